"""From a real prefix, or the keys and values of a cache, to a `PrefixState`."""

import math

import torch
from torch import Tensor

from . import checks
from .feature_maps import FEATURE_MAPS, feature_dim, features
from .state import PrefixState

_CHUNK_ELEMENTS = 2**20  # features held at a time
_CHUNK_ROWS = 4096  # summed in the dtype of the features; sums of chunks are added in float64
_SAMPLES_PER_CENTER = 256  # rows that k-means looks at; more do not move a mean noticeably


def prefix_to_state(
    prefix_key: Tensor,
    prefix_value: Tensor,
    feature_map: str = "taylor1",
    *,
    centers: str | int | Tensor | None = "mean",
    scale: float | None = None,
    feature_scale: float | None = None,
    seed: int = 0,
) -> PrefixState:
    """Converts the m rows of a prefix to a state, in closed form.

    exp(scale·q·k_j) is expanded around the centre nearest to k_j and summed over the rows. Differentiable in
    `prefix_key` and `prefix_value`. Keys are expected as the attention sees them (after rotary embedding).

    Real keys share a large mean, so expand around it at least; around 0 the expansion is of no use for them. "elu"
    does not approximate exp: its closed form over-weights the prefix about D times.

    Args:
        prefix_key: [Hs, m, D], or [N, Hs, m, D] for a stack of N states; any floating dtype.
        prefix_value: [Hs, m, Dv] or [N, Hs, m, Dv].
        feature_map: "taylor1", "taylor2" or "elu".
        centers: where to expand. "mean": around the mean key of each head; an int C: around C means found by
            k-means (scikit-learn, the `convert` extra); a tensor [(N,) Hs, C, D]; None: around 0. More than one
            centre goes with "taylor1" only.
        scale: the factor on Q·Kᵀ of the attention that the state is for; default 1/sqrt(D).
        feature_scale: factor on the query inside φ; default sqrt(scale). The keys get scale / feature_scale.
        seed: of k-means.

    Returns:
        A state in float32 (float64 for float64 keys) with r·C rows per head. Its `log_scale` is the logarithm of the
        number of rows of each centre, `z` and `k` are means over them, so that any length fits any dtype. A centre
        without rows is switched off (log_scale = -inf), so an empty prefix (m = 0) gives a state that adds nothing.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Source: arXiv 2406.14036, section 4, there around 0; `ntk_kernels.reference.prefix_to_state` is the formula.
    """
    checks.check_floating("prefix_key", prefix_key)
    checks.check_floating("prefix_value", prefix_value)
    if prefix_key.dim() not in (3, 4) or 0 in (*prefix_key.shape[:-2], prefix_key.shape[-1]):
        raise ValueError(f"`prefix_key` must have shape [Hs, m, D] or [N, Hs, m, D], got {list(prefix_key.shape)}")
    letters = "N Hs m Dv" if prefix_key.dim() == 4 else "Hs m Dv"
    checks.check_shape("prefix_value", prefix_value, (*prefix_key.shape[:-1], None), letters)
    for what in ("dtype", "device"):
        ours, theirs = getattr(prefix_key, what), getattr(prefix_value, what)
        if ours != theirs:
            raise ValueError(f"`prefix_value` must have the {what} of `prefix_key`, {ours}, got {theirs}")
    checks.check_one_of("feature_map", feature_map, FEATURE_MAPS)
    head_dim = prefix_key.shape[-1]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    checks.check_finite("scale", scale, positive=True)
    feature_scale = math.sqrt(scale) if feature_scale is None else feature_scale
    checks.check_finite("feature_scale", feature_scale, positive=True)

    lead = prefix_key.shape[:-2]
    dtype = torch.float64 if prefix_key.dtype == torch.float64 else torch.float32
    checks.check_int("seed", seed, minimum=0, maximum=2**32 - 1)
    centers = _centers(centers, prefix_key, feature_map, dtype, seed)
    prefix_key, prefix_value = prefix_key.flatten(0, -3), prefix_value.flatten(0, -3)
    flat = None if centers is None else centers.flatten(0, -3)
    with torch.autocast(prefix_key.device.type, enabled=False):
        per_head = [
            _sum_features(
                prefix_key[head].to(dtype), prefix_value[head].to(dtype), None if flat is None else flat[head],
                feature_map, scale / feature_scale,
            )
            for head in range(prefix_key.shape[0])
        ]  # fmt: skip
    z, k, count = (torch.stack(parts) for parts in zip(*per_head, strict=True))
    mid = () if centers is None else (centers.shape[-2],)
    return PrefixState(
        z.reshape(*lead, *mid, *z.shape[2:]),
        k.reshape(*lead, *mid, k.shape[2]),
        feature_map,
        feature_scale=feature_scale,
        centers=centers,
        log_scale=count.log().reshape(*lead, *mid),
    )


