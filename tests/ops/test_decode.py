"""Decode: a few queries against a cache give the rows of the whole sequence."""

import math

import pytest
import torch
from backends import FUSED, all_backends, fused_backends, triton_only
from cases import BF16, make_state
from decode_cases import ALL_PARTS, CALLS, LENGTHS, TAYLOR2, check, decode_by, in_pages, make_call, served
from oracle import run

from ntk_kernels import PrefixState, ntk_attention, ntk_attention_decode, reference
from ntk_kernels.backends.torch import cached
from ntk_kernels.inputs import DecodeInputs

SERVED = [(name, backend) for name in CALLS for backend in FUSED if served(name, backend)]


@pytest.mark.parametrize("name, backend", SERVED)
def test_against_the_reference(name, backend):
    call = make_call(name)
    ours = run(decode_by(backend), *call)
    assert ours["out"].dtype == call[0].dtype
    check(name, call, ours, call[0].dtype)


@pytest.mark.parametrize(
    "name, backend", [case for case in SERVED if case[0] in ("elu", "all_parts", "window", "plain")]
)
def test_where_lengths_cannot_be_read(name, backend, monkeypatch):
    """The torch backend goes this way on a GPU, as reading them would wait."""
    monkeypatch.setattr(cached, "_lengths_are_free", lambda query: False)
    query, key_cache, value_cache, state, options = make_call(name)
    for page_size in (None, 16):
        caches, paged = (key_cache, value_cache), {}
        if page_size is not None:
            *caches, table = in_pages(*caches, options["cache_seqlens"], page_size)
            paged = {"block_table": table}
        check(name, make_call(name), run(decode_by(backend), query, *caches, state, options | paged), query.dtype)


