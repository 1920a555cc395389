"""Jit helpers that say which keys a row of queries sees: packed sequences, key ranges, band, mask, soft-capping.

Row i of a sequence sees key j if start <= j < stop, i + lower <= j <= i + upper, and the mask lets it. Tiles of scores
come as [M, N] (rows, keys) or [N, M]: `rows` and `keys` are indices shaped to broadcast against them, [M, 1] and [1, N]
or [1, M] and [N, 1].
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .tiles import LOG2_E

_MAX_BIAS = tl.constexpr(2.3e38)


class Sequences(NamedTuple):
    """Starts of packed sequences, and the range of visible keys of each batch row, contiguous; None if absent."""

    cu_seqlens_q: object
    cu_seqlens_k: object
    key_start: object
    key_stop: object


@triton.jit
def locate_rows(sequences, batch, seq_q):
    """Row in the tensors, first query there and length of a batch row (or packed sequence)."""
    first_q = tl.cast(0, tl.int64)
    tensor_batch = batch
    if sequences.cu_seqlens_q is not None:
        first_q = tl.load(sequences.cu_seqlens_q + batch).to(tl.int64)
        seq_q = (tl.load(sequences.cu_seqlens_q + batch + 1) - first_q).to(tl.int32)
        tensor_batch = tl.cast(0, tl.int64)
    return tensor_batch, first_q, seq_q


@triton.jit
def locate_keys(sequences, batch, seq_q, seq_k, lower, upper):
    """First key and number of keys of a batch row (or packed sequence), start and stop of those that may be visible,
    and the bounds of its band."""
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


class Zones(NamedTuple):
    """The tiles that a tile sees, in three zones: [start, middle_start) and [middle_stop, stop) need masks, the middle
    none.

    The middle is a whole number of tiles. With a mask it is empty, and so is the first zone.
    """

    start: object
    middle_start: object
    middle_stop: object
    stop: object


class Band(NamedTuple):
    """The bounds of the keys that the rows of a head see; `masked` applies them."""

    mask: object  # Strided, of all heads
    mask_offset: object  # where that of the head begins
    seq_q: object  # end of the rows
    stop: object  # end of the visible keys
    lower: object
    upper: object


class HeadKeys(NamedTuple):
    """Keys and values of a head, from the first of a sequence on. (Up to triton 3.6 a helper cannot return it.)"""

    k_ptr: object
    v_ptr: object
    keys: object  # Keys, of all heads
    batch: object  # where descriptors find them
    head: object
    first: object


class Keys(NamedTuple):
    """Keys and values of all heads, and descriptors of both (TMA) or None."""

    k: object  # Strided
    v: object
    k_desc: object
    v_desc: object


@triton.jit
def mask_offset(mask, batch, head):
    """Offset of the first number of a head's mask."""
    return batch * mask.stride[0] + tl.cast(head, tl.int64) * mask.stride[1]


@triton.jit
def keys_of_rows(start_m, stop_m, start, stop, lower, upper, HAS_MASK: tl.constexpr, dims):
    """The Zones of the keys that some row of start_m ... stop_m sees."""
    unmasked_start, unmasked_stop = start, stop
    if dims.HAS_LOWER:
        unmasked_start = tl.maximum(start, stop_m - 1 + lower)
        start = tl.maximum(start, start_m + lower)
    if dims.HAS_UPPER:
        unmasked_stop = tl.minimum(stop, start_m + upper + 1)
        stop = tl.minimum(stop, stop_m + upper)
    if HAS_MASK:
        return Zones(start, start, start, stop)
    middle_start, middle_stop = _middle(start, unmasked_start, unmasked_stop, dims.BLOCK_N, dims.HAS_LOWER)
    return Zones(start, middle_start, middle_stop, stop)


@triton.jit
def rows_of_keys(start_n, stop_n, seq_q, lower, upper, HAS_MASK: tl.constexpr, dims):
    """The Zones of the rows that see some of the keys start_n ... stop_n, the visible ones of a tile."""
    first, last, unmasked_first, unmasked_last = 0, seq_q, 0, seq_q
    if dims.HAS_UPPER:
        unmasked_first = tl.maximum(0, stop_n - 1 - upper)
        first = tl.maximum(0, start_n - upper)
    if dims.HAS_LOWER:
        unmasked_last = tl.minimum(seq_q, start_n - lower + 1)
        last = tl.minimum(seq_q, stop_n - lower)
    # Not a whole tile of keys: all of it needs masks. No key at all: no row.
    unmasked_last = tl.where(stop_n - start_n < dims.BLOCK_N, first, unmasked_last)
    last = tl.where(stop_n <= start_n, first, last)
    if HAS_MASK:
        return Zones(first, first, first, last)
    middle_first, middle_last = _middle(first, unmasked_first, unmasked_last, dims.BLOCK_M, dims.HAS_UPPER)
    return Zones(first, middle_first, middle_last, last)


@triton.jit
def bounds_of_zone(zones, zone: tl.constexpr):
    """Start and stop of zone 0, 1 (which needs no masks) or 2."""
    start, stop = zones.middle_stop, zones.stop
    if zone == 0:
        start, stop = zones.start, tl.minimum(zones.middle_start, zones.stop)
    elif zone == 1:
        start, stop = zones.middle_start, zones.middle_stop
    return start, stop


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
    return softcap * tl.where(square < 0.01, series, 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2_E))))


@triton.jit
def logits_and_slope(s, scales, dims):
    """The logits of products s = q·k, and their derivative by s · scale."""
    slope = 1.0
    if dims.SOFTCAP:
        s = soft_capped(s, scales.logit, scales.softcap)
        slope = 1.0 - (s / scales.softcap) * (s / scales.softcap)
    else:
        s = s * scales.logit
    return s, slope


@triton.jit
def masked(s, rows, keys, start, band, dims):
    """The logits `s` plus an additive mask, and which of them are visible, of keys from `start` on."""
    visible = (keys >= start) & (keys < band.stop)
    if dims.HAS_LOWER:
        visible = visible & (keys >= rows + band.lower)
    if dims.HAS_UPPER:
        visible = visible & (keys <= rows + band.upper)
    if band.mask.ptr is not None:
        mask_ptr = band.mask.ptr + band.mask_offset
        ptrs = mask_ptr + rows.to(tl.int64) * band.mask.stride[2] + keys.to(tl.int64) * band.mask.stride[3]
        bias = tl.load(ptrs, mask=(rows < band.seq_q) & (keys < band.stop), other=0)
        if bias.dtype == tl.int1:
            visible = visible & bias
        else:
            bias = bias.to(tl.float32)
            visible = visible & (bias != -float("inf"))
            # finfo.min, which some use for -inf, times log2(e) would be -inf
            bias = tl.maximum(bias, -_MAX_BIAS, propagate_nan=tl.PropagateNan.ALL)
            s += tl.minimum(bias, _MAX_BIAS, propagate_nan=tl.PropagateNan.ALL) * LOG2_E
    return s, visible
