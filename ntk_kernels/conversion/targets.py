"""What attention over input and prefix gives to calibration queries, and how far off a state is on those held out."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention import ntk_attention
from ..merge import merge_attention
from ..state import PrefixState
from .terms import Terms

HELD_OUT = 0.25  # of the queries, the last ones
TINY = 1e-300
_CHUNK_WEIGHTS = 2**22  # attention weights held at a time
_ENOUGH_QUERIES = 4096  # to find the rows with much attention


class Targets(NamedTuple):
    """What attention over input and prefix gives to n calibration queries of each state head, in float64."""

    query: Tensor  # [Hs, n, D]
    lse: Tensor  # [Hs, n], over the input and the prefix
    share: Tensor  # [Hs, n], of the prefix, ρ
    log_rest: Tensor  # [Hs, n], log(1 − ρ) of the input, also where 1 − ρ would be rounded to 0
    of_prefix: Tensor  # [Hs, n, Dv], ρ·p
    of_input: Tensor  # [Hs, n, Dv], (1 − ρ)·a

    @property
    def out(self) -> Tensor:
        return self.of_prefix + self.of_input

    @property
    def rest(self) -> Tensor:
        return self.log_rest.exp()

    @property
    def num_queries(self) -> int:
        return self.query.shape[1]

    @property
    def num_fitted(self) -> int:
        """How many of the queries the fit sees; the others are held out."""
        return num_fitted(self.num_queries)

    def first(self, count: int) -> "Targets":
        return Targets(*(tensor[:, :count] for tensor in self))

    def from_(self, start: int) -> "Targets":
        return Targets(*(tensor[:, start:] for tensor in self))

    def of_head(self, head: int) -> "Targets":
        """Of one head, without that dimension."""
        return Targets(*(tensor[head] for tensor in self))

    def split(self, size: int) -> Iterator["Targets"]:
        """So many queries at a time."""
        for part in zip(*(tensor.split(size, dim=self.lse.dim() - 1) for tensor in self), strict=True):
            yield Targets(*part)


def num_fitted(num_queries: int) -> int:
    return num_queries - max(1, round(HELD_OUT * num_queries))


def targets_of(
    query: Tensor, prefix_key: Tensor, prefix_value: Tensor, attention: tuple[Tensor, Tensor] | None, scale: float
) -> Targets:
    """`query` [B, Hq, L, D], a prefix [Hs, m, D] and, over the input alone, out [B, Hq, L, Dv] and lse [B, Hq, L].

    The queries of all heads that share a state head are its calibration queries, ordered by batch row, then token.
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
    """[B, Hq, L, ...] -> [Hs, B·L·G, ...]."""
    return tensor.unflatten(1, (heads, -1)).movedim(1, 0).transpose(2, 3).flatten(1, 3)


def with_rows(attention, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over the input (None: nothing) and rows that are kept: out and lse."""
    batch = query.shape[0]
    keys, values = (tensor.to(query.dtype).expand(batch, -1, -1, -1) for tensor in (keys, values))
    over_rows = ntk_attention(query, keys, values, scale=scale, return_lse=True)
    return over_rows if attention is None else merge_attention(*attention, *over_rows)


def most_seen(targets: Targets, prefix_key: Tensor, count: int, scale: float) -> Tensor:
    """Numbers [Hs, count] of the rows with the largest sum of squared attention weights over the fitted queries, or
    over every n-th of them, so that they are no more than `_ENOUGH_QUERIES`."""
    chosen = []
    every_nth = slice(0, targets.num_fitted, -(-targets.num_fitted // _ENOUGH_QUERIES))
    rows_at_once = max(1, _CHUNK_WEIGHTS // prefix_key.shape[1])
    for key, query, lse in zip(prefix_key.float(), targets.query.float(), targets.lse.float(), strict=True):
        seen = key.new_zeros(key.shape[0])
        for q, t in zip(query[every_nth].split(rows_at_once), lse[every_nth].split(rows_at_once), strict=True):
            seen += (scale * q @ key.mT - t[:, None]).exp_().square_().sum(0)
        chosen.append(seen.topk(count).indices)
    return torch.stack(chosen)


def held_out_errors(state: PrefixState | None, targets: Targets, scale: float) -> Tensor:
    """Relative errors [Hs] of what the op gives on the held-out queries; without a state, of leaving it out."""
    held_out = targets.from_(targets.num_fitted)
    squares = exact = 0
    if state is not None:
        terms, z, k = Terms.of_state(state, scale)
    num_terms = 1 if state is None else k.numel()
    for part in held_out.split(max(1, _CHUNK_WEIGHTS // num_terms)):
        if state is None:
            out, total = part.of_input, part.rest
        else:
            logits = terms.logits(part.query) - part.lse[..., None]
            above = logits.amax(-1).clamp(min=0)  # a state may weigh more than all of the exact attention
            weights, less = terms.weights(part.query, logits - above[..., None]), (-above).exp()
            out = less[..., None] * part.of_input + weights @ z
            total = less * part.rest + terms.mass(weights, k[:, None])[:, 0]
        squares += (out / total.clamp(min=TINY)[..., None] - part.out).square().sum((1, 2))
        exact += part.out.square().sum((1, 2))
    return (squares.sqrt() / exact.sqrt().clamp(min=TINY)).float()
