"""The option tables on a GPU."""

import functools

import pytest
import torch
from cases import BF16, CASES, CAUSAL, F32, F64, HALF, TAYLOR2, Case, make_inputs, served_by
from decode_cases import CALLS, check, decode_by, in_pages, make_call, served
from fit_cases import STATES as FITTED
from fit_cases import Sample
from oracle import NAN_STATES, check_case, check_nan, run
from sums_cases import a_prefix, by_op, results
from sums_cases import check as check_sums

from ntk_kernels import (
    FEATURE_MAPS,
    PrefixAccumulator,
    PrefixState,
    library,
    ntk_attention,
    ntk_attention_decode,
    prefix_to_state,
    reference,
    replay,
)
from ntk_kernels.inputs import SumInputs
from ntk_kernels.kernels import add_second_order
from ntk_kernels.kernels.host import configs

pytestmark = pytest.mark.gpu
BACKENDS = ["torch", "triton"]
# The kernels multiply float32 as three products of TensorFloat-32, which keep 22 bits. Gradients of half precision go
# through a rounded `out`, and PyTorch's attention is rounded once more when the prefix is added to it; so is, to 11 bits
# of TensorFloat-32, what a float16 model multiplies with the second half of a low-rank pair.
TOLERANCE = {"float32_bits": 22, "roundings": 2}


def served_on_gpu(backend):
    """Neither takes float64 there, nor the kernels wide heads in float32 or of odd sizes."""

    def takes(case):
        dims = (case.head_dim, case.head_dim if case.value_dim is None else case.value_dim)
        wide = max(dims) > 128 and (case.dtype == F32 or any(dim % 8 for dim in dims))
        return case.dtype != F64 and not (backend == "triton" and wide)

    return [case for case in served_by(backend) if takes(case)]


@pytest.mark.parametrize(
    "backend, case",
    [pytest.param(backend, case, id=f"{backend}-{case.id}") for backend in BACKENDS for case in served_on_gpu(backend)],
)
def test_forward_and_backward(backend, case):
    check_case(make_inputs(case), case.dtype, backend=backend, backward=True, device="cuda", **TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [case for case in CASES if case.id in ("elu", "all_parts", "bf16")],
                         ids=lambda case: case.id)  # fmt: skip
def test_backward_through_lse(case, backend):
    check_case(make_inputs(case), case.dtype, backend=backend, backward=True, grad_lse=True, device="cuda",
               **TOLERANCE)  # fmt: skip


@pytest.mark.parametrize("case", served_on_gpu("triton"), ids=lambda case: case.id)
def test_runs_agree_bit_for_bit(case):
    query, key, value, state, options = make_inputs(case)
    grad_out = torch.randn(*query.shape[:3], value.shape[3]).to(case.dtype)

    def attention(*args, **kwargs):
        return ntk_attention(*args, **kwargs, backend="triton")

    first, second = (
        run(attention, query, key, value, state, options, grad_out=grad_out, device="cuda") for _ in range(2)
    )
    for name in first:
        assert torch.equal(first[name], second[name]), name


DECODED = [name for name in CALLS if CALLS[name][2].get("dtype") != torch.float64]


@pytest.mark.parametrize("page_size", [None, 16, 128])
@pytest.mark.parametrize("splits", [None, 1, 5])
@pytest.mark.parametrize("name", [name for name in DECODED if served(name, "triton")])
def test_decode(name, splits, page_size):
    call = query, key_cache, value_cache, state, options = make_call(name)
    if page_size is not None:
        *caches, table = in_pages(key_cache, value_cache, options["cache_seqlens"], page_size)
        call = query, *caches, state, options | {"block_table": table}
    ours = run(decode_by("triton", num_splits=splits), *call, device="cuda")
    check(name, make_call(name), ours, query.dtype, **TOLERANCE)
    again = run(decode_by("triton", num_splits=splits), *call, device="cuda")
    for result in ours:
        assert torch.equal(ours[result], again[result]), result


