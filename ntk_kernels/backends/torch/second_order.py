"""Features 1, x, x_a·x_b and x_a²/√2 in blocks of columns of x, and products with them.

Pairs and squares are outer products of _BLOCK columns of x with all columns from the first of these on. So a few
multiplications make them all, at the price of a few that are there twice, pairs within a block, of which each counts
half. Numbers of different rows lie side by side (x is [D, M] for M rows, features are [F, M]), so that multiplications
run along them; and one head is taken after the other, some rows at a time, so that features stay in the cache from
where they are made to where they are multiplied.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ...feature_maps import LINEAR, PAIRS, SQUARES, FeatureMap

_BLOCK = 8
_MAX_FEATURES = {"cpu": 2**20, "cuda": 2**24}  # at a time
MIN_ROWS = 32  # for fewer it does not pay to bring Z into this order
_OF_SQUARES = math.sqrt(0.5)


def is_second_order(feature_map: FeatureMap) -> bool:
    """Returns whether the features of a map are these, packed in this order."""
    return feature_map.sections == (LINEAR, PAIRS, SQUARES)


class Blocks:
    """The features of x [D, M] in their order here: block after block, then x, then 1."""

    def __init__(self, head_dim: int, dtype: torch.dtype, device: torch.device):
        self.head_dim = head_dim
        self._sizes = [min(_BLOCK, head_dim - start) * (head_dim - start) for start in range(0, head_dim, _BLOCK)]
        self.num_features = sum(self._sizes) + head_dim + 1
        self.max_rows = max(256, _MAX_FEATURES[device.type] // self.num_features)
        self._room: Tensor | None = None

        a, b = self._pairs = torch.triu_indices(head_dim, head_dim, 1, device=device)
        columns = torch.arange(head_dim, device=device)
        num_first = 1 + head_dim
        # [D, D], where x_a·x_b is in packing order, whichever of the two is larger.
        self._packed = torch.empty(head_dim, head_dim, dtype=torch.int64, device=device)
        self._packed[a, b] = self._packed[b, a] = torch.arange(num_first, num_first + a.shape[0], device=device)
        self._packed.diagonal().copy_(columns + (num_first + a.shape[0]))
        is_square = columns[:, None] == columns
        in_block = columns[:, None] // _BLOCK == columns // _BLOCK
        ones = torch.ones(head_dim, head_dim, dtype=dtype, device=device)
        factors = ones.masked_fill(in_block, 0.5).masked_fill_(is_square, _OF_SQUARES)
        self._of_square = ones.fill_(0.5).masked_fill_(is_square, _OF_SQUARES)
        # Of each feature here: where it is in packing order, and what part of it counts.
        self._sources = torch.cat([*self._blocks_of(self._packed), columns + 1, columns.new_zeros(1)])
        self._factors = torch.cat([*self._blocks_of(factors), factors.new_ones(num_first)]).unsqueeze(-1)
        # Of each feature in packing order: where it is here.
        linear = columns + sum(self._sizes)
        self._targets = torch.cat([linear[-1:] + 1, linear, self._number(a, b), self._number(columns, columns)])

    def _blocks_of(self, matrix: Tensor) -> list[Tensor]:
        return [matrix[start : start + _BLOCK, start:].flatten() for start in range(0, self.head_dim, _BLOCK)]

    def _number(self, a: Tensor, b: Tensor) -> Tensor:
        """Returns where x_a·x_b is here, a <= b."""
        block = a // _BLOCK
        start = block * _BLOCK
        before = start * self.head_dim - block * (block - 1) // 2 * _BLOCK**2
        return before + (a - start) * (self.head_dim - start) + b - start

    def pack(self, z: Tensor) -> Tensor:
        """Returns what the features here are multiplied with, [..., F, N], in the place of z [..., r, N]."""
        return z.index_select(-2, self._sources).mul_(self._factors)

    def unpack(self, sums: Tensor) -> Tensor:
        """Returns sums [..., r, N] over the features in packing order from those over the features here [..., F, N]."""
        sums = sums.index_select(-2, self._targets)
        sums[..., sums.shape[-2] - self.head_dim :, :] *= _OF_SQUARES
        return sums

    def square_of(self, k: Tensor) -> Tensor:
        """Returns the symmetric matrix K [..., D, D] of k [..., r], with φ(x)·k = k_0 + k_1·x + x·(K x)."""
        matrix = k.index_select(-1, self._packed.flatten()).unflatten(-1, self._packed.shape)
        return matrix.mul_(self._of_square)

    def of_square(self, matrix: Tensor) -> Tensor:
        """Returns sums of pairs and squares [..., r - 1 - D] from those of x xᵀ [..., D, D]."""
        squares = matrix.diagonal(dim1=-2, dim2=-1) * _OF_SQUARES
        return torch.cat([matrix[..., self._pairs[0], self._pairs[1]], squares], dim=-1)

    def features(self, x: Tensor) -> Tensor:
        """Returns the features [F, M] of x [D, M], until the next call."""
        if self._room is None or self._room.shape[1] != x.shape[1]:
            self._room = x.new_empty(self.num_features, x.shape[1])
        parts = self._parts(self._room)
        for start, part in zip(range(0, self.head_dim, _BLOCK), parts, strict=False):
            left, right = x[start : start + _BLOCK].unsqueeze(1), x[start:].unsqueeze(0)
            torch.mul(left, right, out=part.view(left.shape[0], *right.shape[1:]))
        parts[-2].copy_(x)
        parts[-1].fill_(1)
        return self._room

    def backward(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradient of x [D, M] from the `grad` [F, M] of its features, and features · grad [M]."""
        parts = self._parts(grad)
        grad_x, room = torch.zeros_like(x), x.new_empty(max(self._sizes), x.shape[1])
        for start, part in zip(range(0, self.head_dim, _BLOCK), parts, strict=False):
            left, right = x[start : start + _BLOCK].unsqueeze(1), x[start:].unsqueeze(0)
            part = part.view(left.shape[0], *right.shape[1:])
            product = room[: left.shape[0] * right.shape[1]].view(part.shape)
            grad_x[start : start + _BLOCK] += torch.mul(part, right, out=product).sum(1)
            grad_x[start:] += torch.mul(part, left, out=product).sum(0)
        # x · grad_x is twice what comes from the second order.
        along_x = (grad_x * x).sum(0).mul_(0.5).add_((parts[-2] * x).sum(0)).add_(parts[-1][0])
        return grad_x.add_(parts[-2]), along_x

    def _parts(self, features: Tensor) -> tuple[Tensor, ...]:
        return features.split([*self._sizes, self.head_dim, 1])


