"""Forward of NTK-Attention in one pass: a FlashAttention-style online softmax that starts from the prefix.

Each program owns BLOCK_M rows of queries of one head. It starts with the prefix's linear-attention term as
accumulator, mass and maximum (`jit/prefix_term.py`), walks the state's own rows, then the keys that some of its rows
see, and normalises. Without keys it adds the prefix to the result of another attention over them, which `out` and
`lse` then hold. The formula is that of `reference/attention.py`, the conventions are those of `tiles.py`.

Grid: one program for each tile of BLOCK_M queries, head and batch row (or packed sequence), those of a head side by
side, so that they share K and V in the L2 cache; with causality the tiles with the most keys come first.

Memory beyond inputs and outputs: `lse`.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import add_prefix as prefix_pass
from .host import configs
from .host.launch import Call, Launch, ceil_div, layout, prepare, run_with_best_tiles, strides
from .jit.prefix_term import add_left_out, attend_rows, locate_state, start_from_prefix
from .jit.tiles import LN_2, LOG2_E, dot, in_log2, load_descriptor_tile, load_tile, online_softmax, rounded_to
from .jit.visibility import keys_of_rows, locate_keys, locate_rows, masked, soft_capped

_LN_2 = tl.constexpr(LN_2)


@triton.jit
def _attend_keys(
    acc, m_i, l_i, q, k_ptr, v_ptr, k_desc, v_desc, desc_batch, desc_head, desc_start, stride_k, stride_v,
    mask_ptr, stride_mask, offs_m, seq_q, start, stop, visible_stop, lower, upper, scale, softcap,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr,
    SOFTCAP: tl.constexpr, POSITIVE_SCALE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The keys from `start` to `stop` in tiles; only if MASKED may there be some that a row does not see."""
    for start_n in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        if MASKED or k_desc is None:
            k = load_tile(k_ptr, start_n, visible_stop, stride_k, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
            v = load_tile(v_ptr, start_n, visible_stop, stride_v, BLOCK_N, VALUE_DIM, BLOCK_DV, MASKED)
        else:
            k = load_descriptor_tile(k_desc, desc_batch, desc_head, desc_start + start_n, BLOCK_N, BLOCK_D)
            v = load_descriptor_tile(v_desc, desc_batch, desc_head, desc_start + start_n, BLOCK_N, BLOCK_DV)
        s = dot(q, k.T, None, PRECISION)
        if SOFTCAP:
            s = soft_capped(s, scale, softcap)
        elif MASKED or not POSITIVE_SCALE:
            s = s * scale
        if MASKED:
            keys = start_n + tl.arange(0, BLOCK_N)[None, :]
            s, visible = masked(
                s, offs_m[:, None], keys, mask_ptr, stride_mask, seq_q, start, visible_stop, lower, upper, HAS_LOWER,
                HAS_UPPER,
            )  # fmt: skip
            if mask_ptr is not None:
                # 0 · NaN = NaN: what no row sees must not be there at all
                seen = tl.max((visible & (offs_m < seq_q)[:, None]).to(tl.int32), 0) > 0
                v = tl.where(seen[:, None], v, 0.0)
            s = tl.where(visible, s, -float("inf"))
        if MASKED or SOFTCAP or not POSITIVE_SCALE:
            p, alpha, m_i, l_i = online_softmax(m_i, l_i, s, 1.0, MASKED)
        else:
            p, alpha, m_i, l_i = online_softmax(m_i, l_i, s, scale, MASKED)
        acc = dot(rounded_to(p, v.dtype), v, acc * alpha[:, None], PRECISION)
    return acc, m_i, l_i


@triton.jit
def _results_of_rows(
    out_ptr, lse_ptr, tensor_batch, head, first_q, start_m, offs_m, seq_q, stride_out, stride_lse_b, stride_lse_h,
    VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Where the out [M, Dv] (with a mask) and the lse [M] of a tile's rows lie."""
    columns = tl.arange(0, BLOCK_DV)[None, :]
    out_ptr += tensor_batch * stride_out[0] + tl.cast(head, tl.int64) * stride_out[1]
    out_ptr += (first_q + start_m) * stride_out[2]
    out_ptrs = out_ptr + tl.arange(0, BLOCK_M)[:, None] * stride_out[2] + columns
    lse_ptr += tensor_batch * stride_lse_b + tl.cast(head, tl.int64) * stride_lse_h + first_q
    return out_ptrs, (offs_m < seq_q)[:, None] & (columns < VALUE_DIM), lse_ptr + offs_m


# Integers that change from call to call; specialised on their values they would recompile the kernel.
_VARYING = ["stride_lse_b", "stride_lse_h", "seq_q", "seq_k", "num_tiles", "lower", "upper"]


@triton.jit(do_not_specialize=_VARYING)
def _ntk_fwd_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, state, mask_ptr, sequences, out_ptr, lse_ptr,
    stride_q, stride_k, stride_v, stride_mask, stride_out, stride_lse_b, stride_lse_h,
    seq_q, seq_k, num_tiles, num_heads, group, lower, upper, scale, softcap, feature_scale,
    FEATURE_MAP: tl.constexpr, NUM_FEATURES: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    RANK: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, SOFTCAP: tl.constexpr,
    POSITIVE_SCALE: tl.constexpr, PRECISION: tl.constexpr, LOGIT_PRECISION: tl.constexpr,
    PREFIX_PRECISION: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_RANK: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % num_tiles
    batch_head = tl.program_id(0) // num_tiles
    if HAS_UPPER:
        tile = num_tiles - 1 - tile
    head = batch_head % num_heads
    batch = (batch_head // num_heads).to(tl.int64)
    start_m = tile * BLOCK_M

    tensor_batch, first_q, seq_q = locate_rows(sequences, batch, seq_q)
    if k_ptr is not None:
        first_k, seq_k, start_n, stop_n, lower, upper = locate_keys(sequences, batch, seq_q, seq_k, lower, upper)
    if start_m >= seq_q:
        return
    if k_ptr is not None:
        start_n, middle_start, middle_stop, stop_n = keys_of_rows(
            start_m, tl.minimum(start_m + BLOCK_M, seq_q), start_n, stop_n, lower, upper, BLOCK_N, HAS_LOWER, HAS_UPPER,
            mask_ptr is not None,
        )  # fmt: skip

    q_ptr += tensor_batch * stride_q[0] + tl.cast(head, tl.int64) * stride_q[1] + first_q * stride_q[2]
    if k_ptr is not None:
        head_k = head // group
        k_ptr += tensor_batch * stride_k[0] + tl.cast(head_k, tl.int64) * stride_k[1] + first_k * stride_k[2]
        v_ptr += tensor_batch * stride_v[0] + tl.cast(head_k, tl.int64) * stride_v[1] + first_k * stride_v[2]
    offs_m = start_m + tl.arange(0, BLOCK_M)
    row_mask = (offs_m < seq_q)[:, None]

    state_head, num_centers, num_rows = locate_state(state, head, batch)
    if k_ptr is None:
        out_ptrs, out_mask, lse_ptrs = _results_of_rows(
            out_ptr, lse_ptr, tensor_batch, head, first_q, start_m, offs_m, seq_q, stride_out, stride_lse_b,
            stride_lse_h, VALUE_DIM, BLOCK_M, BLOCK_DV,
        )  # fmt: skip
        out = tl.load(out_ptrs, mask=out_mask, other=0.0)
        lse = tl.load(lse_ptrs, mask=offs_m < seq_q, other=-float("inf"))
    q_rows = q_ptr + start_m * tl.cast(stride_q[2], tl.int64) + tl.arange(0, BLOCK_M)[:, None] * stride_q[2]
    if FEATURE_MAP is None:
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
        l_i = tl.zeros([BLOCK_M], tl.float32)
    else:
        acc, m_i, l_i, massless, any_left_out = start_from_prefix(
            q_rows, row_mask, state, state_head, num_centers, scale, feature_scale, FEATURE_MAP, NUM_FEATURES,
            HEAD_DIM, VALUE_DIM, RANK, BLOCK_M, BLOCK_D, BLOCK_DV, BLOCK_RANK, CHUNK, PREFIX_PRECISION, OPERAND,
            LOGIT_PRECISION, STAGES,
        )  # fmt: skip
    q = load_tile(q_ptr, start_m, seq_q, stride_q[2], BLOCK_M, HEAD_DIM, BLOCK_D, True)
    if state.row_keys is not None:
        acc, m_i, l_i = attend_rows(
            acc, m_i, l_i, q, state, state_head, num_rows, scale, HEAD_DIM, VALUE_DIM, CHUNK, BLOCK_D, BLOCK_DV,
            PREFIX_PRECISION, LOGIT_PRECISION,
        )  # fmt: skip

    if mask_ptr is not None:
        mask_ptr += batch * stride_mask[0] + tl.cast(head, tl.int64) * stride_mask[1]
    for part in tl.static_range(0 if k_ptr is None else 3):
        if part == 0:
            part_start, part_stop = start_n, tl.minimum(middle_start, stop_n)
        elif part == 1:
            part_start, part_stop = middle_start, middle_stop
        else:
            part_start, part_stop = middle_stop, stop_n
        if (part == 0 and HAS_LOWER and mask_ptr is None) or (part == 1 and mask_ptr is None) or part == 2:
            acc, m_i, l_i = _attend_keys(
                acc, m_i, l_i, q, k_ptr, v_ptr, k_desc, v_desc, tensor_batch, head_k, first_k, stride_k[2],
                stride_v[2], mask_ptr, stride_mask, offs_m, seq_q, part_start, part_stop, stop_n, lower, upper, scale,
                softcap, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, HAS_LOWER, HAS_UPPER, SOFTCAP,
                POSITIVE_SCALE, part != 1, PRECISION, STAGES,
            )  # fmt: skip

    # 0, as the grid has one dimension, which the compiler does not know: addresses and masks that it took for those of
    # the start would stay in registers through the loop over the keys.
    zero = tl.program_id(1)
    offs_m = start_m + zero + tl.arange(0, BLOCK_M)
    row_mask = (offs_m < seq_q)[:, None]
    first_q += zero
    if k_ptr is None:
        out, lse = out.to(tl.float32), in_log2(lse)
        m_new = tl.maximum(m_i, lse)
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        weight, alpha = tl.exp2(lse - shift), tl.exp2(m_i - shift)
        acc = acc * alpha[:, None] + out * weight[:, None]
        l_i = l_i * alpha + weight
        m_i = m_new
    inverse = tl.where(l_i == 0, 0.0, 1.0 / l_i)
    acc = acc * inverse[:, None]
    if FEATURE_MAP is not None:
        if any_left_out:
            q_rows = q_ptr + offs_m.to(tl.int64)[:, None] * stride_q[2]
            shift = tl.where(l_i == 0, 0.0, m_i)
            acc = add_left_out(
                acc, shift, inverse, massless, q_rows, row_mask, state, state_head + zero, num_centers, scale,
                feature_scale, FEATURE_MAP, NUM_FEATURES, HEAD_DIM, VALUE_DIM, RANK, BLOCK_M, BLOCK_D, BLOCK_DV,
                BLOCK_RANK, CHUNK, PREFIX_PRECISION, OPERAND, LOGIT_PRECISION, STAGES,
            )  # fmt: skip

    lse = tl.where(l_i == 0, -float("inf"), (m_i + tl.log2(l_i)) * _LN_2)
    out_ptrs, out_mask, lse_ptrs = _results_of_rows(
        out_ptr, lse_ptr, tensor_batch, head, first_q, start_m, offs_m, seq_q, stride_out, stride_lse_b, stride_lse_h,
        VALUE_DIM, BLOCK_M, BLOCK_DV,
    )  # fmt: skip
    tl.store(lse_ptrs, lse, mask=offs_m < seq_q)
    tl.store(out_ptrs, rounded_to(acc, out_ptr.dtype.element_ty), mask=out_mask)


def fwd_launch(call: Call, out, lse, config: configs.TileConfig) -> Launch:
    """The launch that fills `out` [B, Hq, Lq, Dv] and `lse` [B, Hq, Lq], or adds the prefix to them (without keys)."""
    key, value = call.key, call.value
    descriptors = (None, None)
    if key is not None and config.use_descriptors and configs.can_describe(key) and configs.can_describe(value):
        descriptors = tuple(
            TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 1, config.block_n, block])
            for tensor, block in ((key, call.blocks.block_d), (value, call.blocks.block_dv))
        )
    tensors = (call.query, key, value, *descriptors, call.state, call.attn_mask, call.sequences, out, lse)
    details = layout(out), layout(lse), descriptors[0] is None

    def describe():
        num_tiles = ceil_div(call.seq_q, config.block_m)
        scalars = (
            *map(strides, (call.query, key, value)), call.mask_strides, strides(out), lse.stride(0), lse.stride(1),
            call.seq_q, call.seq_k, num_tiles, call.heads, call.group, call.lower, call.upper, call.scale * LOG2_E,
            call.softcap, call.feature_scale,
        )  # fmt: skip
        constants = call.flags | call.prefix | call.sizes
        constants |= {
            "RANK": 1 if call.state.z_b is None else call.state.z_b.shape[3],
            "POSITIVE_SCALE": call.scale > 0,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_RANK": call.blocks.block_rank,
            "STAGES": config.num_stages,
        }
        in_half = call.query.dtype != torch.float32
        narrow = call.blocks.block_dv <= call.blocks.block_d  # else it would not fit
        if call.feature_map == "elu" and call.arch == "sm90" and in_half and narrow and not call.crowded:
            constants["CHUNK"] = min(call.blocks.block_d, 128)  # all of Z is fetched at once: programs wait for it less
        return (num_tiles * call.heads * call.batch,), scalars, constants

    return call.launch(_ntk_fwd_kernel, tensors, config, describe, *details)


def run_ntk_fwd(query, key, value, out, lse, **arguments) -> None:
    """Fills `out` and `lse`; without keys (None, as values) adds the prefix to the attention that they hold."""
    call = prepare(query, key, value, **arguments)
    updated = (out, lse) if key is None else ()
    if prefix_pass.takes(call):
        launch_with = partial(prefix_pass.prefix_pass_launch, call, out, lse)
        run_with_best_tiles(call, "prefix_pass", launch_with, updated)
    else:
        run_with_best_tiles(call, "forward", partial(fwd_launch, call, out, lse), updated)
