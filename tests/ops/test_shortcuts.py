"""Calls of a known kind skip checks and dispatcher, but not where something watches them or is not as it was."""

import threading

import pytest
import torch
from backends import fused_backends
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from ntk_kernels import PrefixState, library, ntk_attention, ntk_attention_decode, replay

# Raised inside PyTorch.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@pytest.fixture
def op_calls(monkeypatch):
    """Names of the ops that are called, by the long way."""
    names, original = [], library._Op.__call__
    monkeypatch.setattr(
        library._Op, "__call__", lambda self, *args: (names.append(self.name), original(self, *args))[1]
    )
    return names


@pytest.fixture
def call():
    """A call that is known, as a function of changes to it."""
    arguments = {"query": torch.randn(2, 4, 16, 8), "key": torch.randn(2, 2, 16, 8), "value": torch.randn(2, 2, 16, 8)}
    arguments |= {"state": PrefixState(torch.rand(2, 8, 8), torch.rand(2, 8), "elu"), "is_causal": True, "scale": 1.0}

    def attend(**changes):
        return ntk_attention(**arguments | {"backend": "torch"} | changes)

    attend.arguments = arguments
    for _ in range(3):
        attend()
    return attend


def exact(call, **changes):
    return ntk_attention(**call.arguments | changes | {"backend": "reference"})


