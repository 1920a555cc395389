"""`Recipe`: the make-up of a state; and the recipes to try for a given error or budget."""

import math
from typing import NamedTuple

from torch import Tensor

from ..feature_maps import REGISTRY, get_feature_map
from .targets import HELD_OUT, num_fitted

_MIN_ROWS = 8  # the first size to try for an error
_ROWS_PER_KEPT_ROW = 4  # of a budget that is divided between fitted and kept rows


class Recipe(NamedTuple):
    """The make-up of a state: features around centres, fitted rows, and rows of the prefix that are kept exactly."""

    feature_map: str | None
    centers: str | int | Tensor | None
    num_rows: int
    keep: int = 0

    @property
    def num_centers(self) -> int:
        """C, 1 for "mean" and for the origin."""
        if isinstance(self.centers, int):
            return self.centers
        return self.centers.shape[-2] if isinstance(self.centers, Tensor) else 1

    def num_features(self, head_dim: int) -> int:
        """Returns C·r, 0 without a feature map."""
        return 0 if self.feature_map is None else self.num_centers * get_feature_map(self.feature_map).dim(head_dim)

    def within(self, num_keys: int) -> "Recipe":
        """Returns the recipe for a prefix of `num_keys` rows: all of them kept, if there is room for so many."""
        max_keys = self.keep if self.feature_map else self.keep + self.num_rows
        return self if max_keys < num_keys else self._replace(num_rows=0, keep=num_keys)

    def min_queries(self, method: str, head_dim: int, value_dim: int) -> int:
        """Returns the number of queries of a state head that a fit has to see.

        Least squares takes a query for each term. Descent takes so many that their outputs have as many numbers as the
        state.
        """
        if method == "closed_form":
            return 0
        terms = self.num_features(head_dim) + self.num_rows
        if method == "least_squares":
            return terms
        numbers = terms * (value_dim + 1) + self.num_rows * head_dim
        if self.feature_map is not None:  # centres and their weights
            numbers += self.num_centers * (1 if self.centers is None else 1 + head_dim)
        return math.ceil(numbers / value_dim)

    def check_queries(self, num_queries: int, method: str, head_dim: int, value_dim: int) -> None:
        """Raises ValueError if `num_queries` queries of a state head, held-out ones included, are too few to fit it."""
        needed = self.min_queries(method, head_dim, value_dim)
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


def recipes_for_error(
    keep: int, num_keys: int, num_queries: int, head_dim: int, value_dim: int
) -> tuple[list[Recipe], list[Recipe]]:
    """Returns the recipes to try in turn for an error, and those that `num_queries` queries are too few to fit.

    They are 8, 16, 32, ... rows beside the kept ones, and at last the prefix itself.
    """
    recipes: list[Recipe] = []
    too_large: list[Recipe] = []
    num_rows = _MIN_ROWS
    while num_rows + keep < num_keys:
        recipe = Recipe(None, "mean", num_rows, keep)
        can_be_fitted = recipe.min_queries("gradient", head_dim, value_dim) <= num_fitted(num_queries)
        (recipes if can_be_fitted else too_large).append(recipe)
        num_rows *= 2
    return [*recipes, Recipe(None, "mean", 0, num_keys)], too_large


def recipes_for_budget(budget: int, num_keys: int, head_dim: int) -> list[Recipe]:
    """Returns the recipes to try for a budget of rows per head.

    They are rows; rows of which a quarter is kept; and rows beside the features of each map that fits in, also around
    several centres. A budget for the whole prefix has one recipe.
    """
    recipes = [Recipe(None, "mean", budget)]
    if budget >= num_keys:
        return recipes
    if keep := budget // _ROWS_PER_KEPT_ROW:
        recipes.append(Recipe(None, "mean", budget - keep, keep))
    for feature_map in sorted(REGISTRY.values(), key=lambda each: not each.several_centers):
        dim = feature_map.dim(head_dim)
        max_centers = budget // dim if feature_map.several_centers else 1
        for num_centers in sorted({1, max_centers // 2, max_centers}):
            if 0 < num_centers * dim <= budget:
                centers = None if not feature_map.is_polynomial else "mean" if num_centers == 1 else num_centers
                recipes.append(Recipe(feature_map.name, centers, budget - num_centers * dim))
    return recipes
