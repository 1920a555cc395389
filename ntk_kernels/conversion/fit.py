"""From a prefix and calibration queries to a state and its report."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..state import PrefixState
from . import gradient, least_squares
from .closed_form import ClosedForm, Rows, together
from .recipe import Layout
from .report import ConversionReport
from .targets import Targets, held_out_errors, most_seen, targets_of, with_rows

_SEEN_PART = 8  # one in so many rows begins at a row with much attention, the others at means of keys


class _Part(NamedTuple):
    """A prefix less the rows that are kept."""

    keep: int
    kept: PrefixState | None
    rest: tuple[Tensor, Tensor]
    targets: Targets  # of the rest, beside the input and what is kept


def fit(
    prefix_key: Tensor, prefix_value: Tensor, query: Tensor, attention, closed_form: ClosedForm,
    layouts: list[Layout], method: str, enough: float | None = None,
) -> tuple[PrefixState, ConversionReport]:  # fmt: skip
    """The state with the least mean error of all `layouts`; of those up to the first with an error of at most `enough`.

    The others as in `prefix_to_state`. Heads whose error is NaN are left out of the mean.
    """
    heads, num_keys, head_dim = prefix_key.shape
    layouts = [layout.within(num_keys) for layout in layouts]
    for layout in layouts:
        if layout.keep < num_keys:
            layout.check_queries(query.numel() // (heads * head_dim), method, head_dim, prefix_value.shape[2])
    with torch.no_grad():
        exact = targets_of(query, prefix_key, prefix_value, attention, closed_form.scale)
        of_prefix = {
            "no_prefix_error": held_out_errors(None, exact, closed_form.scale),
            "prefix_share": exact.share.mean(-1).float(),
            "held_out_queries": exact.num_queries - exact.num_fitted,
            "prefix_bytes": prefix_key.nbytes + prefix_value.nbytes,
        }
    best, least, tried, part = None, math.inf, {}, None
    for layout in layouts:
        if part is None or part.keep != layout.keep:
            part = _part(prefix_key, prefix_value, query, attention, exact, layout.keep, closed_form)
        before, state, ridge = _fitted(part.rest, part.targets, closed_form, layout, method)
        if part.kept is not None:
            before, state = (part.kept if s is None else s.merge(part.kept) for s in (before, state))
        with torch.no_grad():
            errors, errors_before = (held_out_errors(s, exact, closed_form.scale) for s in (state, before))
        error = tried[str(layout)] = errors.nanmean().item()
        if best is None or error < least:  # an error that is NaN in every head replaces nothing
            num_features = layout.num_features(head_dim)
            report = ConversionReport(
                error=errors, closed_form_error=errors_before, method=method, ridge=ridge,
                rows_per_head=num_features + state.num_rows, kept_rows=layout.keep, state_bytes=state.nbytes,
                break_even=num_features / 2 + state.num_rows, tried=tried, **of_prefix,
            )  # fmt: skip
            best = state, report
            least = math.inf if math.isnan(error) else error
        if enough is not None and error <= enough:
            break
    return best


def _part(prefix_key: Tensor, prefix_value: Tensor, query, attention, exact: Targets, keep: int, closed_form) -> _Part:
    """Keeps the rows with the most attention."""
    if not keep:
        return _Part(keep, None, (prefix_key, prefix_value), exact)
    scale = closed_form.scale
    kept, rest, targets = (prefix_key, prefix_value), (prefix_key[:, keep:], prefix_value[:, keep:]), exact
    if keep < prefix_key.shape[1]:
        with torch.no_grad():
            chosen = most_seen(exact, prefix_key, keep, scale)
        kept, rest = _split(prefix_key, prefix_value, chosen)
        with torch.no_grad():
            targets = targets_of(query, *rest, with_rows(attention, query, *kept, scale), scale)
    keys, values = (tensor.to(closed_form.dtype, copy=True) for tensor in kept)  # not a view of a cache
    return _Part(keep, PrefixState(keys=keys, values=values), rest, targets)


def _fitted(rest: tuple[Tensor, Tensor], targets: Targets, closed_form: ClosedForm, layout: Layout, method: str):
    """Of the rest: the closed form, the state and the ridge of each head (least squares only); None without terms."""
    features = rows = None
    if layout.feature_map is not None:
        features = closed_form.features(*rest, layout.feature_map, layout.centers)
    if rest[0].shape[1] == 0:  # all is kept
        return features, features, None
    if method == "closed_form":
        before = together(features, closed_form.rows(*rest, layout.num_rows) if layout.num_rows else None)
        return before, before, None
    if layout.num_rows:
        rows = _first_rows(rest, targets, closed_form, layout.num_rows)
    if method == "least_squares":
        before = together(features, rows) if features is None else features
        return before, *least_squares.fit_state(before, rows, targets, closed_form.scale)
    before = together(features, rows)
    spread = {
        name: tensor.double().var(1, correction=0).mean(-1).sqrt()
        for name, tensor in zip(("keys", "values"), rest, strict=True)
    }
    return before, gradient.descend(before, spread, targets, closed_form.scale, closed_form.seed), None


def _first_rows(rest: tuple[Tensor, Tensor], targets: Targets, closed_form: ClosedForm, num_rows: int) -> Rows:
    """A few rows with much attention as they are (sinks), and means of clusters of the others."""
    num_seen = num_rows // _SEEN_PART
    if not num_seen:
        return closed_form.rows(*rest, num_rows)
    seen, others = _split(*rest, most_seen(targets, rest[0], num_seen, closed_form.scale))
    seen = Rows(*(tensor.to(closed_form.dtype) for tensor in seen), targets.lse.new_ones(seen[0].shape[:2]))
    means = closed_form.rows(*others, num_rows - num_seen)
    return Rows(*(torch.cat([a, b.to(a)], dim=1).to(closed_form.dtype) for a, b in zip(seen, means, strict=True)))


def _split(prefix_key: Tensor, prefix_value: Tensor, chosen: Tensor):
    """The rows with the numbers `chosen` [Hs, n], and the others, each as keys and values."""
    others = torch.ones(prefix_key.shape[:2], dtype=torch.bool, device=chosen.device).scatter_(1, chosen, False)
    chosen_rows = [
        tensor.gather(1, chosen[..., None].expand(-1, -1, tensor.shape[-1])) for tensor in (prefix_key, prefix_value)
    ]
    rest = [
        tensor[others].unflatten(0, (prefix_key.shape[0], prefix_key.shape[1] - chosen.shape[1]))
        for tensor in (prefix_key, prefix_value)
    ]
    return chosen_rows, rest
