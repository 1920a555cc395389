"""Tiles of query rows and ranges of keys: together they show each row the keys that mask, window and diagonal show
it."""

import math
import sys

import pytest
import torch

from ntk_kernels.backends.torch.row_tiles import row_tiles, tile_bias, without_hidden_keys

SIZES = [(7, 7), (5, 12), (12, 5), (1, 9), (9, 1), (6, 0), (0, 6)]
BANDS = [  # left, right, offset
    (-1, -1, 0), (-1, 0, 0), (-1, 0, 3), (-1, 0, -3), (-1, 0, 40), (-1, 0, -40), (-1, 2, -4), (2, -1, 1), (2, 0, 4),
    (3, 2, -4), (0, 0, 0),
]  # fmt: skip
MASKS = {
    "none": lambda seq_q, seq_k: None,
    "full": lambda seq_q, seq_k: torch.rand(2, 3, seq_q, seq_k) < 0.6,
    "keys": lambda seq_q, seq_k: torch.rand(2, 1, 1, seq_k) < 0.6,
    "rows": lambda seq_q, seq_k: torch.rand(1, 3, seq_q, 1) < 0.6,
}


def shown(tiles, seq_q, seq_k, left, right, offset, mask):
    """Returns how often row i gets key j, [2, 3, Lq, Lk]."""
    times = torch.zeros(2, 3, seq_q, seq_k, dtype=torch.int64)
    for tile in tiles:
        for keys in tile.ranges:
            part = times[:, :, tile.start : tile.stop, keys.start : keys.stop]
            assert part.numel() and not (keys.is_causal and keys.has_bias)
            if keys.has_bias:
                part += tile_bias(tile, keys, left, right, offset, mask, torch.zeros(())) == 0
            elif keys.is_causal:
                assert part.shape[2] == part.shape[3]
                part += torch.ones(part.shape[2:], dtype=torch.int64).tril()
            else:
                part += 1
    return times


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("tile_rows", [1, 4, 256])
def test_every_visible_key_once_and_no_other(tile_rows, kind, monkeypatch):
    monkeypatch.setattr(sys.modules[row_tiles.__module__], "_TILE_ROWS", tile_rows)
    for seq_q, seq_k in SIZES:
        i, j = torch.arange(seq_q)[:, None], torch.arange(seq_k)
        for left, right, offset in BANDS:
            mask = MASKS[kind](seq_q, seq_k)
            visible = (left < 0) | (j >= i + offset - left)
            visible = visible & ((right < 0) | (j <= i + offset + right))
            visible = visible if mask is None else visible & mask
            tiles = row_tiles(seq_q, seq_k, left, right, offset, mask)
            assert [tile.start for tile in tiles[1:]] == [tile.stop for tile in tiles[:-1]]
            assert not tiles or (tiles[0].start, tiles[-1].stop) == (0, seq_q)
            times = shown(tiles, seq_q, seq_k, left, right, offset, mask)
            assert torch.equal(times, visible.expand(2, 3, -1, -1).long()), (seq_q, seq_k, left, right, offset)


def test_a_mask_to_be_added_is_added():
    mask = torch.randn(2, 3, 8, 6).masked_fill(torch.rand(2, 3, 8, 6) < 0.3, -math.inf)
    (tile,) = row_tiles(8, 6, -1, 0, -1, mask)
    (keys,) = tile.ranges
    bias = tile_bias(tile, keys, -1, 0, -1, mask, torch.zeros(()))
    later = torch.arange(6) > torch.arange(8)[:, None] - 1
    assert torch.equal(bias, mask.masked_fill(later, -math.inf)[..., keys.start : keys.stop])


def test_keys_that_no_row_sees_are_zero():
    bias = torch.zeros(2, 3, 4, 5)
    bias[0, :, :, 1] = bias[1, :, :3, 2] = bias[1, :2, :, 4] = -math.inf  # all of it, all but a row, all but a head
    key, value = torch.rand(2, 2, 5, 8) + 1, torch.rand(2, 2, 5, 6) + 1
    key[0, :, 1] = value[0, :, 1] = math.nan
    for tensor, result in zip((key, value), without_hidden_keys(bias, key, value), strict=True):
        expected = tensor.clone()
        expected[0, :, 1] = 0
        assert torch.equal(result, expected)
