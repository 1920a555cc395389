"""Backward of the pass that adds the prefix (`add_prefix.py`): all gradients through the prefix in one pass.

    Δ_i  = dO_i·out_i - dlse_i                  Δ'_i = Δ_i where the prefix has mass, else 0
    dx_i = Z dO_i - Δ'_i k                      dQ_i += feature_scale · u_i φ'(x_i)ᵀ dx_i + scale · dβ_i μ
    dZ   = Σ_i u_i φ_i dO_iᵀ                    dk = -Σ_i u_i Δ'_i φ_i
    dβ_i = u_i φ_i·(Z dO_i - Δ'_i k)            dμ = scale · Σ_i dβ_i q_i,   dβ = Σ_i dβ_i

with u_i = w_i e^{-lse_i}, cut off at e^40 where there is no mass. For calls in which all batch rows use one state; the
others take the passes of `backward.py`. Each program keeps Z and its sums, and walks tiles of the query rows that use
one head of the state, of which the next are on their way.

Grid: (heads of the state, splits); a split takes every n-th tile of BLOCK_M rows. The splits' sums are added up
afterwards, so that two runs agree bit for bit.
"""

from functools import partial

import torch
import triton
import triton.language as tl

from .add_prefix import features_and_mass, load_state, takes
from .backward_delta import load_lse
from .backward_state import StateGrads, added_up
from .host import configs
from .host.launch import Call, Launch, ceil_div, layout, run_with_best_tiles, strides
from .jit.prefix_term import MAX_WEIGHT, SMALLEST_MASS
from .jit.tiles import LN_2, LOG2_E, dot, load_tile, rounded_to, store_tile

_LN_2 = tl.constexpr(LN_2)
_SMALLEST_MASS, _MAX_WEIGHT = tl.constexpr(SMALLEST_MASS), tl.constexpr(MAX_WEIGHT)