@pytest.mark.parametrize("name", [name for name in DECODED if served(name, "torch")])
def test_decode_by_pytorch(name):
    check(name, make_call(name), run(decode_by("torch"), *make_call(name), device="cuda"), make_call(name)[0].dtype,
          **TOLERANCE)  # fmt: skip


@pytest.mark.parametrize("splits", [1, 4])
def test_decode_in_a_cuda_graph(splits):
    """Captured once, replayed with other lengths, pages and states."""
    query, key_cache, value_cache, state, options = make_call("index")
    *caches, table = in_pages(key_cache, value_cache, options["cache_seqlens"], 16)
    query, *caches, table, state = (x.to("cuda") for x in (query, *caches, table, state))
    lengths, index = (options[name].to("cuda") for name in ("cache_seqlens", "state_index"))

    def decode():
        return ntk_attention_decode(query, *caches, lengths, state, block_table=table, state_index=index,
                                    num_splits=splits, backend="triton")  # fmt: skip

    decode()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode()
    for other in ((10, 1, 30, 0), (75, 0, 37, 0), (1, 1, 1, 0)):
        lengths.copy_(torch.tensor(other))
        index.copy_(index.roll(1))
        graph.replay()
        assert torch.equal(out, decode())


MAPS = (None, "elu", "taylor1", "taylor2")
FOR_TILES = [
    Case(f"{name}-d{dim}-{feature_map or 'plain'}", "longer than two tiles of any size", batch=1, seq_q=300, seq_k=333,
         dtype=dtype, head_dim=dim, state=None if feature_map is None else {"feature_map": feature_map}, options=CAUSAL)
    for name, dtype in (("bf16", BF16), ("f16", HALF), ("f32", F32))
    for dim in (64, 128, 256)
    for feature_map in MAPS
    if dtype != F32 or dim < 256
]  # fmt: skip


@pytest.mark.parametrize("case", FOR_TILES, ids=lambda case: case.id)
def test_every_tile_that_the_autotuner_may_take(case, monkeypatch):
    """The defaults first, then the second candidate of each kernel, then the third, and so on."""
    candidates, most = configs.candidates, 1

    def at(position):
        def one(*args):
            nonlocal most
            found = candidates(*args)
            most = max(most, len(found))
            return (found[min(position, len(found) - 1)],)

        return one

    position = 0
    while position < most:
        monkeypatch.setattr(configs, "candidates", at(position))
        check_case(make_inputs(case), case.dtype, backend="triton", backward=True, device="cuda", **TOLERANCE)
        position += 1
    assert most > 1 or case.dtype == F32


