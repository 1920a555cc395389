"""What attention over input and prefix gives to calibration queries, and how far off a state is on those held out."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention import ntk_attention
from ..merge import merge_attention, prefix_attention_state
from ..state import PrefixState

HELD_OUT = 0.25  # of the queries, the last ones
TINY = 1e-300
_CHUNK_WEIGHTS = 2**22  # attention weights held at a time
_ENOUGH_QUERIES = 4096  # to find the rows with much attention


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


def check_enough(targets: Targets, needed: int, what: str) -> None:
    """Refuses to fit `what` to fewer queries than it takes."""
    if targets.num_fitted < needed:
        total = math.ceil(needed / (1 - HELD_OUT))
        raise ValueError(
            f"`query` must give each state head at least {total:,} queries to fit {what}, a quarter of them to be held "
            f"out, got {targets.num_queries:,}"
        )


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
    """Relative errors [Hs] of the op's own results on the held-out queries; without a state, of leaving it out."""
    held_out = targets.from_(targets.num_fitted)
    share = held_out.share
    if state is None:
        out = torch.where((share < 1)[..., None], held_out.of_input / (1 - share).clamp(min=TINY)[..., None], 0)
    else:
        dtype = torch.promote_types(torch.float32, next(iter(state.tensors().values())).dtype)
        of_state, lse = prefix_attention_state(held_out.query[None].to(dtype), state, scale=scale)
        mass = (lse[0].double() - held_out.lse).exp()
        total = 1 - share + mass
        out = (held_out.of_input + mass[..., None] * of_state[0].double()) / total.clamp(min=TINY)[..., None]
    difference, exact = (tensor.flatten(1).norm(dim=1) for tensor in (out - held_out.out, held_out.out))
    return (difference / exact.clamp(min=TINY)).float()
