"""States fitted by gradient descent through attention itself: all that a state has moves, the keys of its rows as well.

The loss of a head is its relative error on a sample of the calibration queries. Adam with a rate that falls as a
cosine, in units of each tensor's spread: logarithms of weights in units of 1, keys, values and centres in units of the
standard deviation of the prefix's. A few times on the way the state is judged on queries that are held out; each head
keeps the best that it had, the start included. Least squares (`least_squares.py`) knows the best Z, k, weights and
values at once, but leaves keys where they are: on real prefixes twice the error, for longer.
"""

import torch
from torch import Tensor

from ..merge import merge_attention, prefix_attention_state
from ..state import PrefixState
from .targets import TINY, Targets, held_out_errors

_STEPS = 600
_JUDGED_EVERY = 50
_BATCH = 2048  # queries of a head that a step looks at
_RATE = 0.1
_BETAS = (0.9, 0.99)


def descend(state: PrefixState, spread: dict[str, Tensor], targets: Targets, scale: float, seed: int) -> PrefixState:
    """The best state on a way downhill from `state`, head by head.

    `spread`: standard deviations [Hs] of the prefix's "keys" and "values".
    """
    start = state.tensors()
    units = {name: _unit(name, tensor, spread) for name, tensor in start.items()}
    moves = {name: torch.zeros_like(tensor, requires_grad=True) for name, tensor in start.items()}
    adam = torch.optim.Adam(moves.values(), lr=_RATE, betas=_BETAS)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, _STEPS)
    fitted = _Batches(targets, state.k if state.keys is None else state.keys, seed)

    def moved() -> PrefixState:
        return PrefixState(
            **{name: tensor + moves[name] * units[name] for name, tensor in start.items()},
            feature_map=state.feature_map, feature_scale=state.feature_scale,
        )  # fmt: skip

    best, least = state, held_out_errors(state, targets, scale)
    for step in range(1, _STEPS + 1):
        with torch.enable_grad():
            loss = fitted.next_loss(moved(), scale)
            adam.zero_grad()
            loss.sum().backward()
        adam.step()
        cosine.step()
        if step % _JUDGED_EVERY == 0:
            with torch.no_grad():
                now = moved()
            errors = held_out_errors(now, targets, scale)
            better = (errors < least) | least.isnan()
            best = _by_head(better, now, best)
            least = torch.where(better, errors, least)
    return best


class _Batches:
    """Samples of the queries that the fit sees, and the losses on them."""

    def __init__(self, targets: Targets, like: Tensor, seed: int):
        seen = targets.first(targets.num_fitted)
        of_input = seen.of_input / seen.rest.clamp(min=TINY)[..., None]
        mean_square = seen.out.square().sum(-1).mean(-1).clamp(min=TINY)
        tensors = (seen.query, seen.lse, of_input, seen.log_rest, seen.out)
        self._tensors = [tensor.to(like.dtype) for tensor in tensors]
        self._mean_square = mean_square.to(like.dtype)
        self._generator = torch.Generator().manual_seed(seed)

    def next_loss(self, state: PrefixState, scale: float) -> Tensor:
        """Relative errors [Hs] on the next sample."""
        num_queries = self._tensors[0].shape[1]
        sample = torch.randint(num_queries, (min(_BATCH, num_queries),), generator=self._generator)
        query, lse, of_input, log_rest, exact = (t[:, sample.to(t.device)] for t in self._tensors)
        of_state, lse_state = prefix_attention_state(query[None], state, scale=scale)
        out, _ = merge_attention(of_input, log_rest, of_state[0], lse_state[0] - lse)
        mean_square = (out - exact).square().sum(-1).mean(-1)
        return (mean_square / self._mean_square + torch.finfo(out.dtype).tiny).sqrt()


def _unit(name: str, tensor: Tensor, spread: dict[str, Tensor]):
    """How far a step of size 1 goes."""
    of = {"keys": "keys", "centers": "keys", "values": "values", "z": "values"}.get(name)
    return 1.0 if of is None else spread[of].to(tensor.dtype).reshape(-1, *[1] * (tensor.dim() - 1))


def _by_head(choose: Tensor, a: PrefixState, b: PrefixState) -> PrefixState:
    """Heads of `a` where `choose` [Hs], else of `b`."""
    tensors = {
        name: torch.where(choose.reshape(-1, *[1] * (tensor.dim() - 1)), tensor, getattr(b, name))
        for name, tensor in a.tensors().items()
    }
    return PrefixState(**tensors, feature_map=a.feature_map, feature_scale=a.feature_scale)