@all_backends
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_step_by_step_is_the_whole_sequence(rows, backend):
    """A cache grows by `rows` tokens a step, for two sequences of which one starts later (left padding)."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 48, 16, generator=generator) for heads in (4, 2, 2))
    state = make_state(generator, heads=2, head_dim=16, value_dim=16, **ALL_PARTS)
    options = {"window": (30, 0), "key_start": torch.tensor([0, 11])}
    whole = ntk_attention(query, key, value, state, is_causal=True, **options, backend=backend)
    key_cache, value_cache = torch.full((2, *key.shape), math.nan)
    for start in range(0, 48, rows):
        new = slice(start, start + rows)
        key_cache[:, :, new], value_cache[:, :, new] = key[:, :, new], value[:, :, new]
        lengths = torch.full((2,), start + rows)
        out = ntk_attention_decode(query[:, :, new], key_cache, value_cache, lengths, state, **options, backend=backend)
        torch.testing.assert_close(out, whole[:, :, new], rtol=1e-5, atol=1e-5)


@fused_backends
@pytest.mark.parametrize("page_size", [16, 32, 128])
@pytest.mark.parametrize("name", ["elu", "all_parts", "window", "bf16", "key_start", "value_narrower"])
def test_pages_are_the_same_bit_for_bit(name, page_size, backend):
    query, key_cache, value_cache, state, options = make_call(name)
    contiguous = run(decode_by(backend, num_splits=3), query, key_cache, value_cache, state, options)
    *caches, table = in_pages(key_cache, value_cache, options["cache_seqlens"], page_size)
    as_flash_attention = [pages.transpose(1, 2).contiguous().transpose(1, 2) for pages in caches]  # [P, page, Hkv, D]
    for index_dtype, pages in ((torch.int32, caches), (torch.int64, as_flash_attention)):
        decode = decode_by(backend, num_splits=3, block_table=table.to(index_dtype))
        paged = run(decode, query, *pages, state, options)
        for result in contiguous:
            assert torch.equal(paged[result], contiguous[result]), result


@fused_backends
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    "recipe", [{}, TAYLOR2, ALL_PARTS, {"heads": 8}], ids=["elu", "taylor2", "all_parts", "per_head"]
)
def test_mixed_tasks_are_as_each_alone_bit_for_bit(recipe, splits, backend):
    query, key_cache, value_cache, _, options = make_call("plain")
    state = make_state(torch.Generator().manual_seed(1),
                       **{"heads": 2, "head_dim": 16, "value_dim": 16, "stack": 3} | recipe)  # fmt: skip
    index = torch.tensor([2, -1, 0, 2])
    decode = decode_by(backend, num_splits=splits, return_lse=True)
    out, lse = decode(query, key_cache, value_cache, state, **options, state_index=index)
    for b, n in enumerate(index.tolist()):
        row = slice(b, b + 1)
        alone = None
        if n >= 0:
            tensors = {name: tensor[n] for name, tensor in state.tensors().items()}
            alone = PrefixState(**tensors, feature_map=state.feature_map)
        alone_out, alone_lse = decode(query[row], key_cache[row], value_cache[row], alone,
                                      cache_seqlens=options["cache_seqlens"][row])  # fmt: skip
        tolerance = {"rtol": 0, "atol": 0} if backend == "triton" else {}  # a BLAS sums by the shape of its batch
        torch.testing.assert_close(out[row], alone_out, **tolerance)
        torch.testing.assert_close(lse[row], alone_lse, **tolerance)


@fused_backends
def test_lengths_index_and_table_are_data(backend):
    """The same tensors get other values, as in a replayed CUDA graph."""
    query, key_cache, value_cache, state, options = make_call("index")
    *caches, table = in_pages(key_cache, value_cache, options["cache_seqlens"], 16)
    lengths = options["cache_seqlens"].clone()
    for other in ((10, 1, 30, 0), LENGTHS):
        lengths.copy_(torch.tensor(other))
        paged = ntk_attention_decode(query, *caches, lengths, state, block_table=table,
                                     state_index=options["state_index"], backend=backend)  # fmt: skip
        expected = reference.ntk_attention_decode(query, key_cache, value_cache, lengths, state,
                                                  state_index=options["state_index"])  # fmt: skip
        torch.testing.assert_close(paged, expected)


@all_backends
@pytest.mark.parametrize("batch, rows, size", [(0, 1, 8), (2, 0, 8), (2, 1, 0)])
def test_nothing_at_all(batch, rows, size, backend):
    query, cache = torch.randn(batch, 4, rows, 8), torch.randn(batch, 2, size, 8)
    out, lse = ntk_attention_decode(query, cache, cache, return_lse=True, backend=backend)
    assert out.shape == query.shape and lse.shape == query.shape[:3]
    if size == 0:
        assert (out == 0).all() and (lse == -math.inf).all()
    empty = torch.zeros(batch, dtype=torch.int32)
    state = make_state(torch.Generator(), heads=2, head_dim=8, value_dim=8)
    out = ntk_attention_decode(query, cache, cache, empty, state, backend=backend)
    torch.testing.assert_close(out, ntk_attention(query, cache[:, :, :0], cache[:, :, :0], state, backend=backend))


@fused_backends
@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (4, 1)])
@pytest.mark.parametrize("batch, rows", [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_layouts_with_dimensions_of_one(batch, rows, heads, backend):
    """The inputs are [B, L, H, D] views, in which some dimensions have any stride."""
    num_heads, kv_heads = heads
    query = torch.randn(batch, rows, num_heads, 8).transpose(1, 2)
    cache = torch.randn(batch, 20, kv_heads, 8).transpose(1, 2)
    for heads_of_state in (num_heads, kv_heads):
        state = make_state(torch.Generator().manual_seed(0), heads=heads_of_state, head_dim=8, value_dim=8, stack=2)
        index = torch.arange(batch) % 2
        out = ntk_attention_decode(query, cache, cache, None, state, state_index=index, backend=backend)
        expected = reference.ntk_attention_decode(query, cache, cache, None, state, state_index=index)
        torch.testing.assert_close(out, expected)
        single = PrefixState(state.z[0], state.k[0], "elu")
        out = ntk_attention_decode(query, cache, cache, None, single, backend=backend)
        torch.testing.assert_close(out, reference.ntk_attention_decode(query, cache, cache, None, single))


@fused_backends
def test_default_length_is_the_whole_cache(backend):
    query, cache = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 40, 8)
    out = ntk_attention_decode(query, cache, cache, backend=backend)
    torch.testing.assert_close(out, ntk_attention(query, cache, cache, is_causal=True, backend=backend))


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # numpy in the interpreter
@fused_backends
def test_nan_in_a_query_stays_in_its_row(backend):
    query, key_cache, value_cache, state, options = make_call("elu")
    expected = decode_by(backend)(query, key_cache, value_cache, state, **options)
    query[0, 0, 0] = math.nan
    out = decode_by(backend)(query, key_cache, value_cache, state, **options)
    assert out[0, 0, 0].isnan().all()
    out[0, 0, 0] = expected[0, 0, 0]
    torch.testing.assert_close(out, expected)


@fused_backends
def test_there_is_no_backward(backend):
    query, cache = torch.randn(1, 2, 1, 8, requires_grad=True), torch.randn(1, 2, 20, 8)
    out = ntk_attention_decode(query, cache, cache, backend=backend)
    with pytest.raises(NotImplementedError, match="ntk_attention_decode has no backward"):
        out.sum().backward()
    ntk_attention_decode(query, cache, cache, backend="reference").sum().backward()
    assert query.grad.abs().sum() > 0


def op_arguments(name, backend, page_size=None):
    from ntk_kernels.arguments import state_tensors

    query, key_cache, value_cache, state, options = make_call(name)
    caches, table = (key_cache, value_cache), None
    if page_size:
        *caches, table = in_pages(*caches, options["cache_seqlens"], page_size)
    left, right = options.get("window", (-1, -1))
    return DecodeInputs(
        query, *caches, state_tensors(state, options.get("state_index")),
        options["cache_seqlens"], options.get("key_start"), table, None if state is None else state.feature_map, 0.5,
        0.25, 0.0, left, right, 0, backend,
    )  # fmt: skip


@fused_backends
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("name", ["plain", "all_parts", "index", "low_rank_elu", "value_narrower", "blhd"])
def test_opcheck(name, page_size, backend):
    inputs = op_arguments(name, backend, page_size)
    query = inputs.query.requires_grad_()
    torch.library.opcheck(torch.ops.ntk_kernels.attention_decode.default, inputs._replace(query=query).flat(),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))  # fmt: skip


def test_the_schema_and_the_inputs_have_the_same_order():
    flat = tuple(argument.name for argument in torch.ops.ntk_kernels.attention_decode.default._schema.arguments)
    inputs = DecodeInputs.of(*flat)
    assert inputs.flat() == flat
    assert all(getattr(inputs, name) == name for name in DecodeInputs._fields if name != "state")
    assert all(getattr(inputs.state, name) == name for name in inputs.state._fields)


@fused_backends
@pytest.mark.parametrize("name", ["all_parts", "index", "window"])
def test_compile(name, backend):
    query, key_cache, value_cache, state, options = make_call(name)
    decode = decode_by(backend)
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = decode(query, key_cache, value_cache, state, **options)
        assert torch.equal(compiled(query, key_cache, value_cache, state, **options), expected)


def test_flops():
    from torch.utils.flop_counter import FlopCounterMode

    query, cache = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 40, 8)
    with FlopCounterMode(display=False) as counter:
        ntk_attention_decode(query, cache, cache)
    assert counter.get_total_flops() == 2 * 2 * 4 * 40 * (8 + 8)


@fused_backends
def test_autocast(backend):
    query, cache = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 40, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = ntk_attention_decode(query, cache, cache, backend=backend)
        mixed = ntk_attention_decode(query, cache.bfloat16(), cache.bfloat16(), backend=backend)
    expected = ntk_attention_decode(query.bfloat16(), cache.bfloat16(), cache.bfloat16(), backend=backend)
    assert out.dtype == BF16 and torch.equal(out, expected) and torch.equal(mixed, expected)


@triton_only
@pytest.mark.parametrize("far", ["heads of queries", "rows of pages"])
def test_offsets_beyond_two_to_the_31(far):
    """The tensors take address space only: untouched pages take no memory."""
    query, cache = torch.randn(1, 5, 1, 16).half(), torch.randn(3, 1, 256, 16).half()
    tensors = make_state(
        torch.Generator(), heads=1, head_dim=16, value_dim=16, feature_map="taylor1", mass="none"
    ).tensors()
    options = {
        "cache_seqlens": torch.tensor([600], dtype=torch.int32),
        "block_table": torch.tensor([[2, 0, 1]]),
        "num_splits": 2,
    }
    options |= {"state": PrefixState(**tensors, feature_map="taylor1"), "backend": "triton"}
    expected = ntk_attention_decode(query, cache, cache, **options)
    storage = torch.empty(2**31 + 2**29, dtype=torch.float16)
    if far == "heads of queries":
        query = storage.as_strided(query.shape, (1, 2**29, 16, 1)).copy_(query)
    else:
        cache = storage.as_strided(cache.shape, (16, 16, 2**23 + 2**20, 1)).copy_(cache)
    assert torch.equal(ntk_attention_decode(query, cache, cache, **options), expected)


@pytest.mark.parametrize("options", [{}, {"window": (3, 1)}, {"is_causal": False}], ids=str)
def test_the_torch_backend_where_reading_lengths_would_wait(options, monkeypatch):
    """On GPUs it masks the whole cache, whose rest may hold anything finite."""
    monkeypatch.setattr(cached, "_lengths_are_free", lambda query: False)
    query, cache = torch.randn(4, 4, 3, 8), torch.randn(2, 4, 2, 12, 8)
    lengths, start = torch.tensor([12, 0, 7, 1]), torch.tensor([0, 0, 3, 0])
    calls = [
        ntk_attention_decode(query, *cache, lengths, key_start=start, return_lse=True, backend=backend, **options)
        for backend in ("torch", "reference")
    ]
    for ours, expected in zip(*calls, strict=True):
        torch.testing.assert_close(ours, expected)


@all_backends
def test_block_tables_of_any_strides(backend):
    query, pages = torch.randn(3, 4, 2, 8), torch.randn(2, 6, 2, 16, 8)
    lengths, table = torch.tensor([32, 17, 5]), torch.randperm(6).reshape(2, 3).t()
    apart = torch.stack([table, table], dim=-1)[..., 0]
    assert table.stride() == (1, 3) and apart.stride(1) != 1
    expected = ntk_attention_decode(query, *pages, lengths, block_table=table.contiguous(), backend=backend)
    for strided in (table, apart):
        out = ntk_attention_decode(query, *pages, lengths, block_table=strided, backend=backend)
        assert torch.equal(out, expected)
