"""`prefix_to_state`: converts a real prefix, or the keys and values of a cache, to a `PrefixState`."""

import math
import warnings
from typing import Literal, overload

import torch
from torch import Tensor

from .. import checks
from ..feature_maps import get_feature_map
from ..state import PrefixState
from .closed_form import ClosedForm
from .fit import fit
from .options import DEFAULT_FEATURE_MAP, FitOptions
from .recipe import Recipe, recipes_for_budget, recipes_for_error
from .report import ConversionReport


@overload
def prefix_to_state(
    prefix_key: Tensor, prefix_value: Tensor, feature_map: str | None = None, *,
    centers: str | int | Tensor | None = "mean", num_rows: int | None = None, keep: int = 0, error: float | None = None,
    budget: int | None = None, query: Tensor | None = None, attention: tuple[Tensor, Tensor] | None = None,
    method: str | None = None, scale: float | None = None, feature_scale: float | None = None, seed: int = 0,
    return_report: Literal[False] = False,
) -> PrefixState: ...  # fmt: skip


@overload
def prefix_to_state(
    prefix_key: Tensor, prefix_value: Tensor, feature_map: str | None = None, *,
    centers: str | int | Tensor | None = "mean", num_rows: int | None = None, keep: int = 0, error: float | None = None,
    budget: int | None = None, query: Tensor | None = None, attention: tuple[Tensor, Tensor] | None = None,
    method: str | None = None, scale: float | None = None, feature_scale: float | None = None, seed: int = 0,
    return_report: Literal[True],
) -> tuple[PrefixState, ConversionReport]: ...  # fmt: skip


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
) -> PrefixState | tuple[PrefixState, ConversionReport | None]:
    """Converts the m rows of a prefix to a state, in closed form or fitted to calibration queries.

    Closed form: exp(scale·q·k_j) is expanded around the centre nearest to k_j and summed over the rows. Differentiable
    in `prefix_key` and `prefix_value`, but not through means found by k-means (`centers` an int), which count as
    constants. Real keys share a large mean: expand around it at least, an expansion around 0 is useless for
    them. "elu" does not approximate exp: its closed form over-weights the prefix about D times.

    Fitted: the state with the smallest error of the output on `query`. On the queries that are held out its error is at
    most that of the closed form. Use this for real keys: the default of 128 rows can replace thousands. The report has
    the errors.

    Keys and queries are expected as attention sees them, after rotary embedding. For a prefix that comes in pieces use
    `PrefixAccumulator`.

    Args:
        prefix_key: [Hs, m, D], or [N, Hs, m, D] for a stack of N states (closed form only); any floating dtype.
        prefix_value: [Hs, m, Dv] or [N, Hs, m, Dv].
        feature_map: "taylor1", "taylor2" or "elu". None: rows only, or "taylor1" if there are neither `num_rows` nor
            queries.
        centers: where to expand. "mean": around the mean key of each head. An int C: around C means found by k-means
            (scikit-learn, the `convert` extra). A tensor [(N,) Hs, C, D]: around these. None: around 0. Only "taylor1"
            may have more than one centre.
        num_rows: number R of rows of the state; 128 by default if there are queries and no feature map. In closed form,
            without a feature map only, they are the means of clusters of keys found by k-means, each with the mean of
            their values and the number of keys as its weight. A fit starts from such rows and from a few rows with much
            attention. A prefix of at most that many rows is kept as it is.
        keep: number of further rows of the prefix that the state keeps exactly, those with the most attention from
            `query` (attention sinks). The rest of the prefix is converted.
        error: instead of `num_rows`: the relative error to reach, mean over the heads on held-out queries. The state is
            the smallest of 8, 16, 32, ... rows that reaches it, among the sizes that there are enough queries to fit;
            if none does, it is the prefix itself, with a warning if queries were too few.
        budget: instead of `feature_map`, `centers`, `num_rows` and `keep`: the number of rows C·r + R + keep that a
            head may have. States of that size are fitted from several recipes: rows, rows of which a quarter is kept,
            and rows beside features of each map that fits in, also around several centres. The one with the smallest
            error, mean over the heads on held-out queries, is returned. The recipe can differ from prefix to prefix;
            states to be stacked must share one.
        query: [B, Hq, L, D], calibration queries, Hq a multiple of Hs, of text like that for which the state is meant.
            The last quarter (of the batch rows, or of the tokens) is held out: not fitted to, but used for the report.
        attention: (out [B, Hq, L, Dv], lse [B, Hq, L]) of these queries over their own input, as
            `ntk_attention(query, key, value, is_causal=True, return_lse=True)` returns them. An infinite lse marks a
            query without visible keys, as in `merge_attention`. Without `attention` the queries see the prefix only.
        method: "closed_form"; "gradient", the default with queries: descent through attention itself, which moves keys
            and centres too; "least_squares": the best Z, k, weights and values for keys and centres as they are.
        scale: the factor on Q·Kᵀ of the attention that the state is for; default 1/sqrt(D).
        feature_scale: factor on the query inside φ; default sqrt(scale). The keys get scale / feature_scale.
        seed: of k-means and of the order in which the descent takes the queries.
        return_report: whether to return a `ConversionReport` too, None for an empty prefix; needs `query`.

    Returns:
        A state in float32 (float64 for float64 keys) with C·r + R + keep rows per head. In closed form its `log_scale`
        is the logarithm of the number of rows of each centre, and `z` and `k` are divided by that number, so that any
        length fits any dtype. A centre without rows is switched off (log_scale = -inf): an empty prefix (m = 0) gives
        a state that adds nothing.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. If there are too few calibration queries
            for the fit, it says how many are needed.

    Source: arXiv 2406.14036, section 4, there around 0; `ntk_kernels.reference.prefix_to_state` is the formula.
    """
    _check_prefix(prefix_key, prefix_value)
    num_keys, head_dim = prefix_key.shape[-2:]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    checks.check_finite("scale", scale, positive=True)
    options = FitOptions(feature_map, centers, num_rows, keep, error, budget, method, feature_scale, seed)
    options = options.resolve(num_keys, has_query=query is not None)
    if isinstance(centers, Tensor):
        _check_given_centers(centers, prefix_key, options.feature_map)
    _check_calibration(prefix_key, prefix_value, query, attention, options, return_report)
    if attention is not None:
        attention = _checked_attention(attention, query, prefix_value.shape[-1])
    if query is not None or options.num_rows:  # k-means and fits read all values anyway
        checks.check_finite_rows("prefix_key", prefix_key)
        checks.check_finite_rows("prefix_value", prefix_value)

    dtype = torch.float64 if prefix_key.dtype == torch.float64 else torch.float32
    feature_scale = math.sqrt(scale) if feature_scale is None else feature_scale
    closed_form = ClosedForm(scale, feature_scale, seed, dtype)
    keeps_graph = torch.is_grad_enabled() and options.method == "closed_form"
    with torch.autocast(prefix_key.device.type, enabled=False), torch.set_grad_enabled(keeps_graph):
        if query is None or num_keys == 0:
            state, report = _in_closed_form(prefix_key, prefix_value, closed_form, options), None
        else:
            with torch.inference_mode(False), torch.set_grad_enabled(keeps_graph):  # a descent needs gradients
                state, report = _fitted(prefix_key, prefix_value, query, attention, closed_form, options)
    return (state, report) if return_report else state


