"""Decode: a few queries against a cache, as if the whole sequence were there."""

import math

import pytest
import torch
from backends import FUSED, all_backends, fused_backends, triton_only
from cases import BF16, F32, F64, make_state
from decode_cases import ALL_PARTS, CALLS, LENGTHS, TAYLOR2, check, decode_by, in_pages, make_call, served
from oracle import run

from ntk_kernels import PrefixState, ntk_attention, ntk_attention_decode, reference
from ntk_kernels.backends.torch import cached
from ntk_kernels.inputs import DECODE_SCHEMA, DecodeInputs

SERVED = [(name, backend) for name in CALLS for backend in FUSED if served(name, backend)]


@pytest.mark.parametrize("name, backend", SERVED)
def test_against_the_reference(name, backend):
    call = make_call(name)
    ours = run(decode_by(backend), *call)
    assert ours["out"].dtype == call[0].dtype
    check(name, call, ours, call[0].dtype)


@pytest.mark.parametrize("name", [name for name, backend in SERVED if backend == "triton"])
def test_splits(name):
    """Three; by default the interpreter, which counts as four multiprocessors, has one for these calls."""
    call = make_call(name)
    check(name, call, run(decode_by("triton", num_splits=3), *call), call[0].dtype)


@triton_only
@pytest.mark.parametrize("splits", [2, 20])
@pytest.mark.parametrize("name", ["elu", "all_parts", "no_mass", "window", "index"])
def test_other_numbers_of_splits(name, splits):
    """With 20, most of them get no keys."""
    call = make_call(name)
    check(name, call, run(decode_by("triton", num_splits=splits), *call), call[0].dtype)


@triton_only
@pytest.mark.parametrize("recipe", [None, {}, {"mass": "none"}], ids=["plain", "elu", "no_mass"])
@pytest.mark.parametrize("splits", [None, 33, 80])
def test_many_splits_with_keys(splits, recipe, monkeypatch):
    """More than the 32 that the interpreter merges at once, and most of them with keys: 59 tiles and a part of one."""
    from ntk_kernels.kernels import decode
    from ntk_kernels.kernels.host import configs

    merged, merge_launch = [], decode.merge_launch

    def recording(call, parts, *rest):
        merged.append(len(parts))
        return merge_launch(call, parts, *rest)

    monkeypatch.setattr(configs, "multiprocessors", lambda device: 1000)  # what the default splits for
    monkeypatch.setattr(decode, "merge_launch", recording)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, n, 8, generator=generator) for heads, n in ((2, 2), (1, 1920), (1, 1920))
    )
    key[:, :, 1100:] *= 3  # the largest logits come late
    state = None if recipe is None else make_state(generator, heads=1, head_dim=8, value_dim=8, **recipe)
    call = query, key, value, state, {"cache_seqlens": torch.tensor([1919, 1003])}
    check("many splits", call, run(decode_by("triton", num_splits=splits), *call), F32)
    assert merged == [splits or 26]


@triton_only
@pytest.mark.parametrize("splits", [1, 2, 7])
@pytest.mark.parametrize("mass", [1e-37, 1e-36])
def test_a_prefix_with_next_to_no_mass(mass, splits):
    """N / M exceeds float32, what it adds to the softmax does not; also where its split has no keys."""
    query, key, value = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 150, 16), torch.randn(1, 1, 150, 16)
    state = PrefixState(torch.full((1, 16, 16), 1e3), torch.full((1, 16), mass), "elu")
    out, lse = ntk_attention_decode(
        query, key, value, None, state, num_splits=splits, return_lse=True, backend="triton"
    )  # fmt: skip
    expected, expected_lse = reference.ntk_attention_decode(
        *(tensor.double() for tensor in (query, key, value)), None, state.to(F64), return_lse=True
    )
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "name, backend", [case for case in SERVED if case[0] in ("elu", "all_parts", "window", "plain")]
)
def test_where_lengths_cannot_be_read(name, backend, monkeypatch):
    """The way of the torch backend on a GPU, where reading them would wait."""
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
    """A cache that grows by `rows` tokens a step, for two sequences of which one starts later (left padding)."""
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
    """The same tensors with other values, as a replayed CUDA graph has them."""
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
    """[B, L, H, D] views, in which some dimensions have any stride."""
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
    from ntk_kernels.attention import state_arguments

    query, key_cache, value_cache, state, options = make_call(name)
    caches, table = (key_cache, value_cache), None
    if page_size:
        *caches, table = in_pages(*caches, options["cache_seqlens"], page_size)
    left, right = options.get("window", (-1, -1))
    return DecodeInputs(
        query, *caches, *state_arguments(state, backend, few_rows=True), options.get("state_index"),
        options["cache_seqlens"], options.get("key_start"), table, None if state is None else state.feature_map, 0.5,
        0.25, 0.0, left, right, 0, backend,
    )  # fmt: skip


@fused_backends
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("name", ["plain", "all_parts", "index", "low_rank_elu", "value_narrower", "blhd"])
def test_opcheck(name, page_size, backend):
    inputs = op_arguments(name, backend, page_size)
    query = inputs.query.requires_grad_()
    torch.library.opcheck(torch.ops.ntk_kernels.attention_decode.default, inputs._replace(query=query),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))  # fmt: skip


def test_the_schema_and_the_inputs_have_the_same_names():
    assert tuple(argument.split()[1] for argument in DECODE_SCHEMA.split(", ")) == DecodeInputs._fields


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


