"""Jit helpers for the linear-attention term: φ(q), φ(q)·k and φ(q)·Z, made from tiles of q and never stored.

x = feature_scale · q [M, D], or feature_scale · (q - μ) where there is a `mu_ptr`; u [M] is a factor for each row. z is
one centre's matrix [r, COLUMNS], k its vector [r], packed as `ntk_kernels.feature_maps` says: 1, then x, then the pairs
x_a·x_b (a < b), row by row, then x_a²/√2.

The pairs are a contraction: Σ_a x_a · (x @ T_a), where row b of T_a is the row of z that belongs to the pair (a, b).
In steps of CHUNK values of b, half of the product with zeros is skipped where D > CHUNK.
"""

import triton
import triton.language as tl

from .tiles import LOG2_E, dot, load_tile, state_dot

_SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit
def load_columns(q_rows, row_mask, start, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, mu_ptr=None):
    """[M, CHUNK]: columns `start`... of the q tile whose rows begin at `q_rows` [M, 1]; with μ of q - μ, in float32."""
    columns = start + tl.arange(0, CHUNK)[None, :]
    q = tl.load(q_rows + columns, mask=row_mask & (columns < HEAD_DIM), other=0.0)
    if mu_ptr is not None:
        q = q.to(tl.float32) - tl.load(mu_ptr + columns, mask=columns < HEAD_DIM, other=0.0).to(tl.float32)
    return q


@triton.jit
def load_column(q_rows, row_mask, column, mu_ptr=None):
    """[M, 1]: one of them, in float32."""
    q = tl.load(q_rows + column, mask=row_mask, other=0.0).to(tl.float32)
    if mu_ptr is not None:
        q -= tl.load(mu_ptr + column).to(tl.float32)
    return q


@triton.jit
def row_dot(q_rows, row_mask, vector, DIM: tl.constexpr, dims):
    """q · vector [M] of rows with DIM columns, in float32."""
    total = tl.zeros([dims.BLOCK_M], tl.float32)
    for start in tl.range(0, DIM, dims.CHUNK, num_stages=1):
        q = load_columns(q_rows, row_mask, start, DIM, dims.CHUNK).to(tl.float32)
        columns = start + tl.arange(0, dims.CHUNK)
        total += tl.sum(q * tl.load(vector + columns, mask=columns < DIM, other=0.0).to(tl.float32)[None, :], 1)
    return total


@triton.jit
def square_start(HEAD_DIM: tl.constexpr):
    """First row of z for the squares."""
    return 1 + HEAD_DIM + HEAD_DIM * (HEAD_DIM - 1) // 2


@triton.jit
def pair_start(a, HEAD_DIM: tl.constexpr):
    """Row of z that the pair (a, 0) would have if there were one: the pair (a, b > a) has this + b."""
    return 1 + HEAD_DIM + a * (2 * HEAD_DIM - a - 1) // 2 - a - 1


@triton.jit
def section_start(SECTION: tl.constexpr, HEAD_DIM: tl.constexpr):
    """First row of z for the features of a section."""
    if SECTION == "pairs":
        return 1 + HEAD_DIM
    if SECTION == "squares":
        return square_start(HEAD_DIM)
    return 0


