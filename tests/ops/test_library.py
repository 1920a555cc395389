"""The ops under torch.library's own checks, torch.compile and torch.export."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from backends import FUSED, fused_backends
from cases import case_named, make_inputs
from oracle import leaves, op_inputs
from torch.autograd import forward_ad

from ntk_kernels import PrefixState, ntk_attention, ntk_attention_decode, ntk_attention_varlen
from ntk_kernels.inputs import NUM_DIFFERENTIABLE, Inputs, StateTensors, schema

attention = torch.ops.ntk_kernels.attention.default
attention_backward = torch.ops.ntk_kernels.attention_backward.default
OPCHECKED = [
    "plain",
    "elu",
    "all_parts",
    "index_none",
    "mask_bool",
    "value_narrower",
    "bf16",
    "blhd",
    "no_keys",
    "key_range",
    "low_rank_taylor2",
]
COMPILED = [
    "elu",
    "all_parts",
    "index_none",
    "mask_padding_causal",
    "window_causal",
    "bf16",
    "blhd_cache",
    "low_rank_taylor2",
]


def op_arguments(case, *, requires_grad, backend="torch"):
    query, key, value, state, options = make_inputs(case)
    if requires_grad:
        inputs, state = leaves(query, key, value, state)
        query, key, value = inputs["query"], inputs["key"], inputs["value"]
    return op_inputs(query, key, value, state, options, backend)


def one_group(name):
    """Returns a case with the heads of one group only, as these checks depend on the number of heads in nothing but
    time."""
    case = case_named(name)
    return replace(case, heads=case.heads // case.kv_heads, kv_heads=1)


@fused_backends
@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck_forward(name, backend):
    torch.library.opcheck(attention, op_arguments(one_group(name), requires_grad=True, backend=backend).flat())


def test_opcheck_packed_sequences():
    args = op_arguments(case_named("no_batch"), requires_grad=False)._asdict()
    query, key, value = torch.randn(3, 1, 2, 12, 8)
    packed = dict(query=query, key=key, value=value, cu_seqlens_q=torch.tensor([0, 5, 12]), max_seqlen_q=7,
                  cu_seqlens_k=torch.tensor([0, 4, 12]), max_seqlen_k=8)  # fmt: skip
    for backend in FUSED:
        inputs = Inputs(**args | packed | {"state": StateTensors(), "feature_map": None, "backend": backend})
        torch.library.opcheck(attention, inputs.flat())


def test_the_schema_and_the_inputs_have_the_same_order():
    names = (*Inputs._fields[:3], *StateTensors._fields, *Inputs._fields[4:])
    assert tuple(argument.name for argument in attention._schema.arguments) == names
    flat = tuple(range(len(names)))
    inputs = Inputs.of(*flat)
    assert inputs.flat() == flat
    assert all(getattr(inputs.state, name) == names.index(name) for name in StateTensors._fields)
    assert schema(Inputs).startswith("Tensor query, Tensor key, Tensor value, Tensor? z, ")


@fused_backends
@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck_backward(name, backend):
    args = op_arguments(one_group(name), requires_grad=False, backend=backend).flat()
    out, lse = attention(*args)
    for needs in (
        [tensor is not None for tensor in args[:NUM_DIFFERENTIABLE]],
        [True] + [False] * (NUM_DIFFERENTIABLE - 1),
    ):
        torch.library.opcheck(
            attention_backward, (torch.randn_like(out), torch.randn_like(lse), *args, out, lse, needs),
            # There is no second derivative; the next test checks the error.
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


def test_an_op_called_for_what_its_backend_lacks_raises():
    args = op_arguments(case_named("elu"), requires_grad=False)
    out, lse = attention(*args.flat())
    args = args._replace(softcap=1.0).flat()
    for call in (
        lambda: attention(*args),
        lambda: attention_backward(out, None, *args, out, lse, [True] + [False] * (NUM_DIFFERENTIABLE - 1)),
    ):
        with pytest.raises(NotImplementedError, match="does not support softcap"):
            call()


@fused_backends
def test_double_backward_is_refused(backend):
    query = torch.randn(1, 2, 8, 4, requires_grad=True)
    out = ntk_attention(query, query, query, is_causal=True, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.autograd.grad(grad.sum(), query)
    out = ntk_attention(query, query, query, is_causal=True, backend="reference")
    (grad,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), query)[0].isfinite().all()


@fused_backends
@pytest.mark.parametrize("name", COMPILED)
def test_compile_without_graph_breaks(name, backend):
    case = case_named(name)
    query, key, value, state, options = make_inputs(case)

    def loss(query, key, value, state):
        return ntk_attention(query * 2, key, value, state, **options, backend=backend).float().square().sum()

    torch._dynamo.reset()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        inputs, fresh = leaves(query, key, value, state)
        value_ = function(inputs["query"], inputs["key"], inputs["value"], fresh)
        results.append([value_, *torch.autograd.grad(value_, list(inputs.values()))])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=0)


@fused_backends
def test_compile_dynamic_compiles_once(backend):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    state = PrefixState(torch.rand(2, 8, 8), torch.rand(2, 8), "elu")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def attend(query, key, value, state):
        return ntk_attention(query, key, value, state, is_causal=True, backend=backend)

    for batch, length in ((3, 9), (4, 17), (5, 40)):  # no size equal to another: such a pair is one symbol
        query, key, value = (torch.randn(batch, 2, length, 8) for _ in range(3))
        torch.testing.assert_close(
            attend(query, key, value, state),
            ntk_attention(query, key, value, state, is_causal=True, backend=backend),
            rtol=0,
            atol=0,
        )
    assert counter.frame_count == 1


@fused_backends
def test_compile_dynamic_takes_a_state_of_fixed_size(backend):
    torch._dynamo.reset()
    state = PrefixState(torch.rand(2, 8, 8), torch.rand(2, 8), "elu")

    def attend(query, key, value):
        return ntk_attention(query, key, value, state, is_causal=True, backend=backend)

    call = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*call), attend(*call), rtol=0, atol=0)


def test_compile_inductor_forward_and_backward():
    query, key, value = torch.randn(3, 2, 2, 24, 8)
    state = PrefixState(torch.rand(2, 9, 8), torch.rand(2, 9), "taylor1")

    def loss(*tensors):
        *qkv, z, k = tensors
        return ntk_attention(*qkv, PrefixState(z, k, "taylor1"), is_causal=True).sin().sum()

    tensors = [tensor.requires_grad_() for tensor in (query, key, value, state.z, state.k)]
    eager = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*tensors), tensors)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(b, a)


def test_export():
    class Attend(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.z, self.k = torch.nn.Parameter(torch.rand(2, 8, 8)), torch.nn.Parameter(torch.rand(2, 8))

        def forward(self, query, key, value):
            return ntk_attention(query, key, value, PrefixState(self.z, self.k, "elu"), is_causal=True)

    module = Attend()
    length = torch.export.Dim("length", min=2, max=4096)
    shapes = {name: {2: length} for name in ("query", "key", "value")}
    program = torch.export.export(module, tuple(torch.randn(3, 2, 2, 12, 8)), dynamic_shapes=shapes)
    query, key, value = torch.randn(3, 2, 2, 31, 8)
    torch.testing.assert_close(program.module()(query, key, value), module(query, key, value), rtol=0, atol=0)


def test_export_with_a_state_as_input():
    class Attend(torch.nn.Module):
        def forward(self, query, key, value, state):
            return ntk_attention(query, key, value, state)

    query, key, value = torch.randn(3, 2, 2, 12, 8)
    state = PrefixState(torch.rand(2, 8, 8), torch.rand(2, 8), "elu", log_scale=torch.rand(2))
    program = torch.export.export(Attend(), (query, key, value, state))
    expected = ntk_attention(query, key, value, state)
    torch.testing.assert_close(program.module()(query, key, value, state), expected, rtol=0, atol=0)


def test_exported_program_with_a_state_survives_a_file(tmp_path):
    class Attend(torch.nn.Module):
        def forward(self, query, key, value, state):
            return ntk_attention(query, key, value, state)

    query, key, value = torch.randn(3, 2, 2, 12, 8)
    z, k, mu = torch.rand(2, 1, 9, 8), torch.rand(2, 1, 9), torch.randn(2, 1, 8)
    state = PrefixState(z, k, "taylor1", centers=mu, log_scale=torch.rand(2, 1), feature_scale=0.5)
    program = torch.export.export(Attend(), (query, key, value, state))
    program.example_inputs = None  # a file of them needs torch.serialization.add_safe_globals([PrefixState])
    torch.export.save(program, tmp_path / "attend.pt2")
    out = torch.export.load(tmp_path / "attend.pt2").module()(query, key, value, state)
    assert torch.equal(out, ntk_attention(query, key, value, state))


@fused_backends
def test_checkpoint_recomputes_the_same(backend):
    query, key, value = (tensor.requires_grad_() for tensor in torch.randn(3, 2, 2, 24, 8).unbind())
    state = PrefixState(torch.rand(2, 8, 8), torch.rand(2, 8), "elu")

    def loss(query, key, value):
        return ntk_attention(query, key, value, state, is_causal=True, backend=backend).square().sum()

    direct = torch.autograd.grad(loss(query, key, value), (query, key, value))
    stored = torch.utils.checkpoint.checkpoint(loss, query, key, value, use_reentrant=False)
    for a, b in zip(direct, torch.autograd.grad(stored, (query, key, value)), strict=True):
        assert torch.equal(a, b)


@fused_backends
def test_func_grad(backend):
    query, key, value = torch.randn(3, 2, 2, 24, 8)
    state = PrefixState(torch.rand(2, 8, 8), torch.rand(2, 8), "elu")

    def loss(query, z):
        prefix = PrefixState(z, state.k, "elu")
        return ntk_attention(query, key, value, prefix, is_causal=True, backend=backend).square().sum()

    grads = torch.func.grad(loss, argnums=(0, 1))(query, state.z)
    leaves_ = query.clone().requires_grad_(), state.z.clone().requires_grad_()
    for a, b in zip(grads, torch.autograd.grad(loss(*leaves_), leaves_), strict=True):
        assert torch.equal(a, b)


def test_per_sample_gradients():
    query, key, value = torch.randn(3, 4, 1, 2, 8, 8)
    z, k = torch.rand(2, 8, 8), torch.rand(2, 8)

    def loss(z, *tensors):
        return ntk_attention(*tensors, PrefixState(z, k, "elu"), is_causal=True).square().sum()

    batched = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(z, query, key, value)
    for i in range(4):
        expected = torch.func.grad(loss)(z, query[i], key[i], value[i])
        torch.testing.assert_close(batched[i], expected, rtol=0, atol=0)


def test_vmap():
    query, key, value = torch.randn(3, 4, 2, 2, 8, 8)
    state = PrefixState(torch.rand(2, 8, 8), torch.rand(2, 8), "elu")

    def attend(query, key, value):
        return ntk_attention(query, key, value, state, is_causal=True)

    expected = torch.stack([attend(*tensors) for tensors in zip(query, key, value, strict=True)])
    torch.testing.assert_close(torch.vmap(attend)(query, key, value), expected, rtol=0, atol=0)


@fused_backends
def test_functionalize(backend):
    """Alone, inside vmap, and under autograd. Elsewhere among transforms PyTorch takes no autograd.Function with it."""
    query, key, value = torch.randn(3, 2, 2, 2, 8, 8)
    z = torch.rand(2, 8, 8, requires_grad=True)

    def attend(query, key, value):
        out = ntk_attention(query, key, value, PrefixState(z, z[..., 0], "elu"), is_causal=True, backend=backend)
        return out + 1

    def decode(query, key, value):
        return ntk_attention_decode(query[..., :1, :], key, value, backend=backend)

    functionalize, vmap = torch.func.functionalize, torch.vmap
    for function in (attend, decode):
        expected = vmap(function)(query, key, value)
        torch.testing.assert_close(vmap(functionalize(function))(query, key, value), expected, rtol=0, atol=0)
        alone = functionalize(function)(query[0], key[0], value[0])
        torch.testing.assert_close(alone, expected[0], rtol=0, atol=0)
    grads = [torch.autograd.grad(f(query[0], key[0], value[0]).sum(), z) for f in (attend, functionalize(attend))]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
def test_meta_tensors(backend):
    """Results and gradients have shapes, strides and dtypes of real ones, without a warning."""

    def results(device):
        query, key, value = torch.randn(3, 2, 4, 9, 8, device=device).bfloat16().unbind()
        tensors = {name: torch.rand(4, *shape, device=device) for name, shape in
                   {"z_a": (8, 3), "z_b": (3, 8), "k": (8,), "keys": (2, 8), "values": (2, 8)}.items()}  # fmt: skip
        leaves_ = [tensor.requires_grad_() for tensor in (query, key, value, *tensors.values())]
        state = PrefixState(**tensors, feature_map="elu")
        out, lse = ntk_attention(query, key, value, state, is_causal=True, return_lse=True, backend=backend)
        decoded = ntk_attention_decode(query[:, :, :1].detach(), key, value, None, state.detach(), backend=backend)
        return [out, lse, decoded, *torch.autograd.grad([out.sum(), lse.sum()], leaves_)]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ours, real in zip(results("meta"), results("cpu"), strict=True):
            assert ours.device.type == "meta"
            assert (ours.shape, ours.stride(), ours.dtype) == (real.shape, real.stride(), real.dtype)


def test_meta_tensors_of_packed_sequences_and_pages():
    query = torch.randn(9, 2, 8, device="meta", requires_grad=True)
    bounds = torch.tensor([0, 4, 9], device="meta")
    out, lse = ntk_attention_varlen(query, query, query, bounds, bounds, 5, 5, softcap=1.0, return_lse=True)
    assert (out.shape, lse.shape) == ((9, 2, 8), (2, 9))
    assert torch.autograd.grad(out.sum(), query)[0].shape == query.shape
    pages, table = torch.randn(6, 2, 16, 8, device="meta"), torch.zeros(3, 2, dtype=torch.int64, device="meta")
    out = ntk_attention_decode(torch.randn(3, 2, 1, 8, device="meta"), pages, pages, table[:, 0], block_table=table)
    assert out.shape == (3, 2, 1, 8)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # raised inside PyTorch
@fused_backends
@pytest.mark.parametrize("needs_grad", [False, True], ids=["no grad", "grad"])
def test_forward_mode_is_refused(needs_grad, backend):
    """Without an error the tangents would be lost: a derivative of 0."""
    query, key, value, tangent = torch.randn(4, 1, 2, 8, 4)
    query.requires_grad_(needs_grad)
    state = PrefixState(torch.rand(2, 4, 4), torch.rand(2, 4), "elu")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, tangent)
        with pytest.raises(NotImplementedError, match="no forward-mode derivatives .* backend='reference'"):
            ntk_attention(dual, key, value, state, backend=backend)
        with pytest.raises(NotImplementedError, match="backend='reference'"):
            ntk_attention_decode(dual[:, :, :1], key, value, backend=backend)
        ntk_attention(query, key, value, state, backend=backend)  # no tangents, nothing to refuse
        result = forward_ad.unpack_dual(ntk_attention(dual, key, value, state, backend="reference"))
    assert result.tangent.abs().sum() > 0
    with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        torch.func.jvp(lambda x: ntk_attention(x, key, value, state, backend=backend), (query,), (tangent,))


@fused_backends
def test_autocast_casts_the_model_and_not_the_state(backend):
    query, key, value = torch.randn(3, 1, 2, 16, 8)
    state = PrefixState(torch.rand(2, 8, 8).requires_grad_(), torch.rand(2, 8), "elu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ntk_attention(query, key, value, state, backend=backend)
        mixed = ntk_attention(query, key, value.bfloat16(), state, backend=backend)  # a rotation leaves them so
    expected = ntk_attention(*(tensor.bfloat16() for tensor in (query, key, value)), state, backend=backend)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected) and torch.equal(mixed, expected)
    assert torch.autograd.grad(out.float().sum(), state.z)[0].dtype == torch.float32


def test_autocast_leaves_float64_alone_and_the_backward_too():
    query, key, value = torch.randn(3, 1, 2, 16, 8)
    state = PrefixState(torch.rand(2, 8, 8).requires_grad_(), torch.rand(2, 8), "elu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ntk_attention(query.double(), key.double(), value.double(), state).dtype == torch.float64
        out = ntk_attention(query, key, value, state)
        (inside,) = torch.autograd.grad(out.float().square().sum(), state.z, retain_graph=True)
    (outside,) = torch.autograd.grad(out.float().square().sum(), state.z)
    assert torch.equal(inside, outside)


def test_backward_flops_are_those_of_sdpa():
    from torch.utils.flop_counter import FlopCounterMode

    query, key = torch.randn(2, 2, 4, 32, 16).unbind()
    value = torch.randn(2, 4, 32, 8)
    counts = []
    for attend in (ntk_attention, torch.nn.functional.scaled_dot_product_attention):
        leaves_ = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        backend = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with FlopCounterMode(display=False) as counter, backend:
            torch.autograd.grad(attend(*leaves_).sum(), leaves_)
        counts.append(counter.get_total_flops())
    recomputed_scores = 2 * 2 * 4 * 32 * 32 * 16
    assert counts[0] == counts[1] + recomputed_scores


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    query, key, value = torch.randn(3, 2, 4, 32, 16)
    state = PrefixState(torch.rand(4, 16, 16), torch.rand(4, 16), "elu")
    with FlopCounterMode(display=False) as counter:
        ntk_attention(query, key, value, state)
    assert counter.get_total_flops() == 2 * 4 * 32 * 2 * (2 * 32 * 16 + 16 * (16 + 1))
