"""Attention over a key/value cache for a backend that takes keys as they come, without prefix.

Where lengths can be read for free, on the CPU, each batch row gets its own keys, cut out of the cache; only pages have
to be copied. Elsewhere reading would wait for the device: the whole cache is masked.
"""

from collections.abc import Callable, Iterator
from itertools import groupby

import torch
from torch import Tensor

from ...inputs import DecodeInputs
from ...replay import refuse
from ..results import empty_out, lse_dtype


def forward(inputs: DecodeInputs, attend: Callable) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Lq, Dv] and lse [B, Hq, Lq].

    `attend(query, key, value, attn_mask, scale, band)` is attention over all of `key`, `band` being (left, right,
    causal_offset).
    """
    query = inputs.query
    if not _lengths_are_free(query):
        return attend(query, *_whole_cache(inputs), _mask(inputs), inputs.scale, (-1, -1, 0))
    out = empty_out(query, inputs.value_cache)
    lse = torch.empty(query.shape[:3], dtype=lse_dtype(query))
    for rows, key, value, offset in _parts(inputs):
        band = (inputs.window_left, inputs.window_right, offset)
        q = query[rows]
        packed = q.shape[2] == 1 or band[:2] == (-1, -1)
        if packed:  # so that keys are read once
            q, band = rows_of_heads(q, key.shape[1]), (-1, -1, 0)
        part, part_lse = attend(q, key, value, None, inputs.scale, band)
        out[rows], lse[rows] = heads_of_rows(part, out[rows].shape), heads_of_rows(part_lse, lse[rows].shape)
    return out, lse


def rows_of_heads(tensor: Tensor, heads: int, merge_batch: bool = False) -> Tensor:
    """[B, Hq, Lq, ...] -> [B, heads, Hq/heads·Lq, ...], or with `merge_batch` [1, heads, B·Hq/heads·Lq, ...]."""
    tensor = tensor.unflatten(1, (heads, -1)).flatten(2, 3)
    return tensor.transpose(0, 1).flatten(1, 2).unsqueeze(0) if merge_batch else tensor


def heads_of_rows(tensor: Tensor, shape: tuple) -> Tensor:
    """Undoes `rows_of_heads` for a tensor that had `shape`."""
    if tensor.shape[0] != shape[0]:
        tensor = tensor[0].unflatten(1, (shape[0], -1)).transpose(0, 1)
    return tensor.reshape(shape)


def _lengths_are_free(query: Tensor) -> bool:
    return query.device.type == "cpu"


def _parts(inputs: DecodeInputs) -> Iterator[tuple[slice, Tensor, Tensor, int]]:
    """Batch rows, the keys and values that one of their queries sees, and where among those their diagonal is."""
    batch, _, seq_q, _ = inputs.query.shape
    size = inputs.cache_size
    if inputs.cache_seqlens is not None or inputs.key_start is not None:
        refuse("lengths are read")
    stops = [size] * batch if inputs.cache_seqlens is None else inputs.cache_seqlens.tolist()
    starts = [0] * batch if inputs.key_start is None else inputs.key_start.tolist()
    ranges = []
    for start, stop in zip(starts, stops, strict=True):
        first = max(start, 0)
        if inputs.window_left >= 0:
            first = max(first, stop - seq_q - inputs.window_left)
        ranges.append((min(first, stop), stop))
    if inputs.block_table is None:
        row = 0
        for (start, stop), same in groupby(ranges):
            rows = slice(row, row + len(list(same)))
            row = rows.stop
            caches = (cache[rows, :, start:stop] for cache in (inputs.key_cache, inputs.value_cache))
            yield rows, *caches, stop - start - seq_q
        return
    page_size = inputs.key_cache.shape[2]
    for row, (start, stop) in enumerate(ranges):
        first_page = start // page_size
        pages = inputs.block_table[row, first_page : -(-stop // page_size)]
        visible = slice(start - first_page * page_size, stop - first_page * page_size)
        caches = (
            cache.transpose(0, 1).index_select(1, pages).flatten(1, 2)[None, :, visible]
            for cache in (inputs.key_cache, inputs.value_cache)
        )
        yield slice(row, row + 1), *caches, stop - start - seq_q


def _whole_cache(inputs: DecodeInputs) -> tuple[Tensor, Tensor]:
    """[B, Hkv, Lk, D or Dv]."""
    caches = inputs.key_cache, inputs.value_cache
    if inputs.block_table is None:
        return caches
    pages = inputs.block_table.clamp(0, caches[0].shape[0] - 1)  # beyond a row's length anything may stand there
    return tuple(cache[pages].transpose(1, 2).flatten(2, 3) for cache in caches)


def _mask(inputs: DecodeInputs) -> Tensor:
    """[B, 1, Lq, Lk], True where a row sees a key."""
    query, size = inputs.query, inputs.cache_size
    j = torch.arange(size, device=query.device)
    stop = query.new_full(query.shape[:1], size, dtype=torch.int64)
    if inputs.cache_seqlens is not None:
        stop = inputs.cache_seqlens.clamp(0, size)
    visible = (j < stop[:, None])[:, None, None, :]
    if inputs.key_start is not None:
        visible = visible & (j >= inputs.key_start[:, None, None, None])
    diagonal = (torch.arange(query.shape[2], device=query.device) - query.shape[2] + stop[:, None])[:, None, :, None]
    if inputs.window_left >= 0:
        visible = visible & (j >= diagonal - inputs.window_left)
    if inputs.window_right >= 0:
        visible = visible & (j <= diagonal + inputs.window_right)
    return visible.expand(-1, -1, query.shape[2], -1)
