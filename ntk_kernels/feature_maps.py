"""Names, dimensions and packing order of the feature maps φ, with the torch versions that the backends use.

`r` below is the feature dimension, `D` the head dimension; `reference/feature_maps.py` has the definitions.
"""

import math

import torch
from torch import Tensor

from . import checks

FEATURE_MAPS = ("elu", "taylor1", "taylor2")


def feature_dim(feature_map: str, head_dim: int) -> int:
    """Number r of features that `feature_map` has at head dimension D: D, 1 + D or 1 + D + D(D+1)/2."""
    checks.check_one_of("feature_map", feature_map, FEATURE_MAPS)
    if head_dim < 1:
        raise ValueError(f"`head_dim` must be at least 1, got {head_dim}")
    return {"elu": head_dim, "taylor1": 1 + head_dim, "taylor2": 1 + head_dim + head_dim * (head_dim + 1) // 2}[
        feature_map
    ]


def head_dim_of(feature_map: str, num_features: int) -> int | None:
    """The head dimension D at which `feature_map` has `num_features` features; None if there is none."""
    if feature_map == "taylor2":  # solves D² + 3D + 2 = 2r; a wrong guess fails the comparison below
        guess = int(((8 * num_features + 1) ** 0.5 - 3) / 2)
    else:
        guess = num_features if feature_map == "elu" else num_features - 1
    return guess if guess >= 1 and feature_dim(feature_map, guess) == num_features else None


def features(x: Tensor, feature_map: str) -> Tensor:
    """φ(x): [..., D] -> [..., r] in the dtype of `x`, which "elu" overwrites if it records no gradient."""
    if feature_map == "elu":
        if x.requires_grad:
            return x.clamp(max=0).exp() + x.clamp(min=0)
        return x.clamp(max=0).exp_().add_(x.clamp_(min=0))
    one = x.new_ones(()).expand(*x.shape[:-1], 1)
    if feature_map == "taylor1":
        return torch.cat([one, x], dim=-1)
    pairs = [x[..., a, None] * x[..., a + 1 :] for a in range(x.shape[-1])]  # far faster than to gather columns
    return torch.cat([one, x, *pairs, x.square().mul_(math.sqrt(0.5))], dim=-1)


def features_backward(grad_phi: Tensor, x: Tensor, phi: Tensor, feature_map: str) -> Tensor:
    """Gradient of x from the gradient of φ(x): [..., r] -> [..., D]."""
    if feature_map == "elu":
        return grad_phi * phi.clamp(max=1)  # φ' = 1 for x > 0, e^x = φ below
    head_dim = x.shape[-1]
    if feature_map == "taylor1":
        return grad_phi[..., 1:]
    _, linear, pair, square = grad_phi.split([1, head_dim, head_dim * (head_dim - 1) // 2, head_dim], dim=-1)
    grad_x = torch.addcmul(linear, square, x, value=math.sqrt(2))
    start = 0
    for a in range(head_dim - 1):  # the pairs (a, b > a) lie side by side
        row = pair[..., start : start + head_dim - 1 - a]
        start += head_dim - 1 - a
        grad_x[..., a].add_((row * x[..., a + 1 :]).sum(-1))
        grad_x[..., a + 1 :].addcmul_(row, x[..., a, None])
    return grad_x