@pytest.mark.parametrize("centers", [None, 1])
@pytest.mark.parametrize("feature_map", ["elu", "taylor1"])
@pytest.mark.parametrize("dim", [64, 128])
def test_every_tile_of_the_resident_prefix_pass(dim, feature_map, centers, monkeypatch):
    """Added to PyTorch's attention over the keys: right, and twice the same bits."""
    candidates = configs.candidates
    case = Case("", "", batch=3, seq_q=700, seq_k=700, dtype=BF16, head_dim=dim,
                state={"feature_map": feature_map, "centers": centers, "log_scale": True}, options=CAUSAL)  # fmt: skip
    inputs = make_inputs(case)

    def added(query, key, value, state, **options):
        grad = torch.ones_like(query)
        leaves = [query.requires_grad_(), *(tensor.requires_grad_() for tensor in state.tensors().values())]
        out = ntk_attention(query, key.detach(), value.detach(), state, **options, backend="torch")
        return out, *torch.autograd.grad(out, leaves[1:], grad)

    for position in range(4):
        monkeypatch.setattr(
            configs, "candidates", lambda *args, i=position: (candidates(*args)[min(i, len(candidates(*args)) - 1)],)
        )
        check_case(inputs, BF16, backend="torch", backward=True, device="cuda", **TOLERANCE)
        there = [tensor.to("cuda") for tensor in inputs[:4]]
        for first, second in zip(added(*there, **inputs[4]), added(*there, **inputs[4]), strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "state", [{}, {"centers": 1, "log_scale": True}, {"mass": "none"}], ids=["", "centre", "no mass"]
)
@pytest.mark.parametrize("dim, value_dim", [(64, 64), (128, 128), (40, 72), (128, 64)])
def test_every_tile_of_the_second_order_pass(dim, value_dim, state, backend, monkeypatch):
    """Right, and the same bit for bit in a second run."""
    monkeypatch.setattr(add_second_order, "is_chosen", lambda call, kernel: True)
    case = Case("", "", head_dim=dim, value_dim=value_dim, seq_q=300, seq_k=300, dtype=BF16, options=CAUSAL,
                state=TAYLOR2 | state)  # fmt: skip
    inputs, candidates = make_inputs(case), configs.candidates
    arch = configs.arch_of(torch.device("cuda", 0))
    attention = functools.partial(ntk_attention, backend=backend)
    for tile in candidates("add_second_order", arch, configs.blocks(arch, dim, value_dim), BF16, "taylor2"):
        monkeypatch.setattr(
            configs, "candidates",
            lambda kernel, *args, tile=tile: (tile,) if kernel == "add_second_order" else candidates(kernel, *args),
        )  # fmt: skip
        replay.forget()
        check_case(inputs, BF16, backend=backend, device="cuda", **TOLERANCE)
        first, second = (run(attention, *inputs, device="cuda") for _ in range(2))
        for name, result in first.items():
            assert torch.equal(result, second[name]), (tile, name)


@pytest.mark.parametrize("name", [name for name in DECODED if served(name, "triton")])
def test_every_tile_of_decode(name, monkeypatch):
    candidates = configs.candidates
    call = make_call(name)
    for position in range(4):
        monkeypatch.setattr(
            configs, "candidates", lambda *args, i=position: (candidates(*args)[min(i, len(candidates(*args)) - 1)],)
        )
        check(name, call, run(decode_by("triton", num_splits=3), *call, device="cuda"), call[0].dtype,
              **TOLERANCE)  # fmt: skip


def test_tensors_of_more_elements_than_int32_counts():
    """2.2e9 elements a tensor; the last batch row alone must give the same bits."""
    shape, dim = (270, 32, 4096), 64
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [torch.randn(*shape, dim, device="cuda", dtype=BF16, generator=generator) for _ in range(4)]
    state = PrefixState(torch.randn(32, dim, dim, device="cuda"), torch.rand(32, dim, device="cuda"), "elu")

    def results(query, key, value, grad):
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        out, lse = ntk_attention(*leaves, state, window=(128, 0), return_lse=True, backend="triton")
        return out, lse, *torch.autograd.grad(out, leaves, grad)

    for whole, last in zip(results(*inputs), results(*(tensor[-1:] for tensor in inputs)), strict=True):
        assert torch.equal(whole[-1:], last)
    del whole, last
    rows = [tensor[-1:, -1:].double() for tensor in inputs[:3]]
    one = PrefixState(state.z[-1:].double(), state.k[-1:].double(), "elu")
    expected = reference.ntk_attention(*rows, one, window=(128, 0))
    ours = ntk_attention(*inputs[:3], state, window=(128, 0), backend="triton")[-1:, -1:]
    assert (ours - expected).norm() < 2e-2 * expected.norm()


def test_one_head_of_more_elements_than_int32_counts():
    """The offset of a row, not only of a head, is beyond int32."""
    length, dim = 2**25 + 64, 64
    query, key, value = (torch.randn(1, 1, length, dim, device="cuda", dtype=BF16) for _ in range(3))
    state = PrefixState(torch.randn(1, dim, dim, device="cuda"), torch.rand(1, dim, device="cuda"), "elu")
    out = ntk_attention(query, key, value, state, window=(64, 0), backend="triton")
    end = [tensor[:, :, -512:] for tensor in (query, key, value)]
    expected = reference.ntk_attention(*(t.double() for t in end), state.to(torch.float64), window=(64, 0))[:, :, 128:]
    assert (out[:, :, -384:] - expected).norm() < 2e-2 * expected.norm()


