"""Backward into the queries: dQ_i, through the input's keys, the state's own rows and its linear-attention term.

    dS_ij   = P_ij (dO_i·v_j - Δ_i)
    dφ_i    = Σ_c u_ic (Z_c dO_i - Δ'_i k_c)
    dlogw_ic = u_ic φ_i·(Z_c dO_i - Δ'_i k_c)
    dQ_i    = scale · Σ_j dS_ij k_j + feature_scale · φ'(x_i)ᵀ dφ_i + scale · Σ_c dlogw_ic μ_c

dlogw is stored as well where gradients of centres or log_scale are wanted.

Grid: as that of the forward.
"""

import triton
import triton.language as tl

from .host import configs
from .host.launch import Call, Kernel, Launch, ceil_div, strided
from .jit.prefix_term import locate_state
from .jit.prefix_term_grad import add_own_rows, linear_term_grad
from .jit.row_terms import RowTerms, load_lse, load_rows
from .jit.tiles import LN_2, dot, head_ptr, load_tile, rounded_to, store_tile
from .jit.visibility import (
    Band,
    HeadKeys,
    bounds_of_zone,
    keys_of_rows,
    locate_keys,
    locate_rows,
    logits_and_slope,
    mask_offset,
    masked,
)


@triton.jit
def _add_keys(dq, q, do, lse, delta, keys, offs_m, start, stop, band, scales, MASKED: tl.constexpr, dims):
    """dq + Σ_j dS_ij k_j over keys from `start` to `stop`; only if MASKED may there be some that a row does not see."""
    for start_n in tl.range(start, stop, dims.BLOCK_N, num_stages=dims.STAGES):
        k = load_tile(
            keys.k_ptr, start_n, band.stop, keys.keys.k.stride[2], dims.BLOCK_N, dims.HEAD_DIM, dims.BLOCK_D, MASKED
        )
        v = load_tile(
            keys.v_ptr, start_n, band.stop, keys.keys.v.stride[2], dims.BLOCK_N, dims.VALUE_DIM, dims.BLOCK_DV, MASKED
        )
        s = dot(q, k.T, None, dims.PRECISION)
        s, slope = logits_and_slope(s, scales, dims)
        if MASKED:
            offs_n = start_n + tl.arange(0, dims.BLOCK_N)[None, :]
            s, visible = masked(s, offs_m[:, None], offs_n, start, band, dims)
            if band.mask.ptr is not None:
                # 0 · NaN = NaN: keys that no row sees must not be there at all.
                seen = tl.max((visible & (offs_m < band.seq_q)[:, None]).to(tl.int32), 0) > 0
                k = tl.where(seen[:, None], k, 0.0)
        ds = slope * tl.exp2(s - lse[:, None]) * (dot(do, v.T, None, dims.PRECISION) - delta[:, None])
        if MASKED:
            ds = tl.where(visible, ds, 0.0)
        dq = dot(rounded_to(ds, k.dtype), k, dq, dims.PRECISION)
    return dq