class SecondOrder:
    """φ(x)·Z and φ(x)·k of the heads of a state, and their gradients.

    Args:
        z: [1 or B, H, r, Dv].
        k: [1 or B, H, r].

    Rows x are [B, H, M, D], at most `blocks.max_rows` of them at a time.
    """

    def __init__(self, z: Tensor, k: Tensor, head_dim: int):
        self.blocks = Blocks(head_dim, k.dtype, k.device)
        self._z = self.blocks.pack(z)
        self._k_0, self._k_1, _ = k.unsqueeze(-2).split([1, head_dim, k.shape[-1] - 1 - head_dim], dim=-1)
        self._square = self.blocks.square_of(k)

    def mass(self, x: Tensor) -> Tensor:
        """Returns φ(x)·k [B, H, M]."""
        return ((x @ self._square).add_(self._k_1).mul_(x).sum(-1, keepdim=True).add_(self._k_0)).squeeze(-1)

    def numerator(self, x: Tensor) -> Tensor:
        """Returns φ(x)·Z [B, H, M, Dv]."""
        numerator = x.new_empty(*x.shape[:3], self._z.shape[3])
        for row, head, of_state in self._heads(x):
            numerator[row, head] = (self._z[of_state, head].mT @ self.blocks.features(_columns(x[row, head]))).mT
        return numerator

    def grad_of_rows(self, x: Tensor, grad: Tensor, grad_mass: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradient of x, and of φ(x) in the direction of φ(x) [B, H, M], from those of numerator and mass.

        Args:
            grad: [B, H, M, Dv].
            grad_mass, mass: [B, H, M].
        """
        grad_x = (x @ self._square).mul_(2).add_(self._k_1).mul_(grad_mass.unsqueeze(-1))
        product = grad_mass * mass
        for row, head, of_state in self._heads(x):
            grad_features = self._z[of_state, head] @ grad[row, head].mT
            of_x, of_product = self.blocks.backward(grad_features, _columns(x[row, head]))
            grad_x[row, head] += of_x.mT
            product[row, head] += of_product
        return grad_x, product

    def add_grad_of_z(self, sums: Tensor, x: Tensor, grad: Tensor) -> None:
        """Adds Σ φ grad to `sums` [1 or B, H, F, Dv], whose features are in the order of `blocks`."""
        for row, head, _ in self._heads(x):
            of_row = row if sums.shape[0] > 1 else 0
            sums[of_row, head].addmm_(self.blocks.features(_columns(x[row, head])), grad[row, head])

    def grad_of_k(self, x: Tensor, grad_mass: Tensor) -> Tensor:
        """Returns Σ φ grad_mass [B, H, r]."""
        weighted = x * grad_mass.unsqueeze(-1)
        constant = grad_mass.sum(-1, keepdim=True)
        return torch.cat([constant, weighted.sum(-2), self.blocks.of_square(weighted.mT @ x)], dim=-1)

    def _heads(self, x: Tensor) -> Iterator[tuple[int, int, int]]:
        """Yields batch row, head, and which of the states the row has."""
        for row in range(x.shape[0]):
            for head in range(x.shape[1]):
                yield row, head, row if self._z.shape[0] > 1 else 0


def _columns(x: Tensor) -> Tensor:
    """Returns x [M, D] as [D, M], whose rows are contiguous."""
    return x.mT.contiguous()
