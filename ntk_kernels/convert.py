"""From a real prefix, or the keys and values of a cache, to a `PrefixState`."""

import math

import torch
from torch import Tensor

from . import checks, ops
from .conversion import least_squares
from .conversion.centers import cluster_means, find_centers
from .conversion.report import ConversionReport
from .dispatch import sums_backend
from .feature_maps import FEATURE_MAPS
from .state import PrefixState

METHODS = ("closed_form", "least_squares")
_KEPT = 4  # rows that one of the divisions of a budget keeps: attention sinks


def prefix_to_state(
    prefix_key: Tensor,
    prefix_value: Tensor,
    feature_map: str | None = "taylor1",
    *,
    centers: str | int | Tensor | None = "mean",
    num_rows: int = 0,
    keep: int = 0,
    budget: int | None = None,
    query: Tensor | None = None,
    attention: tuple[Tensor, Tensor] | None = None,
    method: str | None = None,
    scale: float | None = None,
    feature_scale: float | None = None,
    seed: int = 0,
    return_report: bool = False,
) -> PrefixState | tuple[PrefixState, ConversionReport]:
    """Converts the m rows of a prefix to a state: in closed form, or fitted to calibration queries.

    Closed form: exp(scale·q·k_j) is expanded around the centre nearest to k_j and summed over the rows. Differentiable
    in `prefix_key` and `prefix_value`. Real keys share a large mean, so expand around it at least; around 0 the
    expansion is of no use for them. "elu" does not approximate exp: its closed form over-weights the prefix D times.

    Least squares (method="least_squares", the default if there are queries): the same terms, and rows, with the Z, k,
    weights and values that give the least error of the output on `query`, never a larger one on those that are held out
    than the closed form has. That is the way to small errors on real keys; what it achieved is in the report.

    Keys and queries are expected as the attention sees them (after rotary embedding).

    Args:
        prefix_key: [Hs, m, D], or [N, Hs, m, D] for a stack of N states (closed form only); any floating dtype.
        prefix_value: [Hs, m, Dv] or [N, Hs, m, Dv].
        feature_map: "taylor1", "taylor2" or "elu"; None: rows and nothing else.
        centers: where to expand. "mean": around the mean key of each head; an int C: around C means found by
            k-means (scikit-learn, the `convert` extra); a tensor [(N,) Hs, C, D]; None: around 0. More than one
            centre goes with "taylor1" only.
        num_rows: R rows of the state, at R means of the keys found by k-means. In closed form a row has the number of
            keys nearest to it as its weight and the mean of their values, and needs feature_map=None.
        keep: rows of the prefix that the state keeps exactly, those with the largest attention from `query` (attention
            sinks); the rest of the prefix is converted.
        budget: rows per head that the state may have. Centres, num_rows and keep are then found: what gives the least
            mean error on the held-out queries among a few divisions of the budget into "taylor1" features and rows.
        query: [B, Hq, L, D], calibration queries, Hq a multiple of Hs; of text that is like what the state is for. The
            last quarter (of the batch rows, or of the tokens) is held out: the fit does not see it, the report does.
        attention: (out [B, Hq, L, Dv], lse [B, Hq, L]) of these queries over their own input, as
            `ntk_attention(query, key, value, is_causal=True, return_lse=True)` gives them. Without it the queries see
            the prefix and nothing else.
        method: "closed_form" or "least_squares".
        scale: the factor on Q·Kᵀ of the attention that the state is for; default 1/sqrt(D).
        feature_scale: factor on the query inside φ; default sqrt(scale). The keys get scale / feature_scale.
        seed: of k-means.
        return_report: also a `ConversionReport`; needs `query`. None for an empty prefix.

    Returns:
        A state in float32 (float64 for float64 keys) with C·r + R + keep rows per head. Its `log_scale` is the
        logarithm of the number of rows of each centre, and `z` and `k` are divided by that number, so that any length
        fits any dtype. A centre without rows is switched off (log_scale = -inf): an empty prefix (m = 0) gives a state
        that adds nothing.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. Too few calibration queries for what is
            to be fitted are refused with the number that it takes.

    Source: arXiv 2406.14036, section 4, there around 0; `ntk_kernels.reference.prefix_to_state` is the formula.
    """
    _check_prefix(prefix_key, prefix_value)
    if feature_map is not None:
        checks.check_one_of("feature_map", feature_map, FEATURE_MAPS)
    method = ("closed_form" if query is None else "least_squares") if method is None else method
    checks.check_one_of("method", method, METHODS)
    num_keys, head_dim = prefix_key.shape[-2:]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    checks.check_finite("scale", scale, positive=True)
    feature_scale = math.sqrt(scale) if feature_scale is None else feature_scale
    checks.check_finite("feature_scale", feature_scale, positive=True)
    checks.check_int("seed", seed, minimum=0, maximum=2**32 - 1)
    _check_rows(num_rows, keep, num_keys, feature_map, method)
    _check_calibration(prefix_key, prefix_value, query, attention, method, keep, return_report)
    if budget is not None:
        checks.check_int("budget", budget, minimum=1)
        if method != "least_squares" or (feature_map, centers, num_rows, keep) != ("taylor1", "mean", 0, 0):
            raise ValueError(
                "`budget` must come with method='least_squares' and without `feature_map`, `centers`, `num_rows` and "
                "`keep`, which it finds"
            )
        fixed = {
            "query": query, "attention": attention, "scale": scale, "feature_scale": feature_scale, "seed": seed,
        }  # fmt: skip
        state, report = _within_budget(prefix_key, prefix_value, budget, fixed)
        return (state, report) if return_report else state

    dtype = torch.float64 if prefix_key.dtype == torch.float64 else torch.float32
    fitting = method == "least_squares" and num_keys > 0
    keeps_graph = torch.is_grad_enabled() and not fitting
    with torch.autocast(prefix_key.device.type, enabled=False), torch.set_grad_enabled(keeps_graph):
        exact = kept = report = None
        if query is not None and num_keys > 0:
            exact = least_squares.targets_of(query, prefix_key, prefix_value, attention, scale)
        rest = prefix_key, prefix_value
        if keep:
            chosen = least_squares.most_seen(exact, prefix_key, keep, scale)
            kept, rest = _split(prefix_key, prefix_value, chosen)
        rows = cluster_means(*rest, num_rows, dtype, seed) if num_rows else None
        before = state = None
        if feature_map is not None or num_rows:
            before = state = _closed_form(*rest, feature_map, centers, rows, scale, feature_scale, seed, dtype)
        ridge = [None] * prefix_key.shape[-3]
        if fitting and state is not None:
            targets = exact
            if keep:
                attention = least_squares.with_rows(attention, query, *kept, scale)
                targets = least_squares.targets_of(query, *rest, attention, scale)
            state, ridge = least_squares.fit_state(before, rows, targets, scale)
        if keep:
            of_kept = PrefixState(keys=kept[0].to(dtype), values=kept[1].to(dtype))
            before, state = (of_kept if s is None else s.merge(of_kept) for s in (before, state))
        if return_report:
            report = _report_of(state, before, exact, ridge, keep, scale, prefix_key, prefix_value)
    return (state, report) if return_report else state


