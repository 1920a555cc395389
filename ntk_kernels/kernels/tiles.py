"""Jit helpers that every kernel shares: loads, masks, the online softmax.

Conventions, for all kernels:

- Logits, running maxima and lse are in units of log 2 (exp2 is what the hardware has); `lse` is converted to natural
  logarithms where it is stored.
- A row that has seen nothing has m_i = -inf, l_i = 0, acc = 0, and its result is out = 0, lse = -inf.
- Keys outside the range of a tile are loaded as 0, so that a NaN there stays out of 0 · NaN.
- Tiles are padded to powers of two: HEAD_DIM of BLOCK_D columns are real, VALUE_DIM of BLOCK_DV.
- Offsets between tiles are int64, offsets inside a tile int32.
"""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
_LOG2_E = tl.constexpr(LOG2_E)
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 when this module was imported
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def rounded_to(x, DTYPE: tl.constexpr):
    """x in another dtype, rounded to nearest."""
    if _INTERPRETED and DTYPE == tl.bfloat16 and x.dtype == tl.float32:  # the interpreter cuts the last bits off
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """a @ b + acc (None: 0) with float32 accumulation; `PRECISION` is for float32 operands."""
    if _INTERPRETED:  # the interpreter multiplies the bit patterns of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def state_dot(a, b, acc, OPERAND: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b + acc for a tile b of the state, which keeps its own precision.

    Under a half-precision OPERAND a is rounded as the probabilities of the softmax are, and a wider b is the sum of
    PARTS half-precision tiles, of 8 (bfloat16) or 11 bits each; otherwise both are float32.
    """
    if OPERAND == tl.float32:
        acc = dot(a.to(tl.float32), b.to(tl.float32), acc, PRECISION)
    elif b.dtype == OPERAND:
        acc = dot(rounded_to(a, OPERAND), b, acc, PRECISION)
    else:
        a = rounded_to(a, OPERAND)
        rest = b.to(tl.float32)
        for _ in tl.static_range(PARTS):
            part = rounded_to(rest, OPERAND)
            acc = dot(a, part, acc, PRECISION)
            rest -= part.to(tl.float32)
    return acc


@triton.jit
def load_tile(ptr, start, stop, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
              MASKED: tl.constexpr):  # fmt: skip
    """[ROWS, BLOCK]: rows `start`... of a matrix with `COLUMNS` columns, 0 from row `stop` on (if MASKED)."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    ptrs = ptr + start * tl.cast(stride, tl.int64) + rows * stride + columns
    if MASKED:
        if COLUMNS == BLOCK:
            return tl.load(ptrs, mask=rows < stop - start, other=0.0)
        return tl.load(ptrs, mask=(rows < stop - start) & (columns < COLUMNS), other=0.0)
    if COLUMNS == BLOCK:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=columns < COLUMNS, other=0.0)


@triton.jit
def load_descriptor_tile(descriptor, batch, head, start, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The same through a descriptor of a [B, H, L, D] tensor, which fills up with 0 beyond L and D."""
    coordinates = [tl.cast(batch, tl.int32), tl.cast(head, tl.int32), tl.cast(start, tl.int32), 0]
    return descriptor.load(coordinates).reshape(ROWS, BLOCK)


@triton.jit
def visible_in_band(offs_m, offs_n, stop, lower, upper, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr):
    """[M, N] bool, or [1, N] without a band: j < stop and i + lower <= j <= i + upper."""
    visible = (offs_n < stop)[None, :]
    if HAS_LOWER:
        visible = visible & (offs_n[None, :] >= offs_m[:, None] + lower)
    if HAS_UPPER:
        visible = visible & (offs_n[None, :] <= offs_m[:, None] + upper)
    return visible


@triton.jit
def soft_capped(s, scale, softcap):
    """softcap · tanh(s · scale / softcap), in units of log 2 as `scale` is; finite for every s."""
    return softcap * (1.0 - 2.0 / (1.0 + tl.exp2(s * (scale / softcap * (2.0 * _LOG2_E)))))


@triton.jit
def online_softmax(m_i, l_i, s, scale, MASKED: tl.constexpr):
    """Adds logits s · scale [M, N] to the running maximum m_i and sum l_i [M].

    Returns p [M, N], the factor for what was accumulated before, and the new m_i, l_i. NaN logits give NaN p.
    """
    m_new = tl.maximum(m_i, tl.max(s, 1) * scale)
    shift = m_new
    if MASKED:  # a row may have seen nothing yet
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
    p = tl.exp2(s * scale - shift[:, None])
    alpha = tl.exp2(m_i - shift)
    return p, alpha, m_new, l_i * alpha + tl.sum(p, 1)
