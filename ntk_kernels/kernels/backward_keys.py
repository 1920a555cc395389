"""Backward through the input's keys and values: dK_j and dV_j.

    P_ij = e^{s_ij - lse_i}    dV_j = Σ_i P_ij dO_i    dS_ij = P_ij (dO_i·v_j - Δ_i)    dK_j = scale · Σ_i dS_ij q_i

summed over the rows i that see key j and the query heads that share it, in a fixed order. Scores are taken transposed,
[N, M]: P and dS are then the left sides of products, which Hopper reads from registers.

Wide gradients are cut into SLICES of their columns, a program each, as no tile of them fits into the registers.

Grid: (tiles of BLOCK_N keys · key/value heads · batch rows or packed sequences, SLICES). The tiles of a head lie side
by side, so that they share the queries in the L2 cache.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .host import configs
from .host.launch import Call, Kernel, Launch, ceil_div, run_pass, strided
from .jit.features import load_columns
from .jit.row_terms import RowTerms, load_lse, load_rows
from .jit.tiles import LN_2, dot, head_ptr, load_tile, rounded_to, store_tile
from .jit.visibility import (
    Band,
    HeadKeys,
    bounds_of_zone,
    locate_keys,
    locate_rows,
    logits_and_slope,
    mask_offset,
    masked,
    rows_of_keys,
)


class _HeadRows(NamedTuple):
    """Rows of a query head, from the first of a sequence on."""

    q_ptr: object
    do_ptr: object
    stride_q: object
    stride_do: object
    lse_ptr: object
    delta_ptr: object


@triton.jit
def _slice_of(ptr, start, row_mask, stride, slice_, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of the rows from `start` on of a matrix with DIM columns."""
    rows = ptr + start * tl.cast(stride, tl.int64) + tl.arange(0, ROWS)[:, None] * stride
    return load_columns(rows, row_mask, slice_ * COLUMNS, DIM, COLUMNS)


@triton.jit
def _add_rows(
    dk, dv, slice_, k, v, rows, offs_n, start, stop, key_start, band, scales, NEEDS_DK: tl.constexpr,
    NEEDS_DV: tl.constexpr, MASKED: tl.constexpr, dims,
):  # fmt: skip
    """Adds the rows from `start` to `stop`; only if MASKED may there be some that do not see all keys.

    `band.seq_q` is the end of the rows that see any.
    """
    for start_m in tl.range(start, stop, dims.BLOCK_M, num_stages=dims.STAGES):
        q = load_tile(rows.q_ptr, start_m, band.seq_q, rows.stride_q, dims.BLOCK_M, dims.HEAD_DIM, dims.BLOCK_D, MASKED)
        do = load_tile(
            rows.do_ptr, start_m, band.seq_q, rows.stride_do, dims.BLOCK_M, dims.VALUE_DIM, dims.BLOCK_DV, MASKED
        )
        offs_m = start_m + tl.arange(0, dims.BLOCK_M)
        row_mask = (offs_m < band.seq_q)[:, None]
        s = dot(k, q.T, None, dims.PRECISION)
        s, slope = logits_and_slope(s, scales, dims)
        lse = load_lse(rows.lse_ptr, offs_m, band.seq_q)[None, :]
        if MASKED:
            s, visible = masked(s, offs_m[None, :], offs_n[:, None], key_start, band, dims)
            visible = visible & (offs_m < band.seq_q)[None, :]
            if band.mask.ptr is not None:
                # 0 · NaN = NaN: rows that see none of the keys must not be there at all.
                row_mask = (tl.max(visible.to(tl.int32), 0) > 0)[:, None]
                q, do = tl.where(row_mask, q, 0.0), tl.where(row_mask, do, 0.0)
            p = tl.where(visible, tl.exp2(s - lse), 0.0)
        else:
            p = tl.exp2(s - lse)
        if NEEDS_DV:
            do_slice = do
            if dv.shape[1] != dims.BLOCK_DV:
                do_slice = _slice_of(
                    rows.do_ptr, start_m, row_mask, rows.stride_do, slice_, dims.VALUE_DIM, dims.BLOCK_M, dv.shape[1]
                )
            dv = dot(rounded_to(p, do.dtype), do_slice, dv, dims.PRECISION)
        if NEEDS_DK:
            delta = load_rows(rows.delta_ptr, offs_m, band.seq_q)[None, :]
            ds = slope * p * dot(v, do.T, tl.zeros_like(p) - delta, dims.PRECISION)
            if MASKED:
                ds = tl.where(visible, ds, 0.0)
            q_slice = q
            if dk.shape[1] != dims.BLOCK_D:
                q_slice = _slice_of(
                    rows.q_ptr, start_m, row_mask, rows.stride_q, slice_, dims.HEAD_DIM, dims.BLOCK_M, dk.shape[1]
                )
            dk = dot(rounded_to(ds, q.dtype), q_slice, dk, dims.PRECISION)
    return dk, dv


_VARYING = ["stride_rows", "seq_q", "seq_k", "num_tiles", "lower", "upper"]