def test_number_of_splits():
    decode = pytest.importorskip("ntk_kernels.kernels.decode")
    assert decode.splits_for(programs=256, tiles=64, multiprocessors=132) == 1  # busy enough
    assert decode.splits_for(programs=8, tiles=4, multiprocessors=132) == 1  # too few keys
    assert decode.splits_for(programs=8, tiles=64, multiprocessors=132) == 14  # 112 of 132
    assert decode.splits_for(programs=1, tiles=1000, multiprocessors=132) == 113  # 85% of all of them
    assert decode.splits_for(programs=8, tiles=10, multiprocessors=132) == 5  # two tiles each
    for programs in range(1, 200):
        splits = decode.splits_for(programs, 64, 132)
        assert 1 <= splits <= 32


@triton_only
@pytest.mark.parametrize("far", ["heads of queries", "rows of pages"])
def test_offsets_beyond_two_to_the_31(far):
    """Address space only: pages that nobody touches take no memory."""
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


BAD = {
    "rows": ({"query": torch.randn(2, 4, 17, 8)}, ValueError,
             "`query` must have at most 16 rows (Lq), got 17; ntk_attention takes any number"),
    "key": ({"key_cache": torch.randn(3, 2, 32, 8)}, ValueError,
            "`key_cache` must have shape [B=2, Hkv, Lk, D=8], got [3, 2, 32, 8]"),
    "value": ({"value_cache": torch.randn(2, 2, 31, 8)}, ValueError,
              "`value_cache` must have shape [B=2, Hkv=2, Lk=32, Dv], got [2, 2, 31, 8]"),
    "dtype": ({"key_cache": torch.randn(2, 2, 32, 8).half()}, TypeError,
              "`key_cache` must have the dtype of `query`, torch.float32, got torch.float16"),
    "heads": ({"query": torch.randn(2, 5, 1, 8)}, ValueError,
              "the heads of `query` must be a multiple of the heads of `key_cache`, got Hq=5, Hkv=2"),
    "lengths": ({"cache_seqlens": torch.tensor([5])}, ValueError, "`cache_seqlens` must have shape [B=2], got [1]"),
    "lengths_dtype": ({"cache_seqlens": torch.tensor([5.0, 6.0])}, TypeError,
                      "`cache_seqlens` must be int32 or int64, got torch.float32"),
    "too_long": ({"cache_seqlens": torch.tensor([5, 33])}, ValueError,
                 "`cache_seqlens` must lie between 0 and 32, the keys that the cache has room for, got values from 5 to 33"),
    "negative": ({"cache_seqlens": torch.tensor([-1, 3])}, ValueError,
                 "`cache_seqlens` must lie between 0 and 32, the keys that the cache has room for, got values from -1 to 3"),
    "splits": ({"num_splits": 0}, ValueError, "`num_splits` must be at least 1, got 0"),
    "page_size": ({"block_table": torch.zeros(2, 3, dtype=torch.int32), "key_cache": torch.randn(9, 2, 24, 8),
                   "value_cache": torch.randn(9, 2, 24, 8)}, ValueError,
                  "`key_cache` must have pages [P, Hkv, page_size, D] of a power of two from 16 on, got page_size=24"),
    "table_shape": ({"block_table": torch.zeros(3, 3, dtype=torch.int32)}, ValueError,
                    "`block_table` must have shape [B=2, n], got [3, 3]"),
    "table_dtype": ({"block_table": torch.zeros(2, 3)}, TypeError,
                    "`block_table` must be int32 or int64, got torch.float32"),
    "table_alone": ({"block_table": torch.zeros(2, 3, dtype=torch.int32), "cache_seqlens": None}, ValueError,
                    "`cache_seqlens` must come with `block_table`, got None"),
    "page": ({"block_table": torch.tensor([[0, 2, -1], [1, 99, 99]]), "cache_seqlens": torch.tensor([40, 32])}, ValueError,
             "`block_table` must lie between 0 and 1, the last page, where `cache_seqlens` reaches, got values from 0 to 2"),
    "beyond_table": ({"block_table": torch.tensor([[0], [1]]), "cache_seqlens": torch.tensor([33, 32])}, ValueError,
                     "`cache_seqlens` must lie between 0 and 32, the keys that the cache has room for, got values from "
                     "32 to 33"),
    "index": ({"state": make_state(torch.Generator(), heads=2, head_dim=8, value_dim=8, stack=2),
               "state_index": torch.tensor([0, 2])}, ValueError,
              "`state_index` must lie between -1 (no state) and 1 (`state` holds 2), got values from 0 to 2"),
    "key_start": ({"key_start": torch.tensor([0])}, ValueError, "`key_start` must have shape [B=2], got [1]"),
    "causal": ({"is_causal": 1}, TypeError, "`is_causal` must be a bool, got int"),
}  # fmt: skip


@all_backends
@pytest.mark.parametrize("changes, error, message", BAD.values(), ids=BAD)
def test_bad_arguments(changes, error, message, backend):
    arguments = {"query": torch.randn(2, 4, 1, 8), "key_cache": torch.randn(2, 2, 32, 8),
                 "value_cache": torch.randn(2, 2, 32, 8), "cache_seqlens": torch.tensor([32, 5])}  # fmt: skip
    with pytest.raises(error) as caught:
        ntk_attention_decode(**arguments | changes, backend=backend)
    assert str(caught.value) == message
