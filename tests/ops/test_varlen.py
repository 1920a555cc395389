"""Packed sequences: each gives the same as alone."""

import pytest
import torch
from backends import all_backends, fused_backends
from cases import F64, make_state
from oracle import assert_as_accurate, run, runs_in_float32

from ntk_kernels import ntk_attention, ntk_attention_varlen, reference

LENGTHS_Q, LENGTHS_K = (37, 0, 5, 70, 9), (37, 12, 40, 33, 0)
ALL_PARTS = {"feature_map": "taylor1", "centers": 2, "rows": 3, "log_scale": True, "rank": 2}
CALLS = {
    "plain": (None, {}),
    "plain_causal": (None, {"is_causal": True}),
    "elu": ({}, {"is_causal": True}),
    "taylor2": ({"feature_map": "taylor2", "rank": 2}, {"is_causal": True}),
    "all_parts": (ALL_PARTS, {"is_causal": True}),
    "window": ({}, {"window": (9, 4)}),
    "index": (ALL_PARTS | {"stack": 3}, {"is_causal": True, "state_index": torch.tensor([2, 0, -1, 2, 1])}),
    "scale": ({}, {"scale": 0.7}),
    "softcap": ({"rows": 2}, {"is_causal": True, "softcap": 1.5}),
}


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def make_call(name, dtype=torch.float32, spare=0, seed=0):
    """Returns query, key, value, state and options; `spare` rows belong to no sequence."""
    generator = torch.Generator().manual_seed(seed)
    recipe, options = CALLS[name]
    query = torch.randn(sum(LENGTHS_Q) + spare, 4, 16, generator=generator, dtype=F64).to(dtype)
    key, value = torch.randn(2, sum(LENGTHS_K) + spare, 2, 16, generator=generator, dtype=F64).to(dtype)
    if recipe is not None and recipe.get("feature_map") == "taylor2":
        recipe = recipe | {"dtype": dtype}  # the kernels round a Z of this map to the dtype of the query
    state = None if recipe is None else make_state(generator, heads=2, head_dim=16, value_dim=16, **recipe)
    return query, key, value, state, options


def varlen(backend, index_dtype=torch.int32):
    lengths = {"cu_seqlens_q": bounds(LENGTHS_Q).to(index_dtype), "cu_seqlens_k": bounds(LENGTHS_K).to(index_dtype)}

    def attention(*args, **kwargs):
        longest = {} if backend == "reference" else {"max_seqlen_q": max(LENGTHS_Q), "max_seqlen_k": max(LENGTHS_K)}
        function = reference.ntk_attention_varlen if backend == "reference" else ntk_attention_varlen
        how = {} if backend == "reference" else {"backend": backend}
        query, key, value, state = args
        return function(query, key, value, **lengths, state=state, **longest, **kwargs, **how)

    return attention


@fused_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", CALLS)
def test_forward_and_backward(name, dtype, backend):
    if name == "softcap" and backend == "torch":
        pytest.skip("goes to the reference")
    call = make_call(name, dtype)
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(call[0].shape, generator=generator, dtype=F64).to(dtype)
    grads = {"grad_out": grad_out, "grad_lse": torch.randn(4, sum(LENGTHS_Q), generator=generator).to(dtype)}
    ours = run(varlen(backend), *call, **grads)
    eager = runs_in_float32(varlen("reference"), *call, **grads)
    exact = run(varlen("reference"), *call, **grads, dtype=F64)
    for result in ours:
        assert_as_accurate(result, ours[result], eager[result], exact[result], dtype, lse_size=10)


@all_backends
@pytest.mark.parametrize("spare", [0, 2])
def test_no_sequence_at_all_has_a_gradient(spare, backend):
    """Rows that belong to no sequence, even if there are no others, are part of the graph."""
    query = torch.randn(spare, 4, 16, requires_grad=True)
    key = torch.randn(spare, 2, 16, requires_grad=True)
    nothing = torch.zeros(1, dtype=torch.int32)
    out, lse = ntk_attention_varlen(query, key, key, nothing, nothing, 0, 0, return_lse=True, backend=backend)
    assert (out.shape, lse.shape) == ((spare, 4, 16), (4, spare))
    assert (out == 0).all() and (lse == -torch.inf).all()
    for grad, tensor in zip(torch.autograd.grad(out.sum(), (query, key)), (query, key), strict=True):
        assert torch.equal(grad, torch.zeros_like(tensor))


