"""`fit_state`: states fitted by linear least squares for the error of the output, keys and centres left as they are.

For a query i let t_i be the lse over its own keys and the prefix, ρ_i the prefix's share of the attention, p_i the
exact output over the prefix alone, o_i over everything, and ψ_i the weights of the terms of a state, relative to
e^{t_i}: exp(scale·q·μ_c + β_c − t_i)·φ(x_i) for every centre, exp(scale·q·κ_j + β_j − t_i) for every row. The state
gives the mass ψ_i·k and the numerator ψ_i·Z, both linear in the unknowns k and Z. They are found in two stages, first
the mass,

    min_k Σ_i (ψ_i·k − ρ_i)²,    k of a row at least `_MIN_WEIGHT`, as its weight is the exponential of its bias

then the values, which make up for the error of the mass where they can. The error of the output is

    (ψ_i·Z − ρ_i·p_i − o_i (ψ_i·k − ρ_i)) / (1 − ρ_i + ψ_i·k),    whose sum of squares is minimised over Z;

first without the denominator, which is near 1, for every candidate; then with it. A ridge keeps both stages near the
closed form. Candidates are judged by the larger of two errors, on the fitted and on the held-out queries; on the latter
none may be worse than the closed form. Everything is in float64, as the systems are close to singular. Their matrices
are summed over chunks of the queries, so that memory grows with F², not with n·F.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..state import PrefixState
from .closed_form import ClusterRows
from .targets import TINY, Targets
from .terms import Terms

# Relative to a diagonal of ones. From 2^-20 on, the error that rounding Z to bfloat16 adds stays below the error that
# the ridge leaves: rounding with a relative error e acts like a ridge of e².
_RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
_MIN_WEIGHT = 1e-3  # of a row, relative to the number of prefix rows in whose place it is
_MIN_TOTAL = 1e-3  # mass by which the errors of a query are divided
_MIN_SQUARES = 1e-6  # sum of squares of a term's weights: below it, the term's value would be arbitrary
_MAX_ROUNDS = 30  # of holding rows at their minimum weight
_CHUNK_WEIGHTS = 2**22  # numbers ψ held at a time


class _Candidate(NamedTuple):
    """A possible fit of one head."""

    ridge: float | None  # None: the closed form
    z: Tensor  # [F, Dv]
    k: Tensor  # [F]


def fit_state(
    state: PrefixState, rows: ClusterRows | None, targets: Targets, scale: float
) -> tuple[PrefixState, list[float | None]]:
    """Returns the best state near a closed form, and the ridge of each head (None: the closed form itself).

    Args:
        state: the closed form, whose features are fitted, if it has any.
        rows: rows to be fitted beside the features, if any.
    """
    heads, dtype = targets.query.shape[0], next(iter(state.tensors().values())).dtype
    value_dim = targets.of_prefix.shape[2]
    z, k = [], []
    parts: dict[str, Any] = {}
    if state.k is not None:
        z.append(state.z.double().reshape(heads, -1, value_dim))
        k.append(state.k.double().reshape(heads, -1))
    if rows is not None:
        keys, values, sizes = (tensor.double() for tensor in rows)
        # Beside features, which hold all of the prefix, rows start with no weight.
        z.append(values if state.k is None else torch.zeros_like(values))
        k.append(torch.ones_like(sizes) if state.k is None else torch.zeros_like(sizes))
    z, k = torch.cat(z, dim=1), torch.cat(k, dim=1)
    terms = Terms(
        state.feature_map, state.feature_scale, scale,
        None if state.centers is None else state.centers.double(),
        None if state.log_scale is None else state.log_scale.double().reshape(heads, -1),
        None if rows is None else keys, None if rows is None else sizes.log(),
    )  # fmt: skip
    best = [
        _fit_head(
            *(_Head(terms.of_head(head), part.of_head(head), dtype) for part in (targets.fitted, targets.held_out)),
            z[head],
            k[head],
        )
        for head in range(heads)
    ]
    z, k = (torch.stack([getattr(candidate, name) for candidate in best]) for name in ("z", "k"))
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
    return PrefixState(**parts), [candidate.ridge for candidate in best]


class _Head(NamedTuple):
    """One head: its terms, and targets of its queries, for which weights ψ are computed chunk by chunk."""

    terms: Terms
    targets: Targets
    dtype: torch.dtype  # of the state

    def chunks(self, num_terms: int) -> Iterator[tuple[Tensor, Targets]]:
        """Yields ψ [c, F] and the targets of c queries at a time."""
        for part in self.targets.split(max(1, _CHUNK_WEIGHTS // num_terms)):
            logits = self.terms.logits(part.query) - part.lse[:, None]
            yield self.terms.weights(part.query, logits), part

    def errors(self, candidates: Sequence[_Candidate]) -> list[float]:
        """Returns the relative error of each candidate's output, with z and k rounded as the state will hold them."""
        rounded = [[tensor.to(self.dtype).double() for tensor in candidate[1:]] for candidate in candidates]
        squares, exact = [0.0] * len(candidates), 0.0
        for weights, part in self.chunks(len(rounded[0][1])):
            exact += part.out.square().sum().item()
            for i, (z, k) in enumerate(rounded):
                total = (part.rest + self.terms.mass(weights, k)).clamp(min=TINY)
                squares[i] += ((part.of_input + weights @ z) / total[:, None] - part.out).square().sum().item()
        return [math.sqrt(square / max(exact, TINY)) for square in squares]


