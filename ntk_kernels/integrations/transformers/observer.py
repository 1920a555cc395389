"""What attention modules are given while a decoder reads a prompt and texts after it."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...attention import ntk_attention


class Observed(NamedTuple):
    """Of one attention module, as `prefix_to_state` takes it."""

    prefix_key: Tensor
    prefix_value: Tensor
    query: Tensor
    attention: tuple[Tensor, Tensor]
    scale: float


class Observer(nn.Module):
    """In the place of a prefix; adds nothing. Raises ValueError where no state could stand in for the prompt."""

    def __init__(self, name: str, prompt_length: int):
        super().__init__()
        self.name, self.prompt_length, self.reads_prompt = name, prompt_length, True
        self.texts: list[Observed] = []

    def state_and_index(self, batch: int) -> tuple[None, None]:
        return None, None

    def observe(self, query, key, value, mask, *, scale, query_scale, softcap, sink) -> None:
        """Takes the queries of a text, [1, Hq, L, D], and keys and values of the prompt and the text."""
        if softcap is not None:
            self._refuse(f"which caps its scores (at {softcap})")
        if self.reads_prompt:
            return
        length = query.shape[2]
        prompt, own = slice(0, -length), slice(-length, None)
        sees_all = True
        if mask is not None:
            sees_all = (mask if mask.dtype == torch.bool else mask == 0)[..., prompt].all()
            mask = mask[..., own]
        if key.shape[2] - length != self.prompt_length or not sees_all:
            self._refuse("in which not every token sees the whole prompt as it is (a sliding window?)")
        out, lse = ntk_attention(
            query, key[:, :, own], value[:, :, own], attn_mask=mask, scale=scale, return_lse=True
        )  # fmt: skip
        if sink is not None:  # a term of the denominator, and of no numerator
            whole = torch.logaddexp(lse, sink.reshape(1, -1, 1).to(lse.dtype))
            out, lse = (out * torch.exp(lse - whole).unsqueeze(-1)).to(out.dtype), whole
        if self.texts:
            prefix_key, prefix_value = self.texts[0][:2]
        else:
            prefix_key, prefix_value = key[0, :, prompt].clone(), value[0, :, prompt].clone()
        self.texts.append(Observed(prefix_key, prefix_value, query / query_scale, (out, lse), scale * query_scale))

    def observed(self) -> Observed:
        """All texts together."""
        return self.texts[0]._replace(
            query=torch.cat([text.query for text in self.texts]),
            attention=tuple(torch.cat(parts) for parts in zip(*(text.attention for text in self.texts), strict=True)),
        )

    def _refuse(self, why: str) -> None:
        raise ValueError(
            f"`modules` must leave out `{self.name}`, {why}. What is left out has nothing of the prompt afterwards"
        )