def test_a_known_call_does_not_go_through_the_op(call, op_calls):
    assert call().shape == call(return_lse=True)[0].shape and not op_calls


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"is_causal": 1}, TypeError, "`is_causal` must be a bool, got int"),
        ({"scale": True}, TypeError, "`scale` must be a float, got bool"),
        ({"return_lse": 0}, TypeError, "`return_lse` must be a bool, got int"),
        ({"window": (True, 0)}, TypeError, r"`window\[0\]` must be an int, got bool"),
        ({"softcap": -1.0}, ValueError, "`softcap` must be positive"),
        ({"scale": float("nan")}, ValueError, "`scale` must be finite, got nan"),
        ({"window": (1, [])}, TypeError, r"`window\[1\]` must be an int, got list"),
        ({"backend": []}, ValueError, "`backend` must be one of"),
        ({"query": torch.randn(2, 4, 16, 9)}, ValueError, "`key` must have shape"),
        ({"key": torch.randn(2, 2, 16, 8, device="meta")}, ValueError, "`key` must be on the device of `query`, cpu"),
        (
            {"value": torch.randn(2, 2, 16, 8).to_sparse()},
            TypeError,
            "`value` must be a dense tensor, got torch.sparse_coo",
        ),
        ({"value": [1]}, TypeError, "`value` must be a torch.Tensor, got list"),
        ({"state": 3}, TypeError, "`state` must be a PrefixState, got int"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_is_refused_is_refused_after_an_equal_call(changes, error, message, call):
    """True == 1 == 1.0, and a window (1, 0) is known."""
    call(window=(1, 0))
    with pytest.raises(error, match=message):
        call(**changes)


def test_a_state_that_changes(call):
    state = call.arguments["state"]
    for change in (
        lambda: state.z.mul_(2),
        lambda: state.z.data.copy_(torch.rand(2, 8, 8)),
        lambda: setattr(state.k, "data", torch.rand(2, 8) + 1),
        lambda: setattr(state.z, "data", torch.rand(2, 16, 8)[:, ::2]),
    ):
        change()
        torch.testing.assert_close(call(), exact(call))


def test_gradients_that_are_wanted_later(call):
    state = call.arguments["state"]
    state.z.requires_grad_()
    for _ in range(3):
        (ours,) = torch.autograd.grad(call().square().sum(), [state.z])
        (expected,) = torch.autograd.grad(exact(call).square().sum(), [state.z])
        torch.testing.assert_close(ours, expected)
    with torch.no_grad():
        assert not call().requires_grad


def test_a_change_between_forward_and_backward_is_refused(call):
    state = call.arguments["state"]
    state.z.requires_grad_()
    out = call()
    state.k.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_mask_that_wants_a_gradient_later(call):
    mask = torch.zeros(16, 16)
    for _ in range(3):
        call(attn_mask=mask)
    mask.requires_grad_()
    with pytest.raises(NotImplementedError, match="does not support a gradient for `attn_mask`"):
        call(attn_mask=mask)
    with torch.no_grad():
        assert not call(attn_mask=mask).requires_grad


def test_gradients_of_several_outputs_at_once(call):
    query = call.arguments["query"].requires_grad_()
    for _ in range(3):
        out = call()
        directions = torch.randn(3, *out.shape)
        (batched,) = torch.autograd.grad(out, [query], directions, is_grads_batched=True, retain_graph=True)
        for direction, expected in zip(directions, batched, strict=True):
            torch.testing.assert_close(torch.autograd.grad(out, [query], direction, retain_graph=True)[0], expected)


def test_second_derivatives_are_refused(call):
    query = call.arguments["query"].requires_grad_()
    for _ in range(3):
        (grad,) = torch.autograd.grad(call().square().sum(), [query], create_graph=True)
        with pytest.raises(NotImplementedError, match="differentiable once"):
            grad.sum().backward()


@fused_backends
@pytest.mark.parametrize("parts", [("out",), ("lse",), ("out", "lse")], ids="-".join)
def test_gradients_through_out_and_lse(parts, backend, call):
    query = call.arguments["query"].requires_grad_()
    for _ in range(4):  # the gradient of a sum has strides of 0

        def gradient(of):
            results = dict(zip(("out", "lse"), of, strict=True))
            return torch.autograd.grad(sum(results[part].sum() for part in parts), [query])[0]

        torch.testing.assert_close(
            gradient(call(return_lse=True, backend=backend)), gradient(exact(call, return_lse=True))
        )


def test_tensors_that_are_the_same_and_then_are_not():
    """A recording of one tensor in three places must not take it for the others."""
    same = torch.randn(1, 2, 16, 8)
    for _ in range(3):
        ntk_attention(same, same, same, backend="torch")
    query, key, value = torch.randn(3, 1, 2, 16, 8)
    torch.testing.assert_close(
        ntk_attention(query, key, value, backend="torch"), ntk_attention(query, key, value, backend="reference")
    )


@fused_backends
def test_parts_of_one_tensor(backend):
    """Query, key and value as slices of one projection, with strides of their own."""
    for _ in range(4):
        packed = torch.randn(2, 16, 3, 4, 8)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind()
        torch.testing.assert_close(
            ntk_attention(query, key, value, backend=backend), ntk_attention(query, key, value, backend="reference")
        )


def test_other_strides_and_a_lazy_minus(call):
    query = torch.randn(2, 16, 4, 8).transpose(1, 2)
    minus = torch.randn(2, 4, 16, 8, dtype=torch.complex64).conj().imag
    assert minus.is_neg()
    for other in (query, minus, query):
        torch.testing.assert_close(call(query=other), exact(call, query=other))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_environment_is_asked_each_time(backend, call, monkeypatch):
    served = []
    for name in ("reference", "torch"):
        module = __import__(f"ntk_kernels.backends.{name}", fromlist=["lacks"])
        monkeypatch.setattr(module, "lacks", lambda *args, name=name: served.append(name))
    for _ in range(2):
        call(backend=None)
    assert served == ["torch"]
    monkeypatch.setenv("NTK_KERNELS_BACKEND", backend)
    call(backend=None)
    assert served == ["torch", backend]


def test_autocast(call, op_calls):
    with torch.autocast("cpu", torch.bfloat16):
        assert call().dtype == torch.bfloat16
    assert call().dtype == torch.float32 and op_calls == ["attention"]


def test_inference_mode(call):
    expected = call()
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(call(), expected) and call().is_inference()
        made = torch.randn(2, 4, 16, 8)
        for _ in range(3):
            torch.testing.assert_close(call(query=made), exact(call, query=made))


def test_transforms(call, op_calls):
    query = call.arguments["query"]
    (expected,) = torch.autograd.grad(call(query=query.requires_grad_()).sum(), [query])
    found = torch.func.grad(lambda x: call(query=x).sum())(query.detach())
    torch.testing.assert_close(found, expected)
    mapped = torch.func.vmap(lambda x: call(query=x))(torch.stack([query.detach()] * 2))
    torch.testing.assert_close(mapped[1], call().detach())
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: call(query=x), (query.detach(),), (query.detach(),))
    assert len(op_calls) >= 3


