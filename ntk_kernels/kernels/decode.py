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

import torch
import triton
import triton.language as tl

from .host import configs
from .host.launch import Call, Launch, ceil_div, layout, prepare, run_with_best_tiles, strides
from .jit.prefix_term import add_left_out, attend_rows, locate_state, start_from_prefix
from .jit.tiles import LN_2, LOG2_E, dot, load_tile, online_softmax, rounded_to
from .jit.visibility import locate_keys, masked, soft_capped

_LN_2 = tl.constexpr(LN_2)
_FEWEST_TILES = 4  # of keys that are worth splitting


@triton.jit
def _load_cache_tile(ptr, table, start, stop, stride_page, stride_row, PAGE_SIZE: tl.constexpr, ROWS: tl.constexpr,
                     COLUMNS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """[ROWS, BLOCK]: keys `start`... of a batch row, 0 from `stop` on; `ptr` is that of the head."""
    if table is None:
        tile = load_tile(ptr, start, stop, stride_row, ROWS, COLUMNS, BLOCK, True)
    else:
        keys, columns = start + tl.arange(0, ROWS), tl.arange(0, BLOCK)[None, :]
        page = tl.load(table + keys // PAGE_SIZE, mask=keys < stop, other=0).to(tl.int64)
        offsets = page * stride_page + (keys % PAGE_SIZE).to(tl.int64) * stride_row
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
    """Of each row of a tile: which head of the group and which query it is, whether there is such a row, and where q
    begins, [M, 1]. `head` is the first of the group."""
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
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, state, sequences, out_ptr, lse_ptr, sum_ptr, left_out_ptr,
    stride_q, stride_k, stride_v, stride_table, stride_out,
    num_queries, seq_q, seq_k, num_tiles, num_splits, prefix_tiles, num_kv_heads, group, lower, upper, scale, softcap,
    feature_scale,
    FEATURE_MAP: tl.constexpr, NUM_FEATURES: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    RANK: tl.constexpr, STATE_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, SPLIT: tl.constexpr,
    HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    LOGIT_PRECISION: tl.constexpr, PREFIX_PRECISION: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_RANK: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`out_ptr` [splits, B, Hq, Lq, Dv] and `lse_ptr` [splits, B, Hq, Lq], contiguous, of B · Hq · Lq queries, are the
    results. Of several splits it is what their softmax has come to, in float32: acc, and m_i in the place of lse, with
    l_i in `sum_ptr`. (acc / l_i might overflow where the prefix is alone and has next to no mass.)

    STATE_HEADS heads of the state belong to the query heads of a group. `left_out_ptr` [B, Hq, Lq] says what the
    first of several splits left out: 0 nothing, 1 some centres, 2 all of them (the row has no mass).
    """
    tile = tl.program_id(0) % num_tiles
    split = tl.program_id(0) // num_tiles % num_splits
    batch_head = tl.program_id(0) // num_tiles // num_splits
    head_k = tl.cast(batch_head % num_kv_heads, tl.int64)
    batch = (batch_head // num_kv_heads).to(tl.int64)

    _, seq_k, start, stop, _, _ = locate_keys(sequences, batch, seq_q, seq_k, lower, upper)
    lower += stop - seq_q
    upper += stop - seq_q
    if HAS_LOWER:
        start = tl.maximum(start, lower)
    if HAS_UPPER:
        stop = tl.minimum(stop, seq_q + upper)
    if SPLIT:
        start, stop = _keys_of_split(split, num_splits, start, stop, prefix_tiles, BLOCK_N)

    q_ptr += batch * stride_q[0]
    head = head_k * group
    group_head, offs_m, in_range, q_rows = _rows_of_tile(tile, q_ptr, stride_q, seq_q, head, group, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)[None, :]
    q = tl.load(q_rows + columns, mask=in_range[:, None] & (columns < HEAD_DIM), other=0.0)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    massless = l_i > 0
    any_left_out = tl.full([], False, tl.int1)
    per_state = group // STATE_HEADS
    if FEATURE_MAP is not None or state.row_keys is not None:
        for h in tl.range(0, STATE_HEADS, num_stages=1):
            state_head, num_centers, num_rows = locate_state(state, head + h * per_state, batch)
            if SPLIT:
                num_centers = tl.where(split == 0, num_centers, 0)
                num_rows = tl.where(split == 0, num_rows, 0)
            mine = in_range & ((group_head // per_state) == h)
            if FEATURE_MAP is not None:
                acc_h, m_h, l_h, massless_h, any_left_out_h = start_from_prefix(
                    q_rows, mine[:, None], state, state_head, num_centers, scale, feature_scale,
                    FEATURE_MAP, NUM_FEATURES, HEAD_DIM, VALUE_DIM, RANK, BLOCK_M, BLOCK_D, BLOCK_DV, BLOCK_RANK,
                    CHUNK, PREFIX_PRECISION, OPERAND, LOGIT_PRECISION, STAGES,
                )  # fmt: skip
                massless = tl.where(mine, massless_h, massless)
                any_left_out = any_left_out | any_left_out_h
            else:
                acc_h, m_h, l_h = acc, m_i, l_i
            if state.row_keys is not None:
                acc_h, m_h, l_h = attend_rows(
                    acc_h, m_h, l_h, q, state, state_head, num_rows, scale, HEAD_DIM, VALUE_DIM, CHUNK, BLOCK_D,
                    BLOCK_DV, PREFIX_PRECISION, LOGIT_PRECISION,
                )  # fmt: skip
            acc = tl.where(mine[:, None], acc_h, acc)
            m_i, l_i = tl.where(mine, m_h, m_i), tl.where(mine, l_h, l_i)

    if table_ptr is None:
        k_ptr += batch * stride_k[0]
        v_ptr += batch * stride_v[0]
    else:
        table_ptr += batch * stride_table
    k_ptr += head_k * stride_k[1]
    v_ptr += head_k * stride_v[1]
    for start_n in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        k = _load_cache_tile(
            k_ptr, table_ptr, start_n, stop, stride_k[0], stride_k[2], PAGE_SIZE, BLOCK_N, HEAD_DIM, BLOCK_D
        )
        v = _load_cache_tile(
            v_ptr, table_ptr, start_n, stop, stride_v[0], stride_v[2], PAGE_SIZE, BLOCK_N, VALUE_DIM, BLOCK_DV
        )
        s = dot(q, k.T, None, PRECISION)
        if SOFTCAP:
            s = soft_capped(s, scale, softcap)
        else:
            s = s * scale
        s, visible = masked(
            s, offs_m[:, None], start_n + tl.arange(0, BLOCK_N)[None, :], None, stride_q, seq_q, start, stop, lower,
            upper, HAS_LOWER, HAS_UPPER,
        )  # fmt: skip
        s = tl.where(visible, s, -float("inf"))
        p, alpha, m_i, l_i = online_softmax(m_i, l_i, s, 1.0, True)
        acc = dot(rounded_to(p, v.dtype), v, acc * alpha[:, None], PRECISION)

    # 0, as the grid has one dimension, which the compiler does not know: what it took for the same as before the loop
    # would stay in registers through it.
    zero = tl.program_id(1)
    head += zero
    group_head, offs_m, in_range, q_rows = _rows_of_tile(tile + zero, q_ptr, stride_q, seq_q, head, group, BLOCK_M)
    inverse = tl.where(l_i == 0, 0.0, 1.0 / l_i)
    if not SPLIT:
        acc = acc * inverse[:, None]
    lse = tl.where(l_i == 0, -float("inf"), m_i + tl.log2(l_i))
    rows = (head + group_head) * stride_out[2] + offs_m * stride_out[3]
    lse_rows = (batch * num_kv_heads * group + head + group_head) * seq_q + offs_m
    if SPLIT:
        if FEATURE_MAP is not None:
            flags = tl.where(any_left_out, 1 + massless.to(tl.int32), 0)
            tl.store(left_out_ptr + lse_rows, flags, mask=in_range & (split == 0))
        out_ptr += split.to(tl.int64) * stride_out[0]
        lse_rows += split.to(tl.int64) * num_queries
        tl.store(lse_ptr + lse_rows, m_i, mask=in_range)
        tl.store(sum_ptr + lse_rows, l_i, mask=in_range)
    else:
        if FEATURE_MAP is not None:
            if any_left_out:
                shift = tl.where(l_i == 0, 0.0, m_i)
                for h in tl.range(0, STATE_HEADS, num_stages=1):
                    state_head, num_centers, num_rows = locate_state(state, head + h * per_state, batch)
                    mine = in_range & ((group_head // per_state) == h)
                    acc = add_left_out(
                        acc, shift, tl.where(mine, inverse, 0.0), massless, q_rows, mine[:, None], state, state_head,
                        num_centers, scale, feature_scale, FEATURE_MAP, NUM_FEATURES, HEAD_DIM, VALUE_DIM, RANK,
                        BLOCK_M, BLOCK_D, BLOCK_DV, BLOCK_RANK, CHUNK, PREFIX_PRECISION, OPERAND, LOGIT_PRECISION,
                        STAGES,
                    )  # fmt: skip
        lse = lse * _LN_2
        tl.store(lse_ptr + lse_rows, lse, mask=in_range)
    columns = tl.arange(0, BLOCK_DV)[None, :]
    out_ptrs = out_ptr + batch * stride_out[1] + rows[:, None] + columns
    tl.store(out_ptrs, rounded_to(acc, out_ptr.dtype.element_ty), mask=in_range[:, None] & (columns < VALUE_DIM))


@triton.jit(do_not_specialize=["num_splits", "num_queries", "seq_q"])
def _merge_kernel(
    q_ptr, state, part_acc, part_max, part_sum, left_out_ptr, out_ptr, lse_ptr, stride_q, stride_out,
    num_splits, num_queries, num_heads, seq_q, scale, feature_scale,
    FEATURE_MAP: tl.constexpr, NUM_FEATURES: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    RANK: tl.constexpr, LOGIT_PRECISION: tl.constexpr, PREFIX_PRECISION: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_RANK: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The result of a query row from acc [splits, B, Hq, Lq, Dv], m_i and l_i [splits, B, Hq, Lq] of the splits."""
    query = tl.program_id(0).to(tl.int64)
    row, head = query % seq_q, (query // seq_q % num_heads).to(tl.int32)  # divided again, which int64 is slow at
    batch = query // seq_q // num_heads
    columns = tl.arange(0, BLOCK_DV)[None, :]
    acc = tl.zeros([1, BLOCK_DV], tl.float32)
    m_i = -float("inf")
    l_i = 0.0
    for start in tl.range(0, num_splits, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        at = splits.to(tl.int64) * num_queries + query
        in_range = splits < num_splits
        maxima = tl.load(part_max + at, mask=in_range, other=-float("inf"))
        sums = tl.load(part_sum + at, mask=in_range, other=0.0)
        part = tl.load(
            part_acc + at[:, None] * VALUE_DIM + columns, mask=in_range[:, None] & (columns < VALUE_DIM), other=0.0
        )
        m_new = tl.maximum(m_i, tl.max(maxima, 0))
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        p = tl.exp2(maxima - shift)
        alpha = tl.exp2(m_i - shift)
        acc = acc * alpha + tl.sum(p[:, None] * part, 0)[None, :]
        l_i = l_i * alpha + tl.sum(p * sums, 0)
        m_i = m_new
    inverse = tl.where(l_i == 0, 0.0, 1.0 / l_i)
    acc = acc * inverse
    if FEATURE_MAP is not None:
        left_out = tl.load(left_out_ptr + query)
        if left_out > 0:
            shift = tl.zeros([1], tl.float32) + tl.where(l_i == 0, 0.0, m_i)
            q_rows = q_ptr + batch * stride_q[0] + head.to(tl.int64) * stride_q[1] + row * stride_q[2]
            q_rows += tl.zeros([1, 1], tl.int32)
            state_head, num_centers, _ = locate_state(state, head, batch)
            acc = add_left_out(
                acc, shift, tl.zeros([1], tl.float32) + inverse, (tl.zeros([1], tl.int32) + left_out) == 2, q_rows,
                tl.full([1, 1], True, tl.int1), state, state_head, num_centers, scale, feature_scale, FEATURE_MAP,
                NUM_FEATURES, HEAD_DIM, VALUE_DIM, RANK, 1, BLOCK_D, BLOCK_DV, BLOCK_RANK, CHUNK, PREFIX_PRECISION,
                OPERAND, LOGIT_PRECISION, 1,
            )  # fmt: skip
    tl.store(lse_ptr + query, tl.where(l_i == 0, -float("inf"), (m_i + tl.log2(l_i)) * _LN_2))
    out_ptr += batch * stride_out[0] + head.to(tl.int64) * stride_out[1] + row * stride_out[2]
    tl.store(out_ptr + columns, rounded_to(acc, out_ptr.dtype.element_ty), mask=columns < VALUE_DIM)


def decode_launch(
    call: Call, out, lse, config: configs.TileConfig, *, num_splits=1, block_table=None, sums=None, left_out=None
) -> Launch:
    """The launch that fills `out` [S, B, Hq, Lq, Dv] and `lse` [S, B, Hq, Lq], S = num_splits; with several as the
    kernel says, `sums` [S, B, Hq, Lq] as well and, if there are features, `left_out` [B, Hq, Lq] (int32)."""
    tensors = (call.query, call.key, call.value, block_table, call.state, call.sequences, out, lse, sums, left_out)

    def describe():
        kv_heads, state = call.key.shape[1], call.state
        rows = call.group * call.seq_q
        block_m = min(config.block_m, max(configs.least_rows(call.arch), triton.next_power_of_2(rows)))
        num_tiles = ceil_div(rows, block_m)
        state_heads = max(state.num_heads // kv_heads, 1)
        prefix_tiles = ceil_div(state_heads * _bytes_of_head(state), _bytes_of_key(call) * config.block_n)
        scalars = (
            *map(strides, (call.query, call.key, call.value)), 0 if block_table is None else block_table.stride(0),
            out.stride()[:4], lse[0].numel(), call.seq_q, call.seq_k, num_tiles, num_splits, prefix_tiles, kv_heads,
            call.group, call.lower, call.upper, call.scale * LOG2_E, call.softcap, call.feature_scale,
        )  # fmt: skip
        constants = call.flags | call.prefix | call.sizes
        constants |= {
            "RANK": 1 if state.z_b is None else state.z_b.shape[3],
            "STATE_HEADS": state_heads,
            "PAGE_SIZE": 1 if block_table is None else call.key.shape[2],
            "SPLIT": num_splits > 1,
            "BLOCK_M": block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_RANK": call.blocks.block_rank,
            # As many tiles in flight although the numbers of the pages have to be fetched before what is on them.
            "STAGES": config.num_stages if block_table is None else 2 * config.num_stages - 1,
        }
        return (num_tiles * num_splits * kv_heads * call.batch,), scalars, constants

    details = num_splits, layout(block_table), layout(out), left_out is None
    return call.launch(_decode_kernel, tensors, config, describe, *details)


def merge_launch(call: Call, parts, maxima, sums, left_out, out, lse, config: configs.TileConfig) -> Launch:
    """The launch that fills `out` [B, Hq, Lq, Dv] and `lse` [B, Hq, Lq] from what `decode_launch` made."""
    tensors = (call.query, call.state, parts, maxima, sums, left_out, out, lse)

    def describe():
        num_splits, num_queries = parts.shape[0], lse.numel()
        scalars = (
            strides(call.query), strides(out), num_splits, num_queries, call.heads, call.seq_q, call.scale * LOG2_E,
            call.feature_scale,
        )  # fmt: skip
        constants = call.prefix | call.sizes
        constants |= {
            "RANK": 1 if call.state.z_b is None else call.state.z_b.shape[3],
            "BLOCK_S": config.block_n,
            "BLOCK_RANK": call.blocks.block_rank,
        }
        return (num_queries,), scalars, constants

    return call.launch(_merge_kernel, tensors, config, describe, parts.shape[0], layout(out))


def _bytes_of_head(state) -> int:
    """What a program reads of a head of the state."""
    tensors = (state.z, state.z_b, state.k, state.centers, state.row_keys, state.row_values)
    return sum(math.prod(tensor.shape[2:]) * tensor.element_size() for tensor in tensors if tensor is not None)


def _bytes_of_key(call: Call) -> int:
    return (call.sizes["HEAD_DIM"] + call.sizes["VALUE_DIM"]) * call.key.element_size()


@functools.cache
def splits_for(programs: int, tiles: int, multiprocessors: int) -> int:
    """How many programs share the keys of one: the fewest that keep the multiprocessors nearly as busy as any number.

    `programs` that there are without splitting, each with so many tiles of keys.
    """
    if programs >= 0.8 * multiprocessors or tiles <= _FEWEST_TILES:
        return 1

    def busy(splits):
        waves = ceil_div(programs * splits, multiprocessors)
        return programs * splits / (waves * multiprocessors)

    possible = range(1, max(min(tiles // 2, multiprocessors), 1) + 1)
    best = max(map(busy, possible))
    return next(splits for splits in possible if busy(splits) >= 0.85 * best)


def _num_splits(call: Call, config: configs.TileConfig) -> int:
    visible = call.seq_k
    if call.flags["HAS_LOWER"]:
        visible = min(visible, call.seq_q - call.lower)
    row_tiles = ceil_div(call.group * call.seq_q, config.block_m)
    programs = row_tiles * call.key.shape[1] * call.batch
    return splits_for(programs, ceil_div(visible, config.block_n), configs.multiprocessors(call.query.device))


def run_ntk_decode(
    query, key_cache, value_cache, out, lse, *, cache_size, cache_seqlens=None, block_table=None, num_splits=0,
    **arguments,
) -> None:  # fmt: skip
    """Fills `out` and `lse`; `num_splits` = 0 chooses. Other arguments as in `inputs.py`."""
    call = prepare(query, key_cache, value_cache, key_stop=cache_seqlens, cache_size=cache_size, **arguments)
    if block_table is not None:
        block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()

    def launch_with(config):
        return lambda: _run(call, out, lse, block_table, num_splits or _num_splits(call, config), config)

    run_with_best_tiles(call, "decode", launch_with)


def _run(call: Call, out, lse, block_table, num_splits: int, config: configs.TileConfig) -> None:
    if num_splits == 1:
        decode_launch(call, out[None], lse[None], config, block_table=block_table)()
        return
    parts = out.new_empty(num_splits, *out.shape, dtype=torch.float32)
    maxima, sums = lse.new_empty(2, num_splits, *lse.shape)
    left_out = None if call.feature_map is None else lse.new_empty(lse.shape, dtype=torch.int32)
    decode_launch(
        call, parts, maxima, config, num_splits=num_splits, block_table=block_table, sums=sums, left_out=left_out
    )()
    merge_launch(call, parts, maxima, sums, left_out, out, lse, call.candidates("merge")[0])()
