"""`Terms`: what a state adds to the attention of a query, as a function linear in Z, k, row weights and row values."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..feature_maps import get_feature_map
from ..state import PrefixState


class Terms(NamedTuple):
    """The terms of a state: features around each centre, and rows.

    With F = C·r + R terms whose weights for a query are ψ [F], the state has the numerator ψ·Z and the mass ψ·k. Z
    [..., F, Dv] holds the Z of the features and the weighted values of the rows, k [..., F] the k of the features and
    the weights of the rows.
    """

    feature_map: str | None
    feature_scale: float | None  # None without features
    scale: float
    centers: Tensor | None  # [..., C, D]; None: the origin
    log_weight: Tensor | None  # [..., C], added to the logits of the centres; None without features
    rows: Tensor | None  # [..., R, D]
    row_bias: Tensor | None  # [..., R], added to the logits of the rows

    @staticmethod
    def of_state(state: PrefixState, scale: float) -> tuple["Terms", Tensor, Tensor]:
        """Returns the terms of a state, Z [Hs, F, Dv] and k [Hs, F], in float64."""
        tensors = {name: tensor.double() for name, tensor in state.tensors().items()}
        z, k, log_weight = [], [], tensors.get("log_scale")
        if state.k is not None:
            z.append(state.full_z.double().flatten(1, -2))
            k.append(tensors["k"].flatten(1))
            log_weight = k[0].new_zeros(len(k[0]), 1) if log_weight is None else log_weight.reshape(len(k[0]), -1)
        if state.keys is not None:
            z.append(tensors["values"])
            k.append(torch.ones_like(tensors["keys"][..., 0]))
            bias = tensors.get("bias", torch.zeros_like(k[-1]))
        terms = Terms(
            state.feature_map, state.feature_scale, scale, tensors.get("centers"), log_weight,
            tensors.get("keys"), None if state.keys is None else bias,
        )  # fmt: skip
        return terms, torch.cat(z, dim=1), torch.cat(k, dim=1)

    def of_head(self, head: int) -> "Terms":
        """Returns the terms of one head, without the dimension of heads."""
        return Terms(*self[:3], *(None if tensor is None else tensor[head] for tensor in self[3:]))

    @property
    def num_rows(self) -> int:
        """R, 0 without rows."""
        return 0 if self.rows is None else self.rows.shape[-2]

    def logits(self, query: Tensor) -> Tensor:
        """Returns the logits [..., n, C + R] of centres and rows for queries [..., n, D]."""
        parts = []
        if self.feature_map is not None:
            of_centers = 0 if self.centers is None else self.scale * query @ self.centers.mT
            parts.append((of_centers + self.log_weight[..., None, :]).expand(*query.shape[:-1], -1))
        if self.rows is not None:
            parts.append(self.scale * query @ self.rows.mT + self.row_bias[..., None, :])
        return torch.cat(parts, dim=-1)

    def weights(self, query: Tensor, logits: Tensor) -> Tensor:
        """Returns ψ [..., n, F] from logits [..., n, C + R], from which the caller may have subtracted a shift."""
        weights = logits.exp()
        if self.feature_map is None:
            return weights
        of_centers, of_rows = weights.split([logits.shape[-1] - self.num_rows, self.num_rows], dim=-1)
        phi = get_feature_map(self.feature_map)(query * self.feature_scale)
        return torch.cat([(of_centers[..., None] * phi[..., None, :]).flatten(-2), of_rows], dim=-1)

    def mass(self, weights: Tensor, k: Tensor) -> Tensor:
        """Returns ψ·k. As in the op, the mass of the features is clamped at 0 before that of the rows is added."""
        num_features = k.shape[-1] - self.num_rows
        of_features, of_rows = (
            k[..., part] @ weights[..., part].mT for part in (slice(num_features), slice(num_features, None))
        )
        return of_rows + of_features.clamp(min=0)