@fused_backends
def test_each_sequence_is_as_if_alone(backend):
    query, key, value, state, options = make_call("index")
    out, lse = varlen(backend)(query, key, value, state, **options, return_lse=True)
    starts_q, starts_k = bounds(LENGTHS_Q).tolist(), bounds(LENGTHS_K).tolist()
    for b in range(len(LENGTHS_Q)):
        rows, keys = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        alone, alone_lse = ntk_attention(
            *(tensor.transpose(0, 1)[None] for tensor in (query[rows], key[keys], value[keys])), state, is_causal=True,
            state_index=options["state_index"][b : b + 1], return_lse=True, backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(out[rows], alone[0].transpose(0, 1), rtol=0, atol=0)
        torch.testing.assert_close(lse[:, rows], alone_lse[0], rtol=0, atol=0)


@all_backends
@pytest.mark.parametrize("layout", ["dense", "last stride not 1"])
def test_rows_of_no_sequence_are_zero(layout, backend):
    """They are 0 forward and backward, whatever they hold."""
    query, key, value, state, options = make_call("elu", spare=7)
    if layout != "dense":
        query = query.permute(0, 2, 1).contiguous().permute(0, 2, 1)
    key[-7:], value[-7:] = float("nan"), float("nan")
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    torch.empty(query.numel()).fill_(float("nan"))  # freed at once, so that an uninitialised result would show it
    out, lse = varlen(backend)(*leaves, state, **options, return_lse=True)
    assert out.isfinite().all() and (out[-7:] == 0).all() and (lse[:, -7:] == -torch.inf).all()
    torch.empty(query.numel()).fill_(float("nan"))
    for grad in torch.autograd.grad(out.square().sum(), leaves):
        assert grad.isfinite().all() and (grad[-7:] == 0).all()


@all_backends
def test_no_sequence_at_all(backend):
    empty = torch.zeros(1, dtype=torch.int32)
    query, key, value = torch.randn(3, 4, 2, 8)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = (tensor.to(dtype) for tensor in (query, key, value))
        out, lse = ntk_attention_varlen(*tensors, empty, empty, 0, 0, return_lse=True, backend=backend)
        assert (out.shape, out.dtype, lse.dtype) == (query.shape, dtype, torch.float32)
        assert (out == 0).all() and (lse == -torch.inf).all()


def test_compile():
    query, key, value, state, options = make_call("elu")
    compiled = torch.compile(varlen("torch"), fullgraph=True, backend="aot_eager")
    expected = varlen("torch")(query, key, value, state, **options)
    torch.testing.assert_close(compiled(query, key, value, state, **options), expected, rtol=0, atol=0)


@all_backends
def test_lengths_of_any_strides(backend):
    query, key, value = torch.randn(3, 9, 2, 8)
    far = torch.tensor([[0, 99], [4, 99], [9, 99]])[:, 0]
    out = ntk_attention_varlen(query, key, value, far, far, 5, 5, backend=backend)
    near = far.contiguous()
    assert torch.equal(out, ntk_attention_varlen(query, key, value, near, near, 5, 5, backend=backend))


BAD = {
    "cu_seqlens_q": (
        {"cu_seqlens_q": torch.tensor([0.0, 4.0])},
        TypeError,
        "`cu_seqlens_q` must be int32 or int64, got torch.float32",
    ),
    "start": (
        {"cu_seqlens_q": torch.tensor([1, 4])},
        ValueError,
        "`cu_seqlens_q` must rise from 0 to at most 4, the number of packed rows, got [1, 4]",
    ),
    "falling": (
        {"cu_seqlens_k": torch.tensor([0, -1])},
        ValueError,
        "`cu_seqlens_k` must rise from 0 to at most 4, the number of packed rows, got [0, -1]",
    ),
    "beyond": (
        {"cu_seqlens_k": torch.tensor([0, 5])},
        ValueError,
        "`cu_seqlens_k` must rise from 0 to at most 4, the number of packed rows, got [0, 5]",
    ),
    "longest": ({"max_seqlen_q": 3}, ValueError, "`max_seqlen_q` must be at least the longest sequence, 4, got 3"),
    "unequal": (
        {"cu_seqlens_k": torch.tensor([0, 2, 4])},
        ValueError,
        "`cu_seqlens_k` must have shape [B+1=2], got [3]",
    ),
    "none": (
        {"cu_seqlens_q": torch.zeros(0, dtype=torch.int32)},
        ValueError,
        "`cu_seqlens_q` must have shape [B+1], at least [1], got [0]",
    ),
    "query": (
        {"query": torch.randn(1, 4, 2, 8)},
        ValueError,
        "`query` must have shape [total_q, Hq, D], got [1, 4, 2, 8]",
    ),
}


@all_backends
@pytest.mark.parametrize("changes, error, message", BAD.values(), ids=BAD)
def test_bad_arguments(changes, error, message, backend):
    query, key, value = torch.randn(3, 4, 2, 8)
    cu = torch.tensor([0, 4])
    arguments = dict(
        query=query, key=key, value=value, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=4, max_seqlen_k=4
    )
    with pytest.raises(error) as caught:
        ntk_attention_varlen(**arguments | changes, backend=backend)
    assert str(caught.value) == message