def test_traces(call):
    traced = make_fx(lambda x: call(query=x))(call.arguments["query"])
    assert any("ntk_kernels.attention" in str(node.target) for node in traced.graph.nodes)
    compiled = torch.compile(lambda x: call(query=x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(call.arguments["query"]), call())


def test_counters_and_profilers(call, op_calls):
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() > 0
    with torch.profiler.profile() as profile:
        call()
    assert any(event.key == "ntk_kernels::attention" for event in profile.key_averages())
    assert len(op_calls) == 2


def test_hooks_of_launches(call, monkeypatch):
    """A hook on launches sees each of them, so none is replayed."""
    monkeypatch.setattr(replay.kinds, "watchers", [lambda: True])
    monkeypatch.setattr(replay.program._Writer, "function", None)
    for _ in range(4):
        call(query=torch.randn(1, 2, 16, 8), key=torch.randn(1, 2, 16, 8), value=torch.randn(1, 2, 16, 8))


def test_modes_of_pytorch(call, op_calls):
    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with torch.device("cpu"):
        call()
    assert not op_calls
    with Seen():
        call()
    assert op_calls
    expected = call()
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            assert torch.equal(call(), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_subclasses(call, op_calls):
    class Other(torch.Tensor):
        pass

    query = call.arguments["query"].as_subclass(Other)
    torch.testing.assert_close(call(query=query).as_subclass(torch.Tensor), call())
    assert op_calls
    parameter = torch.nn.Parameter(call.arguments["query"].clone())
    assert torch.equal(call(query=parameter), call())


def test_threads(call):
    """Each of them finds, records and replays kinds that the others do too."""
    queries = [torch.randn(2, 4, 16, 8) for _ in range(8)]
    expected = [exact(call, query=query, scale=0.3) for query in queries]
    replay.forget()
    problems = []

    def work(number):
        for i in range(24):
            which = (number + i) % 8
            try:
                torch.testing.assert_close(call(query=queries[which], scale=0.3), expected[which])
            except Exception as error:
                problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_numbers_are_checked_in_each_call():
    query, key = torch.randn(2, 2, 1, 8), torch.randn(2, 2, 16, 8)
    lengths = torch.tensor([3, 16])
    for _ in range(4):
        ntk_attention_decode(query, key, key, lengths, backend="torch")
    with pytest.raises(ValueError, match="`cache_seqlens` must lie between 0 and 16"):
        ntk_attention_decode(query, key, key, lengths + 1, backend="torch")


def test_kinds_do_not_pile_up(call, monkeypatch):
    monkeypatch.setattr(replay.kinds, "_MAX_KINDS", 4)
    for length in range(16, 28):
        torch.testing.assert_close(
            call(query=torch.ones(2, 4, length, 8)), exact(call, query=torch.ones(2, 4, length, 8))
        )
    assert all(len(known) <= 4 for known in replay.kinds._all_known)


def test_a_recording_keeps_no_tensor_alive(call):
    import gc
    import weakref

    query = torch.randn(2, 4, 16, 8)
    alive = weakref.ref(query)
    for _ in range(3):
        call(query=query, scale=0.7)
    del query
    gc.collect()
    assert alive() is None
