"""Cuts causal, windowed and masked attention into pieces that a fused attention without those features can do."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_TILE_ROWS = 256  # query rows per bias tile: bounds the memory that masks and windows take


class KeyRange(NamedTuple):
    """Keys `start` to `stop`: all visible, causal (as many keys as rows) or through a bias."""

    start: int
    stop: int
    is_causal: bool = False
    has_bias: bool = False


class RowTile(NamedTuple):
    """Query rows `start` to `stop` and the ranges of keys that they see."""

    start: int
    stop: int
    ranges: tuple[KeyRange, ...]


def row_tiles(seq_q: int, seq_k: int, left: int, right: int, offset: int, attn_mask: Tensor | None) -> list[RowTile]:
    """Disjoint tiles that cover the query rows; row i sees key j if i + offset - left <= j <= i + offset + right
    (-1: unbounded) and the mask [b, h, Lq or 1, Lk or 1] lets it."""
    if seq_q == 0:
        return []
    if attn_mask is None and left < 0:
        tiles = _dense_tiles(seq_q, seq_k, seq_k if right < 0 else offset + right)
    elif left < 0 and right < 0 and attn_mask.shape[2] == 1:
        tiles = [(0, seq_q, [KeyRange(0, seq_k, has_bias=True)])]
    else:
        tiles = _banded_tiles(seq_q, seq_k, left, right, offset)
    return [
        RowTile(start, stop, tuple(keys for keys in ranges if keys.start < keys.stop))
        for start, stop, ranges in tiles
        if start < stop
    ]


def _dense_tiles(seq_q: int, seq_k: int, last: int):
    """Row i sees the keys up to i + `last`: first rows without keys, then a causal square beside a block that is
    all visible, then rows that see everything."""
    if last >= seq_k - 1:
        return [(0, seq_q, [KeyRange(0, seq_k)])]
    blind = min(max(-last, 0), seq_q)
    full = max(last, 0)
    square = min(seq_q - blind, seq_k - full)
    return [
        (0, blind, []),
        (blind, blind + square, [KeyRange(0, full), KeyRange(full, full + square, is_causal=True)]),
        (blind + square, seq_q, [KeyRange(0, seq_k)]),
    ]


def _banded_tiles(seq_q: int, seq_k: int, left: int, right: int, offset: int) -> Iterator[tuple]:
    for start in range(0, seq_q, _TILE_ROWS):
        stop = min(start + _TILE_ROWS, seq_q)
        first = 0 if left < 0 else max(0, start + offset - left)
        last = seq_k if right < 0 else min(seq_k, stop + offset + right)
        yield start, stop, [KeyRange(first, last, has_bias=True)]


def tile_bias(
    tile: RowTile, keys: KeyRange, left: int, right: int, offset: int, attn_mask: Tensor | None, like: Tensor
) -> Tensor:
    """The mask and window of a tile as something to add to its scores, [b, h, rows or 1, keys], dtype of `like`."""
    bias = like.new_zeros(1, 1, 1, keys.stop - keys.start)
    if attn_mask is not None:
        rows = slice(tile.start, tile.stop) if attn_mask.shape[2] > 1 else slice(None)
        columns = slice(keys.start, keys.stop) if attn_mask.shape[3] > 1 else slice(None)
        part = attn_mask[:, :, rows, columns]
        if part.dtype == torch.bool:
            bias = bias.masked_fill(~part, -math.inf)
        else:
            bias = bias + part.to(like.dtype)
    if left >= 0 or right >= 0:
        i = torch.arange(tile.start, tile.stop, device=like.device)[:, None] + offset
        j = torch.arange(keys.start, keys.stop, device=like.device)
        if left >= 0:
            bias = bias.masked_fill(j < i - left, -math.inf)
        if right >= 0:
            bias = bias.masked_fill(j > i + right, -math.inf)
    return bias


def without_hidden_keys(bias: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with 0 where no row of the tile sees them: a NaN there, or an overflow, would not stay hidden
    (NaN - inf = NaN, 0 · NaN = NaN)."""
    hidden = (bias == -math.inf).all(-2).all(1)[:, None, :, None]
    return key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
