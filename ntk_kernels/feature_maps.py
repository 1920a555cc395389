"""The feature maps φ: one record each, with everything that the package has to know about a map.

A map is a `FeatureMap` in `REGISTRY`, made of sections: features that are packed side by side and computed alike. With
sections that exist, a record is all that a new map takes, except for the Triton kernels, which have code for each
section. Definitions, written independently of this file, are in `reference/feature_maps.py`.

Below, `r` is the number of features and `D` the head dimension.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from . import checks


class Section(ABC):
    """Features that are packed side by side and computed alike."""

    name: str

    @abstractmethod
    def dim(self, head_dim: int) -> int:
        """Returns the number of features at head dimension D."""

    @abstractmethod
    def features(self, x: Tensor) -> list[Tensor]:
        """Returns the features of x [..., D] as tensors [..., n] that lie side by side.

        It may overwrite x if it is the only section of its maps, x records no gradient and `backward` does not read x.
        """

    @abstractmethod
    def backward(self, grad: Tensor, x: Tensor, features: Tensor) -> Tensor:
        """Returns the gradient of x [..., D] from the gradient of the features."""

    def moved(self, sums: Mapping[str, Tensor], move: Tensor) -> Tensor:
        """Returns the section's Σ φ(y - move) cᵀ [..., n, N] from Σ φ(y) cᵀ of every section of the map, by name.

        `move` is [..., D, 1]. Polynomials only.
        """
        raise NotImplementedError(f"sums of the features {self.name!r} cannot be moved")


class _Elu(Section):
    """elu(x) + 1: x + 1 for x > 0, e^x below."""

    name = "elu"

    def dim(self, head_dim: int) -> int:
        return head_dim

    def features(self, x: Tensor) -> list[Tensor]:
        if x.requires_grad:
            return [x.clamp(max=0).exp() + x.clamp(min=0)]
        return [x.clamp(max=0).exp_().add_(x.clamp_(min=0))]

    def backward(self, grad: Tensor, x: Tensor, features: Tensor) -> Tensor:
        return grad * features.clamp(max=1)  # φ' = 1 for x > 0, e^x = φ below


class _Linear(Section):
    """1 and x: how every polynomial map begins."""

    name = "linear"

    def dim(self, head_dim: int) -> int:
        return 1 + head_dim

    def features(self, x: Tensor) -> list[Tensor]:
        return [x.new_ones(()).expand(*x.shape[:-1], 1), x]

    def backward(self, grad: Tensor, x: Tensor, features: Tensor) -> Tensor:
        return grad[..., 1:]

    def moved(self, sums: Mapping[str, Tensor], move: Tensor) -> Tensor:
        one, linear = _one_and_linear(sums)
        return torch.cat([one, linear - move * one], dim=-2)


class _Pairs(Section):
    """x_a·x_b for a < b, row by row of the strict upper triangle: (0, 1), (0, 2), ..., (1, 2), ..."""

    name = "pairs"

    def dim(self, head_dim: int) -> int:
        return head_dim * (head_dim - 1) // 2

    def features(self, x: Tensor) -> list[Tensor]:
        return [x[..., a, None] * x[..., a + 1 :] for a in range(x.shape[-1])]  # far faster than to gather columns

    def backward(self, grad: Tensor, x: Tensor, features: Tensor) -> Tensor:
        head_dim, start = x.shape[-1], 0
        grad_x = torch.zeros_like(x)
        for a in range(head_dim - 1):  # the pairs (a, b > a) lie side by side
            row = grad[..., start : start + head_dim - 1 - a]
            start += head_dim - 1 - a
            grad_x[..., a].add_((row * x[..., a + 1 :]).sum(-1))
            grad_x[..., a + 1 :].addcmul_(row, x[..., a, None])
        return grad_x

    def moved(self, sums: Mapping[str, Tensor], move: Tensor) -> Tensor:
        one, linear = _one_and_linear(sums)
        a, b = torch.triu_indices(move.shape[-2], move.shape[-2], 1, device=move.device)
        at_a, at_b = move[..., a, :], move[..., b, :]
        return sums["pairs"] - at_a * linear[..., b, :] - at_b * linear[..., a, :] + at_a * at_b * one


class _Squares(Section):
    """x_a²/√2."""

    name = "squares"

    def dim(self, head_dim: int) -> int:
        return head_dim

    def features(self, x: Tensor) -> list[Tensor]:
        return [x.square().mul_(math.sqrt(0.5))]

    def backward(self, grad: Tensor, x: Tensor, features: Tensor) -> Tensor:
        return (grad * x).mul_(math.sqrt(2))

    def moved(self, sums: Mapping[str, Tensor], move: Tensor) -> Tensor:
        one, linear = _one_and_linear(sums)
        return sums["squares"] - math.sqrt(2) * move * linear + move.square() / math.sqrt(2) * one


def _one_and_linear(sums: Mapping[str, Tensor]) -> list[Tensor]:
    return sums["linear"].split([1, sums["linear"].shape[-2] - 1], dim=-2)


ELU, LINEAR, PAIRS, SQUARES = _Elu(), _Linear(), _Pairs(), _Squares()


@dataclass(frozen=True)
class FeatureMap:
    """A feature map φ: R^D -> R^r; calling it computes the features.

    Attributes:
        name: the name by which states, files and options refer to the map.
        sections: its features in the order in which they are packed. r must tell D.
        order: degree of the polynomial in x·y that φ(x)·φ(y) is; 0 for a map that is not a polynomial. A polynomial
            begins with the section `LINEAR`: its first feature is 1, and sums of its features can be moved.
        several_centers: whether a state may be expanded around more than one centre.
        tiles: the kind of entry in the kernels' tables of tiles.
    """

    name: str
    sections: tuple[Section, ...]
    order: int = 0
    several_centers: bool = False
    tiles: str = "state"

    def __post_init__(self) -> None:
        if self.is_polynomial and self.sections[0] is not LINEAR:
            raise ValueError(f"`sections` must begin with LINEAR at order={self.order}, got {self.sections[0].name!r}")

    @property
    def is_polynomial(self) -> bool:
        """True if the features are monomials of x, of which the first is 1."""
        return self.order > 0

    def dim(self, head_dim: int) -> int:
        """Returns r at head dimension D."""
        return sum(section.dim(head_dim) for section in self.sections)

    def section_dims(self, head_dim: int) -> dict[str, int]:
        """Returns the number of features of each section at head dimension D, in packing order."""
        return {section.name: section.dim(head_dim) for section in self.sections}

    def head_dim(self, num_features: int) -> int | None:
        """Returns the head dimension D at which the map has `num_features` features, None if there is none."""
        low, high = 1, num_features  # the smallest D with at least so many features is between them
        if (first_order := num_features - self.dim(0)) >= 1 and self.dim(first_order) == num_features:
            return first_order
        while low < high:
            middle = (low + high) // 2
            if self.dim(middle) < num_features:
                low = middle + 1
            else:
                high = middle
        return low if self.dim(low) == num_features else None

    def __call__(self, x: Tensor) -> Tensor:
        """Returns φ(x), [..., D] -> [..., r], in the dtype of `x`, which it may overwrite if x records no gradient."""
        parts = [part for section in self.sections for part in section.features(x)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def backward(self, grad_phi: Tensor, x: Tensor, phi: Tensor) -> Tensor:
        """Returns the gradient of x [..., D] from the gradient of φ(x) [..., r]."""
        parts = zip(self.sections, self._split(grad_phi, x.shape[-1]), self._split(phi, x.shape[-1]), strict=True)
        return reduce(torch.add, [section.backward(grad, x, features) for section, grad, features in parts])

    def moved(self, sums: Tensor, move: Tensor) -> Tensor:
        """Returns Σ φ(y - move) cᵀ [..., r, N] from Σ φ(y) cᵀ, for `move` [..., D, 1]. Polynomials only."""
        parts = self._split(sums, move.shape[-2], dim=-2)
        by_name = {section.name: part for section, part in zip(self.sections, parts, strict=True)}
        return torch.cat([section.moved(by_name, move) for section in self.sections], dim=-2)

    def check_num_centers(self, num_centers: int) -> None:
        """Raises ValueError unless a state may be expanded around that many centres."""
        if num_centers < 1:
            raise ValueError(f"`centers` must hold at least one centre, got C={num_centers}")
        if num_centers > 1 and not self.several_centers:
            raise ValueError(
                f"`centers` must hold one centre (C=1) with feature_map={self.name!r}, {several_centers_rule()}, "
                f"got C={num_centers}"
            )

    def _split(self, features: Tensor, head_dim: int, dim: int = -1) -> tuple[Tensor, ...]:
        return features.split([section.dim(head_dim) for section in self.sections], dim=dim)


REGISTRY: dict[str, FeatureMap] = {
    feature_map.name: feature_map
    for feature_map in (
        FeatureMap("elu", (ELU,)),
        FeatureMap("taylor1", (LINEAR,), order=1, several_centers=True),
        FeatureMap("taylor2", (LINEAR, PAIRS, SQUARES), order=2, tiles="taylor2"),
    )
}
FEATURE_MAPS = tuple(REGISTRY)


def get_feature_map(name: str) -> FeatureMap:
    """Returns the record of a map.

    Raises:
        ValueError: if there is no map of this name.
    """
    checks.check_one_of("feature_map", name, tuple(REGISTRY))
    return REGISTRY[name]


def feature_dim(feature_map: str, head_dim: int) -> int:
    """Returns the number r of features of a map at head dimension D: D, 1 + D or 1 + D + D(D+1)/2.

    Raises:
        ValueError: if there is no map of this name, or D is less than 1.
    """
    if head_dim < 1:
        raise ValueError(f"`head_dim` must be at least 1, got {head_dim}")
    return get_feature_map(feature_map).dim(head_dim)


def several_centers_rule() -> str:
    """Returns the rule about several centres, for messages."""
    names = " or ".join(repr(each.name) for each in REGISTRY.values() if each.several_centers)
    return f"several go with {names} only"
