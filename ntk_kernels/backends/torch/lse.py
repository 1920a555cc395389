"""Two parts of one softmax, merged by their lse."""

import math

import torch
from torch import Tensor


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """out [..., Dv] and lse [...] over the keys of both parts, in the widest of their dtypes, float32 at least;
    differentiable.

    A part whose lse is infinite has seen nothing; its out is not looked at.
    """
    dtype = torch.float32
    for tensor in (out_a, lse_a, out_b, lse_b):
        dtype = torch.promote_types(dtype, tensor.dtype)
    nothing = [lse.isinf() for lse in (lse_a, lse_b)]
    parts = [lse.to(dtype).masked_fill(empty, -math.inf) for lse, empty in zip((lse_a, lse_b), nothing, strict=True)]
    neither = nothing[0] & nothing[1]
    peak = torch.maximum(*parts).detach().masked_fill(neither, 0)
    weights = [(lse - peak).exp() for lse in parts]
    total = (weights[0] + weights[1]).masked_fill(neither, 1)
    lse = (peak + total.log()).masked_fill(neither, -math.inf)
    out = sum(
        part.to(dtype).masked_fill(empty.unsqueeze(-1), 0) * (weight / total).unsqueeze(-1)
        for part, empty, weight in zip((out_a, out_b), nothing, weights, strict=True)
    )
    return out, lse
