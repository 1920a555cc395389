"""States fitted to what a prefix gives to calibration queries: linear least squares for the error of the output.

For a query i let t_i be the lse over its own keys and the prefix, ρ_i the prefix's share of the attention, p_i the
exact output over the prefix alone, o_i over everything, and ψ_i the weights that the terms of a state have for it,
relative to e^{t_i}: exp(scale·q·μ_c + β_c − t_i)·φ(x_i) of every centre, exp(scale·q·κ_j + β_j − t_i) of every row. The
state gives the mass ψ_i·k and the numerator ψ_i·Z, both linear in what is sought. Two stages, the mass first:

    min_k Σ_i (ψ_i·k − ρ_i)²,    k of a row at least `_LEAST_WEIGHT`, as its weight is the exponential of its bias

then the values, which make up for the error of the mass where they can, as the output is off by

    (ψ_i·Z − ρ_i·p_i − o_i (ψ_i·k − ρ_i)) / (1 − ρ_i + ψ_i·k),    of which the sum of squares is minimised over Z;

first without the denominator, which is near 1, for every candidate; then with it. Both stages are kept near the closed
form by a ridge. Candidates are judged on queries that are held out. The closed form is one of them, so that on those
queries the fit is never worse. Everything is in float64, as the systems are close to singular.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention import ntk_attention
from ..feature_maps import features
from ..merge import merge_attention, prefix_attention_state
from ..state import PrefixState

HELD_OUT = 0.25  # of the queries, the last ones
# Of a matrix with ones on its diagonal. From 2^-20 on, what rounding Z to bfloat16 adds to the error stays below what
# the ridge leaves: rounding errors of relative size e weigh as a ridge of e² does.
_RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
_LEAST_WEIGHT = 1e-3  # of a row, relative to the number of prefix rows that it stands for
_CHUNK_WEIGHTS = 2**25  # attention weights held at a time
_LEAST_TOTAL = 1e-3  # of a query, where its errors are divided by it
_TINY = 1e-300
_MOST_ROUNDS = 30  # of holding rows at their least weight


class Targets(NamedTuple):
    """What attention over input and prefix gives to n calibration queries of each state head, in float64."""

    query: Tensor  # [Hs, n, D]
    lse: Tensor  # [Hs, n], over the input and the prefix
    share: Tensor  # [Hs, n], of the prefix, ρ
    of_prefix: Tensor  # [Hs, n, Dv], ρ·p
    of_input: Tensor  # [Hs, n, Dv], (1 − ρ)·a

    @property
    def out(self) -> Tensor:
        return self.of_prefix + self.of_input

    @property
    def num_queries(self) -> int:
        return self.query.shape[1]

    @property
    def num_fitted(self) -> int:
        """How many of the queries the fit sees; the others are held out."""
        return self.num_queries - round(HELD_OUT * self.num_queries)

    def first(self, count: int) -> "Targets":
        return Targets(*(tensor[:, :count] for tensor in self))

    def from_(self, start: int) -> "Targets":
        return Targets(*(tensor[:, start:] for tensor in self))


class Terms(NamedTuple):
    """What a state is linear in: features around centres [Hs, C, D] or the origin, and weights of rows [Hs, R, D].

    `log_weight` [Hs, C or 1] and `row_bias` [Hs, R] are logarithms of the numbers of prefix rows that they stand for.
    """

    feature_map: str | None
    feature_scale: float
    scale: float
    centers: Tensor | None
    log_weight: Tensor | None
    rows: Tensor | None
    row_bias: Tensor | None

    def weights(self, head: int, query: Tensor, lse: Tensor) -> Tensor:
        """ψ [n, F] of queries [n, D]: centre by centre, then the rows."""
        parts = []
        if self.feature_map is not None:
            logits = -lse[:, None] + self.log_weight[head]
            if self.centers is not None:
                logits = logits + self.scale * query @ self.centers[head].mT
            phi = features(query * self.feature_scale, self.feature_map)
            parts.append((logits.exp()[:, :, None] * phi[:, None]).flatten(1))
        if self.rows is not None:
            parts.append((self.scale * query @ self.rows[head].mT + self.row_bias[head] - lse[:, None]).exp())
        return torch.cat(parts, dim=1)


def targets_of(
    query: Tensor, prefix_key: Tensor, prefix_value: Tensor, attention: tuple[Tensor, Tensor] | None, scale: float
) -> Targets:
    """`query` [B, Hq, L, D], a prefix [Hs, m, D] and, over the input alone, out [B, Hq, L, Dv] and lse [B, Hq, L].

    The queries of all heads that share a state head are its calibration queries, ordered by batch row, then token.
    """
    heads, batch = prefix_key.shape[0], query.shape[0]
    query = query.to(torch.promote_types(query.dtype, torch.float32))
    keys, values = (tensor[None].expand(batch, -1, -1, -1).to(query.dtype) for tensor in (prefix_key, prefix_value))
    out, lse = ntk_attention(query, keys, values, scale=scale, return_lse=True)
    of_input, lse_input = (torch.zeros_like(out), torch.full_like(lse, -torch.inf)) if attention is None else attention
    query, out, lse, of_input, lse_input = (
        _by_state_head(tensor.double(), heads) for tensor in (query, out, lse, of_input, lse_input)
    )
    total = torch.logaddexp(lse, lse_input)
    share = (lse - total).exp()
    return Targets(query, total, share, share[..., None] * out, (lse_input - total).exp()[..., None] * of_input)


def _by_state_head(tensor: Tensor, heads: int) -> Tensor:
    """[B, Hq, L, ...] -> [Hs, B·L·G, ...]."""
    return tensor.unflatten(1, (heads, -1)).movedim(1, 0).transpose(2, 3).flatten(1, 3)


def with_rows(attention, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over the input (None: nothing) and rows that are kept: out and lse."""
    batch = query.shape[0]
    keys, values = (tensor[None].expand(batch, -1, -1, -1).to(query.dtype) for tensor in (keys, values))
    over_rows = ntk_attention(query, keys, values, scale=scale, return_lse=True)
    return over_rows if attention is None else merge_attention(*attention, *over_rows)


