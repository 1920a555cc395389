"""Jit helpers that every kernel shares: products, loads, the online softmax.

Conventions, for all kernels:

- Logits, running maxima and lse are in units of log 2 (exp2 is what the hardware has); `lse` is converted to natural
  logarithms where it is stored.
- A row that has seen nothing has m_i = -inf, l_i = 0, acc = 0, and its result is out = 0, lse = -inf.
- Keys outside the range of a tile are loaded as 0, so that a NaN there stays out of 0 · NaN.
- Tiles are padded to powers of two: HEAD_DIM of BLOCK_D columns are real, VALUE_DIM of BLOCK_DV.
- Offsets between tiles are int64, offsets inside a tile int32 (`addressable` in launch.py sees to it).
"""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 when this module was imported
_INTERPRETED = tl.constexpr(INTERPRETED)
_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def in_log2(lse):
    """lse in units of log 2; not -inf for a row masked by finfo.min, which some use for -inf and which is seen."""
    scaled = lse * _LOG2_E
    return tl.where((scaled == -float("inf")) & (lse != -float("inf")), -3.4e38, scaled)


@triton.jit
def rounded_to(x, DTYPE: tl.constexpr):
    """x in another dtype, rounded to nearest."""
    if _INTERPRETED and DTYPE == tl.bfloat16 and x.dtype != tl.bfloat16:  # the interpreter cuts the last bits off
        x = x.to(tl.float32)
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
def state_dot(a, b, acc, MODEL: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b + acc for a tile b of the state, which keeps its own precision under a model of dtype MODEL.

    Of the model's dtype, b is multiplied as a key or value is. A wider b is taken as the sum of PARTS bfloat16 tiles of
    8 bits each; so is a, which has 8 bits under a bfloat16 model and 11, two parts, under a float16 one. A single row a
    is multiplied in float32, without tensor cores.
    """
    if a.shape[0] == 1:
        product = tl.sum(tl.trans(a.to(tl.float32)) * b.to(tl.float32), 0)[None, :]
        acc = product if acc is None else acc + product
    elif MODEL == tl.float32:
        acc = dot(a.to(tl.float32), b.to(tl.float32), acc, PRECISION)
    elif b.dtype == MODEL or (MODEL == tl.bfloat16 and PARTS == 1):
        acc = dot(rounded_to(a, MODEL), rounded_to(b, MODEL), acc, PRECISION)
    else:
        # Loops: unrolled, the products would need more registers (sm_90) and accumulators (sm_100) than there are.
        a_rest = a.to(tl.float32)
        for _ in tl.range(0, 1 if MODEL == tl.bfloat16 else 2, num_stages=1):
            a_part = rounded_to(a_rest, tl.bfloat16)
            a_rest -= a_part.to(tl.float32)
            b_rest = b.to(tl.float32)
            for _ in tl.range(0, PARTS, num_stages=1):
                b_part = rounded_to(b_rest, tl.bfloat16)
                acc = dot(a_part, b_part, acc, PRECISION)
                b_rest -= b_part.to(tl.float32)
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
def store_tile(ptr, tile, rows, stop, stride, part, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Stores columns part · BLOCK ... of those `rows` of a matrix with DIM columns that come before `stop`."""
    columns = part * BLOCK + tl.arange(0, BLOCK)[None, :]
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + columns
    tl.store(ptrs, rounded_to(tile, ptr.dtype.element_ty), mask=(rows < stop)[:, None] & (columns < DIM))


@triton.jit
def load_descriptor_tile(descriptor, batch, head, start, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The same through a descriptor of a [B, H, L, D] tensor, which fills up with 0 beyond L and D."""
    coordinates = [tl.cast(batch, tl.int32), tl.cast(head, tl.int32), tl.cast(start, tl.int32), 0]
    return descriptor.load(coordinates).reshape(ROWS, BLOCK)


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