@triton.jit
def feature_index(columns, a, SECTION: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Row of z for the feature that a section makes of each column of x; of the pairs, of those with x_a."""
    if SECTION == "linear":
        columns = columns + 1
    elif SECTION == "squares":
        columns = columns + square_start(HEAD_DIM)
    elif SECTION == "pairs":
        columns = columns + pair_start(a, HEAD_DIM)
    return columns


@triton.jit
def taylor_mass(q_rows, row_mask, k_ptr, feature_scale, dims):
    """φ(x) · k [M], in float32."""
    mass = tl.zeros([dims.BLOCK_M], tl.float32) + tl.load(k_ptr).to(tl.float32)
    if dims.FEATURE_MAP == "taylor1":
        return mass + feature_scale * row_dot(q_rows, row_mask, k_ptr + 1, dims.HEAD_DIM, dims)
    for start in tl.range(0, dims.HEAD_DIM, dims.CHUNK, num_stages=1):
        columns = start + tl.arange(0, dims.CHUNK)
        in_range = columns < dims.HEAD_DIM
        x = feature_scale * load_columns(q_rows, row_mask, start, dims.HEAD_DIM, dims.CHUNK).to(tl.float32)
        linear = tl.load(k_ptr + 1 + columns, mask=in_range, other=0.0).to(tl.float32)
        square = tl.load(k_ptr + square_start(dims.HEAD_DIM) + columns, mask=in_range, other=0.0).to(tl.float32)
        factor = linear[None, :] + (square * _SQRT_HALF)[None, :] * x
        for a_start in tl.range(0, start + dims.CHUNK, dims.CHUNK, num_stages=1):
            a = a_start + tl.arange(0, dims.CHUNK)[:, None]
            pairs = tl.load(
                k_ptr + pair_start(a, dims.HEAD_DIM) + columns[None, :],
                mask=(a < columns[None, :]) & in_range[None, :], other=0.0,
            )  # fmt: skip
            x_a = feature_scale * load_columns(q_rows, row_mask, a_start, dims.HEAD_DIM, dims.CHUNK).to(tl.float32)
            factor = dot(x_a, pairs.to(tl.float32), factor, dims.LOGIT_PRECISION)
        mass += tl.sum(factor * x, 1)
    return mass


@triton.jit
def elu_of(x):
    """elu(x) + 1, without cancellation for x < 0."""
    return tl.where(x > 0, x + 1.0, tl.exp2(x * LOG2_E))  # without a minimum of x and 0, which would hide NaN


@triton.jit
def elu_slope(phi):
    """φ'(x) from φ(x): 1 for x > 0, e^x = φ below; NaN stays."""
    return tl.minimum(phi, 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def section_of(x, x_a, SECTION: tl.constexpr):
    """The features that a section makes of a tile of x, of the pairs those with the column x_a [M, 1]."""
    if SECTION == "elu":
        x = elu_of(x)
    elif SECTION == "squares":
        x = x * x * _SQRT_HALF
    elif SECTION == "pairs":
        x = x * x_a
    return x


@triton.jit
def elu_mass(q_rows, row_mask, k_ptr, feature_scale, dims):
    """φ(x) · k [M], in float32."""
    mass = tl.zeros([dims.BLOCK_M], tl.float32)
    for start in tl.range(0, dims.HEAD_DIM, dims.CHUNK, num_stages=1):
        q = load_columns(q_rows, row_mask, start, dims.HEAD_DIM, dims.CHUNK)
        mass += tl.sum(elu_of(feature_scale * q.to(tl.float32)) * _load_vector(k_ptr, start, dims)[None, :], 1)
    return mass


@triton.jit
def _load_vector(ptr, start, dims):
    """[CHUNK] of a vector with HEAD_DIM numbers, from `start` on, in float32."""
    columns = start + tl.arange(0, dims.CHUNK)
    return tl.load(ptr + columns, mask=columns < dims.HEAD_DIM, other=0.0).to(tl.float32)


@triton.jit
def _add_product(acc, phi, z_ptr, start, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr, dims):
    """acc + phi @ z[start : start + CHUNK], rows from HEAD_DIM on taken as 0."""
    z = load_tile(z_ptr, start, dims.HEAD_DIM, COLUMNS, dims.CHUNK, COLUMNS, BLOCK, True)
    return state_dot(phi, z, acc, dims.OPERAND, PIECES, dims.PREFIX_PRECISION)


@triton.jit
def add_elu(
    acc, mass, u, q_rows, row_mask, z_ptr, k_ptr, feature_scale, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, dims,
    mu_ptr=None,
):  # fmt: skip
    """acc + u · φ(x) @ z and mass + u · φ(x) · k, each feature computed once."""
    PIECES: tl.constexpr = 1 if dims.OPERAND == tl.bfloat16 else 2
    # One stage: pipelined, triton 3.6.0 overwrites a computed left operand while the product reads it (issue 9433).
    for start in tl.range(0, dims.HEAD_DIM, dims.CHUNK, num_stages=1):
        q = load_columns(q_rows, row_mask, start, dims.HEAD_DIM, dims.CHUNK, mu_ptr)
        phi = u[:, None] * elu_of(feature_scale * q.to(tl.float32))
        mass += tl.sum(phi * _load_vector(k_ptr, start, dims)[None, :], 1)
        acc = _add_product(acc, phi, z_ptr, start, COLUMNS, BLOCK, PIECES, dims)
    return acc, mass


@triton.jit
def _add_components(
    acc, u, q_rows, row_mask, z_ptr, feature_scale, SQUARED: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    PIECES: tl.constexpr, dims, mu_ptr,
):  # fmt: skip
    """acc + u · x @ z, or acc + u · x²/√2 @ z."""
    for start in tl.range(0, dims.HEAD_DIM, dims.CHUNK, num_stages=1):  # one stage, as in add_elu
        x = feature_scale * load_columns(q_rows, row_mask, start, dims.HEAD_DIM, dims.CHUNK, mu_ptr).to(tl.float32)
        phi = u[:, None] * x
        if SQUARED:
            phi = phi * x * _SQRT_HALF
        acc = _add_product(acc, phi, z_ptr, start, COLUMNS, BLOCK, PIECES, dims)
    return acc


@triton.jit
def _add_pairs(
    acc, u, q_rows, row_mask, z_ptr, feature_scale, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, dims, mu_ptr
):
    """acc + u · Σ_{a<b} x_a·x_b · z_ab."""
    u = u * feature_scale * feature_scale
    columns = tl.arange(0, BLOCK)[None, :]
    for b_start in tl.static_range(0, dims.BLOCK_D, dims.CHUNK):
        q_b = load_columns(q_rows, row_mask, b_start, dims.HEAD_DIM, dims.CHUNK, mu_ptr)
        b = b_start + tl.arange(0, dims.CHUNK)[:, None]
        for a in tl.range(0, min(b_start + dims.CHUNK, dims.HEAD_DIM) - 1, num_stages=dims.STAGES):
            z = tl.load(
                z_ptr + (pair_start(a, dims.HEAD_DIM) + b) * COLUMNS + columns,
                mask=(b > a) & (b < dims.HEAD_DIM) & (columns < COLUMNS), other=0.0,
            )  # fmt: skip
            q_a = load_column(q_rows, row_mask, a, mu_ptr)
            acc += (u[:, None] * q_a) * state_dot(q_b, z, None, dims.OPERAND, 1, dims.PREFIX_PRECISION)
    return acc


@triton.jit
def add_taylor(
    acc, u, q_rows, row_mask, z_ptr, feature_scale, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, dims, mu_ptr=None
):
    """acc + u · φ(x) @ z, [M, BLOCK]."""
    # Most of z of taylor2 are the pairs, which are rounded under any model. In one piece wide heads would spill.
    PIECES: tl.constexpr = (
        1 if ((dims.OPERAND == tl.bfloat16 and dims.BLOCK_D <= 128) or dims.FEATURE_MAP == "taylor2") else 2
    )
    columns = tl.arange(0, BLOCK)
    acc += u[:, None] * tl.load(z_ptr + columns, mask=columns < COLUMNS, other=0.0).to(tl.float32)[None, :]
    acc = _add_components(
        acc, u, q_rows, row_mask, z_ptr + COLUMNS, feature_scale, False, COLUMNS, BLOCK, PIECES, dims, mu_ptr
    )
    if dims.FEATURE_MAP == "taylor2":
        acc = _add_pairs(acc, u, q_rows, row_mask, z_ptr, feature_scale, COLUMNS, BLOCK, dims, mu_ptr)
        z_ptr += square_start(dims.HEAD_DIM) * COLUMNS
        acc = _add_components(
            acc, u, q_rows, row_mask, z_ptr, feature_scale, True, COLUMNS, BLOCK, PIECES, dims, mu_ptr
        )
    return acc
