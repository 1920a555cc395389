"""The three feature maps φ: R^D -> R^r with φ(x)·φ(y) ≈ exp(x·y), except for `elu`, which is positive only."""

import math

import torch
from torch import Tensor


def elu(x: Tensor) -> Tensor:
    """Returns φ(x) = elu(x) + 1, r = D: x + 1 for x > 0, e^x below (in this form nothing cancels).

    This is the map of the authors' experiments; it does not approximate exp.
    """
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def taylor1(x: Tensor) -> Tensor:
    """Returns φ(x) = [1, x], r = 1 + D, so that φ(x)·φ(y) = 1 + t with t = x·y."""
    return torch.cat([torch.ones_like(x[..., :1]), x], dim=-1)


def taylor2(x: Tensor) -> Tensor:
    """Returns φ(x) = [1, x, x_a·x_b for a < b, x_a²/√2], r = 1 + D + D(D+1)/2, so that φ(x)·φ(y) = 1 + t + t²/2.

    The pairs (a, b) are in row-major order of the strict upper triangle: (0,1), (0,2), …, (1,2), …; the D
    squares come last.
    """
    a, b = torch.triu_indices(x.shape[-1], x.shape[-1], offset=1, device=x.device)
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., a] * x[..., b], x * x / math.sqrt(2)], dim=-1)


FEATURE_MAPS = {"elu": elu, "taylor1": taylor1, "taylor2": taylor2}


def feature_map(x: Tensor, name: str) -> Tensor:
    """Returns φ(x) of the map `name` in `FEATURE_MAPS`: [..., D] -> [..., r]."""
    return FEATURE_MAPS[name](x)
