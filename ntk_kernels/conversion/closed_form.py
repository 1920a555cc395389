"""States in closed form: sums of features around centres, and rows at the means of clusters."""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks, library
from ..dispatch import sums_backend
from ..inputs import SumInputs
from ..state import PrefixState
from .centers import cluster_means, find_centers


class ClusterRows(NamedTuple):
    """Rows in the place of clusters of prefix rows."""

    keys: Tensor  # [..., R, D]
    values: Tensor  # [..., R, Dv]
    sizes: Tensor  # [..., R], the number of prefix rows of each cluster

    def state(self) -> PrefixState:
        """Returns the state of these rows, each with the weight of its cluster."""
        return PrefixState(keys=self.keys, values=self.values, bias=self.sizes.log())


class ClosedForm(NamedTuple):
    """Makes states of a dtype from sums and means over a prefix, for attention with these scales."""

    scale: float
    feature_scale: float
    seed: int  # of k-means
    dtype: torch.dtype

    def features(
        self, prefix_key: Tensor, prefix_value: Tensor, feature_map: str, centers: str | int | Tensor | None
    ) -> PrefixState:
        """Returns the state of a prefix [..., m, D], [..., m, Dv] expanded around `centers`.

        Features are summed over the rows nearest to each centre and divided by their number.
        """
        lead = prefix_key.shape[:-2]
        centers = find_centers(centers, prefix_key, self.dtype, self.seed)
        flat_key, flat_value = prefix_key.flatten(0, -3), prefix_value.flatten(0, -3)
        inputs = SumInputs(
            flat_key, flat_value, None, None if centers is None else centers.flatten(0, -3), feature_map,
            self.scale / self.feature_scale, sums_backend(flat_key, flat_value),
        )  # fmt: skip
        z, k, count = library.sum_features(inputs)
        if not torch.compiler.is_compiling() and checks.readable(z) and not (z.isfinite().all() and k.isfinite().all()):
            checks.check_finite_rows("prefix_key", prefix_key)
            checks.check_finite_rows("prefix_value", prefix_value)
        mid = () if centers is None else (centers.shape[-2],)
        return state_of_sums(
            z.reshape(*lead, *mid, *z.shape[2:]), k.reshape(*lead, *mid, k.shape[2]), count.reshape(*lead, *mid),
            centers, feature_map, self.feature_scale,
        )  # fmt: skip

    def rows(self, prefix_key: Tensor, prefix_value: Tensor, num_rows: int) -> ClusterRows:
        """Returns the mean rows of R clusters of the keys of a prefix."""
        return ClusterRows(*cluster_means(prefix_key, prefix_value, num_rows, self.dtype, self.seed))


def state_of_sums(
    z: Tensor, k: Tensor, count: Tensor, centers: Tensor | None, feature_map: str, feature_scale: float
) -> PrefixState:
    """Returns the state of sums z [..., C?, r, Dv] and k [..., C?, r] over `count` [..., C?] rows.

    The sums are divided by the number of rows, whose logarithm becomes `log_scale`.
    """
    rows = count.where(count > 0, 1).unsqueeze(-1)
    return PrefixState(
        z / rows.unsqueeze(-1), k / rows, feature_map, feature_scale=feature_scale, centers=centers,
        log_scale=count.log(),
    )  # fmt: skip


def merge_halved(features: PrefixState | None, rows: ClusterRows | None) -> PrefixState:
    """Returns the state of features and rows that each hold the whole prefix: if both are given, at half the weight."""
    if features is None:
        return rows.state()
    if rows is None:
        return features
    halved = replace(features, log_scale=features.log_scale - math.log(2))
    return halved.merge(rows._replace(sizes=rows.sizes / 2).state())
