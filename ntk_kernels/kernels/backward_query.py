"""Backward into the queries: dQ_i, through the input's keys, the state's own rows and its linear-attention term.

    dS_ij   = P_ij (dO_i·v_j - Δ_i)
    dφ_i    = Σ_c u_ic (Z_c dO_i - Δ'_i k_c)
    dlogw_ic = u_ic φ_i·(Z_c dO_i - Δ'_i k_c)
    dQ_i    = scale · Σ_j dS_ij k_j + feature_scale · φ'(x_i)ᵀ dφ_i + scale · Σ_c dlogw_ic μ_c

dlogw is stored as well where gradients of centres or log_scale are wanted. Without keys the prefix's dQ is added to
what is there.

Grid: as that of the forward.
"""

import triton
import triton.language as tl

from .backward_delta import RowTerms, load_lse, load_rows
from .host import configs
from .host.launch import Call, Launch, ceil_div, layout, strides
from .jit.prefix_term import locate_state
from .jit.prefix_term_grad import add_own_rows, linear_term_grad
from .jit.tiles import LN_2, LOG2_E, dot, load_tile, rounded_to, store_tile
from .jit.visibility import keys_of_rows, locate_keys, locate_rows, logits_and_slope, masked

_LN_2 = tl.constexpr(LN_2)


