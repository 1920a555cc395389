"""Jit helpers for the gradient of a tile of query rows through a prefix state, in the notation of `backward_query.py`.

`do_rows` [M, 1] points at the rows of dO as `q_rows` does at those of q.
"""

import triton
import triton.language as tl

from .features import elu_of, elu_slope, load_column, load_columns, pair_start, row_dot, square_start
from .row_terms import load_rows
from .tiles import LN_2, LOG2_E, load_tile, state_dot

_SQRT_2 = tl.constexpr(1.4142135623730951)


@triton.jit
def dot_rows(
    acc, a_rows, row_mask, b_ptr, num_rows, DIM: tl.constexpr, BLOCK: tl.constexpr, MODEL: tl.constexpr,
    PIECES: tl.constexpr, PRECISION: tl.constexpr, dims,
):  # fmt: skip
    """acc [M, BLOCK] + a @ bᵀ for rows a [M, DIM] of the model and b [num_rows, DIM] of a state, by CHUNK columns."""
    rows = tl.arange(0, BLOCK)[None, :]
    for start in tl.range(0, DIM, dims.CHUNK, num_stages=1):
        a = load_columns(a_rows, row_mask, start, DIM, dims.CHUNK)
        columns = start + tl.arange(0, dims.CHUNK)[:, None]
        b = tl.load(b_ptr + rows * DIM + columns, mask=(rows < num_rows) & (columns < DIM), other=0.0)
        acc = state_dot(a, b, acc, MODEL, PIECES, PRECISION)
    return acc


@triton.jit
def _add_features_grad(grad, do_rows, row_mask, mass_delta, z_ptr, k_ptr, dims):
    """grad [M, BLOCK_D] + Z_f·dO_i - k_f Δ'_i for the HEAD_DIM features f whose rows of z and k begin there."""
    PIECES: tl.constexpr = 1 if dims.OPERAND == tl.bfloat16 else 2
    grad = dot_rows(
        grad, do_rows, row_mask, z_ptr, dims.HEAD_DIM, dims.VALUE_DIM, dims.BLOCK_D, dims.OPERAND, PIECES,
        dims.PREFIX_PRECISION, dims,
    )  # fmt: skip
    features = tl.arange(0, dims.BLOCK_D)
    k = tl.load(k_ptr + features, mask=features < dims.HEAD_DIM, other=0.0).to(tl.float32)
    return grad - mass_delta[:, None] * k[None, :]


@triton.jit
def _add_pairs_grad(dx, q_rows, do_rows, row_mask, mass_delta, z_ptr, k_ptr, feature_scale, dims, mu_ptr):
    """dx + Σ_{a≠b} x_a (Z_ab·dO_i - k_ab Δ'_i), [M, BLOCK_D] for every b.

    Each pair is read twice, for x_a and for x_b, so that nothing has to be added to a single column of a tile.
    """
    # Wide heads have no registers for a second tile, nor wide values room for Z: x_a goes into dO there, Z in steps of
    # 64 columns. A computed left side must not be pipelined (see add_elu).
    WIDE: tl.constexpr = dims.BLOCK_D > 128 or dims.BLOCK_DV > 128
    STEP: tl.constexpr = 64 if WIDE else dims.BLOCK_DV
    b = tl.arange(0, dims.BLOCK_D)
    for start in tl.static_range(0, dims.BLOCK_DV, STEP):
        do = load_columns(do_rows, row_mask, start, dims.VALUE_DIM, STEP)
        columns = start + tl.arange(0, STEP)[:, None]
        for a in tl.range(0, dims.HEAD_DIM, num_stages=1 if WIDE else dims.STAGES):
            pair = tl.where(b > a, pair_start(a, dims.HEAD_DIM) + b, pair_start(b, dims.HEAD_DIM) + a)
            exists = (b != a) & (b < dims.HEAD_DIM)
            ptrs = z_ptr + pair[None, :] * dims.VALUE_DIM + columns
            z = tl.load(ptrs, mask=exists[None, :] & (columns < dims.VALUE_DIM), other=0.0)
            x_a = feature_scale * load_column(q_rows, row_mask, a, mu_ptr)
            if WIDE:
                dx = state_dot(x_a * do.to(tl.float32), z, dx, dims.OPERAND, 1, dims.PREFIX_PRECISION)
            else:
                dx += x_a * state_dot(do, z, None, dims.OPERAND, 1, dims.PREFIX_PRECISION)
            if start == 0:
                k = tl.load(k_ptr + pair, mask=exists, other=0.0).to(tl.float32)
                dx -= x_a * mass_delta[:, None] * k[None, :]
    return dx


