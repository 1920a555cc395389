"""Backward through the input's keys and values: dK_j and dV_j.

    P_ij = e^{s_ij - lse_i}    dV_j = Σ_i P_ij dO_i    dS_ij = P_ij (dO_i·v_j - Δ_i)    dK_j = scale · Σ_i dS_ij q_i

summed over the rows i that see key j and the query heads that share it, in a fixed order. Scores are taken transposed,
[N, M]: P and dS are then the left sides of products, which Hopper reads from registers.

Wide gradients are cut into PARTS of their columns, a program each, as no tile of them fits into the registers.

Grid: (tiles of BLOCK_N keys · key/value heads · batch rows or packed sequences, PARTS). The tiles of a head lie side by
side, so that they share the queries in the L2 cache.
"""

from functools import partial

import triton
import triton.language as tl

from .backward_delta import RowTerms, load_lse, load_rows
from .host import configs
from .host.launch import Call, Launch, ceil_div, layout, run_with_best_tiles, strides
from .jit.features import load_columns
from .jit.tiles import LN_2, LOG2_E, dot, load_tile, rounded_to, store_tile
from .jit.visibility import locate_keys, locate_rows, logits_and_slope, masked, rows_of_keys

_LN_2 = tl.constexpr(LN_2)


@triton.jit
def _part_of(ptr, start, row_mask, stride, part, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of the rows from `start` on of a matrix with DIM columns."""
    rows = ptr + start * tl.cast(stride, tl.int64) + tl.arange(0, ROWS)[:, None] * stride
    return load_columns(rows, row_mask, part * COLUMNS, DIM, COLUMNS)


@triton.jit
def _add_rows(
    dk, dv, part, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_q, stride_do, mask_ptr, stride_mask, offs_n, last,
    start, stop, key_start, key_stop, lower, upper, scale, softcap,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, SOFTCAP: tl.constexpr,
    NEEDS_DK: tl.constexpr, NEEDS_DV: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """What the rows from `start` to `stop` add; only if MASKED may there be some that do not see all keys.

    `last` is the end of the rows that see any.
    """
    for start_m in tl.range(start, stop, BLOCK_M, num_stages=STAGES):
        q = load_tile(q_ptr, start_m, last, stride_q, BLOCK_M, HEAD_DIM, BLOCK_D, MASKED)
        do = load_tile(do_ptr, start_m, last, stride_do, BLOCK_M, VALUE_DIM, BLOCK_DV, MASKED)
        rows = start_m + tl.arange(0, BLOCK_M)
        row_mask = (rows < last)[:, None]
        s = dot(k, q.T, None, PRECISION)
        s, slope = logits_and_slope(s, scale, softcap, SOFTCAP)
        lse = load_lse(lse_ptr, rows, last)[None, :]
        if MASKED:
            s, visible = masked(
                s, rows[None, :], offs_n[:, None], mask_ptr, stride_mask, last, key_start, key_stop, lower, upper,
                HAS_LOWER, HAS_UPPER,
            )  # fmt: skip
            visible = visible & (rows < last)[None, :]
            if mask_ptr is not None:
                # 0 · NaN = NaN: rows that see none of the keys must not be there at all.
                row_mask = (tl.max(visible.to(tl.int32), 0) > 0)[:, None]
                q, do = tl.where(row_mask, q, 0.0), tl.where(row_mask, do, 0.0)
            p = tl.where(visible, tl.exp2(s - lse), 0.0)
        else:
            p = tl.exp2(s - lse)
        if NEEDS_DV:
            do_part = do
            if dv.shape[1] != BLOCK_DV:
                do_part = _part_of(do_ptr, start_m, row_mask, stride_do, part, VALUE_DIM, BLOCK_M, dv.shape[1])
            dv = dot(rounded_to(p, do.dtype), do_part, dv, PRECISION)
        if NEEDS_DK:
            delta = load_rows(delta_ptr, rows, last)[None, :]
            ds = slope * p * dot(v, do.T, tl.zeros_like(p) - delta, PRECISION)
            if MASKED:
                ds = tl.where(visible, ds, 0.0)
            q_part = q
            if dk.shape[1] != BLOCK_D:
                q_part = _part_of(q_ptr, start_m, row_mask, stride_q, part, HEAD_DIM, BLOCK_M, dk.shape[1])
            dk = dot(rounded_to(ds, q.dtype), q_part, dk, PRECISION)
    return dk, dv


_VARYING = ["stride_rows", "seq_q", "seq_k", "num_tiles", "lower", "upper"]


@triton.jit(do_not_specialize=_VARYING)
def _ntk_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, mask_ptr, sequences, row_terms, dk_ptr, dv_ptr,
    stride_q, stride_k, stride_v, stride_do, stride_mask, stride_dk, stride_dv, stride_rows,
    seq_q, seq_k, num_tiles, num_heads_k, group, lower, upper, scale, softcap,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    start_n = tl.program_id(0) % num_tiles * BLOCK_N
    batch_head = tl.program_id(0) // num_tiles
    head_k = batch_head % num_heads_k
    batch = (batch_head // num_heads_k).to(tl.int64)
    tensor_batch, first_q, seq_q = locate_rows(sequences, batch, seq_q)
    first_k, seq_k, key_start, key_stop, lower, upper = locate_keys(sequences, batch, seq_q, seq_k, lower, upper)
    if start_n >= seq_k:
        return
    first, middle_first, middle_last, last = rows_of_keys(
        tl.maximum(start_n, key_start), tl.minimum(start_n + BLOCK_N, key_stop), seq_q, lower, upper, BLOCK_M, BLOCK_N,
        HAS_LOWER, HAS_UPPER, mask_ptr is not None,
    )  # fmt: skip

    k_ptr += tensor_batch * stride_k[0] + tl.cast(head_k, tl.int64) * stride_k[1] + first_k * stride_k[2]
    v_ptr += tensor_batch * stride_v[0] + tl.cast(head_k, tl.int64) * stride_v[1] + first_k * stride_v[2]
    k = load_tile(k_ptr, start_n, seq_k, stride_k[2], BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v = load_tile(v_ptr, start_n, seq_k, stride_v[2], BLOCK_N, VALUE_DIM, BLOCK_DV, True)
    part = tl.program_id(1)
    dk = tl.zeros([BLOCK_N, BLOCK_D // PARTS], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV // PARTS], tl.float32)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    for g in tl.range(0, group, num_stages=1):
        head = head_k * group + g
        q_head = q_ptr + tensor_batch * stride_q[0] + tl.cast(head, tl.int64) * stride_q[1] + first_q * stride_q[2]
        do_head = do_ptr + tensor_batch * stride_do[0] + tl.cast(head, tl.int64) * stride_do[1] + first_q * stride_do[2]
        first_row = (tensor_batch * num_heads_k * group + head) * stride_rows + first_q
        mask_head = mask_ptr
        if mask_ptr is not None:
            mask_head += batch * stride_mask[0] + tl.cast(head, tl.int64) * stride_mask[1]
        # Tiles that need masks (at the upper edge), tiles that need none, tiles at the lower edge (with a mask all).
        for section in tl.static_range(3):
            if section == 0:
                from_row, to_row = first, tl.minimum(middle_first, last)
            elif section == 1:
                from_row, to_row = middle_first, middle_last
            else:
                from_row, to_row = middle_last, last
            if (section == 0 and HAS_UPPER and mask_ptr is None) or (section == 1 and mask_ptr is None) or section == 2:
                dk, dv = _add_rows(
                    dk, dv, part, k, v, q_head, do_head, row_terms.lse + first_row, row_terms.delta + first_row,
                    stride_q[2], stride_do[2], mask_head, stride_mask, offs_n, last, from_row, to_row, key_start,
                    key_stop, lower, upper, scale, softcap, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_D, BLOCK_DV, HAS_LOWER,
                    HAS_UPPER, SOFTCAP, dk_ptr is not None, dv_ptr is not None, section != 1, PRECISION, STAGES,
                )  # fmt: skip

    offs_n = start_n + tl.program_id(2) + tl.arange(0, BLOCK_N)  # + 0, so that no address is held through the loops
    if dk_ptr is not None:
        dk_ptr += tensor_batch * stride_dk[0] + tl.cast(head_k, tl.int64) * stride_dk[1] + first_k * stride_dk[2]
        store_tile(dk_ptr, dk * (scale * _LN_2), offs_n, seq_k, stride_dk[2], part, HEAD_DIM, BLOCK_D // PARTS)
    if dv_ptr is not None:
        dv_ptr += tensor_batch * stride_dv[0] + tl.cast(head_k, tl.int64) * stride_dv[1] + first_k * stride_dv[2]
        store_tile(dv_ptr, dv, offs_n, seq_k, stride_dv[2], part, VALUE_DIM, BLOCK_DV // PARTS)


def dkdv_launch(call: Call, grad_out, row_terms: RowTerms, grad_key, grad_value, config: configs.TileConfig) -> Launch:
    """The launch that fills `grad_key` and `grad_value` (one may be None), but for rows of no packed sequence."""
    tensors = (
        call.query, call.key, call.value, grad_out, call.attn_mask, call.sequences, row_terms, grad_key, grad_value
    )  # fmt: skip
    details = layout(grad_out), layout(grad_key), layout(grad_value), row_terms.weights is None

    def describe():
        num_tiles, heads = ceil_div(call.seq_k, config.block_n), call.key.shape[1]
        scalars = (
            *map(strides, (call.query, call.key, call.value, grad_out)), call.mask_strides, strides(grad_key),
            strides(grad_value), row_terms.lse.shape[2], call.seq_q, call.seq_k, num_tiles, heads, call.group,
            call.lower, call.upper, call.scale * LOG2_E, call.softcap,
        )  # fmt: skip
        widths = [(call.blocks.block_d, grad_key), (call.blocks.block_dv, grad_value)]
        narrowest = min(width for width, grad in widths if grad is not None)
        parts = max(1, min(config.parts, narrowest // configs.least_dimension(call.arch)))
        constants = call.flags | call.sizes
        constants |= {
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "PARTS": parts,
            "STAGES": config.num_stages,
        }
        return (num_tiles * heads * call.batch, parts), scalars, constants

    return call.launch(_ntk_bwd_dkdv_kernel, tensors, config, describe, *details)


def run_dkdv(call: Call, grad_out, row_terms: RowTerms, grad_key, grad_value) -> None:
    """Fills `grad_key` and `grad_value`, each may be None."""
    targets = {"dkdv": (grad_key, grad_value)}
    if max(call.blocks.block_d, call.blocks.block_dv) > 128:
        targets = {"dk": (grad_key, None), "dv": (None, grad_value)}
    for kernel, grads in targets.items():
        if grads != (None, None):
            run_with_best_tiles(call, kernel, partial(dkdv_launch, call, grad_out, row_terms, *grads))