@triton.jit
def _add_keys(
    dq, q, do, lse, delta, k_ptr, v_ptr, stride_k, stride_v, mask_ptr, stride_mask, offs_m, seq_q, start, stop,
    visible_stop, lower, upper, scale, softcap,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq + Σ_j dS_ij k_j over keys from `start` to `stop`; only if MASKED may there be some that a row does not see."""
    for start_n in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        k = load_tile(k_ptr, start_n, visible_stop, stride_k, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
        v = load_tile(v_ptr, start_n, visible_stop, stride_v, BLOCK_N, VALUE_DIM, BLOCK_DV, MASKED)
        s = dot(q, k.T, None, PRECISION)
        s, slope = logits_and_slope(s, scale, softcap, SOFTCAP)
        if MASKED:
            keys = start_n + tl.arange(0, BLOCK_N)[None, :]
            s, visible = masked(
                s, offs_m[:, None], keys, mask_ptr, stride_mask, seq_q, start, visible_stop, lower, upper, HAS_LOWER,
                HAS_UPPER,
            )  # fmt: skip
            if mask_ptr is not None:
                # 0 · NaN = NaN: keys that no row sees must not be there at all.
                seen = tl.max((visible & (offs_m < seq_q)[:, None]).to(tl.int32), 0) > 0
                k = tl.where(seen[:, None], k, 0.0)
        ds = slope * tl.exp2(s - lse[:, None]) * (dot(do, v.T, None, PRECISION) - delta[:, None])
        if MASKED:
            ds = tl.where(visible, ds, 0.0)
        dq = dot(rounded_to(ds, k.dtype), k, dq, PRECISION)
    return dq


@triton.jit(do_not_specialize=["stride_rows", "seq_q", "seq_k", "num_tiles", "lower", "upper"])
def _ntk_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, state, mask_ptr, sequences, row_terms, dq_ptr, dlogw_ptr,
    stride_q, stride_k, stride_v, stride_do, stride_mask, stride_dq, stride_rows,
    seq_q, seq_k, num_tiles, num_heads, group, lower, upper, scale, softcap, feature_scale,
    FEATURE_MAP: tl.constexpr, NUM_FEATURES: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, LOGIT_PRECISION: tl.constexpr, PREFIX_PRECISION: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % num_tiles
    batch_head = tl.program_id(0) // num_tiles
    if HAS_UPPER:
        tile = num_tiles - 1 - tile
    head = (batch_head % num_heads).to(tl.int64)
    batch = (batch_head // num_heads).to(tl.int64)
    start_m = tile * BLOCK_M
    tensor_batch, first_q, seq_q = locate_rows(sequences, batch, seq_q)
    if start_m >= seq_q:
        return
    rows = start_m + tl.arange(0, BLOCK_M)
    row_mask = (rows < seq_q)[:, None]
    q_ptr += tensor_batch * stride_q[0] + head * stride_q[1] + first_q * stride_q[2]
    do_ptr += tensor_batch * stride_do[0] + head * stride_do[1] + first_q * stride_do[2]
    q_rows = q_ptr + rows.to(tl.int64)[:, None] * stride_q[2]
    do_rows = do_ptr + rows.to(tl.int64)[:, None] * stride_do[2]
    q = load_tile(q_ptr, start_m, seq_q, stride_q[2], BLOCK_M, HEAD_DIM, BLOCK_D, True)
    do = load_tile(do_ptr, start_m, seq_q, stride_do[2], BLOCK_M, VALUE_DIM, BLOCK_DV, True)
    state_head, num_centers, num_rows = locate_state(state, head, batch)
    first_row = (tensor_batch * num_heads + head) * stride_rows + first_q
    if FEATURE_MAP is None:
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    else:
        dlogw_head = dlogw_ptr
        first_weight = first_row + (tensor_batch * num_heads + head) * (state.num_centers - 1) * stride_rows
        if dlogw_ptr is not None:
            dlogw_head += first_weight
        dq = linear_term_grad(
            q, q_rows, do_rows, row_mask, rows, seq_q, state, state_head, num_centers, row_terms.weights + first_weight,
            load_rows(row_terms.mass_delta + first_row, rows, seq_q), dlogw_head, stride_rows, scale, feature_scale,
            FEATURE_MAP, NUM_FEATURES, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_D, BLOCK_DV, CHUNK, PREFIX_PRECISION,
            OPERAND, STAGES,
        )  # fmt: skip
    factor = scale * _LN_2
    if dq_ptr is not None and HAS_SCALE:
        dq = dq / factor  # so that dS enters as it is: times scale, small ones would be lost in float16
        lse = load_lse(row_terms.lse + first_row, rows, seq_q)
        delta = load_rows(row_terms.delta + first_row, rows, seq_q)
        if state.row_keys is not None:
            dq = add_own_rows(
                dq, q_rows, do_rows, row_mask, lse, delta, state, state_head, num_rows, scale, q.dtype,
                HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_D, CHUNK, PREFIX_PRECISION, LOGIT_PRECISION,
            )  # fmt: skip
        if k_ptr is not None:
            first_k, seq_k, start_n, stop_n, lower, upper = locate_keys(sequences, batch, seq_q, seq_k, lower, upper)
            start_n, middle_start, middle_stop, stop_n = keys_of_rows(
                start_m, tl.minimum(start_m + BLOCK_M, seq_q), start_n, stop_n, lower, upper, BLOCK_N, HAS_LOWER,
                HAS_UPPER, mask_ptr is not None,
            )  # fmt: skip
            head_k = head // group
            k_ptr += tensor_batch * stride_k[0] + head_k * stride_k[1] + first_k * stride_k[2]
            v_ptr += tensor_batch * stride_v[0] + head_k * stride_v[1] + first_k * stride_v[2]
            if mask_ptr is not None:
                mask_ptr += batch * stride_mask[0] + head * stride_mask[1]
        # Tiles that need masks (at the lower edge), tiles that need none, tiles at the upper edge (with a mask all).
        for part in tl.static_range(0 if k_ptr is None else 3):
            if part == 0:
                part_start, part_stop = start_n, tl.minimum(middle_start, stop_n)
            elif part == 1:
                part_start, part_stop = middle_start, middle_stop
            else:
                part_start, part_stop = middle_stop, stop_n
            if (part == 0 and HAS_LOWER and mask_ptr is None) or (part == 1 and mask_ptr is None) or part == 2:
                dq = _add_keys(
                    dq, q, do, lse, delta, k_ptr, v_ptr, stride_k[2], stride_v[2], mask_ptr, stride_mask, rows, seq_q,
                    part_start, part_stop, stop_n, lower, upper, scale, softcap, HEAD_DIM, VALUE_DIM, BLOCK_N,
                    BLOCK_D, BLOCK_DV, HAS_LOWER, HAS_UPPER, SOFTCAP, part != 1, PRECISION, STAGES,
                )  # fmt: skip
        dq = dq * factor
    if dq_ptr is not None:
        # + 0, which the compiler does not know, so that no address is held through the loops
        rows = start_m + tl.program_id(1) + tl.arange(0, BLOCK_M)
        dq_ptr += tensor_batch * stride_dq[0] + head * stride_dq[1] + first_q * stride_dq[2]
        if k_ptr is None:
            dq += load_tile(dq_ptr, start_m, seq_q, stride_dq[2], BLOCK_M, HEAD_DIM, BLOCK_D, True).to(tl.float32)
        store_tile(dq_ptr, dq, rows, seq_q, stride_dq[2], 0, HEAD_DIM, BLOCK_D)


def dq_launch(
    call: Call, grad_out, row_terms: RowTerms, grad_query, grad_log_weights, config: configs.TileConfig
) -> Launch:
    """The launch that fills `grad_query` (adds to it, without keys) and `grad_log_weights` [B, Hq, C, Lq] (each may be
    None), but for rows of no packed sequence or state."""
    tensors = (
        call.query, call.key, call.value, grad_out, call.state, call.attn_mask, call.sequences, row_terms, grad_query,
        grad_log_weights,
    )  # fmt: skip
    details = layout(grad_out), layout(grad_query), grad_log_weights is None, row_terms.weights is None

    def describe():
        num_tiles = ceil_div(call.seq_q, config.block_m)
        scalars = (
            *map(strides, (call.query, call.key, call.value, grad_out)), call.mask_strides, strides(grad_query),
            row_terms.lse.shape[2], call.seq_q, call.seq_k, num_tiles, call.heads, call.group, call.lower, call.upper,
            call.scale * LOG2_E, call.softcap, call.feature_scale,
        )  # fmt: skip
        constants = call.flags | call.prefix | call.sizes
        constants |= {
            "HAS_SCALE": call.scale != 0,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "STAGES": config.num_stages,
        }
        return (num_tiles * call.heads * call.batch,), scalars, constants

    return call.launch(_ntk_bwd_dq_kernel, tensors, config, describe, *details)
