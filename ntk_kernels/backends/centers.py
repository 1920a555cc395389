"""Rows and the centre nearest to each, for the sums of features."""

import torch
from torch import Tensor

from .results import lse_dtype

_CHUNK_ELEMENTS = {"cpu": 2**21, "other": 2**25}  # features held at a time: as many as the cache holds
_MIN_STEP = 16  # rows


def rows_by_center(keys: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Sorts the rows by their nearest centre.

    Returns:
        The numbers [H, m] of the rows in this order, and the offsets [H, C + 1] at which the rows of each centre begin.
    """
    nearest, order = nearest_centers(keys, centers).sort(dim=-1, stable=True)
    bounds = torch.arange(centers.shape[1] + 1, device=keys.device).expand(len(keys), -1).contiguous()
    return order, torch.searchsorted(nearest, bounds)


def nearest_centers(keys: Tensor, centers: Tensor) -> Tensor:
    """Returns the number [H, m] of the centre [H, C, D] nearest to each key [H, m, D], the first if several are."""
    (heads, num_rows, head_dim), num_centers = keys.shape, centers.shape[1]
    # |k - μ|² less |k|², which is the same for all centres; both relative to the mean of the centres, as real keys
    # share a large mean.
    dtype = lse_dtype(keys)
    centers = centers.detach().to(dtype)
    origin = centers.mean(1, keepdim=True)
    shifted = centers - origin
    norms = shifted.square().sum(-1).unsqueeze(1)
    nearest = torch.empty(heads, num_rows, dtype=torch.int64, device=keys.device)
    step = max(_MIN_STEP, elements_at_a_time(keys) // (heads * (num_centers + head_dim)))
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        distance = torch.baddbmm(norms, keys[:, rows].to(dtype) - origin, shifted.mT, alpha=-2)
        torch.argmin(distance, -1, out=nearest[:, rows])
    return nearest


def elements_at_a_time(tensor: Tensor) -> int:
    """Returns how many numbers fill the cache of a CPU, or keep another device busy."""
    return _CHUNK_ELEMENTS["cpu" if tensor.device.type == "cpu" else "other"]
