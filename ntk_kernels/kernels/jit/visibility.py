"""Jit helpers that say which keys a row of queries sees: packed sequences, key ranges, band, mask, soft-capping.

Row i of a sequence sees key j if start <= j < stop, i + lower <= j <= i + upper, and the mask lets it. Tiles of scores
come as [M, N] (rows, keys) or [N, M]: `rows` and `keys` are indices shaped to broadcast against them, [M, 1] and [1, N]
or [1, M] and [N, 1].
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .tiles import LOG2_E

_LARGEST_BIAS = tl.constexpr(2.3e38)
_LOG2_E = tl.constexpr(LOG2_E)


class Sequences(NamedTuple):
    """Where packed sequences begin, and the visible keys of each batch row, contiguous; None for what there is not."""

    cu_seqlens_q: object
    cu_seqlens_k: object
    key_start: object
    key_stop: object


@triton.jit
def locate_rows(sequences, batch, seq_q):
    """Of batch row (or packed sequence) `batch`: its row in the tensors, its first query there, its length."""
    first_q = tl.cast(0, tl.int64)
    tensor_batch = batch
    if sequences.cu_seqlens_q is not None:
        first_q = tl.load(sequences.cu_seqlens_q + batch).to(tl.int64)
        seq_q = (tl.load(sequences.cu_seqlens_q + batch + 1) - first_q).to(tl.int32)
        tensor_batch = tl.cast(0, tl.int64)
    return tensor_batch, first_q, seq_q


@triton.jit
def locate_keys(sequences, batch, seq_q, seq_k, lower, upper):
    """Likewise its first key and the number of keys; the first and the end of those that may be visible; the band."""
    first_k = tl.cast(0, tl.int64)
    if sequences.cu_seqlens_k is not None:
        first_k = tl.load(sequences.cu_seqlens_k + batch).to(tl.int64)
        seq_k = (tl.load(sequences.cu_seqlens_k + batch + 1) - first_k).to(tl.int32)
        lower += seq_k - seq_q
        upper += seq_k - seq_q
    start = 0
    stop = seq_k
    if sequences.key_start is not None:
        start = tl.minimum(tl.maximum(tl.load(sequences.key_start + batch), 0), seq_k).to(tl.int32)
    if sequences.key_stop is not None:
        stop = tl.minimum(tl.maximum(tl.load(sequences.key_stop + batch), 0), seq_k).to(tl.int32)
    return first_k, seq_k, start, stop, lower, upper


@triton.jit
def keys_of_rows(start_m, stop_m, start, stop, lower, upper, BLOCK_N: tl.constexpr, HAS_LOWER: tl.constexpr,
                 HAS_UPPER: tl.constexpr, HAS_MASK: tl.constexpr):  # fmt: skip
    """Where the keys that some row of start_m ... stop_m sees start, become visible to all of them, cease to be, end.

    Between the first two and the last two tiles need masks. The middle part is a whole number of tiles; it is empty,
    and so is the first part, with a mask.
    """
    unmasked_start, unmasked_stop = start, stop
    if HAS_LOWER:
        unmasked_start = tl.maximum(start, stop_m - 1 + lower)
        start = tl.maximum(start, start_m + lower)
    if HAS_UPPER:
        unmasked_stop = tl.minimum(stop, start_m + upper + 1)
        stop = tl.minimum(stop, stop_m + upper)
    if HAS_MASK:
        return start, start, start, stop
    middle_start, middle_stop = _middle(start, unmasked_start, unmasked_stop, BLOCK_N, HAS_LOWER)
    return start, middle_start, middle_stop, stop


@triton.jit
def rows_of_keys(start_n, stop_n, seq_q, lower, upper, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                 HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, HAS_MASK: tl.constexpr):  # fmt: skip
    """The same for the rows that see some of the keys start_n ... stop_n, the visible ones of a tile."""
    first, last, unmasked_first, unmasked_last = 0, seq_q, 0, seq_q
    if HAS_UPPER:
        unmasked_first = tl.maximum(0, stop_n - 1 - upper)
        first = tl.maximum(0, start_n - upper)
    if HAS_LOWER:
        unmasked_last = tl.minimum(seq_q, start_n - lower + 1)
        last = tl.minimum(seq_q, stop_n - lower)
    # Not a whole tile of keys: all of it needs masks. No key at all: no row.
    unmasked_last = tl.where(stop_n - start_n < BLOCK_N, first, unmasked_last)
    last = tl.where(stop_n <= start_n, first, last)
    if HAS_MASK:
        return first, first, first, last
    middle_first, middle_last = _middle(first, unmasked_first, unmasked_last, BLOCK_M, HAS_UPPER)
    return first, middle_first, middle_last, last


@triton.jit
def _middle(start, unmasked_start, unmasked_stop, BLOCK: tl.constexpr, HAS_FIRST: tl.constexpr):
    """Whole tiles, counted from `start`, that lie between the unmasked bounds."""
    middle_start = start
    if HAS_FIRST:
        middle_start += tl.cdiv(tl.maximum(unmasked_start - start, 0), BLOCK) * BLOCK
    return middle_start, middle_start + tl.maximum(unmasked_stop - middle_start, 0) // BLOCK * BLOCK


@triton.jit
def soft_capped(s, scale, softcap):
    """softcap · tanh(s · scale / softcap), in units of log 2 as `scale` and `softcap` are; finite for every s."""
    x = s * (scale / softcap)
    square = x * x
    # Where the formula with exp cancels, the series, whose next term is below the rounding.
    series = x * (1.0 - square * (1.0 / 3 - square * (2.0 / 15 - square * (17.0 / 315))))
    return softcap * tl.where(square < 0.01, series, 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * _LOG2_E))))


@triton.jit
def logits_and_slope(s, scale, softcap, SOFTCAP: tl.constexpr):
    """The logits of products s = q·k, and their derivative by s · scale."""
    slope = 1.0
    if SOFTCAP:
        s = soft_capped(s, scale, softcap)
        slope = 1.0 - (s / softcap) * (s / softcap)
    else:
        s = s * scale
    return s, slope


@triton.jit
def masked(s, rows, keys, mask_ptr, stride_mask, seq_q, start, stop, lower, upper, HAS_LOWER: tl.constexpr,
           HAS_UPPER: tl.constexpr):  # fmt: skip
    """The logits `s` plus an additive mask, and which of them are visible. `mask_ptr` is that of the head."""
    visible = (keys >= start) & (keys < stop)
    if HAS_LOWER:
        visible = visible & (keys >= rows + lower)
    if HAS_UPPER:
        visible = visible & (keys <= rows + upper)
    if mask_ptr is not None:
        ptrs = mask_ptr + rows.to(tl.int64) * stride_mask[2] + keys.to(tl.int64) * stride_mask[3]
        bias = tl.load(ptrs, mask=(rows < seq_q) & (keys < stop), other=0)
        if bias.dtype == tl.int1:
            visible = visible & bias
        else:
            bias = bias.to(tl.float32)
            visible = visible & (bias != -float("inf"))
            # finfo.min, which some use for -inf, times log2(e) would be -inf
            bias = tl.maximum(bias, -_LARGEST_BIAS, propagate_nan=tl.PropagateNan.ALL)
            s += tl.minimum(bias, _LARGEST_BIAS, propagate_nan=tl.PropagateNan.ALL) * _LOG2_E
    return s, visible