def test_under_torch_compile():
    query, key, value = (torch.randn(2, 4, 130, 64, device="cuda", dtype=BF16, requires_grad=True) for _ in range(3))
    state = PrefixState(torch.randn(4, 64, 64, device="cuda"), torch.rand(4, 64, device="cuda"), "elu")

    def call(query, key, value):
        return ntk_attention(query * 2, key, value, state, is_causal=True, backend="triton") + 1

    results = []
    for function in (call, torch.compile(call, fullgraph=True)):
        out = function(query, key, value)
        results.append((out, *torch.autograd.grad(out.square().sum(), (query, key, value))))
    for eager, compiled in zip(*results, strict=True):
        assert (eager - compiled).norm() < 1e-2 * eager.norm()


SUMS = [(dtype, dim, name) for dtype in (BF16, HALF, F32) for dim in (40, 64, 128, 256) for name in FEATURE_MAPS
        if dtype != F32 or dim < 256]  # fmt: skip


@pytest.mark.parametrize("centers", [None, 1, 5])
@pytest.mark.parametrize("dtype, dim, feature_map", SUMS, ids=lambda x: str(x).removeprefix("torch."))
def test_sums_of_features(dtype, dim, feature_map, centers):
    if feature_map == "taylor2" and centers == 5 and dim > 64:
        pytest.skip("the reference takes too much memory")
    rows = 3000 if feature_map != "taylor2" else 130 if dim > 128 else 500
    prefix = a_prefix(2, rows, dim, dim, centers=centers, weighted=centers != 1, dtype=dtype)
    check_sums(prefix, feature_map, "triton", dim**-0.25, device="cuda", roundings=8, float32_bits=22)


@pytest.mark.parametrize("centers", [None, 5])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_sums_of_features_agree_bit_for_bit(feature_map, centers):
    prefix = a_prefix(4, 5000, 64, 64, centers=centers, weighted=True, dtype=BF16)
    prefix = [None if tensor is None else tensor.to("cuda") for tensor in prefix]
    first, second = (results(by_op, prefix, feature_map, 0.5, "triton") for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_sums_of_features_wait_for_nothing():
    prefix = [None if t is None else t.to("cuda") for t in a_prefix(4, 5000, 64, 64, centers=5, dtype=BF16)]
    results(by_op, prefix, "taylor1", 0.5, "triton")  # compiles
    leaves = [t if t is None else t.requires_grad_() for t in prefix]
    torch.cuda.set_sync_debug_mode("error")
    try:
        z, k, _ = library.sum_features(SumInputs(*leaves, "taylor1", 0.5, "triton"))
        torch.autograd.grad(z.sum() + k.sum(), [t for t in leaves if t is not None])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("centers", [1, 3])
def test_sums_over_more_elements_than_int32_counts(centers):
    """One head of 2.1e9 elements: forward and backward are those of PyTorch's operations."""
    length, dim = 2**25 + 64, 64
    keys, values = (torch.randn(1, length, dim, device="cuda", dtype=BF16) for _ in range(2))
    mu = torch.randn(1, centers, dim, device="cuda")
    ours, expected = (results(by_op, [keys, values, None, mu], "elu", 0.5, backend) for backend in ("triton", "torch"))
    for name in ours:
        if ours[name].shape == keys.shape:  # in the end: offsets beyond int32
            ours[name], expected[name] = (found[name][:, -512:].double() for found in (ours, expected))
        assert (ours[name] - expected[name]).norm() < 1e-2 * expected[name].norm(), name


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])
@pytest.mark.parametrize("seq_k", [0, 21])
@pytest.mark.parametrize("recipe", NAN_STATES.values(), ids=NAN_STATES)
def test_nan_is_not_hidden(recipe, seq_k, dtype, backend):
    check_nan(recipe, seq_k, backend, device="cuda", head_dim=64, dtype=dtype)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_a_key_that_is_no_number_is_refused(feature_map):
    keys, values = torch.randn(2, 3, 500, 64, device="cuda", dtype=BF16).unbind()
    keys[1, 7, 5] = float("nan")
    with pytest.raises(ValueError, match=r"`prefix_key` must be finite, got .* at index \[1, 7\]"):
        prefix_to_state(keys, values, feature_map, centers=None)


