"""From a real prefix, or the keys and values of a cache, to a `PrefixState`."""

import math
import warnings

import torch
from torch import Tensor

from .. import checks
from ..feature_maps import get_feature_map
from ..state import PrefixState
from .closed_form import ClosedForm
from .fit import fit
from .recipe import Layout, layouts_for_budget, layouts_for_error
from .report import ConversionReport

METHODS = ("closed_form", "least_squares", "gradient")
_NUM_ROWS = 128  # of a state that is fitted, unless told otherwise


def prefix_to_state(
    prefix_key: Tensor,
    prefix_value: Tensor,
    feature_map: str | None = None,
    *,
    centers: str | int | Tensor | None = "mean",
    num_rows: int | None = None,
    keep: int = 0,
    error: float | None = None,
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

    Fitted: the state with the least error of the output on `query`, on those that are held out never a larger one than
    the closed form has. That is the way to small errors on real keys: 128 rows, the default, stand for thousands. The
    report says what was achieved.

    Keys and queries are expected as the attention sees them (after rotary embedding). A prefix that comes in pieces is
    the business of `PrefixAccumulator`.

    Args:
        prefix_key: [Hs, m, D], or [N, Hs, m, D] for a stack of N states (closed form only); any floating dtype.
        prefix_value: [Hs, m, Dv] or [N, Hs, m, Dv].
        feature_map: "taylor1", "taylor2" or "elu". None: rows and nothing else, or "taylor1" if there are neither
            `num_rows` nor queries.
        centers: where to expand. "mean": around the mean key of each head; an int C: around C means found by
            k-means (scikit-learn, the `convert` extra); a tensor [(N,) Hs, C, D]; None: around 0. More than one
            centre goes with "taylor1" only.
        num_rows: R rows of the state, 128 by default if there are queries and no feature map. In closed form, without
            a feature map only, they are means of the keys found by k-means, each with the number of keys nearest to it
            as its weight and the mean of their values. A fit starts from them and a few rows with much attention. A
            prefix of at most that many rows is kept as it is.
        keep: further rows of the prefix that the state keeps exactly, those with the largest attention from `query`
            (attention sinks); the rest of the prefix is converted.
        error: instead of `num_rows`: the relative error, mean over the heads on held-out queries, that is wanted. The
            state is the smallest of 8, 16, 32, ... rows that reaches it, as far as there are queries enough to fit so
            many; otherwise the prefix itself, with a warning if there were too few.
        budget: instead of `feature_map`, `centers`, `num_rows` and `keep`: rows C·r + R + keep that a head may have. Up
            to seven states of that size are fitted: rows, rows of which a quarter is kept, and rows beside features of
            each map that fits in, also around several centres. The one with the least error, mean over the heads on
            held-out queries, is taken. It may be made of something else for each prefix; what is to be stacked has to
            be made of the same.
        query: [B, Hq, L, D], calibration queries, Hq a multiple of Hs; of text that is like what the state is for. The
            last quarter (of the batch rows, or of the tokens) is held out: the fit does not see it, the report does.
        attention: (out [B, Hq, L, Dv], lse [B, Hq, L]) of these queries over their own input, as
            `ntk_attention(query, key, value, is_causal=True, return_lse=True)` gives them. An infinite lse marks a
            query that saw nothing, as in `merge_attention`. Without it the queries see the prefix and nothing else.
        method: "closed_form"; "gradient", the default with queries: descent through the attention itself, which moves
            keys and centres too; "least_squares": the best Z, k, weights and values for keys and centres as they are.
        scale: the factor on Q·Kᵀ of the attention that the state is for; default 1/sqrt(D).
        feature_scale: factor on the query inside φ; default sqrt(scale). The keys get scale / feature_scale.
        seed: of k-means, and of the order in which the descent sees the queries.
        return_report: also a `ConversionReport`; needs `query`. None for an empty prefix.

    Returns:
        A state in float32 (float64 for float64 keys) with C·r + R + keep rows per head. In closed form its `log_scale`
        is the logarithm of the number of rows of each centre, and `z` and `k` are divided by that number, so that any
        length fits any dtype. A centre without rows is switched off (log_scale = -inf): an empty prefix (m = 0) gives
        a state that adds nothing.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. Too few calibration queries for what is
            to be fitted are refused with the number that it takes.

    Source: arXiv 2406.14036, section 4, there around 0; `ntk_kernels.reference.prefix_to_state` is the formula.
    """
    _check_prefix(prefix_key, prefix_value)
    num_keys, head_dim = prefix_key.shape[-2:]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    checks.check_finite("scale", scale, positive=True)
    feature_map, num_rows, method = settle(
        num_keys, query is not None, feature_map=feature_map, centers=centers, num_rows=num_rows, keep=keep,
        error=error, budget=budget, method=method, feature_scale=feature_scale, seed=seed,
    )  # fmt: skip
    feature_scale = math.sqrt(scale) if feature_scale is None else feature_scale
    if isinstance(centers, Tensor):
        _check_given_centers(centers, prefix_key, feature_map)
    _check_calibration(prefix_key, prefix_value, query, attention, method, keep, return_report)
    if attention is not None:
        attention = _checked_attention(attention, query, prefix_value.shape[-1])
    if query is not None or num_rows:  # what these do with the rows reads them anyway
        checks.check_finite_rows("prefix_key", prefix_key)
        checks.check_finite_rows("prefix_value", prefix_value)

    dtype = torch.float64 if prefix_key.dtype == torch.float64 else torch.float32
    keeps_graph = torch.is_grad_enabled() and method == "closed_form"
    with torch.autocast(prefix_key.device.type, enabled=False), torch.set_grad_enabled(keeps_graph):
        closed_form = ClosedForm(scale, feature_scale, seed, dtype)
        if query is not None and num_keys > 0:
            if error is not None:
                num_queries = query.numel() // (prefix_key.shape[0] * head_dim)
                layouts, left_out = layouts_for_error(keep, num_keys, num_queries, head_dim, prefix_value.shape[2])
            elif budget is not None:
                layouts = layouts_for_budget(budget, num_keys, head_dim)
            else:
                layouts = [Layout(feature_map, centers, num_rows, keep)]
            with torch.inference_mode(False), torch.set_grad_enabled(keeps_graph):  # a descent needs gradients
                state, report = fit(prefix_key, prefix_value, query, attention, closed_form, layouts, method, error)
            if error is not None and left_out and report.kept_rows == num_keys:
                warnings.warn(
                    f"prefix_to_state: fewer rows do not reach an error of {error:g}, and {num_queries:,} queries of a "
                    f"state head are too few to fit {left_out[0].num_rows:,}: the state is the prefix itself",
                    stacklevel=2,
                )
        elif feature_map is None and num_keys > num_rows:
            state, report = closed_form.rows(prefix_key, prefix_value, num_rows).state(), None
        elif feature_map is None and num_keys > 0:
            keys, values = (
                tensor.to(dtype, copy=True) for tensor in (prefix_key, prefix_value)
            )  # not a view of a cache
            state, report = PrefixState(keys=keys, values=values), None
        else:
            state, report = closed_form.features(prefix_key, prefix_value, feature_map or "taylor1", centers), None
    return (state, report) if return_report else state


def settle(
    num_keys: int,
    has_query: bool,
    *,
    feature_map: str | None = None,
    centers: str | int | Tensor | None = "mean",
    num_rows: int | None = None,
    keep: int = 0,
    error: float | None = None,
    budget: int | None = None,
    method: str | None = None,
    feature_scale: float | None = None,
    seed: int = 0,
) -> tuple[str | None, int, str]:
    """Checks the options of `prefix_to_state` that no tensor has to be there for.

    Returns feature map, number of rows and method, with their defaults.
    """
    if feature_map is not None:
        get_feature_map(feature_map)
    method = ("gradient" if has_query else "closed_form") if method is None else method
    checks.check_one_of("method", method, METHODS)
    if feature_scale is not None:
        checks.check_finite("feature_scale", feature_scale, positive=True)
    checks.check_int("seed", seed, minimum=0, maximum=2**32 - 1)
    _check_error(error, feature_map, centers, num_rows, has_query, method)
    _check_budget(budget, feature_map, centers, num_rows, keep, error, has_query, method)
    if feature_map is None and num_rows is None:
        feature_map, num_rows = (None, _NUM_ROWS) if has_query else ("taylor1", 0)
    num_rows = 0 if num_rows is None else num_rows
    _check_terms(feature_map, centers, num_rows, keep, num_keys, method)
    return feature_map, num_rows, method


def _check_prefix(prefix_key, prefix_value) -> None:
    checks.check_floating("prefix_key", prefix_key)
    checks.check_floating("prefix_value", prefix_value)
    if prefix_key.device.type == "meta":
        raise ValueError("`prefix_key` must have values, got a tensor on the device 'meta'")
    if prefix_key.dim() not in (3, 4) or 0 in (*prefix_key.shape[:-2], prefix_key.shape[-1]):
        raise ValueError(f"`prefix_key` must have shape [Hs, m, D] or [N, Hs, m, D], got {list(prefix_key.shape)}")
    letters = "N Hs m Dv" if prefix_key.dim() == 4 else "Hs m Dv"
    checks.check_shape("prefix_value", prefix_value, (*prefix_key.shape[:-1], None), letters)
    for what in ("dtype", "device"):
        ours, theirs = getattr(prefix_key, what), getattr(prefix_value, what)
        if ours != theirs:
            raise ValueError(f"`prefix_value` must have the {what} of `prefix_key`, {ours}, got {theirs}")


def _check_terms(feature_map, centers, num_rows, keep, num_keys, method) -> None:
    checks.check_int("num_rows", num_rows, minimum=0)
    checks.check_int("keep", keep, minimum=0)
    if feature_map is None:
        if num_rows == 0 and keep < num_keys:
            raise ValueError("`num_rows` must be at least 1 with feature_map=None, unless all rows are kept, got 0")
        if not (isinstance(centers, str) and centers == "mean"):
            raise ValueError(f"`centers` must come with `feature_map`, got {centers!r} and feature_map=None")
        return
    if num_rows + keep > num_keys:
        raise ValueError(
            f"`num_rows` and `keep` must be at most the number of prefix rows together, m={num_keys}, "
            f"got {num_rows} and {keep}"
        )
    if isinstance(centers, str) and centers != "mean":
        raise ValueError(f"`centers` must be 'mean', an int, a tensor or None, got {centers!r}")
    if not (centers is None or isinstance(centers, str | Tensor)):
        _check_num_centers(centers, feature_map, keep, num_keys)
    if num_rows and method == "closed_form":
        raise ValueError(
            f"`num_rows` must be 0 in closed form with a feature map (either holds all of the prefix), got {num_rows}"
        )


def _check_num_centers(centers, feature_map, keep, num_keys) -> None:
    if isinstance(centers, bool) or not isinstance(centers, int):
        raise TypeError(f"`centers` must be 'mean', an int, a tensor or None, got {type(centers).__name__}")
    checks.check_int("centers", centers, minimum=1)
    if centers > num_keys - keep:
        which = f" that are not kept, m={num_keys} less {keep}" if keep else f", m={num_keys}"
        raise ValueError(f"`centers` must be at most the number of prefix rows{which}, got {centers}")
    get_feature_map(feature_map).check_num_centers(centers)


def _check_given_centers(centers: Tensor, prefix_key: Tensor, feature_map) -> None:
    checks.check_floating("centers", centers)
    letters = "N Hs C D" if prefix_key.dim() == 4 else "Hs C D"
    checks.check_shape("centers", centers, (*prefix_key.shape[:-2], None, prefix_key.shape[-1]), letters)
    if centers.device != prefix_key.device:
        raise ValueError(f"`centers` must be on the device of `prefix_key`, {prefix_key.device}, got {centers.device}")
    get_feature_map(feature_map).check_num_centers(centers.shape[-2])
    if not torch.compiler.is_compiling() and checks.readable(centers):
        checks.check_finite_rows("centers", centers)


def _check_error(error, feature_map, centers, num_rows, has_query, method) -> None:
    if error is None:
        return
    checks.check_finite("error", error, positive=True)
    if error >= 1:
        raise ValueError(f"`error` must be less than 1, the error of giving 0, got {error}")
    if not has_query or method != "gradient":
        missing = "`query`, got None" if not has_query else f"method='gradient', got {method!r}"
        raise ValueError(f"`error` must come with {missing}")
    _check_defaults(
        "`error`, which finds the number of rows",
        ("feature_map", feature_map, None),
        ("centers", centers, "mean"),
        ("num_rows", num_rows, None),
    )


def _check_budget(budget, feature_map, centers, num_rows, keep, error, has_query, method) -> None:
    if budget is None:
        return
    checks.check_int("budget", budget, minimum=1)
    if not has_query:
        raise ValueError("`budget` must come with `query`, got None")
    if method == "closed_form":
        raise ValueError(f"`method` must be 'gradient' or 'least_squares' with `budget`, got {method!r}")
    _check_defaults(
        "`budget`, which finds what the state is made of",
        ("feature_map", feature_map, None),
        ("centers", centers, "mean"),
        ("num_rows", num_rows, None),
        ("keep", keep, 0),
        ("error", error, None),
    )


def _check_defaults(beside: str, *options: tuple) -> None:
    """Options (name, value, default) that must not be given `beside` another."""
    for name, value, default in options:
        if not (type(value) is type(default) and value == default):
            raise ValueError(f"`{name}` must be {default!r} with {beside}, got {value!r}")


def _check_calibration(prefix_key, prefix_value, query, attention, method, keep, return_report) -> None:
    if query is None:
        for name, needs in (("keep", keep), ("return_report", return_report), ("attention", attention is not None)):
            if needs:
                raise ValueError(f"`{name}` needs calibration queries: `query` must be given, got None")
        if method != "closed_form":
            raise ValueError(f"`query` must be given with method={method!r}, got None")
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
    if value_dim == 0:
        raise ValueError(f"`prefix_value` must have a head dimension Dv of at least 1, got {list(prefix_value.shape)}")
    if query.shape[0] * query.shape[2] * (query.shape[1] // heads) < 2:
        raise ValueError(
            "`query` must give each state head at least 2 queries, of which one is held out, got shape "
            f"{list(query.shape)}"
        )
    checks.check_finite_rows("query", query)


def _checked_attention(attention, query, value_dim: int) -> tuple[Tensor, Tensor]:
    """`attention` with (0, -inf) for a query that saw nothing: an infinite lse marks it, its out may be anything."""
    if not (isinstance(attention, tuple) and len(attention) == 2):
        raise TypeError(f"`attention` must be a pair (out, lse), got {type(attention).__name__}")
    for name, tensor, shape, letters in (
        ("attention[0]", attention[0], (*query.shape[:3], value_dim), "B Hq L Dv"),
        ("attention[1]", attention[1], query.shape[:3], "B Hq L"),
    ):
        checks.check_floating(name, tensor)
        checks.check_shape(name, tensor, shape, letters)
        if tensor.device != query.device:
            raise ValueError(f"`{name}` must be on the device of `query`, {query.device}, got {tensor.device}")
    out, lse = attention
    nothing = lse.isinf()
    out = out.masked_fill(nothing.unsqueeze(-1), 0)
    checks.check_finite_rows("attention[0]", out)
    checks.check_finite_rows("attention[1]", lse.masked_fill(nothing, 0).unsqueeze(-1))
    return out, lse.masked_fill(nothing, -torch.inf)