def _sum_features(keys: Tensor, values: Tensor, centers: Tensor | None, feature_map: str, key_scale: float):
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


def _centers(centers, prefix_key: Tensor, feature_map: str, dtype: torch.dtype, seed: int) -> Tensor | None:
    """The centres [..., C, D] to expand around; None for the origin."""
    lead, (num_rows, head_dim) = prefix_key.shape[:-2], prefix_key.shape[-2:]
    if centers is None:
        return None
    if isinstance(centers, str):
        if centers != "mean":
            raise ValueError(f"`centers` must be 'mean', an int, a tensor or None, got {centers!r}")
        return prefix_key.to(dtype).sum(-2, keepdim=True) / max(num_rows, 1)
    if isinstance(centers, Tensor):
        checks.check_floating("centers", centers)
        letters = "N Hs C D" if len(lead) == 2 else "Hs C D"
        checks.check_shape("centers", centers, (*lead, None, head_dim), letters)
        if centers.device != prefix_key.device:
            raise ValueError(
                f"`centers` must be on the device of `prefix_key`, {prefix_key.device}, got {centers.device}"
            )
        if centers.shape[-2] == 0:
            raise ValueError(f"`centers` must hold at least one centre, got {list(centers.shape)}")
        centers = centers.to(dtype)
    else:
        if isinstance(centers, bool) or not isinstance(centers, int):
            raise TypeError(f"`centers` must be 'mean', an int, a tensor or None, got {type(centers).__name__}")
        checks.check_int("centers", centers, minimum=1)
        if centers > num_rows:
            raise ValueError(f"`centers` must be at most the number of prefix rows, m={num_rows}, got {centers}")
        if centers > 1 and feature_map != "taylor1":
            raise ValueError(f"`centers` must be at most 1 with feature_map={feature_map!r}, got {centers}")
        centers = _k_means(prefix_key.detach(), centers, seed).to(dtype)
    return centers


def _k_means(prefix_key: Tensor, num_centers: int, seed: int) -> Tensor:
    """[..., m, D] -> [..., C, D] means of the clusters of each head's keys."""
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError("an int for `centers` needs scikit-learn: pip install 'ntk-kernels[convert]'") from error
    if not prefix_key.isfinite().all():
        raise ValueError("`prefix_key` must be finite to find centres in it, got NaN or inf")
    lead, (num_rows, head_dim) = prefix_key.shape[:-2], prefix_key.shape[-2:]
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(num_rows, generator=generator)[: _SAMPLES_PER_CENTER * num_centers]
    keys = prefix_key.flatten(0, -3)[:, sample.to(prefix_key.device)].float().cpu().numpy()
    centers = [
        KMeans(num_centers, n_init=1, max_iter=25, random_state=seed).fit(head_keys).cluster_centers_
        for head_keys in keys
    ]
    return torch.stack([torch.from_numpy(c) for c in centers]).reshape(*lead, num_centers, head_dim).to(prefix_key)
