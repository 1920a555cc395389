"""Jit helpers for the gradient of a tile of query rows through a prefix state, in the notation of `backward_query.py`.

`do_rows` [M, 1] points at the rows of dO as `q_rows` does at those of q.
"""

import triton
import triton.language as tl

from .features import elu_of, load_column, load_columns, pair_start, row_dot, square_start
from .tiles import LN_2, LOG2_E, load_tile, state_dot

_LN_2, _LOG2_E = tl.constexpr(LN_2), tl.constexpr(LOG2_E)
_SQRT_2 = tl.constexpr(1.4142135623730951)


@triton.jit
def dot_rows(
    acc, a_rows, row_mask, b_ptr, num_rows, DIM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    MODEL: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [M, BLOCK] + a @ bᵀ for rows a [M, DIM] of the model and b [num_rows, DIM] of a state, by CHUNK columns."""
    rows = tl.arange(0, BLOCK)[None, :]
    for start in tl.range(0, DIM, CHUNK, num_stages=1):
        a = load_columns(a_rows, row_mask, start, DIM, CHUNK)
        columns = start + tl.arange(0, CHUNK)[:, None]
        b = tl.load(b_ptr + rows * DIM + columns, mask=(rows < num_rows) & (columns < DIM), other=0.0)
        acc = state_dot(a, b, acc, MODEL, PARTS, PRECISION)
    return acc


@triton.jit
def add_features_grad(
    grad, do_rows, row_mask, mass_delta, z_ptr, k_ptr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """grad [M, BLOCK_D] + Z_f·dO_i - k_f Δ'_i for the HEAD_DIM features f whose rows of z and k begin there."""
    PARTS: tl.constexpr = 1 if OPERAND == tl.bfloat16 else 2
    grad = dot_rows(grad, do_rows, row_mask, z_ptr, HEAD_DIM, VALUE_DIM, BLOCK_D, CHUNK, OPERAND, PARTS, PRECISION)
    features = tl.arange(0, BLOCK_D)
    k = tl.load(k_ptr + features, mask=features < HEAD_DIM, other=0.0).to(tl.float32)
    return grad - mass_delta[:, None] * k[None, :]


@triton.jit
def add_pairs_grad(
    dx, q_rows, do_rows, row_mask, mass_delta, z_ptr, k_ptr, feature_scale, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
    OPERAND: tl.constexpr, STAGES: tl.constexpr, mu_ptr=None,
):  # fmt: skip
    """dx + Σ_{a≠b} x_a (Z_ab·dO_i - k_ab Δ'_i), [M, BLOCK_D] for every b.

    Each pair is read twice, for x_a and for x_b, so that nothing has to be added to a single column of a tile.
    """
    # Wide heads have no registers for a second tile, nor wide values room for Z: x_a goes into dO there, Z in steps of
    # 64 columns. A computed left side must not be pipelined (see add_elu).
    WIDE: tl.constexpr = BLOCK_D > 128 or BLOCK_DV > 128
    STEP: tl.constexpr = 64 if WIDE else BLOCK_DV
    b = tl.arange(0, BLOCK_D)
    for start in tl.static_range(0, BLOCK_DV, STEP):
        do = load_columns(do_rows, row_mask, start, VALUE_DIM, STEP)
        columns = start + tl.arange(0, STEP)[:, None]
        for a in tl.range(0, HEAD_DIM, num_stages=1 if WIDE else STAGES):
            pair = tl.where(b > a, pair_start(a, HEAD_DIM) + b, pair_start(b, HEAD_DIM) + a)
            exists = (b != a) & (b < HEAD_DIM)
            ptrs = z_ptr + pair[None, :] * VALUE_DIM + columns
            z = tl.load(ptrs, mask=exists[None, :] & (columns < VALUE_DIM), other=0.0)
            x_a = feature_scale * load_column(q_rows, row_mask, a, mu_ptr)
            if WIDE:
                dx = state_dot(x_a * do.to(tl.float32), z, dx, OPERAND, 1, PRECISION)
            else:
                dx += x_a * state_dot(do, z, None, OPERAND, 1, PRECISION)
            if start == 0:
                k = tl.load(k_ptr + pair, mask=exists, other=0.0).to(tl.float32)
                dx -= x_a * mass_delta[:, None] * k[None, :]
    return dx


@triton.jit
def features_grad(
    q, q_rows, do_rows, row_mask, mass_delta, z_ptr, k_ptr, feature_scale, FEATURE_MAP: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
    STAGES: tl.constexpr, mu_ptr=None,
):  # fmt: skip
    """φ'(x_i)ᵀ (Z dO_i - k Δ'_i) [M, BLOCK_D], and φ(x_i)·(Z dO_i - k Δ'_i) [M]. Loads q where it is None, late."""
    dx = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if FEATURE_MAP == "elu":
        dx = add_features_grad(
            dx, do_rows, row_mask, mass_delta, z_ptr, k_ptr, HEAD_DIM, VALUE_DIM, BLOCK_D, CHUNK, PRECISION,
            OPERAND,
        )  # fmt: skip
        if q is None:
            q = load_columns(q_rows, row_mask, 0, HEAD_DIM, BLOCK_D, mu_ptr)
        phi = elu_of(q.to(tl.float32) * feature_scale)
        product = tl.sum(dx * phi, 1)
        dx = dx * tl.minimum(phi, 1.0, propagate_nan=tl.PropagateNan.ALL)  # φ' = 1 for x > 0, e^x = φ below
    else:
        # φ·(Z dO - k Δ') has the parts 1, first order and second order; x·dx = first order + 2 · second order.
        product = row_dot(do_rows, row_mask, z_ptr, VALUE_DIM, BLOCK_M, CHUNK)
        product -= mass_delta * tl.load(k_ptr).to(tl.float32)
        if FEATURE_MAP == "taylor2":
            first = square_start(HEAD_DIM)
            dx = add_features_grad(
                dx, do_rows, row_mask, mass_delta, z_ptr + first * VALUE_DIM, k_ptr + first, HEAD_DIM, VALUE_DIM,
                BLOCK_D, CHUNK, PRECISION, OPERAND,
            )  # fmt: skip
            if q is None:
                q = load_columns(q_rows, row_mask, 0, HEAD_DIM, BLOCK_D, mu_ptr)
            dx = dx * (q.to(tl.float32) * (feature_scale * _SQRT_2))
            dx = add_pairs_grad(
                dx, q_rows, do_rows, row_mask, mass_delta, z_ptr, k_ptr, feature_scale, HEAD_DIM, VALUE_DIM,
                BLOCK_D, BLOCK_DV, PRECISION, OPERAND, STAGES, mu_ptr,
            )  # fmt: skip
            product -= 0.5 * tl.sum(dx * (q.to(tl.float32) * feature_scale), 1)
        dx = add_features_grad(
            dx, do_rows, row_mask, mass_delta, z_ptr + VALUE_DIM, k_ptr + 1, HEAD_DIM, VALUE_DIM, BLOCK_D, CHUNK,
            PRECISION, OPERAND,
        )  # fmt: skip
        if q is None:
            q = load_columns(q_rows, row_mask, 0, HEAD_DIM, BLOCK_D, mu_ptr)
        product += tl.sum(dx * (q.to(tl.float32) * feature_scale), 1)
    return dx, product


@triton.jit
def linear_term_grad(
    q, q_rows, do_rows, row_mask, rows, seq_q, state, head, num_centers, weights_ptr, mass_delta, dlogw_ptr,
    stride_rows, scale, feature_scale, FEATURE_MAP: tl.constexpr, NUM_FEATURES: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq [M, BLOCK_D] through features and weights of the linear-attention term; stores dlogw if asked to."""
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for c in tl.range(0, num_centers, num_stages=1):
        center = head * state.num_centers + c
        z_ptr, k_ptr = state.z + center * NUM_FEATURES * VALUE_DIM, state.k + center * NUM_FEATURES
        u = tl.load(weights_ptr + c * tl.cast(stride_rows, tl.int64) + rows, mask=rows < seq_q, other=0.0)
        dx, product = features_grad(
            q, q_rows, do_rows, row_mask, mass_delta, z_ptr, k_ptr, feature_scale, FEATURE_MAP, HEAD_DIM, VALUE_DIM,
            BLOCK_M, BLOCK_D, BLOCK_DV, CHUNK, PRECISION, OPERAND, STAGES,
        )  # fmt: skip
        dlogw = u * product
        dx = (feature_scale * u)[:, None] * dx
        if FEATURE_MAP == "taylor1":
            dq += dx
        else:  # has one centre
            dq = dx
        if state.centers is not None:
            columns = tl.arange(0, BLOCK_D)
            mu = tl.load(state.centers + center * HEAD_DIM + columns, mask=columns < HEAD_DIM, other=0.0)
            dq += (dlogw * (scale * _LN_2))[:, None] * mu.to(tl.float32)[None, :]
        if dlogw_ptr is not None:
            tl.store(dlogw_ptr + c * tl.cast(stride_rows, tl.int64) + rows, dlogw, mask=rows < seq_q)
    return dq


@triton.jit
def own_rows_grad(
    q_rows, do_rows, row_mask, lse, delta, state, head, start, scale, NEEDS_DS: tl.constexpr, MODEL: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr, LOGIT_PRECISION: tl.constexpr,
):  # fmt: skip
    """P and dS [M, N] of the state's own rows from `start` on; dS is 0 unless NEEDS_DS."""
    left = state.num_rows - start
    first = head * state.num_rows + start
    rows = tl.arange(0, BLOCK_N)
    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    s = dot_rows(
        s, q_rows, row_mask, state.row_keys + first * HEAD_DIM, left, HEAD_DIM, BLOCK_N, CHUNK, MODEL, 3,
        LOGIT_PRECISION,
    )  # fmt: skip
    s = s * scale
    if state.row_bias is not None:
        bias = tl.load(state.row_bias + first + rows, mask=rows < left, other=0.0)
        s += bias.to(tl.float32)[None, :] * _LOG2_E
    p = tl.where((rows < left)[None, :], tl.exp2(s - lse[:, None]), 0.0)
    ds = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if NEEDS_DS:
        ds = dot_rows(
            ds, do_rows, row_mask, state.row_values + first * VALUE_DIM, left, VALUE_DIM, BLOCK_N, CHUNK, MODEL, 2,
            PRECISION,
        )  # fmt: skip
        ds = p * (ds - delta[:, None])
    return p, ds


@triton.jit
def add_own_rows(
    dq, q_rows, do_rows, row_mask, lse, delta, state, head, num_rows, scale, MODEL: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr, LOGIT_PRECISION: tl.constexpr,
):  # fmt: skip
    """dq + Σ_j dS_ij κ_j over the state's own rows."""
    for start in tl.range(0, num_rows, CHUNK, num_stages=1):
        _, ds = own_rows_grad(
            q_rows, do_rows, row_mask, lse, delta, state, head, start, scale, True, MODEL, HEAD_DIM, VALUE_DIM, BLOCK_M,
            CHUNK, CHUNK, PRECISION, LOGIT_PRECISION,
        )  # fmt: skip
        k = load_tile(
            state.row_keys + head * state.num_rows * HEAD_DIM, start, num_rows, HEAD_DIM, CHUNK, HEAD_DIM, BLOCK_D, True
        )
        dq = state_dot(ds, k, dq, MODEL, 2, PRECISION)
    return dq
