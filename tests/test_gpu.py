"""The option tables on a GPU."""

import pytest
import torch
from cases import CASES, make_inputs, served_by
from oracle import check_case, run
from test_decode import CALLS, check, decode_by, in_pages, make_call, served

from ntk_kernels import ntk_attention, ntk_attention_decode

pytestmark = pytest.mark.gpu
BACKENDS = ["torch", "triton"]


@pytest.mark.parametrize(
    "backend, case",
    [
        pytest.param(backend, case, id=f"{backend}-{case.id}")
        for backend in BACKENDS
        for case in served_by(backend)
        if case.dtype != torch.float64
    ],
)
def test_forward_and_backward(backend, case):
    check_case(make_inputs(case), case.dtype, backend=backend, backward=True, device="cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [case for case in CASES if case.id in ("elu", "all_parts", "bf16")],
                         ids=lambda case: case.id)  # fmt: skip
def test_backward_through_lse(case, backend):
    check_case(make_inputs(case), case.dtype, backend=backend, backward=True, grad_lse=True, device="cuda")


@pytest.mark.parametrize("case", [case for case in served_by("triton") if case.dtype != torch.float64],
                         ids=lambda case: case.id)  # fmt: skip
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
    check(name, make_call(name), ours, query.dtype)
    again = run(decode_by("triton", num_splits=splits), *call, device="cuda")
    for result in ours:
        assert torch.equal(ours[result], again[result]), result


@pytest.mark.parametrize("name", [name for name in DECODED if served(name, "torch")])
def test_decode_by_pytorch(name):
    check(name, make_call(name), run(decode_by("torch"), *make_call(name), device="cuda"), make_call(name)[0].dtype)


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
