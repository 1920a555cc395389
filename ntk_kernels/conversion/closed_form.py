"""Sums of features of keys over the rows nearest to each centre."""

import torch
from torch import Tensor

from ..feature_maps import feature_dim, features

_CHUNK_ELEMENTS = 2**20  # features held at a time
_CHUNK_ROWS = 4096  # summed in the dtype of the features; sums of chunks are added in float64


def sum_features(keys: Tensor, values: Tensor, centers: Tensor | None, feature_map: str, key_scale: float):
    """One head, `keys` [m, D], `values` [m, Dv], `centers` [C, D]: the means z [C, r, Dv], k [C, r] over the rows
    nearest to each centre, and their numbers [C]."""
    if centers is None:
        groups = [torch.arange(keys.shape[0], device=keys.device)]
    else:
        # |k - μ|² without the |k|² that all centres share, both taken from the centres' mean: keys share a large one
        origin = centers.mean(0)
        shifted = centers - origin
        distance = (shifted.square().sum(-1) - 2 * (keys - origin) @ shifted.mT).detach()
        nearest = distance.argmin(-1)
        order = nearest.argsort(stable=True)
        groups = order.split(torch.bincount(nearest, minlength=centers.shape[0]).tolist())
    num_features = feature_dim(feature_map, keys.shape[1])
    chunk = max(1, min(_CHUNK_ROWS, _CHUNK_ELEMENTS // num_features))
    means = []
    for c, rows in enumerate(groups):
        z = keys.new_zeros(num_features, values.shape[1], dtype=torch.float64)
        k = keys.new_zeros(num_features, dtype=torch.float64)
        for part in rows.split(chunk):
            y = keys[part] if centers is None else keys[part] - centers[c]
            phi = features(y * key_scale, feature_map)
            z = z + phi.mT @ values[part]
            k = k + phi.sum(0)
        means.append((z / max(len(rows), 1), k / max(len(rows), 1)))
    z, k = (torch.stack(parts).to(keys.dtype) for parts in zip(*means, strict=True))
    count = torch.tensor([len(rows) for rows in groups], dtype=keys.dtype, device=keys.device)
    return z, k, count
