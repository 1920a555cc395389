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
from .tiles import LOG2_E, load_tile, online_softmax, running_max, state_dot

# Up to triton 3.7 the layout of tensor memory (sm_100) crashes on the reduction of a vector that may not be reordered;
# from 3.9 on the option is deprecated.
_CAN_REORDER = tl.constexpr(triton.__version__.startswith(("3.6.", "3.7.")))
_MIN_MASS = tl.constexpr(1.1754943508222875e-38)  # float32 below this is flushed to 0 on GPUs
MAX_WEIGHT = tl.constexpr(2.3538526683702e17)  # e^40: of a prefix without mass, see the reference


class State(NamedTuple):
    """The prefix states, contiguous; None if absent. z is [N, Hs, C, r, Dv], or [.., r, s] beside a z_b."""

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
def center_logit(q_rows, row_mask, state, center, scale, dims):
    """log w_c [M] of the centre number `center` (counted over states and heads), in units of log 2."""
    logit = tl.zeros([dims.BLOCK_M], tl.float32)
    if state.centers is not None:
        mu_ptr = state.centers + center * dims.HEAD_DIM
        logit += scale * row_dot(q_rows, row_mask, mu_ptr, dims.HEAD_DIM, dims)
    if state.log_scale is not None:
        logit += tl.load(state.log_scale + center).to(tl.float32) * LOG2_E
    return logit


@triton.jit
def is_massless(mass, logit):
    """Whether a prefix of such a mass, relative to e^logit, has none; not where the logit is NaN, which stays."""
    return ((mass < _MIN_MASS) & (logit == logit)) | (logit == -float("inf"))


@triton.jit
def weight_limit(mass, massless):
    """Bound of u = w e^-lse: e^40 without mass; with mass u <= 1 / mass but for rounding, here a factor e.

    A mass that was rounded to the other side of 0 than in the forward must not set a weight free.
    """
    return tl.where(massless, MAX_WEIGHT, tl.maximum(MAX_WEIGHT, 2.7182818 / mass))


@triton.jit
def any_of(flags, BLOCK_M: tl.constexpr):
    """Whether any of the flags [M] is set."""
    return tl.max(tl.reshape(flags.to(tl.int32), [BLOCK_M], can_reorder=_CAN_REORDER), 0) > 0


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
def _add_center(acc, mass, u, q_rows, row_mask, state, center, feature_scale, dims):
    """acc + u · φ(x)ᵀ Z_c; with "elu" also mass + u · φ(x)·k_c."""
    if state.z_b is None:
        COLUMNS: tl.constexpr = dims.VALUE_DIM
        BLOCK: tl.constexpr = dims.BLOCK_DV
        product = acc
    else:  # first over the columns of the pair's left side
        COLUMNS: tl.constexpr = dims.RANK
        BLOCK: tl.constexpr = dims.BLOCK_RANK
        product = tl.zeros([dims.BLOCK_M, dims.BLOCK_RANK], tl.float32)
    z_ptr = state.z + center * dims.NUM_FEATURES * COLUMNS
    if dims.FEATURE_MAP == "elu":
        product, mass = add_elu(
            product, mass, u, q_rows, row_mask, z_ptr, state.k + center * dims.HEAD_DIM, feature_scale, COLUMNS,
            BLOCK, dims,
        )  # fmt: skip
    else:
        product = add_taylor(product, u, q_rows, row_mask, z_ptr, feature_scale, COLUMNS, BLOCK, dims)
    if state.z_b is not None:
        z_b_ptr = state.z_b + center * dims.RANK * dims.VALUE_DIM
        z_b = load_tile(z_b_ptr, 0, dims.RANK, dims.VALUE_DIM, dims.BLOCK_RANK, dims.VALUE_DIM, dims.BLOCK_DV, True)
        if dims.OPERAND == tl.float32:  # what it is multiplied with is a sum, for which float16 has too few bits
            z_b = z_b.to(tl.float32)
        product = state_dot(
            product, z_b, acc, dims.OPERAND, 1 if dims.OPERAND == tl.bfloat16 else 2, dims.PREFIX_PRECISION
        )
    return product, mass


