"""Sums of features over the rows nearest to each centre, in plain tensor operations, forward and backward.

    z_c = Σ_j w_j φ(y_j) v_jᵀ    k_c = Σ_j w_j φ(y_j)    count_c = Σ_j w_j    y_j = key_scale · (k_j - μ_c)

over the rows j of centre c. With one centre, tiles are slices of the rows of a few heads. With several, the rows of a
head are sorted by centre and gathered in tiles that have rows of one centre each; a tile that is not full repeats its
last row, with weight 0. Tiles are summed in the dtype of the accumulation, and their sums in float64. Features of
second order around one centre are made in blocks (`second_order.py`), of one head after the other.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...feature_maps import LINEAR, get_feature_map
from ...inputs import SumInputs
from ..centers import elements_at_a_time, rows_by_center
from ..results import empty_sum_grads, empty_sums, lse_dtype
from .second_order import Blocks, SecondOrder, is_second_order

_MAX_TILE_ROWS = 2048  # more would lose digits
_MIN_TILE_ROWS = 16


class _Tiles(NamedTuple):
    """B tiles of T rows each."""

    heads: slice  # B heads, or a single one if rows are gathered
    rows: slice | Tensor  # [B, T]
    centers: Tensor | None  # [B], the centre of each tile; None if there is only one
    exists: Tensor | None  # [B, T, 1], False where a tile repeats its last row

    def rows_of(self, tensor: Tensor) -> Tensor:
        """Returns the rows of the tiles, [H, m, d] -> [B, T, d]."""
        if self.centers is None:
            return tensor[self.heads, self.rows]
        return tensor[self.heads.start].index_select(0, self.rows.flatten()).unflatten(0, self.rows.shape)

    def set_rows(self, tensor: Tensor, tiles: Tensor) -> None:
        """Writes the rows of the tiles [B, T, d] into a tensor [H, m, d]."""
        if self.centers is None:
            tensor[self.heads, self.rows] = tiles
        else:
            tensor[self.heads.start].index_copy_(0, self.rows.flatten(), tiles.flatten(0, 1).to(tensor.dtype))

    def centers_of(self, tensor: Tensor) -> Tensor:
        """Returns the part of each tile's centre, [H, C, ...] -> [B, ...]."""
        if self.centers is None:
            return tensor[self.heads, 0]
        return tensor[self.heads.start].index_select(0, self.centers)

    def add_to(self, sums: Tensor, tiles: Tensor) -> None:
        """Adds tiles [B, ...] to the sums [H, C, ...] of their centres, in a fixed order."""
        if self.centers is None:
            sums[self.heads, 0] += tiles
        elif sums.device.type == "cpu":
            sums[self.heads.start].index_add_(0, self.centers, tiles.to(sums.dtype))
        else:  # where index_add_ has no fixed order
            sums[self.heads.start].index_put_((self.centers,), tiles.to(sums.dtype), accumulate=True)