def _fit_head(fitted: _Head, held_out: _Head, z: Tensor, k: Tensor) -> _Candidate:
    """Returns the best candidate of a head, of which `fitted` and `held_out` have the queries and z, k the start."""
    num_terms, num_rows = len(k), fitted.terms.num_rows
    # Beside rows, the features keep their mass: rows only add to it, and a mass below 0 would be cut off.
    free = slice(num_terms - num_rows, None) if num_rows else slice(None)
    bound = torch.full_like(k[free], _MIN_WEIGHT if num_rows else -torch.inf)
    gram, side = k.new_zeros(num_terms, num_terms), torch.zeros_like(k)
    for weights, part in fitted.chunks(num_terms):
        gram += weights.mT @ weights
        side += weights.mT @ (part.share - fitted.terms.mass(weights, k))
    matrix, scale = _scaled(gram[free, free])
    fitted_k = k.expand(len(_RIDGES), -1).clone()
    for new_k, ridge in zip(fitted_k, _RIDGES, strict=True):
        step = scale * _solve_bounded(_ridged(matrix, ridge), scale * side[free], (bound - k[free]) / scale)
        new_k[free] = torch.maximum(k[free] + step, bound)

    def residual(weights: Tensor, part: Targets, k: Tensor) -> Tensor:
        """Returns what Z has to add [..., c, Dv] for k [..., F]."""
        return part.of_prefix - weights @ z + part.out * (fitted.terms.mass(weights, k) - part.share)[..., None]

    matrix, scale = _scaled(gram)
    sides = z.new_zeros(len(_RIDGES), *z.shape)
    for weights, part in fitted.chunks(num_terms):
        sides += weights.mT @ residual(weights, part, fitted_k)
    candidates = [_Candidate(None, z, k)]
    for ridge, side, new_k in zip(_RIDGES, sides, fitted_k, strict=True):
        candidates.append(_Candidate(ridge, z + _step(matrix, scale, side, ridge), new_k))
    on_held_out = held_out.errors(candidates)
    errors = _larger_errors(on_held_out, fitted.errors(candidates), on_held_out[0])
    # Once more with the denominator, for the best k and that of the closed form.
    again = []
    for new_k in (candidates[_index_of_min(errors)].k, k):
        gram, side = torch.zeros_like(gram), torch.zeros_like(z)
        for weights, part in fitted.chunks(num_terms):
            factor = 1 / (part.rest + fitted.terms.mass(weights, new_k)).clamp(min=_MIN_TOTAL)[:, None]
            gram += (weights * factor).mT @ (weights * factor)
            side += weights.mT @ (residual(weights, part, new_k) * factor.square())
        matrix, scale = _scaled(gram)
        again += [_Candidate(ridge, z + _step(matrix, scale, side, ridge), new_k) for ridge in _RIDGES]
    errors += _larger_errors(held_out.errors(again), fitted.errors(again), on_held_out[0])
    return (candidates + again)[_index_of_min(errors)]


def _larger_errors(on_held_out: list[float], on_fitted: list[float], limit: float) -> list[float]:
    """Returns the larger error of each candidate; NaN if the error on the held-out queries exceeds `limit`.

    A candidate may fail for one query in thousands, which may be in either part.
    """
    both = zip(on_held_out, on_fitted, strict=True)
    return [max(held_out, fitted) if held_out <= limit else math.nan for held_out, fitted in both]


def _index_of_min(errors: list[float]) -> int:
    """Returns the index of the smallest error that is not NaN."""
    return min(range(len(errors)), key=lambda i: math.inf if math.isnan(errors[i]) else errors[i])


def _step(matrix: Tensor, scale: Tensor, side: Tensor, ridge: float) -> Tensor:
    """Returns the change [F, Dv] of Z, from the system scaled by `scale` and the right side Ψᵀ·residual."""
    return scale[:, None] * _solve(_ridged(matrix, ridge), scale[:, None] * side)


def _scaled(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Returns Ψᵀ·Ψ with a diagonal of ones (less where no query sees a term), and the scale [F] of the unknowns."""
    scale = gram.diagonal().clamp(min=_MIN_SQUARES).rsqrt()
    return gram * scale[:, None] * scale, scale


def _ridged(matrix: Tensor, ridge: float) -> Tensor:
    """Returns the matrix with `ridge` added to its diagonal."""
    matrix = matrix.clone()
    matrix.diagonal().add_(ridge)
    return matrix


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Returns the solution of matrix·x = right, NaN where the matrix is singular to rounding."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if info.item():
        return torch.full_like(right, torch.nan)
    return torch.cholesky_solve(right, factor)


def _solve_bounded(matrix: Tensor, right: Tensor, bound: Tensor) -> Tensor:
    """Returns an x >= bound that makes ½ xᵀAx − bᵀx small.

    Unknowns that fall below their bound are held there, and the others are solved for again.
    """
    held = torch.zeros_like(bound, dtype=torch.bool)
    x = torch.zeros_like(bound)
    for _ in range(_MAX_ROUNDS):
        x = torch.where(held, bound, x)
        side = right[~held] - matrix[~held][:, held] @ bound[held]
        x[~held] = _solve(matrix[~held][:, ~held], side[:, None])[:, 0]
        below = ~held & (x < bound)
        if not below.any():
            break
        held |= below
    return x
