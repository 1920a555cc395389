"""First pass of the backward: what the other passes need to know of each query row.

    Δ_i  = dO_i·out_i - dlse_i
    Δ'_i = Δ_i where the prefix has mass, else 0     of states with a linear-attention term
    u_ic = w_ic e^{-lse_i}                           likewise; cut off at e^40 where there is no mass

Grid: one program for each tile of BLOCK_M rows, head and batch row (or packed sequence).
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .host import configs
from .host.launch import Call, Launch, ceil_div, layout, strides
from .jit.features import elu_mass, taylor_mass
from .jit.prefix_term import CAN_REORDER, MAX_WEIGHT, SMALLEST_MASS, center_logit, locate_state
from .jit.tiles import LOG2_E, load_tile
from .jit.visibility import locate_rows

_LOG2_E = tl.constexpr(LOG2_E)
_CAN_REORDER = tl.constexpr(CAN_REORDER)
_MAX_WEIGHT = tl.constexpr(MAX_WEIGHT)
_SMALLEST_MASS = tl.constexpr(SMALLEST_MASS)


class RowTerms(NamedTuple):
    """One number for each query row, [B, Hq, Lq]; `weights` one for each centre and row, [B, Hq, C, Lq]. Float32."""

    lse: object
    delta: object
    mass_delta: object  # None, as the weights, without a linear-attention term
    weights: object


@triton.jit
def load_rows(ptr, rows, seq_q):
    """[M] numbers of RowTerms, 0 beyond the last row."""
    return tl.load(ptr + rows, mask=rows < seq_q, other=0.0)


@triton.jit
def load_lse(ptr, rows, seq_q):
    """[M] lse in units of log 2; +inf, which makes e^{s - lse} 0, for rows that see nothing or do not exist."""
    lse = tl.load(ptr + rows, mask=rows < seq_q, other=float("inf")) * _LOG2_E
    return tl.where(lse == -float("inf"), float("inf"), lse)


@triton.jit(do_not_specialize=["stride_rows", "seq_q", "num_tiles"])
def _ntk_bwd_delta_kernel(
    q_ptr, out_ptr, do_ptr, dlse_ptr, state, sequences, row_terms, stride_q, stride_out, stride_do, stride_rows,
    seq_q, num_tiles, num_heads, scale, feature_scale,
    FEATURE_MAP: tl.constexpr, NUM_FEATURES: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    LOGIT_PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    start_m = tl.program_id(0) % num_tiles * BLOCK_M
    batch_head = tl.program_id(0) // num_tiles
    head = (batch_head % num_heads).to(tl.int64)
    batch = (batch_head // num_heads).to(tl.int64)
    tensor_batch, first_q, seq_q = locate_rows(sequences, batch, seq_q)
    if start_m >= seq_q:
        return
    rows = start_m + tl.arange(0, BLOCK_M)
    first_row = (tensor_batch * num_heads + head) * stride_rows + first_q

    out_ptr += tensor_batch * stride_out[0] + head * stride_out[1] + first_q * stride_out[2]
    do_ptr += tensor_batch * stride_do[0] + head * stride_do[1] + first_q * stride_do[2]
    out = load_tile(out_ptr, start_m, seq_q, stride_out[2], BLOCK_M, VALUE_DIM, BLOCK_DV, True).to(tl.float32)
    do = load_tile(do_ptr, start_m, seq_q, stride_do[2], BLOCK_M, VALUE_DIM, BLOCK_DV, True).to(tl.float32)
    delta = tl.sum(out * do, 1)
    if dlse_ptr is not None:
        delta -= load_rows(dlse_ptr + first_row, rows, seq_q)
    lse = load_lse(row_terms.lse + first_row, rows, seq_q)
    delta = tl.where(lse == float("inf"), 0.0, delta)  # of rows that see nothing, whatever the gradient of their lse
    tl.store(row_terms.delta + first_row + rows, delta, mask=rows < seq_q)

    if FEATURE_MAP is not None:
        state_head, num_centers, _ = locate_state(state, head, batch)
        q_ptr += tensor_batch * stride_q[0] + head * stride_q[1] + first_q * stride_q[2]
        q_rows = q_ptr + rows.to(tl.int64)[:, None] * stride_q[2]
        row_mask = (rows < seq_q)[:, None]
        weights_ptr = row_terms.weights + (tensor_batch * num_heads + head) * state.num_centers * stride_rows
        weights_ptr += first_q + rows
        # Σ_c w_ic φ(x_i)·k_c as the forward has it: l_i, relative to the largest w_ic that has mass, m_i.
        m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
        l_i = tl.zeros([BLOCK_M], tl.float32)
        largest = tl.zeros([BLOCK_M], tl.float32)
        for c in tl.range(0, num_centers, num_stages=1):
            center = state_head * state.num_centers + c
            logit = center_logit(q_rows, row_mask, state, center, scale, HEAD_DIM, BLOCK_M, CHUNK)
            u = tl.exp2(logit - lse)
            if FEATURE_MAP == "elu":
                k_ptr = state.k + center * NUM_FEATURES
                l_i = elu_mass(q_rows, row_mask, k_ptr, feature_scale, HEAD_DIM, BLOCK_M, CHUNK)
                m_i = logit
            else:
                mass = taylor_mass(
                    q_rows, row_mask, state.k + center * NUM_FEATURES, feature_scale, FEATURE_MAP, HEAD_DIM, BLOCK_M,
                    CHUNK, LOGIT_PRECISION,
                )  # fmt: skip
                u = tl.where(mass == 0, tl.minimum(u, _MAX_WEIGHT, propagate_nan=tl.PropagateNan.ALL), u)
                logit = tl.where(mass == 0, -float("inf"), logit)
                m_new = tl.maximum(m_i, logit)
                shift = tl.where(m_new == -float("inf"), 0.0, m_new)
                l_i = l_i * tl.exp2(m_i - shift) + mass * tl.exp2(logit - shift)
                m_i = m_new
            largest = tl.maximum(largest, u)
            tl.store(weights_ptr + c * tl.cast(stride_rows, tl.int64), u, mask=rows < seq_q)
        massless = (l_i < _SMALLEST_MASS) | (m_i == -float("inf"))
        tl.store(row_terms.mass_delta + first_row + rows, tl.where(massless, 0.0, delta), mask=rows < seq_q)
        # A mass that was rounded to the other side of 0 than in the forward must not set a weight free: u <= 1 / mass,
        # but for rounding, here a factor e.
        limit = tl.where(massless, _MAX_WEIGHT, tl.maximum(_MAX_WEIGHT, 2.7182818 / l_i))
        too_large = tl.reshape((largest > limit).to(tl.int32), [BLOCK_M], can_reorder=_CAN_REORDER)
        if tl.max(too_large, 0) > 0:
            tl.debug_barrier()  # what one thread stored another may load
            for c in tl.range(0, num_centers, num_stages=1):
                ptrs = weights_ptr + c * tl.cast(stride_rows, tl.int64)
                u = tl.load(ptrs, mask=rows < seq_q, other=0.0)
                u = tl.minimum(u, limit, propagate_nan=tl.PropagateNan.ALL)
                tl.store(ptrs, u, mask=rows < seq_q)


def delta_launch(call: Call, grad_out, grad_lse, out, row_terms: RowTerms, config: configs.TileConfig) -> Launch:
    """The launch that fills `delta`, and `mass_delta` and `weights` if there are any."""
    tensors = (call.query, out, grad_out, grad_lse, call.state, call.sequences, row_terms)
    details = layout(out), layout(grad_out), layout(grad_lse), row_terms.weights is None

    def describe():
        num_tiles = ceil_div(call.seq_q, config.block_m)
        scalars = (
            *map(strides, (call.query, out, grad_out)), row_terms.lse.shape[2], call.seq_q, num_tiles, call.heads,
            call.scale * LOG2_E, call.feature_scale,
        )  # fmt: skip
        constants = {"FEATURE_MAP": call.feature_map if row_terms.weights is not None else None}
        constants |= {name: call.prefix[name] for name in ("NUM_FEATURES", "LOGIT_PRECISION", "CHUNK")}
        constants |= {name: call.sizes[name] for name in ("HEAD_DIM", "VALUE_DIM", "BLOCK_DV")}
        constants |= {"BLOCK_M": config.block_m}
        return (num_tiles * call.heads * call.batch,), scalars, constants

    return call.launch(_ntk_bwd_delta_kernel, tensors, config, describe, *details)
