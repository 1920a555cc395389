"""What a state adds to the attention of queries, as something linear in its Z, k, weights and values."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..feature_maps import get_feature_map
from ..state import PrefixState


class Terms(NamedTuple):
    """Features around centres [..., C, D] or the origin, and rows [..., R, D].

    `log_weight` [..., C or 1] and `row_bias` [..., R] are added to their logits. With F = C·r + R terms a state has the
    numerator ψ·Z and the mass ψ·k, where Z [..., F, Dv] holds weights times values of the rows, and k [..., F] weights.
    """

    feature_map: str | None
    feature_scale: float
    scale: float
    centers: Tensor | None
    log_weight: Tensor | None
    rows: Tensor | None
    row_bias: Tensor | None

    @staticmethod
    def of_state(state: PrefixState, scale: float) -> tuple["Terms", Tensor, Tensor]:
        """A state's terms, Z [Hs, F, Dv] and k [Hs, F], in float64."""
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
        return Terms(*self[:3], *(None if tensor is None else tensor[head] for tensor in self[3:]))

    @property
    def num_rows(self) -> int:
        return 0 if self.rows is None else self.rows.shape[-2]

    def logits(self, query: Tensor) -> Tensor:
        """Of queries [..., n, D], [..., n, C + R]."""
        parts = []
        if self.feature_map is not None:
            of_centers = 0 if self.centers is None else self.scale * query @ self.centers.mT
            parts.append((of_centers + self.log_weight[..., None, :]).expand(*query.shape[:-1], -1))
        if self.rows is not None:
            parts.append(self.scale * query @ self.rows.mT + self.row_bias[..., None, :])
        return torch.cat(parts, dim=-1)

    def weights(self, query: Tensor, logits: Tensor) -> Tensor:
        """ψ [..., n, F] from logits [..., n, C + R], less what the caller measures them from."""
        weights = logits.exp()
        if self.feature_map is None:
            return weights
        of_centers, of_rows = weights.split([logits.shape[-1] - self.num_rows, self.num_rows], dim=-1)
        phi = get_feature_map(self.feature_map)(query * self.feature_scale)
        return torch.cat([(of_centers[..., None] * phi[..., None, :]).flatten(-2), of_rows], dim=-1)

    def mass(self, weights: Tensor, k: Tensor) -> Tensor:
        """ψ·k; that of the features is cut off at 0 before that of the rows is added, as the op does."""
        num_features = k.shape[-1] - self.num_rows
        of_features, of_rows = (
            k[..., part] @ weights[..., part].mT for part in (slice(num_features), slice(num_features, None))
        )
        return of_rows + of_features.clamp(min=0)
