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


def prefix_to_state(
    prefix_key: Tensor,
    prefix_value: Tensor,
    feature_map: str,
    *,
    centers: Tensor | None = None,
    scale: float | None = None,
    feature_scale: float | None = None,
) -> dict[str, Tensor]:
    """`prefix_key` [..., m, D], `prefix_value` [..., m, Dv], `centers` [..., C, D] or None (around 0).

    Returns `z` [..., C, r, Dv], `k` [..., C, r] and `log_scale` [..., C]; without centres there is no C. A
    centre without rows has z = k = 0 and log_scale = -inf.
    """
    scale = 1 / math.sqrt(prefix_key.shape[-1]) if scale is None else scale
    feature_scale = math.sqrt(scale) if feature_scale is None else feature_scale
    mu = torch.zeros_like(prefix_key[..., :1, :1]) if centers is None else centers
    mu = mu.expand(*mu.shape[:-1], prefix_key.shape[-1])
    nearest = torch.cdist(prefix_key, mu).argmin(-1)  # [..., m]
    member = torch.nn.functional.one_hot(nearest, mu.shape[-2]).to(prefix_key)  # [..., m, C]
    features = phi((prefix_key - member @ mu) * (scale / feature_scale), feature_map)
    count = member.sum(-2)
    mean = member / count.clamp(min=1)[..., None, :]
    z = torch.einsum("...mc,...mr,...md->...crd", mean, features, prefix_value)
    k = torch.einsum("...mc,...mr->...cr", mean, features)
    if centers is None:
        return {"z": z.squeeze(-3), "k": k.squeeze(-2), "log_scale": count.log().squeeze(-1)}
    return {"z": z, "k": k, "log_scale": count.log()}