def _within_budget(prefix_key: Tensor, prefix_value: Tensor, budget: int, fixed: dict):
    """The best of the divisions of the budget, and its report."""
    num_keys, head_dim = prefix_key.shape[-2:]
    if num_keys == 0:
        return prefix_to_state(prefix_key, prefix_value, **fixed), None
    r = head_dim + 1
    divisions = [{"feature_map": None, "num_rows": budget}]
    if budget >= r:
        divisions.append({"num_rows": budget - r})
    if budget >= r + 2 * _KEPT:
        divisions.append({"num_rows": budget - r - _KEPT, "keep": _KEPT})
    if (centers := budget // (2 * r)) > 1:
        divisions.append({"centers": centers, "num_rows": budget - centers * r})
    if budget >= num_keys:
        divisions = [{"feature_map": None, "num_rows": 0, "keep": num_keys}]
    found = [
        prefix_to_state(prefix_key, prefix_value, **division, **fixed, return_report=True) for division in divisions
    ]
    return min(found, key=lambda pair: pair[1].error.mean().item())


def _split(prefix_key: Tensor, prefix_value: Tensor, chosen: Tensor):
    """The rows with the numbers `chosen` [Hs, keep], and the others, each as keys and values."""
    others = torch.ones(prefix_key.shape[:2], dtype=torch.bool, device=chosen.device).scatter_(1, chosen, False)
    kept = [
        tensor.gather(1, chosen[..., None].expand(-1, -1, tensor.shape[-1])) for tensor in (prefix_key, prefix_value)
    ]
    rest = [tensor[others].unflatten(0, (prefix_key.shape[0], -1)) for tensor in (prefix_key, prefix_value)]
    return kept, rest


def _closed_form(
    prefix_key, prefix_value, feature_map, centers, rows, scale, feature_scale, seed, dtype
) -> PrefixState:
    """Features; without a feature map the rows, which otherwise are left to the fit."""
    if feature_map is None:
        keys, values, count = rows
        return PrefixState(keys=keys, values=values, bias=count.log())
    lead = prefix_key.shape[:-2]
    centers = find_centers(centers, prefix_key, feature_map, dtype, seed)
    flat_key, flat_value = prefix_key.flatten(0, -3), prefix_value.flatten(0, -3)
    z, k, count = ops.sum_features(
        flat_key, flat_value, None, None if centers is None else centers.flatten(0, -3), feature_map,
        scale / feature_scale, sums_backend(flat_key, flat_value),
    )  # fmt: skip
    if not torch.compiler.is_compiling() and checks.readable(z) and not (z.isfinite().all() and k.isfinite().all()):
        checks.check_finite_rows("prefix_key", prefix_key)
        checks.check_finite_rows("prefix_value", prefix_value)
    rows_of_center = count.clamp(min=1).unsqueeze(-1)
    z, k = z / rows_of_center.unsqueeze(-1), k / rows_of_center
    mid = () if centers is None else (centers.shape[-2],)
    return PrefixState(
        z.reshape(*lead, *mid, *z.shape[2:]),
        k.reshape(*lead, *mid, k.shape[2]),
        feature_map,
        feature_scale=feature_scale,
        centers=centers,
        log_scale=count.log().reshape(*lead, *mid),
    )


def _report_of(state, before, exact, ridge, keep, scale, prefix_key, prefix_value) -> ConversionReport:
    features = 0 if state.k is None else state.num_centers * state.k.shape[-1]
    return ConversionReport(
        *(least_squares.held_out_errors(s, exact, scale) for s in (state, before, None)),
        prefix_share=exact.share.mean(-1).float(),
        ridge=ridge,
        held_out_queries=exact.num_queries - exact.num_fitted,
        rows_per_head=features + state.num_rows,
        kept_rows=keep,
        state_bytes=state.nbytes,
        prefix_bytes=prefix_key.nbytes + prefix_value.nbytes,
        break_even=features / 2 + state.num_rows,
    )


def _check_prefix(prefix_key, prefix_value) -> None:
    checks.check_floating("prefix_key", prefix_key)
    checks.check_floating("prefix_value", prefix_value)
    if prefix_key.dim() not in (3, 4) or 0 in (*prefix_key.shape[:-2], prefix_key.shape[-1]):
        raise ValueError(f"`prefix_key` must have shape [Hs, m, D] or [N, Hs, m, D], got {list(prefix_key.shape)}")
    letters = "N Hs m Dv" if prefix_key.dim() == 4 else "Hs m Dv"
    checks.check_shape("prefix_value", prefix_value, (*prefix_key.shape[:-1], None), letters)
    for what in ("dtype", "device"):
        ours, theirs = getattr(prefix_key, what), getattr(prefix_value, what)
        if ours != theirs:
            raise ValueError(f"`prefix_value` must have the {what} of `prefix_key`, {ours}, got {theirs}")


def _check_rows(num_rows, keep, num_keys, feature_map, method) -> None:
    checks.check_int("num_rows", num_rows, minimum=0)
    checks.check_int("keep", keep, minimum=0)
    if num_rows + keep > num_keys:
        raise ValueError(
            f"`num_rows` and `keep` must be at most the number of prefix rows together, m={num_keys}, "
            f"got {num_rows} and {keep}"
        )
    if feature_map is None and num_rows == 0 and (keep == 0 or keep < num_keys):
        raise ValueError("`num_rows` must be at least 1 with feature_map=None, unless all rows are kept, got 0")
    if feature_map is not None and num_rows and method == "closed_form":
        raise ValueError(
            f"`num_rows` must be 0 in closed form with a feature map (either holds all of the prefix), got {num_rows}"
        )


def _check_calibration(prefix_key, prefix_value, query, attention, method, keep, return_report) -> None:
    if query is None:
        for name, needs in (("keep", keep), ("return_report", return_report), ("attention", attention is not None)):
            if needs:
                raise ValueError(f"`{name}` needs calibration queries: `query` must be given, got None")
        if method == "least_squares":
            raise ValueError("`query` must be given with method='least_squares', got None")
        return
    checks.check_floating("query", query)
    if prefix_key.dim() != 3:
        raise ValueError(f"`prefix_key` must be of one state, [Hs, m, D], with `query`, got {list(prefix_key.shape)}")
    heads, head_dim, value_dim = prefix_key.shape[0], prefix_key.shape[-1], prefix_value.shape[-1]
    checks.check_shape("query", query, (None, None, None, head_dim), "B Hq L D")
    if query.shape[1] % heads or query.shape[1] == 0:
        raise ValueError(f"`query` must have a multiple of Hs={heads} heads, got {query.shape[1]}")
    if query.device != prefix_key.device:
        raise ValueError(f"`query` must be on the device of `prefix_key`, {prefix_key.device}, got {query.device}")
    checks.check_finite_rows("query", query)
    if attention is None:
        return
    if not (isinstance(attention, tuple) and len(attention) == 2):
        raise TypeError(f"`attention` must be a pair (out, lse), got {type(attention).__name__}")
    for name, tensor, shape, letters in (
        ("attention[0]", attention[0], (*query.shape[:3], value_dim), "B Hq L Dv"),
        ("attention[1]", attention[1], query.shape[:3], "B Hq L"),
    ):
        checks.check_floating(name, tensor)
        checks.check_shape(name, tensor, shape, letters)
