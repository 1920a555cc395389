"""From a prefix and calibration queries to a state and its report."""

import torch
from torch import Tensor

from ..state import PrefixState
from . import gradient, least_squares
from .closed_form import Expansion, Rows, together
from .report import ConversionReport
from .targets import Targets, held_out_errors, most_seen, targets_of, with_rows

_FEWEST_ROWS = 8  # tried for an error
_SEEN_PART = 8  # one in so many rows begins at a row with much attention, the others at means of keys


def fit(
    prefix_key: Tensor, prefix_value: Tensor, query: Tensor, attention, expansion: Expansion, num_rows: int, keep: int,
    error: float | None, method: str,
) -> tuple[PrefixState, ConversionReport]:  # fmt: skip
    """See `prefix_to_state`. With `error` the first of the sizes 8, 16, 32, ... whose mean error is no larger."""
    num_keys, scale, dtype = prefix_key.shape[1], expansion.scale, expansion.dtype
    with torch.no_grad():
        exact = targets_of(query, prefix_key, prefix_value, attention, scale)
        if keep >= num_keys or (expansion.feature_map is None and error is None and num_rows + keep >= num_keys):
            num_rows, keep = 0, num_keys
        chosen = most_seen(exact, prefix_key, keep, scale) if keep else None
    kept, rest, targets = None, (prefix_key, prefix_value), exact
    if keep:
        kept, rest = _split(prefix_key, prefix_value, chosen)
        with torch.no_grad():
            targets = targets_of(query, *rest, with_rows(attention, query, *kept, scale), scale)
        kept = PrefixState(keys=kept[0].to(dtype), values=kept[1].to(dtype))
    sizes = [num_rows]
    if error is not None:
        sizes = _sizes(rest[0].shape[1], targets, prefix_key.shape[2], prefix_value.shape[2])
    for num_rows in sizes:
        before, state, ridge = _fitted(rest, targets, expansion, num_rows, method)
        if kept is not None:
            before, state = (kept if s is None else s.merge(kept) for s in (before, state))
        exactly = num_keys if expansion.feature_map is None and num_rows + keep == num_keys else keep
        with torch.no_grad():
            report = _report_of(
                state, before, exact, ridge, exactly, scale, method, prefix_key.nbytes + prefix_value.nbytes
            )
        if error is not None and report.error.mean() <= error:
            break
    return state, report


def _sizes(num_keys: int, targets: Targets, head_dim: int, value_dim: int) -> list[int]:
    """Numbers of rows to be tried for an error: those that there are queries enough to fit, then all rows."""
    sizes = [_FEWEST_ROWS << i for i in range(num_keys.bit_length())]
    enough = [
        size for size in sizes
        if size < num_keys and size * (head_dim + value_dim + 1) <= targets.num_fitted * value_dim
    ]  # fmt: skip
    return [*enough, num_keys]


def _fitted(prefix: tuple[Tensor, Tensor], targets: Targets, expansion: Expansion, num_rows: int, method: str):
    """The closed form, the state and the ridge of each head (least squares only); None without terms."""
    if expansion.feature_map is None and num_rows in (0, prefix[0].shape[1]):
        if num_rows == 0:
            return None, None, None
        keys, values = (tensor.to(expansion.dtype, copy=True) for tensor in prefix)  # not a view of a cache
        whole = PrefixState(keys=keys, values=values)
        return whole, whole, None
    features = None if expansion.feature_map is None else expansion.features(*prefix)
    if method == "closed_form":
        start = together(features, expansion.rows(*prefix, num_rows) if num_rows else None)
        return start, start, None
    rows = _first_rows(prefix, targets, expansion, num_rows) if num_rows else None
    if prefix[0].shape[1] == 0:  # all is kept
        return features, features, None
    if method == "least_squares":
        before = together(features, rows) if features is None else features
        return before, *least_squares.fit_state(before, rows, targets, expansion.scale)
    before = together(features, rows)
    spread = {
        name: tensor.double().var(1, correction=0).mean(-1).sqrt()
        for name, tensor in zip(("keys", "values"), prefix, strict=True)
    }
    return before, gradient.descend(before, spread, targets, expansion.scale, expansion.seed), None


def _first_rows(prefix: tuple[Tensor, Tensor], targets: Targets, expansion: Expansion, num_rows: int) -> Rows:
    """A few rows with much attention as they are (sinks), and means of clusters of the others."""
    num_seen = num_rows // _SEEN_PART
    if not num_seen:
        return expansion.rows(*prefix, num_rows)
    seen, others = _split(*prefix, most_seen(targets, prefix[0], num_seen, expansion.scale))
    seen = Rows(*(tensor.to(expansion.dtype) for tensor in seen), targets.lse.new_ones(seen[0].shape[:2]))
    means = expansion.rows(*others, num_rows - num_seen)
    return Rows(*(torch.cat([a, b.to(a)], dim=1).to(expansion.dtype) for a, b in zip(seen, means, strict=True)))


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


def _report_of(state, before, exact, ridge, keep, scale, method, prefix_bytes) -> ConversionReport:
    features = 0 if state.k is None else state.num_centers * state.k.shape[-1]
    return ConversionReport(
        *(held_out_errors(s, exact, scale) for s in (state, before, None)),
        prefix_share=exact.share.mean(-1).float(),
        method=method,
        ridge=ridge,
        held_out_queries=exact.num_queries - exact.num_fitted,
        rows_per_head=features + state.num_rows,
        kept_rows=keep,
        state_bytes=state.nbytes,
        prefix_bytes=prefix_bytes,
        break_even=features / 2 + state.num_rows,
    )