def _in_closed_form(
    prefix_key: Tensor, prefix_value: Tensor, closed_form: ClosedForm, options: FitOptions
) -> PrefixState:
    num_keys = prefix_key.shape[-2]
    if options.feature_map is not None or num_keys == 0:
        feature_map = options.feature_map or DEFAULT_FEATURE_MAP
        return closed_form.features(prefix_key, prefix_value, feature_map, options.centers)
    if num_keys > options.num_rows:
        return closed_form.rows(prefix_key, prefix_value, options.num_rows).state()
    # Copies: prefix and state must not share memory.
    keys, values = (tensor.to(closed_form.dtype, copy=True) for tensor in (prefix_key, prefix_value))
    return PrefixState(keys=keys, values=values)


def _fitted(
    prefix_key: Tensor, prefix_value: Tensor, query: Tensor, attention: tuple[Tensor, Tensor] | None,
    closed_form: ClosedForm, options: FitOptions,
) -> tuple[PrefixState, ConversionReport]:  # fmt: skip
    heads, num_keys, head_dim = prefix_key.shape
    num_queries = query.numel() // (heads * head_dim)
    too_large: list[Recipe] = []
    if options.error is not None:
        recipes, too_large = recipes_for_error(options.keep, num_keys, num_queries, head_dim, prefix_value.shape[2])
    elif options.budget is not None:
        recipes = recipes_for_budget(options.budget, num_keys, head_dim)
    else:
        recipes = [Recipe(options.feature_map, options.centers, options.num_rows, options.keep)]
    state, report = fit(prefix_key, prefix_value, query, attention, closed_form, recipes, options.method, options.error)
    if too_large and report.kept_rows == num_keys:
        warnings.warn(
            f"prefix_to_state: fewer rows do not reach an error of {options.error:g}, and {num_queries:,} queries of a "
            f"state head are too few to fit {too_large[0].num_rows:,}: the state is the prefix itself",
            stacklevel=3,
        )
    return state, report


def _check_prefix(prefix_key: Tensor, prefix_value: Tensor) -> None:
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


def _check_given_centers(centers: Tensor, prefix_key: Tensor, feature_map: str) -> None:
    checks.check_floating("centers", centers)
    letters = "N Hs C D" if prefix_key.dim() == 4 else "Hs C D"
    checks.check_shape("centers", centers, (*prefix_key.shape[:-2], None, prefix_key.shape[-1]), letters)
    if centers.device != prefix_key.device:
        raise ValueError(f"`centers` must be on the device of `prefix_key`, {prefix_key.device}, got {centers.device}")
    get_feature_map(feature_map).check_num_centers(centers.shape[-2])
    if not torch.compiler.is_compiling() and checks.readable(centers):
        checks.check_finite_rows("centers", centers)


def _check_calibration(
    prefix_key: Tensor, prefix_value: Tensor, query: Tensor | None, attention: tuple[Tensor, Tensor] | None,
    options: FitOptions, return_report: bool,
) -> None:  # fmt: skip
    if query is None:
        for name, is_given in (
            ("keep", options.keep),
            ("return_report", return_report),
            ("attention", attention is not None),
        ):
            if is_given:
                raise ValueError(f"`{name}` needs calibration queries: `query` must be given, got None")
        if options.method != "closed_form":
            raise ValueError(f"`query` must be given with method={options.method!r}, got None")
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


def _checked_attention(attention: tuple[Tensor, Tensor], query: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    """Checks `attention` and returns it with (0, -inf) for queries with an infinite lse, which see no key.

    The output of such a query may be anything.
    """
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
    sees_nothing = lse.isinf()
    out = out.masked_fill(sees_nothing.unsqueeze(-1), 0)
    checks.check_finite_rows("attention[0]", out)
    checks.check_finite_rows("attention[1]", lse.masked_fill(sees_nothing, 0).unsqueeze(-1))
    return out, lse.masked_fill(sees_nothing, -torch.inf)