@triton.jit
def features_grad(q, q_rows, do_rows, row_mask, mass_delta, z_ptr, k_ptr, feature_scale, dims, mu_ptr=None):
    """φ'(x_i)ᵀ (Z dO_i - k Δ'_i) [M, BLOCK_D], and φ(x_i)·(Z dO_i - k Δ'_i) [M]. Loads q where it is None, late."""
    dx = tl.zeros([dims.BLOCK_M, dims.BLOCK_D], tl.float32)
    if dims.FEATURE_MAP == "elu":
        dx = _add_features_grad(dx, do_rows, row_mask, mass_delta, z_ptr, k_ptr, dims)
        if q is None:
            q = load_columns(q_rows, row_mask, 0, dims.HEAD_DIM, dims.BLOCK_D, mu_ptr)
        phi = elu_of(q.to(tl.float32) * feature_scale)
        product = tl.sum(dx * phi, 1)
        dx = dx * elu_slope(phi)
    else:
        # φ·(Z dO - k Δ') has the parts 1, first order and second order; x·dx = first order + 2 · second order.
        product = row_dot(do_rows, row_mask, z_ptr, dims.VALUE_DIM, dims)
        product -= mass_delta * tl.load(k_ptr).to(tl.float32)
        if dims.FEATURE_MAP == "taylor2":
            first = square_start(dims.HEAD_DIM)
            dx = _add_features_grad(
                dx, do_rows, row_mask, mass_delta, z_ptr + first * dims.VALUE_DIM, k_ptr + first, dims
            )
            if q is None:
                q = load_columns(q_rows, row_mask, 0, dims.HEAD_DIM, dims.BLOCK_D, mu_ptr)
            dx = dx * (q.to(tl.float32) * (feature_scale * _SQRT_2))
            dx = _add_pairs_grad(dx, q_rows, do_rows, row_mask, mass_delta, z_ptr, k_ptr, feature_scale, dims, mu_ptr)
            product -= 0.5 * tl.sum(dx * (q.to(tl.float32) * feature_scale), 1)
        dx = _add_features_grad(dx, do_rows, row_mask, mass_delta, z_ptr + dims.VALUE_DIM, k_ptr + 1, dims)
        if q is None:
            q = load_columns(q_rows, row_mask, 0, dims.HEAD_DIM, dims.BLOCK_D, mu_ptr)
        product += tl.sum(dx * (q.to(tl.float32) * feature_scale), 1)
    return dx, product