@triton.jit(do_not_specialize=["stride_rows", "seq_q", "seq_k", "num_tiles", "lower", "upper"])
def _ntk_bwd_dq_kernel(
    query, keys, grad_out, state, mask, sequences, row_terms, grad_query, dlogw_ptr, stride_rows, seq_q, seq_k,
    num_tiles, num_heads, group, lower, upper, scales, dims,
):  # fmt: skip
    tile = tl.program_id(0) % num_tiles
    batch_head = tl.program_id(0) // num_tiles
    if dims.HAS_UPPER:
        tile = num_tiles - 1 - tile
    head = (batch_head % num_heads).to(tl.int64)
    batch = (batch_head // num_heads).to(tl.int64)
    start_m = tile * dims.BLOCK_M
    tensor_batch, first_q, seq_q = locate_rows(sequences, batch, seq_q)
    if start_m >= seq_q:
        return
    offs_m = start_m + tl.arange(0, dims.BLOCK_M)
    row_mask = (offs_m < seq_q)[:, None]
    q_ptr = head_ptr(query, tensor_batch, head, first_q)
    do_ptr = head_ptr(grad_out, tensor_batch, head, first_q)
    q_rows = q_ptr + offs_m.to(tl.int64)[:, None] * query.stride[2]
    do_rows = do_ptr + offs_m.to(tl.int64)[:, None] * grad_out.stride[2]
    q = load_tile(q_ptr, start_m, seq_q, query.stride[2], dims.BLOCK_M, dims.HEAD_DIM, dims.BLOCK_D, True)
    do = load_tile(do_ptr, start_m, seq_q, grad_out.stride[2], dims.BLOCK_M, dims.VALUE_DIM, dims.BLOCK_DV, True)
    state_head, num_centers, num_rows = locate_state(state, head, batch)
    first_row = (tensor_batch * num_heads + head) * stride_rows + first_q
    if dims.FEATURE_MAP is None:
        dq = tl.zeros([dims.BLOCK_M, dims.BLOCK_D], tl.float32)
    else:
        dq = linear_term_grad(
            q, q_rows, do_rows, row_mask, offs_m, seq_q, state, state_head, num_centers, row_terms, dlogw_ptr,
            tensor_batch * num_heads + head, first_q, stride_rows, scales, dims,
        )  # fmt: skip
    factor = scales.logit * LN_2
    if grad_query.ptr is not None and dims.HAS_SCALE:
        dq = dq / factor  # so that dS enters as it is: times scale, small ones would be lost in float16
        lse = load_lse(row_terms.lse + first_row, offs_m, seq_q)
        delta = load_rows(row_terms.delta + first_row, offs_m, seq_q)
        if state.row_keys is not None:
            dq = add_own_rows(
                dq, q_rows, do_rows, row_mask, lse, delta, state, state_head, num_rows, scales.logit, q.dtype, dims
            )
        first_k, seq_k, start_n, stop_n, lower, upper = locate_keys(sequences, batch, seq_q, seq_k, lower, upper)
        stop_m = tl.minimum(start_m + dims.BLOCK_M, seq_q)
        zones = keys_of_rows(start_m, stop_m, start_n, stop_n, lower, upper, mask.ptr is not None, dims)
        head_k = head // group
        k_ptr, v_ptr = head_ptr(keys.k, tensor_batch, head_k, first_k), head_ptr(keys.v, tensor_batch, head_k, first_k)
        keys = HeadKeys(k_ptr, v_ptr, keys, tensor_batch, head_k, first_k)
        band = Band(mask, mask_offset(mask, batch, head), seq_q, zones.stop, lower, upper)
        for zone in tl.static_range(3):
            if zone == 2 or (mask.ptr is None and (zone == 1 or dims.HAS_LOWER)):
                start, stop = bounds_of_zone(zones, zone)
                dq = _add_keys(dq, q, do, lse, delta, keys, offs_m, start, stop, band, scales, zone != 1, dims)
        dq = dq * factor
    if grad_query.ptr is not None:
        # + 0, opaque to the compiler, so that no address is held through the loops
        offs_m = start_m + tl.program_id(1) + tl.arange(0, dims.BLOCK_M)
        dq_ptr = head_ptr(grad_query, tensor_batch, head, first_q)
        store_tile(dq_ptr, dq, offs_m, seq_q, grad_query.stride[2], 0, dims.HEAD_DIM, dims.BLOCK_D)


def dq_launch(
    call: Call, grad_out, row_terms: RowTerms, grad_query, grad_log_weights, config: configs.TileConfig
) -> Launch:
    """The launch that fills `grad_query` and `grad_log_weights` [B, Hq, C, Lq] (each may be None), but for rows of no
    packed sequence or state."""
    kind, sizes = call.kind, call.sizes
    tensors = (
        call.query, call.keys, strided(grad_out), call.state, call.mask, call.sequences, row_terms,
        strided(grad_query), grad_log_weights,
    )  # fmt: skip

    num_tiles = ceil_div(sizes.seq_q, config.block_m)
    scalars = (
        row_terms.lse.shape[2], sizes.seq_q, sizes.seq_k, num_tiles, kind.heads, kind.group, sizes.lower, sizes.upper,
        kind.scales,
    )  # fmt: skip
    return kind.launch(
        _ntk_bwd_dq_kernel, (num_tiles * kind.heads * sizes.batch,), tensors, scalars, config, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, STAGES=config.num_stages,
    )  # fmt: skip


DQ = (Kernel("dq", dq_launch),)
