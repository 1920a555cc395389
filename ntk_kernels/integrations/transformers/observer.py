"""What an attention module is given while a decoder reads a prompt and texts after it."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...attention import ntk_attention
from ...state import PrefixState


class Observed(NamedTuple):
    """As `prefix_to_state` takes it; the texts one after the other in a single row of the batch."""

    prefix_key: Tensor
    prefix_value: Tensor
    query: Tensor
    attention: tuple[Tensor, Tensor]
    scale: float


class Observer(nn.Module):
    """In the place of a prefix, of which it plays three parts, one after the other (`part`).

    "none": it adds nothing. "observe": it adds nothing and keeps what attention is given, or in `trouble` why no state
    can stand in for the prompt here. "replay": all rows of the prompt.
    """

    def __init__(self, prompt_length: int):
        super().__init__()
        self.part, self.prompt_length = "none", prompt_length
        self.trouble: str | None = None
        self.prompt: PrefixState | None = None
        self.scale = 1.0
        self.queries, self.outs, self.lses = [], [], []

    def state_and_index(self, batch: int) -> tuple[PrefixState | None, None]:
        return (self.prompt if self.part == "replay" else None), None

    def observe(self, query, key, value, mask, *, scale, query_scale, softcap, sink) -> None:
        """Takes the queries of a text, [1, Hq, L, D], and keys and values of the prompt and the text."""
        if self.part != "observe" or self.trouble is not None:
            return
        length = query.shape[2]
        prompt, own = slice(0, -length), slice(-length, None)
        sees_all = key.shape[2] - length == self.prompt_length
        if mask is not None:
            sees_all = sees_all and bool((mask if mask.dtype == torch.bool else mask == 0)[..., prompt].all())
            mask = mask[..., own]
        if softcap is not None or not sees_all:
            self.trouble = "scores are capped" if sees_all else "a text does not see the whole prompt, as in a window"
            return
        out, lse = ntk_attention(
            query, key[:, :, own], value[:, :, own], attn_mask=mask, scale=scale, return_lse=True
        )  # fmt: skip
        if sink is not None:  # a term of the denominator, and of no numerator
            whole = torch.logaddexp(lse, sink.reshape(1, -1, 1).to(lse.dtype))
            out, lse = (out * torch.exp(lse - whole).unsqueeze(-1)).to(out.dtype), whole
        if self.prompt is None:
            self.prompt = PrefixState(keys=key[0, :, prompt].clone(), values=value[0, :, prompt].clone())
        self.scale = scale * query_scale
        self.queries.append(query / query_scale)
        self.outs.append(out)
        self.lses.append(lse)

    def observed(self) -> Observed:
        attention = torch.cat(self.outs, dim=2), torch.cat(self.lses, dim=2)
        return Observed(self.prompt.keys, self.prompt.values, torch.cat(self.queries, dim=2), attention, self.scale)