def most_seen(targets: Targets, prefix_key: Tensor, count: int, scale: float) -> Tensor:
    """Numbers [Hs, count] of the rows with the largest sum of squared attention weights over the fitted queries."""
    chosen = []
    for key, query, lse in zip(prefix_key.float(), targets.query.float(), targets.lse.float(), strict=True):
        seen = key.new_zeros(key.shape[0])
        for start in range(0, targets.num_fitted, chunk := max(1, _CHUNK_WEIGHTS // key.shape[0])):
            part = slice(start, min(start + chunk, targets.num_fitted))
            seen += (scale * query[part] @ key.mT - lse[part, None]).exp_().square_().sum(0)
        chosen.append(seen.topk(count).indices)
    return torch.stack(chosen)


def held_out_errors(state: PrefixState | None, targets: Targets, scale: float) -> Tensor:
    """Relative errors [Hs] of the op's own results on the held-out queries; without a state, of leaving it out."""
    held_out = targets.from_(targets.num_fitted)
    share = held_out.share
    if state is None:
        out = torch.where((share < 1)[..., None], held_out.of_input / (1 - share).clamp(min=_TINY)[..., None], 0)
    else:
        dtype = torch.promote_types(torch.float32, next(iter(state.tensors().values())).dtype)
        of_state, lse = prefix_attention_state(held_out.query[None].to(dtype), state, scale=scale)
        mass = (lse[0].double() - held_out.lse).exp()
        total = 1 - share + mass
        out = (held_out.of_input + mass[..., None] * of_state[0].double()) / total.clamp(min=_TINY)[..., None]
    difference, exact = (tensor.flatten(1).norm(dim=1) for tensor in (out - held_out.out, held_out.out))
    return (difference / exact.clamp(min=_TINY)).float()


def fit_state(
    state: PrefixState, rows: tuple[Tensor, Tensor, Tensor] | None, targets: Targets, scale: float
) -> tuple[PrefixState, list[float | None]]:
    """The best state near a closed form, and the ridge of each head (None: the closed form itself).

    `rows`: mean keys [Hs, R, D], mean values and numbers of prefix rows; beside the features of the state, if any.
    """
    heads, dtype = targets.query.shape[0], next(iter(state.tensors().values())).dtype
    value_dim = targets.of_prefix.shape[2]
    z, k, parts = [], [], {}
    if state.k is not None:
        z.append(state.z.double().reshape(heads, -1, value_dim))
        k.append(state.k.double().reshape(heads, -1))
    if rows is not None:
        keys, values, count = (tensor.double() for tensor in rows)
        # Beside features, which hold all of the prefix, they begin with nothing.
        z.append(values if state.k is None else torch.zeros_like(values))
        k.append(torch.ones_like(count) if state.k is None else torch.zeros_like(count))
    z, k = torch.cat(z, dim=1), torch.cat(k, dim=1)
    terms = Terms(
        state.feature_map, state.feature_scale, scale,
        None if state.centers is None else state.centers.double(),
        None if state.log_scale is None else state.log_scale.double().reshape(heads, -1),
        None if rows is None else keys, None if rows is None else count.log(),
    )  # fmt: skip
    fitted_queries = targets.num_fitted
    if fitted_queries < k.shape[1]:
        needed = math.ceil(k.shape[1] / (1 - HELD_OUT))
        raise ValueError(
            f"`query` must give each state head at least {needed:,} queries to fit {k.shape[1]:,} features and rows, a "
            f"quarter of them to be held out, got {targets.num_queries:,}"
        )
    fitted, held_out = targets.first(fitted_queries), targets.from_(fitted_queries)
    best = [_fit_head(fitted, held_out, terms, head, z[head], k[head]) for head in range(heads)]
    z, k = (torch.stack([head[i] for head in best]) for i in (1, 2))
    if state.k is not None:
        num_features = state.k[0].numel()
        parts |= {
            "z": z[:, :num_features].reshape(state.z.shape).to(dtype),
            "k": k[:, :num_features].reshape(state.k.shape).to(dtype),
            "feature_map": state.feature_map, "feature_scale": state.feature_scale, "centers": state.centers,
            "log_scale": state.log_scale,
        }  # fmt: skip
        z, k = z[:, num_features:], k[:, num_features:]
    if rows is not None:
        values = torch.where(k[..., None] > 0, z / k[..., None], 0)
        of_rows = {"keys": keys, "values": values, "bias": terms.row_bias + k.log()}
        parts |= {name: tensor.to(dtype) for name, tensor in of_rows.items()}
    return PrefixState(**parts), [head[0] for head in best]


def _fit_head(fitted: Targets, held_out: Targets, terms: Terms, head: int, z: Tensor, k: Tensor):
    """(ridge, z, k) of the candidate with the least error on the held-out queries."""
    num_rows = 0 if terms.rows is None else terms.rows.shape[1]
    of_rows = slice(len(k) - num_rows, None)

    def mass_of(weights, k):
        """The op cuts the mass of the features off at 0 before it adds that of the rows."""
        rows = weights[:, of_rows] @ k[of_rows]
        return rows + (weights[:, : len(k) - num_rows] @ k[: len(k) - num_rows]).clamp(min=0)

    share, of_prefix, out = fitted.share[head], fitted.of_prefix[head], fitted.out[head]
    weights = terms.weights(head, fitted.query[head], fitted.lse[head])
    unseen = terms.weights(head, held_out.query[head], held_out.lse[head])
    candidates = [(None, z, k)]

    def best():
        errors = [relative_error(held_out, head, mass_of(unseen, k), unseen @ z) for _, z, k in candidates]
        return candidates[min(range(len(errors)), key=lambda i: math.inf if math.isnan(errors[i]) else errors[i])]

    # Beside rows the features keep their mass: rows only add to it, and what falls below 0 would be cut off.
    free = of_rows if num_rows else slice(None)
    bound = torch.full_like(k[free], _LEAST_WEIGHT if num_rows else -torch.inf)
    matrix, scale = _gram(weights[:, free])
    side = scale * (weights[:, free].mT @ (share - mass_of(weights, k)))
    fitted_k = {}
    for ridge in _RIDGES:
        step = scale * _solve_bounded(_ridged(matrix, ridge), side, (bound - k[free]) / scale)
        fitted_k[ridge] = k.clone()
        fitted_k[ridge][free] = torch.maximum(k[free] + step, bound)

    def residual(k):
        return of_prefix - weights @ z + out * (mass_of(weights, k) - share)[:, None]

    matrix, scale = _gram(weights)
    for ridge, new_k in fitted_k.items():
        candidates.append((ridge, z + _values(matrix, scale, weights, residual(new_k), ridge), new_k))
    # Once more for the best k and that of the closed form, to all orders: each query's error over its total mass.
    for new_k in (best()[2], k):
        factor = 1 / (1 - share + mass_of(weights, new_k)).clamp(min=_LEAST_TOTAL)[:, None]
        matrix, scale = _gram(weights * factor)
        for ridge in _RIDGES:
            step = _values(matrix, scale, weights * factor, residual(new_k) * factor, ridge)
            candidates.append((ridge, z + step, new_k))
    return best()


def _values(matrix: Tensor, scale: Tensor, weights: Tensor, residual: Tensor, ridge: float) -> Tensor:
    """What to add to Z to make up for the residual [n, Dv]."""
    return scale[:, None] * _solve(_ridged(matrix, ridge), scale[:, None] * (weights.mT @ residual))


def relative_error(targets: Targets, head: int, mass: Tensor, numerator: Tensor) -> float:
    """Of the output that these give."""
    out = (targets.of_input[head] + numerator) / (1 - targets.share[head] + mass).clamp(min=_TINY)[:, None]
    exact = targets.out[head]
    return ((out - exact).norm() / exact.norm().clamp(min=_TINY)).item()


def _gram(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Ψᵀ·Ψ scaled to ones on its diagonal, and that scale [F] of the unknowns."""
    gram = weights.mT @ weights
    scale = gram.diagonal().clamp(min=_TINY).rsqrt()
    return gram * scale[:, None] * scale, scale


def _ridged(matrix: Tensor, ridge: float) -> Tensor:
    matrix = matrix.clone()
    matrix.diagonal().add_(ridge)
    return matrix


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """NaN where the matrix is singular to rounding."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if info.item():
        return torch.full_like(right, torch.nan)
    return torch.cholesky_solve(right, factor)


def _solve_bounded(matrix: Tensor, right: Tensor, bound: Tensor) -> Tensor:
    """The x >= bound that makes ½ xᵀAx − bᵀx small: what falls below its bound is held there, the rest solved again."""
    held = torch.zeros_like(bound, dtype=torch.bool)
    x = torch.zeros_like(bound)
    for _ in range(_MOST_ROUNDS):
        x = torch.where(held, bound, x)
        side = right[~held] - matrix[~held][:, held] @ bound[held]
        x[~held] = _solve(matrix[~held][:, ~held], side[:, None])[:, 0]
        below = ~held & (x < bound)
        if not below.any():
            break
        held |= below
    return x
