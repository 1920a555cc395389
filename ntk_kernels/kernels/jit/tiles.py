"""Jit helpers that every kernel shares: products, loads, the online softmax.

Conventions, for all kernels:

- Logits, running maxima and lse are in units of log 2 (exp2 is what the hardware has); `lse` is converted to natural
  logarithms where it is stored.
- A row that has seen nothing has m_i = -inf, l_i = 0, acc = 0, and its result is out = 0, lse = -inf.
- Keys outside the range of a tile are loaded as 0, so that a NaN there stays out of 0 · NaN.
- Tiles are padded to powers of two: HEAD_DIM of BLOCK_D columns are real, VALUE_DIM of BLOCK_DV.
- Offsets between tiles are int64, offsets inside a tile int32 (`addressable` in host/launch.py sees to it).
- A constant of `Dims` stands to the right of a tensor in sums and products; the interpreter wraps the result otherwise.
- [B, H, L, D] tensors come as `Strided`, constants as `Dims` (`dims.py`), factors of logits and features as `Scales`.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 when this module was imported
_INTERPRETED = tl.constexpr(INTERPRETED)


class Strided(NamedTuple):
    """A [B, H, L, D] tensor whose rows are contiguous: its pointer and the strides of B, H and L."""

    ptr: object
    stride: object


class Scales(NamedTuple):
    """Factors, floats."""

    logit: object  # scale · log2(e): q·k to a logit in units of log 2
    softcap: object  # in units of log 2; 0 for none
    feature: object  # feature_scale: q to x


@triton.jit
def head_ptr(tensor, batch, head, first):
    """Pointer to row `first` of a head of a Strided; `batch` and `first` are int64."""
    offset = batch * tensor.stride[0] + tl.cast(head, tl.int64) * tensor.stride[1] + first * tensor.stride[2]
    return tensor.ptr + offset


@triton.jit
def in_log2(lse):
    """lse in units of log 2; not -inf for a row masked by finfo.min, which some use for -inf and which is seen."""
    scaled = lse * LOG2_E
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
def state_dot(a, b, acc, MODEL: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b + acc for a tile b of the state, which keeps its own precision under a model of dtype MODEL.

    Of the model's dtype, b is multiplied as a key or value is. A wider b is taken as the sum of PIECES bfloat16 tiles
    of 8 bits each; so is a, which has 8 bits under a bfloat16 model and 11, two pieces, under a float16 one. A single
    row a is multiplied in float32, without tensor cores.
    """
    if a.shape[0] == 1:
        product = tl.sum(tl.trans(a.to(tl.float32)) * b.to(tl.float32), 0)[None, :]
        acc = product if acc is None else acc + product
    elif MODEL == tl.float32:
        acc = dot(a.to(tl.float32), b.to(tl.float32), acc, PRECISION)
    elif b.dtype == MODEL or (MODEL == tl.bfloat16 and PIECES == 1):
        acc = dot(rounded_to(a, MODEL), rounded_to(b, MODEL), acc, PRECISION)
    else:
        # Loops: unrolled, the products would need more registers (sm_90) and accumulators (sm_100) than there are.
        a_rest = a.to(tl.float32)
        for _ in tl.range(0, 1 if MODEL == tl.bfloat16 else 2, num_stages=1):
            a_piece = rounded_to(a_rest, tl.bfloat16)
            a_rest -= a_piece.to(tl.float32)
            b_rest = b.to(tl.float32)
            for _ in tl.range(0, PIECES, num_stages=1):
                b_piece = rounded_to(b_rest, tl.bfloat16)
                acc = dot(a_piece, b_piece, acc, PRECISION)
                b_rest -= b_piece.to(tl.float32)
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
def store_tile(ptr, tile, rows, stop, stride, slice_, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Stores columns slice_ · BLOCK ... of those `rows` of a matrix with DIM columns that come before `stop`."""
    columns = slice_ * BLOCK + tl.arange(0, BLOCK)[None, :]
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + columns
    tl.store(ptrs, rounded_to(tile, ptr.dtype.element_ty), mask=(rows < stop)[:, None] & (columns < DIM))


@triton.jit
def load_descriptor_tile(descriptor, batch, head, start, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """[ROWS, BLOCK]: rows `start`... through a descriptor of a [B, H, L, D] tensor, which fills up with 0 beyond L and
    D."""
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


@triton.jit
def running_max(m_i, logit):
    """The larger of two maxima [M], NaN if one is, and what to subtract from logits: it, or 0 where it is -inf."""
    m_new = tl.maximum(m_i, logit, propagate_nan=tl.PropagateNan.ALL)
    return m_new, tl.where(m_new == -float("inf"), 0.0, m_new)


@triton.jit
def lse_of(m_i, l_i):
    """Natural log-sum-exp [M] from the running maximum and sum; -inf for a row that has seen nothing."""
    return tl.where(l_i == 0, -float("inf"), (m_i + tl.log2(l_i)) * LN_2)


@triton.jit
def results_of_rows(
    out, lse_ptr, batch, head, first, start_m, offs_m, seq_q, stride_lse_b, stride_lse_h, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Pointers to the out [M, Dv] (with a mask) and the lse [M] of a tile's rows."""
    columns = tl.arange(0, BLOCK_DV)[None, :]
    out_ptr = head_ptr(out, batch, head, first + start_m)
    out_ptrs = out_ptr + tl.arange(0, BLOCK_M)[:, None] * out.stride[2] + columns
    lse_ptr += batch * stride_lse_b + tl.cast(head, tl.int64) * stride_lse_h + first
    return out_ptrs, (offs_m < seq_q)[:, None] & (columns < VALUE_DIM), lse_ptr + offs_m
