"""`Targets`: results of attention over input and prefix for calibration queries; and the error of a state on them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention import ntk_attention
from ..merge import merge_attention
from ..state import PrefixState
from .terms import Terms

HELD_OUT = 0.25  # share of the queries, the last ones
TINY = 1e-300
_CHUNK_WEIGHTS = 2**22  # attention weights held at a time
# Queries and keys of which the weights are computed at once; on a CPU they stay in its cache.
_ATTENDED_AT_ONCE = {"cpu": (256, 1024), "cuda": (4096, 4096)}
_MAX_SAMPLED_QUERIES = 4096  # queries that decide which rows have the most attention


class Targets(NamedTuple):
    """Results of attention over input and prefix for n calibration queries of each state head, in float64."""

    query: Tensor  # [Hs, n, D]
    lse: Tensor  # [Hs, n], over the input and the prefix
    share: Tensor  # [Hs, n], of the prefix, ρ
    log_rest: Tensor  # [Hs, n], log(1 − ρ) of the input, also where 1 − ρ would be rounded to 0
    of_prefix: Tensor  # [Hs, n, Dv], ρ·p
    of_input: Tensor  # [Hs, n, Dv], (1 − ρ)·a

    @property
    def out(self) -> Tensor:
        """The exact output [Hs, n, Dv]."""
        return self.of_prefix + self.of_input

    @property
    def rest(self) -> Tensor:
        """The share [Hs, n] of the input, 1 − ρ."""
        return self.log_rest.exp()

    @property
    def num_queries(self) -> int:
        """The number n of queries."""
        return self.query.shape[1]

    @property
    def fitted(self) -> "Targets":
        """The queries that the fit sees."""
        return Targets(*(tensor[:, : num_fitted(self.num_queries)] for tensor in self))

    @property
    def held_out(self) -> "Targets":
        """The other queries."""
        return Targets(*(tensor[:, num_fitted(self.num_queries) :] for tensor in self))

    def of_head(self, head: int) -> "Targets":
        """Returns the targets of one head, without the dimension of heads."""
        return Targets(*(tensor[head] for tensor in self))

    def split(self, size: int) -> Iterator["Targets"]:
        """Yields the targets of at most `size` queries at a time."""
        for part in zip(*(tensor.split(size, dim=self.lse.dim() - 1) for tensor in self), strict=True):
            yield Targets(*part)


def num_fitted(num_queries: int) -> int:
    """Returns the number of queries that a fit sees; the others are held out."""
    return num_queries - max(1, round(HELD_OUT * num_queries))


def targets_of(
    query: Tensor, prefix_key: Tensor, prefix_value: Tensor, attention: tuple[Tensor, Tensor] | None, scale: float
) -> Targets:
    """Computes the targets of `query` [B, Hq, L, D] for a prefix [Hs, m, D], [Hs, m, Dv].

    The queries of all heads that share a state head are its calibration queries, ordered by batch row, then token.

    Args:
        attention: out [B, Hq, L, Dv] and lse [B, Hq, L] over the input alone; None without an input.
    """
    heads, batch = prefix_key.shape[0], query.shape[0]
    query = query.to(torch.promote_types(query.dtype, torch.float32))
    keys, values = (tensor.to(query.dtype).expand(batch, -1, -1, -1) for tensor in (prefix_key, prefix_value))
    out, lse = ntk_attention(query, keys, values, scale=scale, return_lse=True)
    of_input, lse_input = (torch.zeros_like(out), torch.full_like(lse, -torch.inf)) if attention is None else attention
    query, out, lse, of_input, lse_input = (
        _by_state_head(tensor.double(), heads) for tensor in (query, out, lse, of_input, lse_input)
    )
    total = torch.logaddexp(lse, lse_input)
    share, log_rest = (lse - total).exp(), lse_input - total
    return Targets(query, total, share, log_rest, share[..., None] * out, log_rest.exp()[..., None] * of_input)


def _by_state_head(tensor: Tensor, heads: int) -> Tensor:
    """Groups the queries by state head, [B, Hq, L, ...] -> [Hs, B·L·G, ...]."""
    return tensor.unflatten(1, (heads, -1)).movedim(1, 0).transpose(2, 3).flatten(1, 3)


def attend_rows_too(
    attention: tuple[Tensor, Tensor] | None, query: Tensor, keys: Tensor, values: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns out and lse of `attention`, that over the input if there is one, and over rows [Hs, n, D] together."""
    batch = query.shape[0]
    keys, values = (tensor.to(query.dtype).expand(batch, -1, -1, -1) for tensor in (keys, values))
    over_rows = ntk_attention(query, keys, values, scale=scale, return_lse=True)
    return over_rows if attention is None else merge_attention(*attention, *over_rows)


def most_attended(targets: Targets, prefix_key: Tensor, count: int, scale: float) -> Tensor:
    """Returns the numbers [Hs, count] of the rows with the largest sum of squared attention weights.

    The sum is over the fitted queries, or over every n-th of them, so that it takes at most `_MAX_SAMPLED_QUERIES`.
    """
    chosen = []
    fitted = targets.fitted
    every_nth = slice(None, None, -(-fitted.num_queries // _MAX_SAMPLED_QUERIES))
    num_queries, num_keys = _ATTENDED_AT_ONCE[prefix_key.device.type]
    for key, query, lse in zip(prefix_key.float(), fitted.query.float(), fitted.lse.float(), strict=True):
        queries = [(2 * scale * query[every_nth]).split(num_queries), (-2 * lse[every_nth, None]).split(num_queries)]
        sums = key.new_zeros(key.shape[0])
        for of_keys, k in zip(sums.split(num_keys), key.split(num_keys), strict=True):
            for q, t in zip(*queries, strict=True):
                of_keys += torch.addmm(t, q, k.mT).exp_().sum(0)
        chosen.append(sums.topk(count).indices)
    return torch.stack(chosen)


def held_out_errors(state: PrefixState | None, targets: Targets, scale: float) -> Tensor:
    """Returns the relative errors [Hs] of the output with a state, or without any prefix, on the held-out queries."""
    squares = exact = 0
    if state is not None:
        terms, z, k = Terms.of_state(state, scale)
    num_terms = 1 if state is None else k.numel()
    for part in targets.held_out.split(max(1, _CHUNK_WEIGHTS // num_terms)):
        if state is None:
            out, total = part.of_input, part.rest
        else:
            logits = terms.logits(part.query) - part.lse[..., None]
            excess = logits.amax(-1).clamp(min=0)  # a state may weigh more than all of the exact attention
            weights, shrink = terms.weights(part.query, logits - excess[..., None]), (-excess).exp()
            out = shrink[..., None] * part.of_input + weights @ z
            total = shrink * part.rest + terms.mass(weights, k[:, None])[:, 0]
        squares += (out / total.clamp(min=TINY)[..., None] - part.out).square().sum((1, 2))
        exact += part.out.square().sum((1, 2))
    return (squares.sqrt() / exact.sqrt().clamp(min=TINY)).float()
