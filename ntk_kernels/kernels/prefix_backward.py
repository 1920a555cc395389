"""Jit helpers for the gradient of a tile of query rows through a prefix state, in the notation of `backward_query.py`.

`do_rows` [M, 1] points at the rows of dO as `q_rows` does at those of q.
"""

import triton
import triton.language as tl

from .features import elu_of, load_columns, pair_start, row_dot, square_start
from .tiles import LN_2, LOG2_E, load_tile, state_dot

_LN_2, _LOG2_E = tl.constexpr(LN_2), tl.constexpr(LOG2_E)
_SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def grad_of_features(
    do_rows, row_mask, mass_delta, z_ptr, k_ptr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """[M, BLOCK_D]: Z_f·dO_i - k_f Δ'_i for the HEAD_DIM features whose rows of z and k begin at the pointers."""
    grad = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    features = tl.arange(0, BLOCK_D)
    for start in tl.range(0, VALUE_DIM, CHUNK, num_stages=1):
        do = load_columns(do_rows, row_mask, start, VALUE_DIM, CHUNK)
        columns = start + tl.arange(0, CHUNK)
        z = tl.load(
            z_ptr + features[None, :] * VALUE_DIM + columns[:, None],
            mask=(features < HEAD_DIM)[None, :] & (columns < VALUE_DIM)[:, None], other=0.0,
        )  # fmt: skip
        grad = state_dot(do, z, grad, OPERAND, 2, PRECISION)
    k = tl.load(k_ptr + features, mask=features < HEAD_DIM, other=0.0).to(tl.float32)
    return grad - mass_delta[:, None] * k[None, :]


@triton.jit
def grad_of_pairs(
    do, q_rows, row_mask, mass_delta, z_ptr, k_ptr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
    OPERAND: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[M, BLOCK_D]: Σ_{a≠b} q_a (Z_ab·dO_i - k_ab Δ'_i) for each b: the gradient of x_b but for feature_scale².

    Each pair is read twice, for x_a and for x_b, so that nothing has to be added to a single column of a tile.
    """
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    columns = tl.arange(0, BLOCK_DV)[:, None]
    b = tl.arange(0, BLOCK_D)
    for a in tl.range(0, HEAD_DIM, num_stages=STAGES):
        pair = tl.where(b > a, pair_start(a, HEAD_DIM) + b, pair_start(b, HEAD_DIM) + a)
        exists = (b != a) & (b < HEAD_DIM)
        z = tl.load(
            z_ptr + pair[None, :] * VALUE_DIM + columns, mask=exists[None, :] & (columns < VALUE_DIM), other=0.0
        )
        k = tl.load(k_ptr + pair, mask=exists, other=0.0).to(tl.float32)
        q_a = tl.load(q_rows + a, mask=row_mask, other=0.0).to(tl.float32)
        grad = state_dot(do, z, None, OPERAND, 1, PRECISION)
        total += q_a * (grad - mass_delta[:, None] * k[None, :])
    return total


@triton.jit
def add_linear_term(
    dq, q, do, q_rows, do_rows, row_mask, rows, seq_q, state, head, num_centers, weights_ptr, mass_delta, dlogw_ptr,
    stride_rows, scale, feature_scale, FEATURE_MAP: tl.constexpr, NUM_FEATURES: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq + the gradient through features and weights of the linear-attention term; stores dlogw if asked to."""
    x = q.to(tl.float32) * feature_scale
    for c in tl.range(0, num_centers, num_stages=1):
        center = head * state.num_centers + c
        z_ptr, k_ptr = state.z + center * NUM_FEATURES * VALUE_DIM, state.k + center * NUM_FEATURES
        u = tl.load(weights_ptr + c * tl.cast(stride_rows, tl.int64) + rows, mask=rows < seq_q, other=0.0)
        if FEATURE_MAP == "elu":
            grad = grad_of_features(
                do_rows, row_mask, mass_delta, z_ptr, k_ptr, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_D, CHUNK, PRECISION,
                OPERAND,
            )  # fmt: skip
            phi = elu_of(x)
            dlogw = tl.sum(grad * phi, 1)
            dx = grad * tl.minimum(phi, 1.0, propagate_nan=tl.PropagateNan.ALL)  # φ' = 1 for x > 0, e^x = φ below
        else:
            dx = grad_of_features(
                do_rows, row_mask, mass_delta, z_ptr + VALUE_DIM, k_ptr + 1, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_D,
                CHUNK, PRECISION, OPERAND,
            )  # fmt: skip
            dlogw = row_dot(do_rows, row_mask, z_ptr, VALUE_DIM, BLOCK_M, CHUNK)
            dlogw += tl.sum(dx * x, 1) - mass_delta * tl.load(k_ptr).to(tl.float32)
            if FEATURE_MAP == "taylor2":
                first = square_start(HEAD_DIM)
                squares = grad_of_features(
                    do_rows, row_mask, mass_delta, z_ptr + first * VALUE_DIM, k_ptr + first, HEAD_DIM, VALUE_DIM,
                    BLOCK_M, BLOCK_D, CHUNK, PRECISION, OPERAND,
                )  # fmt: skip
                squares = squares * x * _SQRT_HALF
                pairs = feature_scale * grad_of_pairs(
                    do, q_rows, row_mask, mass_delta, z_ptr, k_ptr, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_D, BLOCK_DV,
                    PRECISION, OPERAND, STAGES,
                )  # fmt: skip
                dlogw += tl.sum((squares + 0.5 * pairs) * x, 1)
                dx += 2.0 * squares + pairs
        dlogw = u * dlogw
        dq += (feature_scale * u)[:, None] * dx
        if state.centers is not None:
            columns = tl.arange(0, BLOCK_D)
            mu = tl.load(state.centers + center * HEAD_DIM + columns, mask=columns < HEAD_DIM, other=0.0)
            dq += (dlogw * (scale * _LN_2))[:, None] * mu.to(tl.float32)[None, :]
        if dlogw_ptr is not None:
            tl.store(dlogw_ptr + c * tl.cast(stride_rows, tl.int64) + rows, dlogw, mask=rows < seq_q)
    return dq


@triton.jit
def row_logits(q, k, state, head, rows, num_rows, scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """[M, N] logits of a tile k of the state's own rows, -inf beyond the last."""
    s = state_dot(q, k.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), q.dtype, 3, PRECISION) * scale
    if state.row_bias is not None:
        bias = tl.load(state.row_bias + head * state.num_rows + rows, mask=rows < num_rows, other=0.0)
        s += bias.to(tl.float32)[None, :] * _LOG2_E
    return tl.where((rows < num_rows)[None, :], s, -float("inf"))


@triton.jit
def add_own_rows(
    dq, q, do, lse, delta, state, head, num_rows, scale, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr, LOGIT_PRECISION: tl.constexpr,
):  # fmt: skip
    """dq + Σ_j dS_ij κ_j over the state's own rows."""
    keys = state.row_keys + head * state.num_rows * HEAD_DIM
    values = state.row_values + head * state.num_rows * VALUE_DIM
    for start in tl.range(0, num_rows, BLOCK_N, num_stages=1):
        k = load_tile(keys, start, num_rows, HEAD_DIM, BLOCK_N, HEAD_DIM, BLOCK_D, True)
        v = load_tile(values, start, num_rows, VALUE_DIM, BLOCK_N, VALUE_DIM, BLOCK_DV, True)
        rows = start + tl.arange(0, BLOCK_N)
        s = row_logits(q, k, state, head, rows, num_rows, scale, BLOCK_M, BLOCK_N, LOGIT_PRECISION)
        p = tl.exp2(s - lse[:, None])
        dp = state_dot(do, v.T, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), q.dtype, 2, PRECISION)
        dq = state_dot(p * (dp - delta[:, None]), k, dq, q.dtype, 2, PRECISION)
    return dq
