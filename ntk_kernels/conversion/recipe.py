"""What a state is made of, and what is tried for an error that is wanted or a size that is given."""

import math
from typing import NamedTuple

from torch import Tensor

from ..feature_maps import REGISTRY, get_feature_map
from .targets import HELD_OUT, num_fitted

_FEWEST_ROWS = 8  # tried for an error
_KEPT_PART = 4  # of a budget: one row in so many is kept as it is


class Layout(NamedTuple):
    """Features around centres, rows that are fitted, and rows that are kept as they are in the prefix."""

    feature_map: str | None
    centers: str | int | Tensor | None
    num_rows: int
    keep: int = 0

    @property
    def num_centers(self) -> int:
        if isinstance(self.centers, int):
            return self.centers
        return self.centers.shape[-2] if isinstance(self.centers, Tensor) else 1

    def num_features(self, head_dim: int) -> int:
        return 0 if self.feature_map is None else self.num_centers * get_feature_map(self.feature_map).dim(head_dim)

    def within(self, num_keys: int) -> "Layout":
        """For a prefix of so many rows: if there is room for all of them they are all kept."""
        everything = self.keep if self.feature_map else self.keep + self.num_rows
        return self if everything < num_keys else self._replace(num_rows=0, keep=num_keys)

    def needed_queries(self, method: str, head_dim: int, value_dim: int) -> int:
        """Of a state head, how many a fit has to see.

        Least squares: one for each term. Descent: as many as have as many numbers of output as the state has numbers.
        """
        if method == "closed_form":
            return 0
        terms = self.num_features(head_dim) + self.num_rows
        if method == "least_squares":
            return terms
        numbers = terms * (value_dim + 1) + self.num_rows * head_dim
        if self.feature_map is not None:  # weights of centres, and where they are
            numbers += self.num_centers * (1 if self.centers is None else 1 + head_dim)
        return math.ceil(numbers / value_dim)

    def check_queries(self, num_queries: int, method: str, head_dim: int, value_dim: int) -> None:
        """Refuses to be fitted to fewer queries of a state head than that takes."""
        needed = self.needed_queries(method, head_dim, value_dim)
        if num_fitted(num_queries) < needed:
            terms = self.num_features(head_dim) + self.num_rows
            how = " by gradient descent" if method == "gradient" else ""
            raise ValueError(
                f"`query` must give each state head at least {math.ceil(needed / (1 - HELD_OUT)):,} queries to fit "
                f"{terms:,} features and rows{how}, a quarter of them to be held out, got {num_queries:,}"
            )

    def __str__(self) -> str:
        parts = []
        if self.feature_map is not None:
            several = f" around {self.num_centers} centres" if self.num_centers > 1 else ""
            parts.append(f"{self.feature_map}{several}")
        if self.num_rows:
            parts.append(f"{self.num_rows:,} row{'s' if self.num_rows > 1 else ''}")
        if self.keep:
            parts.append(f"{self.keep:,} kept")
        return " + ".join(parts)


def layouts_for_error(keep: int, num_keys: int, num_queries: int, head_dim: int, value_dim: int):
    """8, 16, 32, ... rows beside those kept, then the prefix itself; and those there are too few queries to fit."""
    layouts, left_out = [], []
    num_rows = _FEWEST_ROWS
    while num_rows + keep < num_keys:
        layout = Layout(None, "mean", num_rows, keep)
        enough = layout.needed_queries("gradient", head_dim, value_dim) <= num_fitted(num_queries)
        (layouts if enough else left_out).append(layout)
        num_rows *= 2
    return [*layouts, Layout(None, "mean", 0, num_keys)], left_out


def layouts_for_budget(budget: int, num_keys: int, head_dim: int) -> list[Layout]:
    """Rows, rows of which a quarter is kept, and rows beside features of each map that fits in, also around several
    centres; or the whole prefix."""
    layouts = [Layout(None, "mean", budget)]
    if budget >= num_keys:
        return layouts
    if kept := budget // _KEPT_PART:
        layouts.append(Layout(None, "mean", budget - kept, kept))
    for feature_map in sorted(REGISTRY.values(), key=lambda each: not each.several_centers):
        max_centers = budget // feature_map.dim(head_dim) if feature_map.several_centers else 1
        for num_centers in sorted({1, max_centers // 2, max_centers}):
            around = None if not feature_map.is_polynomial else "mean" if num_centers == 1 else num_centers
            size = num_centers * feature_map.dim(head_dim)
            if 0 < size <= budget:
                layouts.append(Layout(feature_map.name, around, budget - size))
    return layouts
