"""`fit`: the best state of several recipes for a prefix and its calibration queries, with a report."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..state import PrefixState
from . import gradient, least_squares
from .closed_form import ClosedForm, ClusterRows, merge_halved
from .recipe import Recipe
from .report import ConversionReport
from .targets import Targets, attend_rows_too, held_out_errors, most_attended, targets_of

# One in so many fitted rows starts as a row with much attention, the others as means of keys.
_ROWS_PER_ATTENDED_ROW = 8


class _Remainder(NamedTuple):
    """A prefix less the rows that are kept."""

    keep: int
    kept: PrefixState | None
    rest: tuple[Tensor, Tensor]  # keys and values
    targets: Targets  # of the rest, beside the input and what is kept


def fit(
    prefix_key: Tensor, prefix_value: Tensor, query: Tensor, attention: tuple[Tensor, Tensor] | None,
    closed_form: ClosedForm, recipes: list[Recipe], method: str, max_error: float | None = None,
) -> tuple[PrefixState, ConversionReport]:  # fmt: skip
    """Fits a state of each recipe; returns the one with the smallest error, mean over heads whose error is not NaN.

    Args:
        prefix_key, prefix_value, query, attention, method: as in `prefix_to_state`.
        recipes: tried in this order.
        max_error: an error that is small enough; recipes after the first with such an error are not tried.
    """
    heads, num_keys, head_dim = prefix_key.shape
    recipes = [recipe.within(num_keys) for recipe in recipes]
    for recipe in recipes:
        if recipe.keep < num_keys:
            recipe.check_queries(query.numel() // (heads * head_dim), method, head_dim, prefix_value.shape[2])
    with torch.no_grad():
        exact = targets_of(query, prefix_key, prefix_value, attention, closed_form.scale)
        of_prefix = {
            "no_prefix_error": held_out_errors(None, exact, closed_form.scale),
            "prefix_share": exact.share.mean(-1).float(),
            "held_out_queries": exact.held_out.num_queries,
            "prefix_bytes": prefix_key.nbytes + prefix_value.nbytes,
        }
    best, min_error, tried, remainder = None, math.inf, {}, None
    for recipe in recipes:
        if remainder is None or remainder.keep != recipe.keep:
            remainder = _keep_rows(prefix_key, prefix_value, query, attention, exact, recipe.keep, closed_form)
        before, state, ridge = _fit_recipe(remainder.rest, remainder.targets, closed_form, recipe, method)
        if remainder.kept is not None:
            before, state = (remainder.kept if s is None else s.merge(remainder.kept) for s in (before, state))
        with torch.no_grad():
            errors, errors_before = (held_out_errors(s, exact, closed_form.scale) for s in (state, before))
        error = tried[str(recipe)] = errors.nanmean().item()
        if best is None or error < min_error:  # an error that is NaN in every head replaces nothing
            num_features = recipe.num_features(head_dim)
            report = ConversionReport(
                error=errors, closed_form_error=errors_before, method=method, ridge=ridge,
                rows_per_head=num_features + state.num_rows, kept_rows=recipe.keep, state_bytes=state.nbytes,
                break_even=num_features / 2 + state.num_rows, tried=tried, **of_prefix,
            )  # fmt: skip
            best = state, report
            min_error = math.inf if math.isnan(error) else error
        if max_error is not None and error <= max_error:
            break
    return best


def _keep_rows(
    prefix_key: Tensor, prefix_value: Tensor, query: Tensor, attention: tuple[Tensor, Tensor] | None, exact: Targets,
    keep: int, closed_form: ClosedForm,
) -> _Remainder:  # fmt: skip
    """Sets the `keep` rows with the most attention apart."""
    if not keep:
        return _Remainder(keep, None, (prefix_key, prefix_value), exact)
    scale = closed_form.scale
    kept, rest, targets = (prefix_key, prefix_value), (prefix_key[:, keep:], prefix_value[:, keep:]), exact
    if keep < prefix_key.shape[1]:
        with torch.no_grad():
            chosen = most_attended(exact, prefix_key, keep, scale)
        kept, rest = _split_rows(prefix_key, prefix_value, chosen)
        with torch.no_grad():
            targets = targets_of(query, *rest, attend_rows_too(attention, query, *kept, scale), scale)
    keys, values = (tensor.to(closed_form.dtype, copy=True) for tensor in kept)  # not a view of a cache
    return _Remainder(keep, PrefixState(keys=keys, values=values), rest, targets)


def _fit_recipe(
    rest: tuple[Tensor, Tensor], targets: Targets, closed_form: ClosedForm, recipe: Recipe, method: str
) -> tuple[PrefixState | None, PrefixState | None, list[float | None] | None]:
    """Returns the closed form, the fitted state and, for least squares, the ridge of each head.

    The states are None if everything is kept and there is no feature map.
    """
    features = rows = None
    if recipe.feature_map is not None:
        features = closed_form.features(*rest, recipe.feature_map, recipe.centers)
    if rest[0].shape[1] == 0:  # everything is kept
        return features, features, None
    if method == "closed_form":
        before = merge_halved(features, closed_form.rows(*rest, recipe.num_rows) if recipe.num_rows else None)
        return before, before, None
    if recipe.num_rows:
        rows = _first_rows(rest, targets, closed_form, recipe.num_rows)
    if method == "least_squares":
        before = merge_halved(features, rows) if features is None else features
        return before, *least_squares.fit_state(before, rows, targets, closed_form.scale)
    before = merge_halved(features, rows)
    spread = {
        name: tensor.double().var(1, correction=0).mean(-1).sqrt()
        for name, tensor in zip(("keys", "values"), rest, strict=True)
    }
    return before, gradient.descend(before, spread, targets, closed_form.scale, closed_form.seed), None


def _first_rows(rest: tuple[Tensor, Tensor], targets: Targets, closed_form: ClosedForm, num_rows: int) -> ClusterRows:
    """Returns the rows that a fit starts from: a few with much attention (sinks), and means of clusters of the rest."""
    num_attended = num_rows // _ROWS_PER_ATTENDED_ROW
    if not num_attended:
        return closed_form.rows(*rest, num_rows)
    attended, others = _split_rows(*rest, most_attended(targets, rest[0], num_attended, closed_form.scale))
    single = targets.lse.new_ones(attended[0].shape[:2])
    attended = ClusterRows(*(tensor.to(closed_form.dtype) for tensor in attended), single)
    means = closed_form.rows(*others, num_rows - num_attended)
    both = zip(attended, means, strict=True)
    return ClusterRows(*(torch.cat([a, b.to(a)], dim=1).to(closed_form.dtype) for a, b in both))


def _split_rows(
    prefix_key: Tensor, prefix_value: Tensor, chosen: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Returns keys and values of the rows with the numbers `chosen` [Hs, n], and of the others."""
    others = torch.ones(prefix_key.shape[:2], dtype=torch.bool, device=chosen.device).scatter_(1, chosen, False)
    num_others = prefix_key.shape[1] - chosen.shape[1]

    def split(tensor: Tensor) -> tuple[Tensor, Tensor]:
        index = chosen[..., None].expand(-1, -1, tensor.shape[-1])
        return tensor.gather(1, index), tensor[others].unflatten(0, (tensor.shape[0], num_others))

    (chosen_keys, other_keys), (chosen_values, other_values) = split(prefix_key), split(prefix_value)
    return (chosen_keys, chosen_values), (other_keys, other_values)
