"""Closed-form conversion of a prefix to a state: expand exp(scale·q·k) around centres, sum over the rows.

    exp(scale·q·k_j) = exp(scale·q·μ) · exp(scale·q·(k_j − μ)) ≈ w(q) · φ(feature_scale·q)·φ(y_j),
    y_j = (scale / feature_scale)·(k_j − μ_c), c the centre nearest to k_j (without centres μ = 0)

    Z_c = 1/n_c Σ_j φ(y_j) v_jᵀ,   k_c = 1/n_c Σ_j φ(y_j),   β_c = log n_c

over the n_c rows of centre c. Dividing by n_c and keeping its logarithm lets any length fit any dtype.
"""

import math

import torch
from torch import Tensor

from .feature_maps import feature_map as phi


def sum_features(
    keys: Tensor,
    values: Tensor,
    feature_map: str,
    *,
    key_scale: float,
    centers: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns z_c = Σ_j w_j φ(y_j) v_jᵀ [..., C, r, Dv], k_c = Σ_j w_j φ(y_j) [..., C, r] and n_c = Σ_j w_j [..., C].

    `keys` [..., m, D], `values` [..., m, Dv], `centers` [..., C, D] (None: one, the origin), `weights` [..., m] (None:
    1). No gradient passes through the choice of the nearest centre.
    """
    mu = keys.new_zeros(*keys.shape[:-2], 1, keys.shape[-1]) if centers is None else centers
    nearest = torch.cdist(keys, mu).argmin(-1)  # [..., m]
    member = torch.nn.functional.one_hot(nearest, mu.shape[-2]).to(keys)  # [..., m, C]
    features = phi((keys - member @ mu) * key_scale, feature_map)
    if weights is not None:
        member = member * weights[..., None]
    z = torch.einsum("...mc,...mr,...md->...crd", member, features, values)
    return z, torch.einsum("...mc,...mr->...cr", member, features), member.sum(-2)


def prefix_to_state(
    prefix_key: Tensor,
    prefix_value: Tensor,
    feature_map: str,
    *,
    centers: Tensor | None = None,
    scale: float | None = None,
    feature_scale: float | None = None,
) -> dict[str, Tensor]:
    """Converts `prefix_key` [..., m, D] and `prefix_value` [..., m, Dv] around `centers` [..., C, D] (None: around 0).

    Returns `z` [..., C, r, Dv], `k` [..., C, r] and `log_scale` [..., C]; without centres there is no C. A centre
    without rows has z = k = 0 and log_scale = -inf.
    """
    scale = 1 / math.sqrt(prefix_key.shape[-1]) if scale is None else scale
    feature_scale = math.sqrt(scale) if feature_scale is None else feature_scale
    z, k, count = sum_features(prefix_key, prefix_value, feature_map, key_scale=scale / feature_scale, centers=centers)
    rows = count.clamp(min=1)[..., None]
    z, k, log_scale = z / rows[..., None], k / rows, count.log()
    if centers is None:
        z, k, log_scale = z.squeeze(-3), k.squeeze(-2), log_scale.squeeze(-1)
    return {"z": z, "k": k, "log_scale": log_scale}
