"""`FitOptions`: the options of `prefix_to_state`, with their defaults and checks."""

from dataclasses import dataclass, replace

from torch import Tensor

from .. import checks
from ..feature_maps import get_feature_map

METHODS = ("closed_form", "least_squares", "gradient")
DEFAULT_FEATURE_MAP = "taylor1"  # of a closed form that is asked for nothing in particular
_DEFAULT_NUM_ROWS = 128  # of a fit that is asked for nothing in particular


@dataclass(frozen=True, eq=False)
class FitOptions:
    """The options of `prefix_to_state`, which explains them, apart from tensors of a call and the attention's scale."""

    feature_map: str | None = None
    centers: str | int | Tensor | None = "mean"
    num_rows: int | None = None
    keep: int = 0
    error: float | None = None
    budget: int | None = None
    method: str | None = None
    feature_scale: float | None = None
    seed: int = 0

    def resolve(self, num_keys: int, *, has_query: bool) -> "FitOptions":
        """Returns the options with `feature_map`, `num_rows` and `method` filled in.

        Args:
            num_keys: m, the number of rows of the prefix.
            has_query: whether there are calibration queries.

        Raises:
            TypeError, ValueError: an option does not fit the others or the prefix; the message names it.
        """
        if self.feature_map is not None:
            get_feature_map(self.feature_map)
        method = self.method
        if method is None:
            method = "gradient" if has_query else "closed_form"
        checks.check_one_of("method", method, METHODS)
        if self.feature_scale is not None:
            checks.check_finite("feature_scale", self.feature_scale, positive=True)
        checks.check_int("seed", self.seed, minimum=0, maximum=2**32 - 1)
        self._check_error(has_query, method)
        self._check_budget(has_query, method)
        feature_map, num_rows = self.feature_map, self.num_rows
        if feature_map is None and num_rows is None:
            feature_map, num_rows = (None, _DEFAULT_NUM_ROWS) if has_query else (DEFAULT_FEATURE_MAP, 0)
        num_rows = 0 if num_rows is None else num_rows
        resolved = replace(self, feature_map=feature_map, num_rows=num_rows, method=method)
        resolved._check_terms(num_keys)
        return resolved

    def _check_error(self, has_query: bool, method: str) -> None:
        if self.error is None:
            return
        checks.check_finite("error", self.error, positive=True)
        if self.error >= 1:
            raise ValueError(f"`error` must be less than 1, the error of giving 0, got {self.error}")
        if not has_query or method != "gradient":
            missing = "`query`, got None" if not has_query else f"method='gradient', got {method!r}"
            raise ValueError(f"`error` must come with {missing}")
        self._check_defaults("`error`, which finds the number of rows", "feature_map", "centers", "num_rows")

    def _check_budget(self, has_query: bool, method: str) -> None:
        if self.budget is None:
            return
        checks.check_int("budget", self.budget, minimum=1)
        if not has_query:
            raise ValueError("`budget` must come with `query`, got None")
        if method == "closed_form":
            raise ValueError(f"`method` must be 'gradient' or 'least_squares' with `budget`, got {method!r}")
        beside = "`budget`, which finds what the state is made of"
        self._check_defaults(beside, "feature_map", "centers", "num_rows", "keep", "error")

    def _check_defaults(self, beside: str, *names: str) -> None:
        """Raises ValueError if one of these options is given, which must not stand `beside` another."""
        for name in names:
            value, default = getattr(self, name), getattr(FitOptions, name)
            if not (type(value) is type(default) and value == default):
                raise ValueError(f"`{name}` must be {default!r} with {beside}, got {value!r}")

    def _check_terms(self, num_keys: int) -> None:
        checks.check_int("num_rows", self.num_rows, minimum=0)
        checks.check_int("keep", self.keep, minimum=0)
        if self.feature_map is None:
            if self.num_rows == 0 and self.keep < num_keys:
                raise ValueError("`num_rows` must be at least 1 with feature_map=None, unless all rows are kept, got 0")
            if not (isinstance(self.centers, str) and self.centers == "mean"):
                raise ValueError(f"`centers` must come with `feature_map`, got {self.centers!r} and feature_map=None")
            return
        if self.num_rows + self.keep > num_keys:
            raise ValueError(
                f"`num_rows` and `keep` must be at most the number of prefix rows together, m={num_keys}, "
                f"got {self.num_rows} and {self.keep}"
            )
        if isinstance(self.centers, str) and self.centers != "mean":
            raise ValueError(f"`centers` must be 'mean', an int, a tensor or None, got {self.centers!r}")
        if not (self.centers is None or isinstance(self.centers, str | Tensor)):
            self._check_num_centers(num_keys)
        if self.num_rows and self.method == "closed_form":
            raise ValueError(
                "`num_rows` must be 0 in closed form with a feature map (either holds all of the prefix), got "
                f"{self.num_rows}"
            )

    def _check_num_centers(self, num_keys: int) -> None:
        if isinstance(self.centers, bool) or not isinstance(self.centers, int):
            raise TypeError(f"`centers` must be 'mean', an int, a tensor or None, got {type(self.centers).__name__}")
        checks.check_int("centers", self.centers, minimum=1)
        if self.centers > num_keys - self.keep:
            which = f" that are not kept, m={num_keys} less {self.keep}" if self.keep else f", m={num_keys}"
            raise ValueError(f"`centers` must be at most the number of prefix rows{which}, got {self.centers}")
        get_feature_map(self.feature_map).check_num_centers(self.centers)