def sum_features(inputs: SumInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Computes z [H, C, r, Dv], k [H, C, r] and count [H, C]."""
    results = empty_sums(inputs)
    if _is_in_blocks(inputs):
        sums = _sum_in_blocks(inputs)
        return tuple(result.copy_(part.unsqueeze(1)) for result, part in zip(results, sums, strict=True))
    z, k, count = (torch.zeros_like(result, dtype=torch.float64) for result in results)
    phi_of = get_feature_map(inputs.feature_map)
    constant = 1 if phi_of.sections == (LINEAR,) else 0  # features that are 1 and need no product
    for tiles in _tiles(inputs):
        w = _weights_of(tiles, inputs)
        v = tiles.rows_of(inputs.values).to(results[0].dtype)
        phi = _centred_keys(tiles, inputs)
        if not constant:
            phi = phi_of(phi.mul_(inputs.key_scale))
        if w is not None:
            phi.mul_(w)
        num_rows = v.shape[1] if w is None else w.sum((1, 2))
        tiles.add_to(count, num_rows)
        tiles.add_to(k[..., constant:], phi.sum(1))  # adds up pairwise, unlike a product with ones
        if constant:
            tiles.add_to(z[..., 0, :], v.sum(1) if w is None else (w * v).sum(1))
        tiles.add_to(z[..., constant:, :], phi.mT @ v)
    if constant:
        k[..., 1:] *= inputs.key_scale
        z[..., 1:, :] *= inputs.key_scale
        k[..., 0] = count
    return tuple(result.copy_(sums) for result, sums in zip(results, (z, k, count), strict=True))


def sum_features_backward(
    grad_z: Tensor, grad_k: Tensor, inputs: SumInputs, needs_grad: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Computes the gradients of keys, values and centres; those that `needs_grad` excludes have no elements."""
    if _is_in_blocks(inputs):
        return _backward_in_blocks(grad_z, grad_k, inputs, needs_grad)
    grad_keys, grad_values, grad_centers = grads = empty_sum_grads(inputs, needs_grad)
    phi_of, of_centers = get_feature_map(inputs.feature_map), torch.zeros_like(grad_centers, dtype=torch.float64)
    for tiles in _tiles(inputs):
        w = _weights_of(tiles, inputs, once=False)
        y = _centred_keys(tiles, inputs).mul_(inputs.key_scale)
        phi = phi_of(y.clone())
        if needs_grad[1]:
            grad = phi @ tiles.centers_of(grad_z)
            tiles.set_rows(grad_values, grad if w is None else grad.mul_(w))
        if needs_grad[0] or needs_grad[2]:
            v = tiles.rows_of(inputs.values).to(y.dtype)
            grad_phi = torch.baddbmm(tiles.centers_of(grad_k).unsqueeze(1), v, tiles.centers_of(grad_z).mT)
            grad = phi_of.backward(grad_phi, y, phi).mul(inputs.key_scale)
            if w is not None:
                grad.mul_(w)
            if needs_grad[0]:
                tiles.set_rows(grad_keys, grad)
            if needs_grad[2]:
                if tiles.exists is not None:
                    grad.mul_(tiles.exists)
                tiles.add_to(of_centers, grad.sum(1))
    if needs_grad[2]:
        grad_centers.copy_(of_centers.neg_())
    return grads


def _is_in_blocks(inputs: SumInputs) -> bool:
    return is_second_order(get_feature_map(inputs.feature_map)) and inputs.num_centers == 1


def _sum_in_blocks(inputs: SumInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Computes z [H, r, Dv], k [H, r] and count [H] in float64, of features of second order around one centre."""
    heads, num_rows, head_dim = inputs.keys.shape
    dtype, device = lse_dtype(inputs.keys), inputs.keys.device
    blocks = Blocks(head_dim, dtype, device)
    shapes = (heads, blocks.num_features, inputs.values.shape[2]), (heads, head_dim + 1, head_dim + 1), (heads,)
    z, products, count = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes)
    for head in range(heads):
        for start in range(0, num_rows, _MAX_TILE_ROWS):
            of_tile = z.new_zeros(z.shape[1:], dtype=dtype)
            for tile in _tiles_of(head, start, min(start + _MAX_TILE_ROWS, num_rows), blocks.max_rows):
                y, v, w = _rows_of(tile, inputs)
                of_tile.addmm_(blocks.features(y.mT.contiguous()), v if w is None else w * v)
                with_one = torch.cat([y.new_ones(y.shape[0], 1), y], dim=-1)
                products[head] += with_one.mT @ (with_one if w is None else w * with_one)
                count[head] += y.shape[0] if w is None else w.sum()
            z[head] += of_tile
    first, second = products[:, 0], products[:, 1:, 1:]
    return blocks.unpack(z), torch.cat([first, blocks.of_square(second)], dim=-1), count


def _backward_in_blocks(grad_z: Tensor, grad_k: Tensor, inputs: SumInputs, needs_grad: Sequence[bool]) -> tuple:
    """Computes `sum_features_backward` for features of second order around one centre."""
    grad_keys, grad_values, grad_centers = grads = empty_sum_grads(inputs, needs_grad)
    heads, num_rows, head_dim = inputs.keys.shape
    of_centers = torch.zeros_like(grad_centers, dtype=torch.float64)
    for head in range(heads):
        features = SecondOrder(grad_z[head : head + 1], grad_k[head : head + 1], head_dim)
        for tile in _tiles_of(head, 0, num_rows, features.blocks.max_rows):
            y, v, w = _rows_of(tile, inputs)
            y, v = y[None, None], v[None, None]
            if needs_grad[1]:
                grad = features.numerator(y)[0]
                tile.set_rows(grad_values, grad if w is None else grad.mul_(w))
            if needs_grad[0] or needs_grad[2]:
                ones = y.new_ones(y.shape[:3])
                grad = features.grad_of_rows(y, v, ones, ones)[0][0].mul_(inputs.key_scale)
                if w is not None:
                    grad.mul_(w)
                if needs_grad[0]:
                    tile.set_rows(grad_keys, grad)
                if needs_grad[2]:
                    tile.add_to(of_centers, grad.sum(1))
    if needs_grad[2]:
        grad_centers.copy_(of_centers.neg_())
    return grads


def _tiles_of(head: int, start: int, stop: int, num_tile_rows: int) -> Iterator[_Tiles]:
    """Yields the rows of one head from `start` to `stop`."""
    for row in range(start, stop, num_tile_rows):
        yield _Tiles(slice(head, head + 1), slice(row, min(row + num_tile_rows, stop)), None, None)


def _rows_of(tile: _Tiles, inputs: SumInputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns y [T, D], v [T, Dv] and weights [T, 1], None if all are 1, of a tile of one head."""
    w = _weights_of(tile, inputs)
    y = _centred_keys(tile, inputs).mul_(inputs.key_scale)
    return y[0], tile.rows_of(inputs.values)[0].to(y.dtype), None if w is None else w[0]


def _tiles(inputs: SumInputs) -> Iterator[_Tiles]:
    """Yields tiles, as many at a time as have `_CHUNK_ELEMENTS` features."""
    heads, num_rows, _ = inputs.keys.shape
    if num_rows == 0:
        return
    max_rows = elements_at_a_time(inputs.keys) // inputs.num_features
    if inputs.num_centers > 1:
        order, offsets = rows_by_center(inputs.keys, inputs.centers)
        for head in range(heads):
            yield from _gathered_tiles(head, order[head], offsets[head], max_rows, inputs.values.shape[2])
        return
    num_tile_rows = max(_MIN_TILE_ROWS, min(_MAX_TILE_ROWS, num_rows, max_rows))
    step = max(1, max_rows // num_tile_rows)
    for head in range(0, heads, step):
        for row in range(0, num_rows, num_tile_rows):
            yield _Tiles(slice(head, head + step), slice(row, row + num_tile_rows), None, None)


def _gathered_tiles(head: int, order: Tensor, offsets: Tensor, max_rows: int, value_dim: int) -> Iterator[_Tiles]:
    """Yields the tiles of one head, so many at a time that neither their rows nor their sums exceed `max_rows` rows."""
    num_rows, num_centers = order.shape[0], offsets.shape[0] - 1
    num_tile_rows = max(_MIN_TILE_ROWS, min(_MAX_TILE_ROWS, num_rows // (4 * num_centers), max_rows))
    starts, stops = offsets[:-1], offsets[1:]
    num_tiles = (stops - starts + num_tile_rows - 1) // num_tile_rows
    all_centers = torch.repeat_interleave(num_tiles)
    numbers = torch.arange(all_centers.shape[0], device=order.device) - (num_tiles.cumsum(0) - num_tiles)[all_centers]
    columns = torch.arange(num_tile_rows, device=order.device)
    step = max(1, max_rows // max(num_tile_rows, value_dim))
    for centers, number in zip(all_centers.split(step), numbers.split(step), strict=True):
        positions = (starts[centers] + number * num_tile_rows).unsqueeze(1) + columns
        last = stops[centers].unsqueeze(1) - 1
        exists = (positions <= last).unsqueeze(-1)
        yield _Tiles(slice(head, head + 1), order[torch.minimum(positions, last)], centers, exists)


def _weights_of(tiles: _Tiles, inputs: SumInputs, *, once: bool = True) -> Tensor | None:
    """Returns the weights [B, T, 1] of the rows, with `once` 0 for repeated ones; None if all are 1."""
    dtype = lse_dtype(inputs.keys)
    w = None if inputs.weights is None else tiles.rows_of(inputs.weights.unsqueeze(-1)).to(dtype)
    if tiles.exists is None or not once:
        return w
    return tiles.exists.to(dtype) if w is None else w * tiles.exists


def _centred_keys(tiles: _Tiles, inputs: SumInputs) -> Tensor:
    """Returns k - μ [B, T, D] as a new tensor."""
    dtype = lse_dtype(inputs.keys)
    keys = tiles.rows_of(inputs.keys)
    if inputs.centers is None:
        return keys.to(dtype, copy=True)
    return keys.to(dtype) - tiles.centers_of(inputs.centers).to(dtype).unsqueeze(1)