@triton.jit
def start_from_prefix(q_rows, row_mask, state, head, num_centers, scales, dims):
    """acc, m_i, l_i and, for each row whether it has no mass, and whether anything is left out."""
    acc = tl.zeros([dims.BLOCK_M, dims.BLOCK_DV], tl.float32)
    m_i = tl.full([dims.BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([dims.BLOCK_M], tl.float32)
    left_out = l_i > 0
    for c in tl.range(0, num_centers, num_stages=1):
        center = head * state.num_centers + c
        logit = center_logit(q_rows, row_mask, state, center, scales.logit, dims)
        if dims.FEATURE_MAP == "elu":  # has one centre
            m_i = logit
            weight = tl.full([dims.BLOCK_M], 1.0, tl.float32)
        else:
            k_ptr = state.k + center * dims.NUM_FEATURES
            mass = taylor_mass(q_rows, row_mask, k_ptr, scales.feature, dims)
            left_out = left_out | ((mass == 0) & (logit != -float("inf")))
            logit = tl.where(mass == 0, -float("inf"), logit)
            m_new, shift = running_max(m_i, logit)
            alpha = tl.exp2(m_i - shift)
            weight = tl.exp2(logit - shift)
            acc = acc * alpha[:, None]
            l_i = l_i * alpha + mass * weight
            m_i = m_new
        acc, l_i = _add_center(acc, l_i, weight, q_rows, row_mask, state, center, scales.feature, dims)
    l_i = tl.where(m_i == m_i, l_i, m_i)  # NaN stays
    massless = is_massless(l_i, m_i)
    left_out = left_out | (massless & (m_i != -float("inf")))
    acc = tl.where(massless[:, None], 0.0, acc)
    m_i, l_i = tl.where(massless, -float("inf"), m_i), tl.where(massless, 0.0, l_i)
    return acc, m_i, l_i, massless, any_of(left_out, dims.BLOCK_M)


@triton.jit
def add_left_out(acc, shift, inverse, massless, q_rows, row_mask, state, head, num_centers, scales, dims):
    """acc (normalised) + the terms that `start_from_prefix` left out; e^-lse = inverse · 2^-shift."""
    for c in tl.range(0, num_centers, num_stages=1):
        center = head * state.num_centers + c
        logit = center_logit(q_rows, row_mask, state, center, scales.logit, dims)
        wanted = massless
        if dims.FEATURE_MAP == "taylor1":  # the only map with several centres, of which some may have mass
            mass = taylor_mass(q_rows, row_mask, state.k + center * dims.NUM_FEATURES, scales.feature, dims)
            wanted = wanted | (mass == 0)
        u = tl.minimum(tl.exp2(logit - shift) * inverse, MAX_WEIGHT, propagate_nan=tl.PropagateNan.ALL)
        u = tl.where(wanted & (inverse > 0), u, 0.0)
        acc, _ = _add_center(acc, inverse, u, q_rows, row_mask, state, center, scales.feature, dims)
    return acc


@triton.jit
def attend_rows(acc, m_i, l_i, q, state, head, num_rows, scale, dims):
    """The state's own rows, which every query sees, by CHUNK."""
    keys = state.row_keys + head * state.num_rows * dims.HEAD_DIM
    values = state.row_values + head * state.num_rows * dims.VALUE_DIM
    for start in tl.range(0, num_rows, dims.CHUNK, num_stages=1):
        k = load_tile(keys, start, num_rows, dims.HEAD_DIM, dims.CHUNK, dims.HEAD_DIM, dims.BLOCK_D, True)
        v = load_tile(values, start, num_rows, dims.VALUE_DIM, dims.CHUNK, dims.VALUE_DIM, dims.BLOCK_DV, True)
        s = tl.zeros([q.shape[0], dims.CHUNK], tl.float32)
        s = state_dot(q, k.T, s, q.dtype, 3, dims.LOGIT_PRECISION)
        s = s * scale
        offs = start + tl.arange(0, dims.CHUNK)
        if state.row_bias is not None:
            bias = tl.load(state.row_bias + head * state.num_rows + offs, mask=offs < num_rows, other=0.0)
            s += bias.to(tl.float32)[None, :] * LOG2_E
        s = tl.where((offs < num_rows)[None, :], s, -float("inf"))
        p, alpha, m_i, l_i = online_softmax(m_i, l_i, s, 1.0, True)
        acc = state_dot(p, v, acc * alpha[:, None], q.dtype, 2, dims.PREFIX_PRECISION)
    return acc, m_i, l_i
