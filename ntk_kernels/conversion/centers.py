"""Centres to expand around: the mean key, k-means, or given ones."""

import torch
from torch import Tensor

from .. import checks
from ..backends.centers import nearest_centers

# Number of rows that k-means samples: more would not move a mean noticeably.
_SAMPLES_PER_CENTER = 256
_MAX_SAMPLES = 16384  # unless there are so many centres that each had fewer samples than this:
_MIN_SAMPLES_PER_CENTER = 16


def find_centers(
    centers: str | int | Tensor | None, prefix_key: Tensor, dtype: torch.dtype, seed: int
) -> Tensor | None:
    """Returns the centres [..., C, D] for keys [..., m, D], None for the origin.

    `centers` is "mean", the number C of centres that k-means finds, given centres, or None.
    """
    if isinstance(centers, str):
        return prefix_key.sum(-2, keepdim=True, dtype=dtype) / max(prefix_key.shape[-2], 1)
    if isinstance(centers, int):
        centers = k_means(prefix_key.detach(), centers, seed)
    return None if centers is None else centers.to(dtype)


def cluster_means(
    prefix_key: Tensor, prefix_value: Tensor, num_rows: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the mean key [..., R, D], mean value [..., R, Dv] and number of rows [..., R] of R clusters of keys."""
    centers = k_means(prefix_key.detach(), num_rows, seed).to(dtype)
    keys, values, counts = [], [], []
    lead = prefix_key.shape[:-2]
    for key, value, center in zip(*(t.flatten(0, -3) for t in (prefix_key, prefix_value, centers)), strict=True):
        key, value = key.to(dtype), value.to(dtype)
        nearest = nearest_centers(key.detach()[None], center[None])[0]
        count = torch.bincount(nearest, minlength=num_rows).to(dtype)

        def mean(rows: Tensor, nearest: Tensor = nearest, count: Tensor = count) -> Tensor:
            sums = rows.new_zeros(num_rows, rows.shape[1]).index_add(0, nearest, rows)
            return sums / count.clamp(min=1)[:, None]

        keys.append(mean(key))
        values.append(mean(value))
        counts.append(count)
    keys, values, counts = (torch.stack(parts).unflatten(0, lead) for parts in (keys, values, counts))
    return keys, values, counts


def k_means(prefix_key: Tensor, num_centers: int, seed: int) -> Tensor:
    """Returns the means [..., C, D] of clusters of each head's keys [..., m, D]."""
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError("an int for `centers` needs scikit-learn: pip install 'ntk-kernels[convert]'") from error
    checks.check_finite_rows("prefix_key", prefix_key)
    lead, (num_rows, head_dim) = prefix_key.shape[:-2], prefix_key.shape[-2:]
    generator = torch.Generator().manual_seed(seed)
    max_samples = max(_MAX_SAMPLES, _MIN_SAMPLES_PER_CENTER * num_centers)
    sample = torch.randperm(num_rows, generator=generator)[: min(_SAMPLES_PER_CENTER * num_centers, max_samples)]
    keys = prefix_key.flatten(0, -3)[:, sample.to(prefix_key.device)].float().cpu().numpy()
    centers = [
        KMeans(num_centers, n_init=1, max_iter=25, random_state=seed).fit(head_keys).cluster_centers_
        for head_keys in keys
    ]
    centers = torch.stack([torch.from_numpy(c) for c in centers]).reshape(*lead, num_centers, head_dim)
    return centers.to(prefix_key.device)  # not rounded to half precision: centres may be finer than keys