@triton.jit(do_not_specialize=["stride_rows", "seq_q", "batch", "num_tiles"])
def _prefix_pass_backward_kernel(
    q_ptr, do_ptr, out_ptr, lse_ptr, dlse_ptr, state, dq_ptr, grads, stride_q, stride_do, stride_out, stride_dq,
    stride_rows, seq_q, batch, num_tiles, num_heads, scale, feature_scale,
    FEATURE_MAP: tl.constexpr, NUM_FEATURES: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PREFIX_PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    head_of_state = tl.program_id(0)
    HAS_CENTER: tl.constexpr = state.centers is not None
    z, k, mu, z_0, k_0, beta = load_state(
        state, head_of_state.to(tl.int64), FEATURE_MAP, NUM_FEATURES, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV
    )
    dz = tl.zeros([BLOCK_DV, BLOCK_D], tl.float32)
    dk = tl.zeros([BLOCK_D], tl.float32)
    dz_0 = tl.zeros([BLOCK_DV], tl.float32)
    dk_0 = tl.zeros([BLOCK_M], tl.float32)
    dcenter = tl.zeros([BLOCK_D], tl.float32)
    dlog_scale = tl.zeros([BLOCK_M], tl.float32)
    tiles_of_state = batch * state.query_heads_per_head * num_tiles
    for tile in tl.range(tl.program_id(1), tiles_of_state, tl.num_programs(1), num_stages=STAGES):
        start_m = tile % num_tiles * BLOCK_M
        head = (tile // num_tiles % state.query_heads_per_head).to(tl.int64)
        head += head_of_state * state.query_heads_per_head
        row = (tile // num_tiles // state.query_heads_per_head).to(tl.int64)
        rows = start_m + tl.arange(0, BLOCK_M)
        first_row = (row * num_heads + head) * stride_rows
        q_head = q_ptr + row * stride_q[0] + head * stride_q[1]
        do_head = do_ptr + row * stride_do[0] + head * stride_do[1]
        out_head = out_ptr + row * stride_out[0] + head * stride_out[1]
        q = load_tile(q_head, start_m, seq_q, stride_q[2], BLOCK_M, HEAD_DIM, BLOCK_D, True).to(tl.float32)
        do = load_tile(do_head, start_m, seq_q, stride_do[2], BLOCK_M, VALUE_DIM, BLOCK_DV, True)
        out = load_tile(out_head, start_m, seq_q, stride_out[2], BLOCK_M, VALUE_DIM, BLOCK_DV, True)
        lse = load_lse(lse_ptr + first_row, rows, seq_q)
        delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
        if dlse_ptr is not None:
            delta -= tl.load(dlse_ptr + first_row + rows, mask=rows < seq_q, other=0.0)
        delta = tl.where(lse == float("inf"), 0.0, delta)

        phi, mass, logit = features_and_mass(q, k, mu, k_0, beta, scale, feature_scale, FEATURE_MAP, HAS_CENTER)
        massless = (mass < _SMALLEST_MASS) | (logit == -float("inf"))
        delta = tl.where(massless, 0.0, delta)
        # u <= 1 / mass, but for rounding, here a factor e.
        limit = tl.where(massless, _MAX_WEIGHT, tl.maximum(_MAX_WEIGHT, 2.7182818 / mass))
        u = tl.minimum(tl.exp2(logit - lse), limit, propagate_nan=tl.PropagateNan.ALL)

        if grads.z is not None or grads.k is not None:
            weighted = u[:, None] * phi
            if grads.z is not None:
                # The computed side on the right: transposed, on the left, Hopper reads it wrong (fla issue 640).
                dz = dot(do.T, rounded_to(weighted, do.dtype), dz, PREFIX_PRECISION)
                if FEATURE_MAP == "taylor1":
                    dz_0 += tl.sum(u[:, None] * do.to(tl.float32), 0)
            if grads.k is not None:
                dk -= tl.sum(weighted * delta[:, None], 0)
                if FEATURE_MAP == "taylor1":
                    dk_0 -= u * delta
        if dq_ptr is not None or grads.centers is not None or grads.log_scale is not None:
            dx = dot(do, z.T, None, PREFIX_PRECISION) - delta[:, None] * k[None, :]
            dbeta = tl.sum(dx * phi, 1)
            if FEATURE_MAP == "elu":
                dx = dx * tl.minimum(phi, 1.0, propagate_nan=tl.PropagateNan.ALL)  # φ' = 1 for x > 0, φ below
            else:
                dbeta += tl.sum(do.to(tl.float32) * z_0[None, :], 1) - delta * k_0
            dbeta *= u
            if dq_ptr is not None:
                dq_head = dq_ptr + row * stride_dq[0] + head * stride_dq[1]
                dq = load_tile(dq_head, start_m, seq_q, stride_dq[2], BLOCK_M, HEAD_DIM, BLOCK_D, True).to(tl.float32)
                dq += (feature_scale * u)[:, None] * dx
                if HAS_CENTER:
                    dq += (dbeta * (scale * _LN_2))[:, None] * mu[None, :]
                store_tile(dq_head, dq, rows, seq_q, stride_dq[2], 0, HEAD_DIM, BLOCK_D)
            if grads.log_scale is not None:
                dlog_scale += dbeta
            if grads.centers is not None:
                dcenter += tl.sum(dbeta[:, None] * q, 0)

    center = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + head_of_state
    features, values = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    CONSTANTS: tl.constexpr = NUM_FEATURES - HEAD_DIM
    if grads.z is not None:
        dz_ptr = grads.z + center * NUM_FEATURES * VALUE_DIM
        if CONSTANTS == 1:
            tl.store(dz_ptr + values, dz_0, mask=values < VALUE_DIM)
        ptrs = dz_ptr + (CONSTANTS + features)[None, :] * VALUE_DIM + values[:, None]
        tl.store(ptrs, dz, mask=(features < HEAD_DIM)[None, :] & (values < VALUE_DIM)[:, None])
    if grads.k is not None:
        if CONSTANTS == 1:
            tl.store(grads.k + center * NUM_FEATURES, tl.sum(dk_0, 0))
        tl.store(grads.k + center * NUM_FEATURES + CONSTANTS + features, dk, mask=features < HEAD_DIM)
    if grads.centers is not None:
        tl.store(grads.centers + center * HEAD_DIM + features, dcenter * (scale * _LN_2), mask=features < HEAD_DIM)
    if grads.log_scale is not None:
        tl.store(grads.log_scale + center, tl.sum(dlog_scale, 0))


def takes_backward(call: Call) -> bool:
    """Whether the gradients of a call without keys are for this pass."""
    fits = call.state.centers is None or max(call.blocks.block_d, call.blocks.block_dv) <= 64  # into the registers
    return takes(call) and fits and call.state.index is None and call.sequences.cu_seqlens_q is None


def prefix_pass_backward_launch(
    call: Call, grad_out, grad_lse, out, lse, grad_query, grads: StateGrads, splits: int, config: configs.TileConfig
) -> Launch:
    """The launch that adds the prefix's gradient to `grad_query` (may be None) and fills `grads` [splits, ...]."""
    tensors = (call.query, grad_out, out, lse, grad_lse, call.state, grad_query, grads)
    wanted = tuple(tensor is not None for tensor in grads)
    details = splits, layout(grad_out), layout(out), layout(grad_lse), layout(grad_query), wanted

    def describe():
        scalars = (
            *map(strides, (call.query, grad_out, out, grad_query)), lse.shape[2], call.seq_q, call.batch,
            ceil_div(call.seq_q, config.block_m), call.heads, call.scale * LOG2_E, call.feature_scale,
        )  # fmt: skip
        constants = {name: call.prefix[name] for name in ("FEATURE_MAP", "NUM_FEATURES", "PREFIX_PRECISION")}
        constants |= call.sizes | {"BLOCK_M": config.block_m, "STAGES": config.num_stages}
        return (call.state.num_heads, splits), scalars, constants

    return call.launch(_prefix_pass_backward_kernel, tensors, config, describe, *details)


def run_prefix_pass_backward(
    call: Call, grad_out, grad_lse, out, lse, grad_query, wanted: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Adds to `grad_query` (may be None); gives the gradients of the `wanted` tensors of the state."""
    # One program for each multiprocessor, if there are as many tiles.
    tiles = call.batch * call.state.query_heads_per_head * ceil_div(call.seq_q, 64)
    splits = max(1, min(configs.multiprocessors(call.query.device) // call.state.num_heads, tiles))
    sums = {name: lse.new_empty(splits, *tensor.shape) for name, tensor in wanted.items()}
    grads = StateGrads(**dict.fromkeys(StateGrads._fields) | sums)
    launch_with = partial(
        prefix_pass_backward_launch, call, grad_out, grad_lse, out, lse, grad_query, grads, splits
    )  # fmt: skip
    run_with_best_tiles(call, "prefix_pass_backward", launch_with, (grad_query,))
    return added_up(grads, wanted)