@triton.jit(do_not_specialize=_VARYING)
def _ntk_bwd_dkdv_kernel(
    query, keys, grad_out, mask, sequences, row_terms, grad_key, grad_value, stride_rows, seq_q, seq_k, num_tiles,
    num_heads_k, group, lower, upper, scales, dims,
):  # fmt: skip
    start_n = tl.program_id(0) % num_tiles * dims.BLOCK_N
    batch_head = tl.program_id(0) // num_tiles
    head_k = batch_head % num_heads_k
    batch = (batch_head // num_heads_k).to(tl.int64)
    tensor_batch, first_q, seq_q = locate_rows(sequences, batch, seq_q)
    first_k, seq_k, key_start, key_stop, lower, upper = locate_keys(sequences, batch, seq_q, seq_k, lower, upper)
    if start_n >= seq_k:
        return
    zones = rows_of_keys(
        tl.maximum(start_n, key_start), tl.minimum(start_n + dims.BLOCK_N, key_stop), seq_q, lower, upper,
        mask.ptr is not None, dims,
    )  # fmt: skip

    k_ptr, v_ptr = head_ptr(keys.k, tensor_batch, head_k, first_k), head_ptr(keys.v, tensor_batch, head_k, first_k)
    keys = HeadKeys(k_ptr, v_ptr, keys, tensor_batch, head_k, first_k)
    k = load_tile(keys.k_ptr, start_n, seq_k, keys.keys.k.stride[2], dims.BLOCK_N, dims.HEAD_DIM, dims.BLOCK_D, True)
    v = load_tile(keys.v_ptr, start_n, seq_k, keys.keys.v.stride[2], dims.BLOCK_N, dims.VALUE_DIM, dims.BLOCK_DV, True)
    slice_ = tl.program_id(1)
    dk = tl.zeros([dims.BLOCK_N, dims.BLOCK_D // dims.SLICES], tl.float32)
    dv = tl.zeros([dims.BLOCK_N, dims.BLOCK_DV // dims.SLICES], tl.float32)
    offs_n = start_n + tl.arange(0, dims.BLOCK_N)
    for g in tl.range(0, group, num_stages=1):
        head = head_k * group + g
        first_row = (tensor_batch * num_heads_k * group + head) * stride_rows + first_q
        rows = _HeadRows(
            head_ptr(query, tensor_batch, head, first_q), head_ptr(grad_out, tensor_batch, head, first_q),
            query.stride[2], grad_out.stride[2], row_terms.lse + first_row, row_terms.delta + first_row,
        )  # fmt: skip
        band = Band(mask, mask_offset(mask, batch, head), zones.stop, key_stop, lower, upper)
        for zone in tl.static_range(3):
            if zone == 2 or (mask.ptr is None and (zone == 1 or dims.HAS_UPPER)):
                start, stop = bounds_of_zone(zones, zone)
                dk, dv = _add_rows(
                    dk, dv, slice_, k, v, rows, offs_n, start, stop, key_start, band, scales,
                    grad_key.ptr is not None, grad_value.ptr is not None, zone != 1, dims,
                )  # fmt: skip

    offs_n = start_n + tl.program_id(2) + tl.arange(0, dims.BLOCK_N)  # + 0: no address is held through the loops
    if grad_key.ptr is not None:
        dk_ptr = head_ptr(grad_key, tensor_batch, head_k, first_k)
        store_tile(
            dk_ptr, dk * (scales.logit * LN_2), offs_n, seq_k, grad_key.stride[2], slice_, dims.HEAD_DIM,
            dims.BLOCK_D // dims.SLICES,
        )  # fmt: skip
    if grad_value.ptr is not None:
        dv_ptr = head_ptr(grad_value, tensor_batch, head_k, first_k)
        store_tile(
            dv_ptr, dv, offs_n, seq_k, grad_value.stride[2], slice_, dims.VALUE_DIM, dims.BLOCK_DV // dims.SLICES
        )


def dkdv_launch(call: Call, grad_out, row_terms: RowTerms, grad_key, grad_value, config: configs.TileConfig) -> Launch:
    """The launch that fills `grad_key` and `grad_value` (one may be None), but for rows of no packed sequence."""
    kind, sizes = call.kind, call.sizes
    tensors = (
        call.query, call.keys, strided(grad_out), call.mask, call.sequences, row_terms, strided(grad_key),
        strided(grad_value),
    )  # fmt: skip

    num_tiles = ceil_div(sizes.seq_k, config.block_n)
    scalars = (
        row_terms.lse.shape[2], sizes.seq_q, sizes.seq_k, num_tiles, kind.kv_heads, kind.group, sizes.lower,
        sizes.upper, kind.scales,
    )  # fmt: skip
    widths = [(kind.blocks.block_d, grad_key), (kind.blocks.block_dv, grad_value)]
    min_width = min(width for width, grad in widths if grad is not None)
    slices = max(1, min(config.slices, min_width // configs.min_dot_dimension(kind.arch)))
    return kind.launch(
        _ntk_bwd_dkdv_kernel, (num_tiles * kind.kv_heads * sizes.batch, slices), tensors, scalars, config,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, SLICES=slices, STAGES=config.num_stages,
    )  # fmt: skip


DKDV = (Kernel("dkdv", dkdv_launch),)
DK, DV = (Kernel("dk", dkdv_launch),), (Kernel("dv", dkdv_launch),)  # one by one, where both are too many registers


def run_dkdv(call: Call, grad_out, row_terms: RowTerms, grad_key, grad_value) -> None:
    """Fills `grad_key` and `grad_value`, each may be None."""
    if max(call.kind.blocks.block_d, call.kind.blocks.block_dv) <= 128:
        passes = [(DKDV, grad_key, grad_value)]
    else:
        passes = [(DK, grad_key, None), (DV, None, grad_value)]
    for kernels, *grads in passes:
        if any(grad is not None for grad in grads):
            run_pass(kernels, call, grad_out, row_terms, *grads)
