"""`descend`: states fitted by gradient descent through attention itself, the keys of their rows included.

The loss of a head is its relative error on a sample of the calibration queries. Adam takes steps whose size falls as a
cosine, in units of each tensor's spread: 1 for logarithms of weights, the standard deviation of the prefix's keys or
values for keys, values and centres. Now and then the state is judged on the held-out queries; each head keeps the best
state that it had, the start included. Least squares (`least_squares.py`) finds the best Z, k, weights and values
directly, but cannot move keys: on real prefixes its error is twice as large, and it takes longer.
"""

import torch
from torch import Tensor

from ..merge import merge_attention, prefix_attention_state
from ..state import PrefixState
from .targets import TINY, Targets, held_out_errors

_STEPS = 600
_STEPS_PER_JUDGEMENT = 50
_BATCH = 2048  # queries of a head in a step
_RATE = 0.1
_BETAS = (0.9, 0.99)


def descend(state: PrefixState, spread: dict[str, Tensor], targets: Targets, scale: float, seed: int) -> PrefixState:
    """Returns the best state, head by head, that a descent from `state` passes.

    Args:
        spread: standard deviations [Hs] of the prefix's "keys" and "values".
        seed: of the samples of queries.
    """
    start = state.tensors()
    units = {name: _unit(name, tensor, spread) for name, tensor in start.items()}
    moves = {name: torch.zeros_like(tensor, requires_grad=True) for name, tensor in start.items()}
    adam = torch.optim.Adam(moves.values(), lr=_RATE, betas=_BETAS)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, _STEPS)
    batches = _Batches(targets, state.k if state.keys is None else state.keys, seed)

    def moved() -> PrefixState:
        return PrefixState(
            **{name: tensor + moves[name] * units[name] for name, tensor in start.items()},
            feature_map=state.feature_map, feature_scale=state.feature_scale,
        )  # fmt: skip

    best, min_errors = state, held_out_errors(state, targets, scale)
    for step in range(1, _STEPS + 1):
        with torch.enable_grad():
            loss = batches.next_loss(moved(), scale)
            adam.zero_grad()
            loss.sum().backward()
        adam.step()
        cosine.step()
        if step % _STEPS_PER_JUDGEMENT == 0:
            with torch.no_grad():
                now = moved()
            errors = held_out_errors(now, targets, scale)
            better = (errors < min_errors) | min_errors.isnan()
            best = _choose_by_head(better, now, best)
            min_errors = torch.where(better, errors, min_errors)
    return best


class _Batches:
    """Samples of the queries that the fit sees, in the dtype of `like`: shuffled once, then from a random place on, so
    that nothing is copied in a step."""

    def __init__(self, targets: Targets, like: Tensor, seed: int):
        fitted = targets.fitted
        of_input = fitted.of_input / fitted.rest.clamp(min=TINY)[..., None]
        mean_square = fitted.out.square().sum(-1).mean(-1).clamp(min=TINY)
        tensors = (fitted.query, fitted.lse, of_input, fitted.log_rest, fitted.out)
        self._generator = torch.Generator().manual_seed(seed)
        self._num_queries = fitted.num_queries
        self._size = min(_BATCH, self._num_queries)
        order = torch.randperm(self._num_queries, generator=self._generator)
        order = torch.cat([order, order[: self._size - 1]]).to(like.device)
        self._tensors = [tensor.to(like.dtype).index_select(1, order) for tensor in tensors]
        self._mean_square = mean_square.to(like.dtype)

    def next_loss(self, state: PrefixState, scale: float) -> Tensor:
        """Returns the relative errors [Hs] of a state on the next sample."""
        start = int(torch.randint(self._num_queries, (), generator=self._generator))
        query, lse, of_input, log_rest, exact = (t.narrow(1, start, self._size) for t in self._tensors)
        attend = _attend_rows if state.k is None else _attend
        out = attend(state, query, lse, of_input, log_rest, scale)
        mean_square = (out - exact).square().sum(-1).mean(-1)
        return (mean_square / self._mean_square + torch.finfo(out.dtype).tiny).sqrt()


def _attend(state: PrefixState, query, lse, of_input, log_rest, scale: float) -> Tensor:
    """Returns attention [Hs, N, Dv] to a state and the input, whose own result has the weight exp(log_rest + lse)."""
    of_state, lse_state = prefix_attention_state(query[None], state, scale=scale)
    out, _ = merge_attention(of_input, log_rest, of_state[0], lse_state[0] - lse)
    return out


def _attend_rows(state: PrefixState, query, lse, of_input, log_rest, scale: float) -> Tensor:
    """The same for a state of rows, in half the time: one softmax over the rows and the input's result."""
    logits = torch.baddbmm(state.bias[:, None] - lse[..., None], query, state.keys.transpose(1, 2), alpha=scale)
    weights = torch.cat([logits, log_rest[..., None]], dim=-1).softmax(dim=-1)
    return torch.baddbmm(of_input * weights[..., -1:], weights[..., :-1], state.values)


def _unit(name: str, tensor: Tensor, spread: dict[str, Tensor]) -> float | Tensor:
    """Returns the length of a step of size 1 of a state's tensor, per head."""
    of = {"keys": "keys", "centers": "keys", "values": "values", "z": "values"}.get(name)
    return 1.0 if of is None else spread[of].to(tensor.dtype).reshape(-1, *[1] * (tensor.dim() - 1))


def _choose_by_head(choose: Tensor, a: PrefixState, b: PrefixState) -> PrefixState:
    """Returns the state with the heads of `a` where `choose` [Hs] is True, else of `b`."""
    tensors = {
        name: torch.where(choose.reshape(-1, *[1] * (tensor.dim() - 1)), tensor, getattr(b, name))
        for name, tensor in a.tensors().items()
    }
    return PrefixState(**tensors, feature_map=a.feature_map, feature_scale=a.feature_scale)