@triton.jit
def linear_term_grad(
    q, q_rows, do_rows, row_mask, offs_m, seq_q, state, head, num_centers, row_terms, dlogw_ptr, query_head, first_q,
    stride_rows, scales, dims,
):  # fmt: skip
    """dq [M, BLOCK_D] through features and weights of the linear-attention term; stores dlogw if there is a pointer.

    `query_head` counts the query heads of all batch rows.
    """
    first_row = query_head * stride_rows + first_q
    first_weight = first_row + query_head * (state.num_centers - 1) * stride_rows
    mass_delta = load_rows(row_terms.mass_delta + first_row, offs_m, seq_q)
    if dlogw_ptr is not None:
        dlogw_ptr += first_weight
    dq = tl.zeros([dims.BLOCK_M, dims.BLOCK_D], tl.float32)
    for c in tl.range(0, num_centers, num_stages=1):
        center = head * state.num_centers + c
        z_ptr = state.z + center * dims.NUM_FEATURES * dims.VALUE_DIM
        k_ptr = state.k + center * dims.NUM_FEATURES
        weights_ptr = row_terms.weights + first_weight + c * tl.cast(stride_rows, tl.int64)
        u = load_rows(weights_ptr, offs_m, seq_q)
        dx, product = features_grad(q, q_rows, do_rows, row_mask, mass_delta, z_ptr, k_ptr, scales.feature, dims)
        dlogw = u * product
        dx = (scales.feature * u)[:, None] * dx
        if dims.FEATURE_MAP == "taylor1":
            dq += dx
        else:  # has one centre
            dq = dx
        if state.centers is not None:
            columns = tl.arange(0, dims.BLOCK_D)
            mu = tl.load(state.centers + center * dims.HEAD_DIM + columns, mask=columns < dims.HEAD_DIM, other=0.0)
            dq += (dlogw * (scales.logit * LN_2))[:, None] * mu.to(tl.float32)[None, :]
        if dlogw_ptr is not None:
            tl.store(dlogw_ptr + c * tl.cast(stride_rows, tl.int64) + offs_m, dlogw, mask=offs_m < seq_q)
    return dq


@triton.jit
def own_rows_grad(
    q_rows, do_rows, row_mask, lse, delta, state, head, start, scale, NEEDS_DS: tl.constexpr, MODEL: tl.constexpr,
    BLOCK_N: tl.constexpr, dims,
):  # fmt: skip
    """P and dS [M, N] of the state's own rows from `start` on; dS is 0 unless NEEDS_DS."""
    left = state.num_rows - start
    first = head * state.num_rows + start
    rows = tl.arange(0, BLOCK_N)
    s = tl.zeros([dims.BLOCK_M, BLOCK_N], tl.float32)
    s = dot_rows(
        s, q_rows, row_mask, state.row_keys + first * dims.HEAD_DIM, left, dims.HEAD_DIM, BLOCK_N, MODEL, 3,
        dims.LOGIT_PRECISION, dims,
    )  # fmt: skip
    s = s * scale
    if state.row_bias is not None:
        bias = tl.load(state.row_bias + first + rows, mask=rows < left, other=0.0)
        s += bias.to(tl.float32)[None, :] * LOG2_E
    p = tl.where((rows < left)[None, :], tl.exp2(s - lse[:, None]), 0.0)
    ds = tl.zeros([dims.BLOCK_M, BLOCK_N], tl.float32)
    if NEEDS_DS:
        ds = dot_rows(
            ds, do_rows, row_mask, state.row_values + first * dims.VALUE_DIM, left, dims.VALUE_DIM, BLOCK_N, MODEL, 2,
            dims.PREFIX_PRECISION, dims,
        )  # fmt: skip
        ds = p * (ds - delta[:, None])
    return p, ds


@triton.jit
def add_own_rows(dq, q_rows, do_rows, row_mask, lse, delta, state, head, num_rows, scale, MODEL: tl.constexpr, dims):
    """dq + Σ_j dS_ij κ_j over the state's own rows, by CHUNK."""
    for start in tl.range(0, num_rows, dims.CHUNK, num_stages=1):
        _, ds = own_rows_grad(
            q_rows, do_rows, row_mask, lse, delta, state, head, start, scale, True, MODEL, dims.CHUNK, dims
        )
        keys = state.row_keys + head * state.num_rows * dims.HEAD_DIM
        k = load_tile(keys, start, num_rows, dims.HEAD_DIM, dims.CHUNK, dims.HEAD_DIM, dims.BLOCK_D, True)
        dq = state_dot(ds, k, dq, MODEL, 2, dims.PREFIX_PRECISION)
    return dq
