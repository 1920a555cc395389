"""`Observer`: records keys, queries and attention of a module while a decoder reads a prompt and texts after it."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ...attention import ntk_attention
from ...state import PrefixState


class Observed(NamedTuple):
    """Arguments of `prefix_to_state`, with all texts one after the other in a single batch row."""

    prefix_key: Tensor  # [Hkv, m, D]
    prefix_value: Tensor  # [Hkv, m, Dv]
    query: Tensor  # [1, Hq, L, D]
    attention: tuple[Tensor, Tensor]  # out [1, Hq, L, Dv] and lse [1, Hq, L]
    scale: float


class Observer(nn.Module):
    """A stand-in for a prefix with three parts to play, one at a time (`part`).

    "none": no prefix. "observe": no prefix, but what attention is called with is recorded; `trouble` becomes the reason
    if no state can replace the prompt here. "replay": all rows of the prompt are the prefix.
    """

    def __init__(self, prompt_length: int):
        super().__init__()
        self.part: Literal["none", "observe", "replay"] = "none"
        self.prompt_length = prompt_length
        self.trouble: str | None = None
        self.prompt: PrefixState | None = None
        self.scale = 1.0
        self.queries: list[Tensor] = []
        self.outs: list[Tensor] = []
        self.lses: list[Tensor] = []

    def state_and_index(self, batch: int) -> tuple[PrefixState | None, None]:
        """Returns the rows of the prompt while they are replayed, else no prefix."""
        return (self.prompt if self.part == "replay" else None), None

    def observe(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        scale: float,
        query_scale: float,
        softcap: float | None,
        sink: Tensor | None,
    ) -> None:
        """Records a call of attention, if that is the part to play.

        Args:
            query: [1, Hq, L, D], of a text.
            key, value: [1, Hkv, m + L, D] and [1, Hkv, m + L, Dv], of the prompt and the text.
            mask: [1, Hq or 1, L, m + L], bool or additive.
            scale: factor on the scores.
            query_scale: factor that the query has already.
            softcap: cap of the scores.
            sink: [Hq], a logit that adds no value.
        """
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
        out, lse = ntk_attention(query, key[:, :, own], value[:, :, own], attn_mask=mask, scale=scale, return_lse=True)
        if sink is not None:  # part of the denominator, not of the numerator
            whole = torch.logaddexp(lse, sink.reshape(1, -1, 1).to(lse.dtype))
            out, lse = (out * torch.exp(lse - whole).unsqueeze(-1)).to(out.dtype), whole
        if self.prompt is None:
            self.prompt = PrefixState(keys=key[0, :, prompt].clone(), values=value[0, :, prompt].clone())
        self.scale = scale * query_scale
        self.queries.append(query / query_scale)
        self.outs.append(out)
        self.lses.append(lse)

    def observed(self) -> Observed:
        """Returns all that was recorded."""
        attention = torch.cat(self.outs, dim=2), torch.cat(self.lses, dim=2)
        return Observed(self.prompt.keys, self.prompt.values, torch.cat(self.queries, dim=2), attention, self.scale)
