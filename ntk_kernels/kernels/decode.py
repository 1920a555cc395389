"""Decode: a few query rows of each batch row against its part of a long key/value cache, split over the keys.

A program owns the query rows that read one key/value head of one batch row: the Lq rows of each of the G heads of a
group, packed into one tile (row p is row p % Lq of head p // Lq), so that keys and values are read once. With enough
of them there is one split: it starts from the prefix, walks the visible keys and normalises, as the forward does. With
fewer, the keys of a batch row are divided among `num_splits` programs, of which the first starts from the prefix, and
a second kernel merges their results, always in the same order.

How the keys are divided depends on the batch row's own length and on `num_splits`, not on the rest of the batch.

The cache is [B, Hkv, Lk, D], or pages [P, Hkv, page size, D] that a block table [B, pages of a row] puts in order.

Memory beyond inputs and outputs, with several splits: their results in float32 (Dv + 2 numbers a split and query row).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .host import configs
from .host.launch import Call, Kernel, Launch, ceil_div, prepare, run_pass
from .jit.prefix_term import add_left_out, attend_rows, locate_state, start_from_prefix
from .jit.tiles import dot, load_tile, lse_of, online_softmax, rounded_to, running_max
from .jit.visibility import Band, locate_keys, masked, soft_capped

_MIN_TILES = 4  # of keys that are worth splitting


class DecodeResults(NamedTuple):
    """`out` [splits, B, Hq, Lq, Dv] and `lse` [splits, B, Hq, Lq], contiguous, of B · Hq · Lq queries.

    Of several splits they are the state of the softmax in float32: acc, and m_i in the place of lse, with l_i in `sums`
    (acc / l_i might overflow where the prefix is alone and has next to no mass). `left_out` [B, Hq, Lq] says what the
    first of several splits left out: 0 nothing, 1 some centres, 2 all of them (the row has no mass).
    """

    out: object
    lse: object
    sums: object = None  # None, as left_out, with a single split
    left_out: object = None


@triton.jit
def _load_cache_tile(ptr, table, start, stop, stride, PAGE_SIZE: tl.constexpr, ROWS: tl.constexpr,
                     COLUMNS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """[ROWS, BLOCK]: keys `start`... of a batch row, 0 from `stop` on; `ptr` is that of the head."""
    if table is None:
        tile = load_tile(ptr, start, stop, stride[2], ROWS, COLUMNS, BLOCK, True)
    else:
        keys, columns = start + tl.arange(0, ROWS), tl.arange(0, BLOCK)[None, :]
        page = tl.load(table + keys // PAGE_SIZE, mask=keys < stop, other=0).to(tl.int64)
        offsets = page * stride[0] + (keys % PAGE_SIZE).to(tl.int64) * stride[2]
        tile = tl.load(ptr + offsets[:, None] + columns, mask=(keys < stop)[:, None] & (columns < COLUMNS), other=0.0)
    return tile


@triton.jit
def _keys_of_split(split, num_splits, start, stop, prefix_tiles, BLOCK_N: tl.constexpr):
    """The first and the end of the keys of a split. The prefix, worth so many tiles of keys, is part of the first."""
    tiles = tl.cdiv(tl.maximum(stop - start, 0), BLOCK_N)
    own = tl.maximum(tl.cdiv(tiles + prefix_tiles, num_splits) - prefix_tiles, 0)
    rest = tl.cdiv(tiles - own, num_splits - 1)
    first = tl.where(split == 0, 0, own + (split - 1) * rest)
    last = tl.where(split == 0, own, first + rest)
    return start + first * BLOCK_N, tl.minimum(start + last * BLOCK_N, stop)


@triton.jit
def _rows_of_tile(tile, q_ptr, stride_q, seq_q, head, group, BLOCK_M: tl.constexpr):
    """Head of the group and number of the query of each row of a tile [M], whether the row exists, and pointers to its
    q [M, 1]. `head` is the first of the group."""
    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    group_head, offs_m = packed // seq_q, packed % seq_q
    q_rows = q_ptr + ((head + group_head) * stride_q[1] + offs_m * stride_q[2])[:, None]
    return group_head, offs_m, group_head < group, q_rows


# Integers that change from call to call; specialised on their values they would recompile the kernel.
_VARYING = [
    "stride_table",
    "num_queries",
    "seq_q",
    "seq_k",
    "num_tiles",
    "num_splits",
    "prefix_tiles",
    "lower",
    "upper",
]


@triton.jit(do_not_specialize=_VARYING)
def _ntk_decode_kernel(
    query, keys, table_ptr, state, mask, sequences, results, stride_out, stride_table, num_queries, seq_q, seq_k,
    num_tiles, num_splits, prefix_tiles, num_kv_heads, group, lower, upper, scales, dims,
):  # fmt: skip
    tile = tl.program_id(0) % num_tiles
    split = tl.program_id(0) // num_tiles % num_splits
    batch_head = tl.program_id(0) // num_tiles // num_splits
    head_k = tl.cast(batch_head % num_kv_heads, tl.int64)
    batch = (batch_head // num_kv_heads).to(tl.int64)

    _, seq_k, start, stop, _, _ = locate_keys(sequences, batch, seq_q, seq_k, lower, upper)
    lower += stop - seq_q
    upper += stop - seq_q
    if dims.HAS_LOWER:
        start = tl.maximum(start, lower)
    if dims.HAS_UPPER:
        stop = tl.minimum(stop, seq_q + upper)
    if dims.SPLIT:
        start, stop = _keys_of_split(split, num_splits, start, stop, prefix_tiles, dims.BLOCK_N)

    q_ptr = query.ptr + batch * query.stride[0]
    head = head_k * group
    group_head, offs_m, in_range, q_rows = _rows_of_tile(tile, q_ptr, query.stride, seq_q, head, group, dims.BLOCK_M)
    columns = tl.arange(0, dims.BLOCK_D)[None, :]
    q = tl.load(q_rows + columns, mask=in_range[:, None] & (columns < dims.HEAD_DIM), other=0.0)

    acc, m_i, l_i, massless, any_left_out = _start_from_states(
        q, q_rows, in_range, group_head, state, head, group // dims.STATE_HEADS, batch, split, scales, dims
    )
    k_ptr, v_ptr = keys.k.ptr, keys.v.ptr
    if table_ptr is None:
        k_ptr += batch * keys.k.stride[0]
        v_ptr += batch * keys.v.stride[0]
    else:
        table_ptr += batch * stride_table
    k_ptr += head_k * keys.k.stride[1]
    v_ptr += head_k * keys.v.stride[1]
    band = Band(mask, 0, seq_q, stop, lower, upper)  # without a mask
    for start_n in tl.range(start, stop, dims.BLOCK_N, num_stages=dims.STAGES):
        k = _load_cache_tile(
            k_ptr, table_ptr, start_n, stop, keys.k.stride, dims.PAGE_SIZE, dims.BLOCK_N, dims.HEAD_DIM, dims.BLOCK_D
        )
        v = _load_cache_tile(
            v_ptr, table_ptr, start_n, stop, keys.v.stride, dims.PAGE_SIZE, dims.BLOCK_N, dims.VALUE_DIM, dims.BLOCK_DV
        )
        s = dot(q, k.T, None, dims.PRECISION)
        if dims.SOFTCAP:
            s = soft_capped(s, scales.logit, scales.softcap)
        else:
            s = s * scales.logit
        s, visible = masked(s, offs_m[:, None], start_n + tl.arange(0, dims.BLOCK_N)[None, :], start, band, dims)
        s = tl.where(visible, s, -float("inf"))
        p, alpha, m_i, l_i = online_softmax(m_i, l_i, s, 1.0, True)
        acc = dot(rounded_to(p, v.dtype), v, acc * alpha[:, None], dims.PRECISION)

    # 0, as the grid has one dimension, but opaque to the compiler: values computed from it again do not stay in
    # registers through the loop.
    zero = tl.program_id(1)
    head += zero
    group_head, offs_m, in_range, q_rows = _rows_of_tile(
        tile + zero, q_ptr, query.stride, seq_q, head, group, dims.BLOCK_M
    )
    inverse = tl.where(l_i == 0, 0.0, 1.0 / l_i)
    if not dims.SPLIT:
        acc = acc * inverse[:, None]
    lse = lse_of(m_i, l_i)
    out_ptr = results.out
    rows = (head + group_head) * stride_out[2] + offs_m * stride_out[3]
    lse_rows = (batch * num_kv_heads * group + head + group_head) * seq_q + offs_m
    if dims.SPLIT:
        if dims.FEATURE_MAP is not None:
            flags = tl.where(any_left_out, 1 + massless.to(tl.int32), 0)
            tl.store(results.left_out + lse_rows, flags, mask=in_range & (split == 0))
        out_ptr += split.to(tl.int64) * stride_out[0]
        lse_rows += split.to(tl.int64) * num_queries
        tl.store(results.lse + lse_rows, m_i, mask=in_range)
        tl.store(results.sums + lse_rows, l_i, mask=in_range)
    else:
        if dims.FEATURE_MAP is not None:
            if any_left_out:
                acc = _add_left_out_of_states(
                    acc, m_i, l_i, inverse, massless, q_rows, in_range, group_head, state, head,
                    group // dims.STATE_HEADS, batch, scales, dims,
                )  # fmt: skip
        tl.store(results.lse + lse_rows, lse, mask=in_range)
    columns = tl.arange(0, dims.BLOCK_DV)[None, :]
    out_ptrs = out_ptr + batch * stride_out[1] + rows[:, None] + columns
    out_mask = in_range[:, None] & (columns < dims.VALUE_DIM)
    tl.store(out_ptrs, rounded_to(acc, results.out.dtype.element_ty), mask=out_mask)


@triton.jit
def _start_from_states(q, q_rows, in_range, group_head, state, head, heads_per_state, batch, split, scales, dims):
    """`start_from_prefix` and `attend_rows` for a tile whose rows may use several heads of the state; with several
    splits for the first of them."""
    acc = tl.zeros([dims.BLOCK_M, dims.BLOCK_DV], tl.float32)
    m_i = tl.full([dims.BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([dims.BLOCK_M], tl.float32)
    massless = l_i > 0
    any_left_out = tl.full([], False, tl.int1)
    if dims.FEATURE_MAP is not None or state.row_keys is not None:
        for h in tl.range(0, dims.STATE_HEADS, num_stages=1):
            state_head, num_centers, num_rows = locate_state(state, head + h * heads_per_state, batch)
            if dims.SPLIT:
                num_centers = tl.where(split == 0, num_centers, 0)
                num_rows = tl.where(split == 0, num_rows, 0)
            mine = in_range & ((group_head // heads_per_state) == h)
            if dims.FEATURE_MAP is not None:
                acc_h, m_h, l_h, massless_h, any_left_out_h = start_from_prefix(
                    q_rows, mine[:, None], state, state_head, num_centers, scales, dims
                )
                massless = tl.where(mine, massless_h, massless)
                any_left_out = any_left_out | any_left_out_h
            else:
                acc_h, m_h, l_h = acc, m_i, l_i
            if state.row_keys is not None:
                acc_h, m_h, l_h = attend_rows(acc_h, m_h, l_h, q, state, state_head, num_rows, scales.logit, dims)
            acc = tl.where(mine[:, None], acc_h, acc)
            m_i, l_i = tl.where(mine, m_h, m_i), tl.where(mine, l_h, l_i)
    return acc, m_i, l_i, massless, any_left_out


@triton.jit
def _add_left_out_of_states(
    acc, m_i, l_i, inverse, massless, q_rows, in_range, group_head, state, head, heads_per_state, batch, scales, dims
):
    """`add_left_out` for such a tile."""
    shift = tl.where(l_i == 0, 0.0, m_i)
    for h in tl.range(0, dims.STATE_HEADS, num_stages=1):
        state_head, num_centers, _ = locate_state(state, head + h * heads_per_state, batch)
        mine = in_range & ((group_head // heads_per_state) == h)
        acc = add_left_out(
            acc, shift, tl.where(mine, inverse, 0.0), massless, q_rows, mine[:, None], state, state_head, num_centers,
            scales, dims,
        )  # fmt: skip
    return acc


@triton.jit(do_not_specialize=["num_splits", "num_queries", "seq_q"])
def _ntk_decode_merge_kernel(
    query, state, splits, out_ptr, lse_ptr, stride_out, num_splits, num_queries, num_heads, seq_q, scales, dims
):
    """The result of a query row from acc [splits, B, Hq, Lq, Dv], m_i and l_i [splits, B, Hq, Lq] of the splits."""
    number = tl.program_id(0).to(tl.int64)
    row, head = number % seq_q, (number // seq_q % num_heads).to(tl.int32)  # divided again, which int64 is slow at
    batch = number // seq_q // num_heads
    columns = tl.arange(0, dims.BLOCK_DV)[None, :]
    acc = tl.zeros([1, dims.BLOCK_DV], tl.float32)
    m_i = -float("inf")
    l_i = 0.0
    for start in tl.range(0, num_splits, dims.BLOCK_S):
        offs = start + tl.arange(0, dims.BLOCK_S)
        at = offs.to(tl.int64) * num_queries + number
        in_range = offs < num_splits
        maxima = tl.load(splits.lse + at, mask=in_range, other=-float("inf"))
        sums = tl.load(splits.sums + at, mask=in_range, other=0.0)
        part = tl.load(
            splits.out + at[:, None] * dims.VALUE_DIM + columns,
            mask=in_range[:, None] & (columns < dims.VALUE_DIM), other=0.0,
        )  # fmt: skip
        m_new, shift = running_max(m_i, tl.max(maxima, 0))
        p = tl.exp2(maxima - shift)
        alpha = tl.exp2(m_i - shift)
        acc = acc * alpha + tl.sum(p[:, None] * part, 0)[None, :]
        l_i = l_i * alpha + tl.sum(p * sums, 0)
        m_i = m_new
    inverse = tl.where(l_i == 0, 0.0, 1.0 / l_i)
    acc = acc * inverse
    if dims.FEATURE_MAP is not None:
        left_out = tl.load(splits.left_out + number)
        if left_out > 0:
            shift = tl.zeros([1], tl.float32) + tl.where(l_i == 0, 0.0, m_i)
            q_rows = query.ptr + batch * query.stride[0] + head.to(tl.int64) * query.stride[1] + row * query.stride[2]
            q_rows += tl.zeros([1, 1], tl.int32)
            state_head, num_centers, _ = locate_state(state, head, batch)
            acc = add_left_out(
                acc, shift, tl.zeros([1], tl.float32) + inverse, (tl.zeros([1], tl.int32) + left_out) == 2, q_rows,
                tl.full([1, 1], True, tl.int1), state, state_head, num_centers, scales, dims,
            )  # fmt: skip
    tl.store(lse_ptr + number, lse_of(m_i, l_i))
    out_ptr += batch * stride_out[0] + head.to(tl.int64) * stride_out[1] + row * stride_out[2]
    tl.store(out_ptr + columns, rounded_to(acc, out_ptr.dtype.element_ty), mask=columns < dims.VALUE_DIM)


def decode_launch(
    call: Call, results: DecodeResults, config: configs.TileConfig, *, num_splits=1, block_table=None
) -> Launch:
    """The launch that fills `results` of so many splits."""
    kind, sizes, state = call.kind, call.sizes, call.state
    tensors = (call.query, call.keys, block_table, state, call.mask, call.sequences, results)
    rows = kind.group * sizes.seq_q
    block_m = min(config.block_m, max(configs.min_rows(kind.arch), triton.next_power_of_2(rows)))
    num_tiles = ceil_div(rows, block_m)
    state_heads = max(state.num_heads // kind.kv_heads, 1)
    prefix_tiles = ceil_div(state_heads * _bytes_of_head(state), _bytes_of_key(call) * config.block_n)
    scalars = (
        results.out.stride()[:4], 0 if block_table is None else block_table.stride(0), results.lse[0].numel(),
        sizes.seq_q, sizes.seq_k, num_tiles, num_splits, prefix_tiles, kind.kv_heads, kind.group, sizes.lower,
        sizes.upper, kind.scales,
    )  # fmt: skip
    return kind.launch(
        _ntk_decode_kernel, (num_tiles * num_splits * kind.kv_heads * sizes.batch,), tensors, scalars, config,
        STATE_HEADS=state_heads, PAGE_SIZE=1 if block_table is None else call.keys.k.ptr.shape[2],
        SPLIT=num_splits > 1, BLOCK_M=block_m, BLOCK_N=config.block_n,
        # As many tiles in flight although the numbers of the pages have to be fetched before what is on them.
        STAGES=config.num_stages if block_table is None else 2 * config.num_stages - 1,
    )  # fmt: skip


def merge_launch(call: Call, splits: DecodeResults, out, lse, config: configs.TileConfig) -> Launch:
    """The launch that fills `out` [B, Hq, Lq, Dv] and `lse` [B, Hq, Lq] from the results of several splits."""
    kind, num_queries = call.kind, lse.numel()
    tensors = (call.query, call.state, splits, out, lse)
    scalars = out.stride()[:3], splits.out.shape[0], num_queries, kind.heads, call.sizes.seq_q, kind.scales
    return kind.launch(
        _ntk_decode_merge_kernel, (num_queries,), tensors, scalars, config, BLOCK_M=1, BLOCK_S=config.block_n, STAGES=1
    )


def _bytes_of_head(state) -> int:
    """Bytes that a program reads of a head of the state."""
    tensors = (state.z, state.z_b, state.k, state.centers, state.row_keys, state.row_values)
    return sum(math.prod(tensor.shape[2:]) * tensor.element_size() for tensor in tensors if tensor is not None)


def _bytes_of_key(call: Call) -> int:
    constants = call.kind.constants
    return (constants["HEAD_DIM"] + constants["VALUE_DIM"]) * call.kind.dtype.itemsize


@functools.cache
def splits_for(programs: int, tiles: int, multiprocessors: int) -> int:
    """Returns the min number of programs that share the keys of one and keep the multiprocessors nearly as busy as any
    number.

    `programs` is their number without splitting, `tiles` of keys each.
    """
    if programs >= 0.8 * multiprocessors or tiles <= _MIN_TILES:
        return 1

    def busy(splits):
        waves = ceil_div(programs * splits, multiprocessors)
        return programs * splits / (waves * multiprocessors)

    possible = range(1, max(min(tiles // 2, multiprocessors), 1) + 1)
    best = max(map(busy, possible))
    return next(splits for splits in possible if busy(splits) >= 0.85 * best)


def _num_splits(call: Call, config: configs.TileConfig) -> int:
    kind, sizes = call.kind, call.sizes
    visible = sizes.seq_k
    if kind.constants["HAS_LOWER"]:
        visible = min(visible, sizes.seq_q - sizes.lower)
    row_tiles = ceil_div(kind.group * sizes.seq_q, config.block_m)
    programs = row_tiles * kind.kv_heads * sizes.batch
    return splits_for(programs, ceil_div(visible, config.block_n), configs.multiprocessors(kind.device))


def decode_and_merge(call: Call, block_table, num_splits, out, lse, config: configs.TileConfig) -> Callable[[], None]:
    """Returns a function that makes the launches that fill `out` and `lse`. `num_splits` 0: as many as serve best."""
    num_splits = num_splits or _num_splits(call, config)
    if num_splits == 1:
        return decode_launch(call, DecodeResults(out[None], lse[None]), config, block_table=block_table)

    def run() -> None:
        left_out = None if call.kind.feature_map is None else lse.new_empty(lse.shape, dtype=torch.int32)
        maxima, sums = lse.new_empty(2, num_splits, *lse.shape)
        splits = DecodeResults(out.new_empty(num_splits, *out.shape, dtype=torch.float32), maxima, sums, left_out)
        decode_launch(call, splits, config, num_splits=num_splits, block_table=block_table)()
        merge_launch(call, splits, out, lse, call.kind.candidates("merge")[0])()

    return run


DECODE = (Kernel("decode", decode_and_merge),)


def run_decode(inputs, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Fills `out` [B, Hq, Lq, Dv] and `lse` [B, Hq, Lq]; `inputs` as DecodeInputs in `ntk_kernels/inputs.py`."""
    call = prepare(inputs)
    table = inputs.block_table
    if table is not None and table.stride(1) != 1:
        table = table.contiguous()
    run_pass(DECODE, call, table, inputs.num_splits, out, lse)