@pytest.mark.parametrize(
    "feature_map, centers", [("elu", None), ("taylor1", "mean"), ("taylor2", "mean"), ("taylor1", 8)]
)
def test_conversion(feature_map, centers):
    keys, values = torch.randn(2, 3, 2000, 64).unbind()
    if centers == 8:
        centers = keys[:, :8]
    state = prefix_to_state(keys, values, feature_map, centers=centers)
    centers = centers.to("cuda") if isinstance(centers, torch.Tensor) else centers
    ours = prefix_to_state(keys.to("cuda"), values.to("cuda"), feature_map, centers=centers).to("cpu")
    for name, tensor in state.tensors().items():
        assert (ours.tensors()[name] - tensor).norm() < 1e-4 * tensor.norm(), name


@pytest.mark.parametrize("method", ["closed_form", "least_squares", "gradient"])
@pytest.mark.parametrize("args, options", FITTED.values(), ids=FITTED)
def test_fit(args, options, method):
    """A fit agrees with the CPU's to rounding, and its report is true on the GPU too."""
    if method == "closed_form" and args[0] and "num_rows" in options:
        pytest.skip("no closed form")
    sample = Sample(dtype=F32)
    _, expected = sample.convert(*args, **options, method=method)
    for name in ("prefix_key", "prefix_value", "query", "key", "value"):
        setattr(sample, name, getattr(sample, name).to("cuda"))
    sample.attention = tuple(tensor.to("cuda") for tensor in sample.attention)
    state, report = sample.convert(*args, **options, method=method)
    assert state.device.type == "cuda"
    held_out = sample.errors(state, slice(3, None))
    torch.testing.assert_close(report.error.double(), held_out.double(), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(report.error.cpu(), expected.error, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("feature_map, centers", [("taylor2", "mean"), ("taylor1", "given"), ("elu", None)], ids=str)
def test_accumulator(feature_map, centers):
    keys, values = (torch.randn(2, 500, 64) for _ in range(2))
    centers = keys[:, :4] if centers == "given" else centers
    expected = prefix_to_state(keys, values, feature_map, centers=centers)
    centers = centers.to("cuda") if isinstance(centers, torch.Tensor) else centers
    ours = PrefixAccumulator(2, 64, 64, feature_map, centers=centers, device="cuda")
    for chunk in zip(keys.to("cuda").split(130, 1), values.to("cuda").split(130, 1), strict=True):
        ours.update(*chunk)
    extra = torch.randn(2, 2, 70, 64, device="cuda")
    state = ours.update(*extra).subtract(*extra).state().to("cpu")
    for name, tensor in expected.tensors().items():
        assert (getattr(state, name) - tensor).norm() < 1e-4 * tensor.norm(), name


def test_conversion_under_torch_compile():
    keys, values = (torch.randn(2, 500, 64, device="cuda", requires_grad=True) for _ in range(2))

    def loss(keys, values):
        state = prefix_to_state(keys * 2, values, centers="mean")
        return state.z.square().sum() + state.k.square().sum()

    for eager, compiled in zip(*(torch.autograd.grad(f(keys, values), (keys, values))
                                 for f in (loss, torch.compile(loss, fullgraph=True))), strict=True):  # fmt: skip
        assert (eager - compiled).norm() < 1e-3 * eager.norm()
