"""Jit helpers for what a prefix state adds to a tile of query rows: its own rows and its linear-attention term.

In the notation of `reference/attention.py`: N_i = Σ_c w_ic φ(x_i)ᵀ Z_c and M_i = Σ_c w_ic φ(x_i)·k_c are where the
online softmax starts from (acc, l_i, relative to m_i, the largest log w_ic). Where there is no mass (M_i <= 0, or no
mass of one centre) nothing bounds the weight of Z but lse_i, known only at the end: such terms are left out at the
start and added at the end, by `add_left_out`. Trained and converted states have few or none of them.

`head` counts the heads of all states, state_index · Hs + head of the state.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .features import add_elu, add_taylor, row_dot, taylor_mass
from .tiles import LOG2_E, load_tile, online_softmax, state_dot

_LOG2_E = tl.constexpr(LOG2_E)
# Up to triton 3.7 the layout of tensor memory (sm_100) crashes on the reduction of a vector that may not be reordered;
# from 3.9 on the option is deprecated.
CAN_REORDER = triton.__version__.startswith(("3.6.", "3.7."))
SMALLEST_MASS = 1.1754943508222875e-38  # float32 below this is flushed to 0 on GPUs
MAX_WEIGHT = 2.3538526683702e17  # e^40: of a prefix without mass, see the reference
_CAN_REORDER, _SMALLEST_MASS, _MAX_WEIGHT = map(tl.constexpr, (CAN_REORDER, SMALLEST_MASS, MAX_WEIGHT))


class State(NamedTuple):
    """The prefix states, contiguous; None for what they lack. z is [N, Hs, C, r, Dv], or [.., r, s] beside a z_b."""

    z: object
    z_b: object
    k: object
    centers: object
    log_scale: object
    row_keys: object
    row_values: object
    row_bias: object
    index: object
    query_heads_per_head: int
    num_heads: int
    num_centers: int
    num_rows: int


@triton.jit
def center_logit(
    q_rows, row_mask, state, center, scale, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr
):
    """log w_c [M] of the centre number `center` (counted over states and heads), in units of log 2."""
    logit = tl.zeros([BLOCK_M], tl.float32)
    if state.centers is not None:
        logit += scale * row_dot(q_rows, row_mask, state.centers + center * HEAD_DIM, HEAD_DIM, BLOCK_M, CHUNK)
    if state.log_scale is not None:
        logit += tl.load(state.log_scale + center).to(tl.float32) * _LOG2_E
    return logit


@triton.jit
def locate_state(state, head, batch):
    """Number of the state's head that a query head of a batch row uses, of centres and of rows; 0 if it has none."""
    num_centers, num_rows = state.num_centers, state.num_rows
    state_head = tl.cast(head // state.query_heads_per_head, tl.int64)
    if state.index is not None:
        index = tl.load(state.index + batch).to(tl.int64)
        num_centers = tl.where(index < 0, 0, num_centers)
        num_rows = tl.where(index < 0, 0, num_rows)
        state_head += index * state.num_heads
    return state_head, num_centers, num_rows


@triton.jit
def add_center(
    acc, mass, u, q_rows, row_mask, state, center, feature_scale, FEATURE_MAP: tl.constexpr,
    NUM_FEATURES: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_RANK: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """acc + u · φ(x)ᵀ Z_c; with "elu" also mass + u · φ(x)·k_c."""
    if state.z_b is None:
        COLUMNS: tl.constexpr = VALUE_DIM
        BLOCK: tl.constexpr = BLOCK_DV
        product = acc
    else:  # first over the columns of the pair's left side
        COLUMNS: tl.constexpr = RANK
        BLOCK: tl.constexpr = BLOCK_RANK
        product = tl.zeros([BLOCK_M, BLOCK_RANK], tl.float32)
    z_ptr = state.z + center * NUM_FEATURES * COLUMNS
    if FEATURE_MAP == "elu":
        product, mass = add_elu(
            product, mass, u, q_rows, row_mask, z_ptr, state.k + center * HEAD_DIM, feature_scale, HEAD_DIM, COLUMNS,
            BLOCK, CHUNK, PRECISION, OPERAND,
        )  # fmt: skip
    else:
        product = add_taylor(
            product, u, q_rows, row_mask, z_ptr, feature_scale, FEATURE_MAP, HEAD_DIM, COLUMNS, BLOCK_D, BLOCK, CHUNK,
            PRECISION, OPERAND, STAGES,
        )  # fmt: skip
    if state.z_b is not None:
        z_b_ptr = state.z_b + center * RANK * VALUE_DIM
        z_b = load_tile(z_b_ptr, 0, RANK, VALUE_DIM, BLOCK_RANK, VALUE_DIM, BLOCK_DV, True)
        if OPERAND == tl.float32:  # what it is multiplied with is a sum, for which float16 has too few bits
            z_b = z_b.to(tl.float32)
        product = state_dot(product, z_b, acc, OPERAND, 1 if OPERAND == tl.bfloat16 else 2, PRECISION)
    return product, mass


@triton.jit
def start_from_prefix(
    q_rows, row_mask, state, head, num_centers, scale, feature_scale, FEATURE_MAP: tl.constexpr,
    NUM_FEATURES: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_RANK: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr, LOGIT_PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """acc, m_i, l_i and, for each row whether it has no mass, and whether anything is left out."""
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    left_out = l_i > 0
    for c in tl.range(0, num_centers, num_stages=1):
        center = head * state.num_centers + c
        logit = center_logit(q_rows, row_mask, state, center, scale, HEAD_DIM, BLOCK_M, CHUNK)
        if FEATURE_MAP == "elu":  # has one centre
            m_i = logit
            weight = tl.full([BLOCK_M], 1.0, tl.float32)
        else:
            mass = taylor_mass(
                q_rows, row_mask, state.k + center * NUM_FEATURES, feature_scale, FEATURE_MAP, HEAD_DIM, BLOCK_M,
                CHUNK, LOGIT_PRECISION,
            )  # fmt: skip
            left_out = left_out | ((mass == 0) & (logit != -float("inf")))
            logit = tl.where(mass == 0, -float("inf"), logit)
            m_new = tl.maximum(m_i, logit, propagate_nan=tl.PropagateNan.ALL)
            shift = tl.where(m_new == -float("inf"), 0.0, m_new)
            alpha = tl.exp2(m_i - shift)
            weight = tl.exp2(logit - shift)
            acc = acc * alpha[:, None]
            l_i = l_i * alpha + mass * weight
            m_i = m_new
        acc, l_i = add_center(
            acc, l_i, weight, q_rows, row_mask, state, center, feature_scale, FEATURE_MAP, NUM_FEATURES, HEAD_DIM,
            VALUE_DIM, RANK, BLOCK_M, BLOCK_D, BLOCK_DV, BLOCK_RANK, CHUNK, PRECISION, OPERAND, STAGES,
        )  # fmt: skip
    l_i = tl.where(m_i == m_i, l_i, m_i)  # NaN stays
    massless = (l_i < _SMALLEST_MASS) | (m_i == -float("inf"))
    left_out = left_out | (massless & (m_i != -float("inf")))
    acc = tl.where(massless[:, None], 0.0, acc)
    flags = tl.reshape(left_out.to(tl.int32), [BLOCK_M], can_reorder=_CAN_REORDER)
    any_left_out = tl.max(flags, 0) > 0
    return acc, tl.where(massless, -float("inf"), m_i), tl.where(massless, 0.0, l_i), massless, any_left_out


@triton.jit
def add_left_out(
    acc, shift, inverse, massless, q_rows, row_mask, state, head, num_centers, scale, feature_scale,
    FEATURE_MAP: tl.constexpr, NUM_FEATURES: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_RANK: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
    LOGIT_PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """acc (normalised) + the terms that `start_from_prefix` left out; e^-lse = inverse · 2^-shift."""
    for c in tl.range(0, num_centers, num_stages=1):
        center = head * state.num_centers + c
        logit = center_logit(q_rows, row_mask, state, center, scale, HEAD_DIM, BLOCK_M, CHUNK)
        wanted = massless
        if FEATURE_MAP == "taylor1":  # the only map with several centres, of which some may have mass
            mass = taylor_mass(
                q_rows, row_mask, state.k + center * NUM_FEATURES, feature_scale, FEATURE_MAP, HEAD_DIM, BLOCK_M,
                CHUNK, LOGIT_PRECISION,
            )  # fmt: skip
            wanted = wanted | (mass == 0)
        u = tl.minimum(tl.exp2(logit - shift) * inverse, _MAX_WEIGHT, propagate_nan=tl.PropagateNan.ALL)
        u = tl.where(wanted & (inverse > 0), u, 0.0)
        acc, _ = add_center(
            acc, inverse, u, q_rows, row_mask, state, center, feature_scale, FEATURE_MAP, NUM_FEATURES, HEAD_DIM,
            VALUE_DIM, RANK, BLOCK_M, BLOCK_D, BLOCK_DV, BLOCK_RANK, CHUNK, PRECISION, OPERAND, STAGES,
        )  # fmt: skip
    return acc


@triton.jit
def attend_rows(
    acc, m_i, l_i, q, state, head, num_rows, scale, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
    LOGIT_PRECISION: tl.constexpr,
):  # fmt: skip
    """The state's own rows, which every query sees."""
    keys = state.row_keys + head * state.num_rows * HEAD_DIM
    values = state.row_values + head * state.num_rows * VALUE_DIM
    for start in tl.range(0, num_rows, BLOCK_N, num_stages=1):
        k = load_tile(keys, start, num_rows, HEAD_DIM, BLOCK_N, HEAD_DIM, BLOCK_D, True)
        v = load_tile(values, start, num_rows, VALUE_DIM, BLOCK_N, VALUE_DIM, BLOCK_DV, True)
        s = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
        s = state_dot(q, k.T, s, q.dtype, 3, LOGIT_PRECISION)
        s = s * scale
        offs = start + tl.arange(0, BLOCK_N)
        if state.row_bias is not None:
            bias = tl.load(state.row_bias + head * state.num_rows + offs, mask=offs < num_rows, other=0.0)
            s += bias.to(tl.float32)[None, :] * _LOG2_E
        s = tl.where((offs < num_rows)[None, :], s, -float("inf"))
        p, alpha, m_i, l_i = online_softmax(m_i, l_i, s, 1.0, True)
        acc = state_dot(p, v, acc * alpha[:, None], q.dtype, 2, PRECISION)
    return acc, m_i, l_i
