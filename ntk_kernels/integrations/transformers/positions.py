"""Positions of tokens in batches that are padded on the left.

A rotary model needs no `position_ids` there, as only distances count in it. A prefix has a place of its own: a row
whose tokens do not begin at position 0 is further away from it.
"""

import inspect
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from .attention_interface import IMPLEMENTATION

_HOOK = "_ntk_positions_hook"


def sync_positions(part: PreTrainedModel, has_prefix: bool) -> None:
    """Makes a rotary decoder with prefixes number the tokens of each row by `attention_mask`; undoes that without."""
    if not has_prefix and _HOOK in part.__dict__:
        part.__dict__.pop(_HOOK).remove()
    if not has_prefix or _HOOK in part.__dict__:
        return
    names = tuple(inspect.signature(part.forward).parameters)
    if not {"attention_mask", "position_ids", "inputs_embeds"} <= {*names}:
        return
    if any("rotary" in type(child).__name__.lower() for child in part.children()):
        hook = partial(_number_tokens, names=names)
        setattr(part, _HOOK, part.register_forward_pre_hook(hook, with_kwargs=True))


def _number_tokens(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, names: tuple[str, ...]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Adds `position_ids` to the arguments of forward if they are missing and there is a mask [B, keys]."""
    given = dict(zip(names, args, strict=False)) | kwargs
    mask, tokens, cache = (given.get(name) for name in ("attention_mask", "input_ids", "past_key_values"))
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if given.get("position_ids") is not None or tokens is None or not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    if module.config._attn_implementation != IMPLEMENTATION:  # adapters are disabled
        return None
    length, seen = tokens.shape[1], 0 if cache is None else cache.get_seq_length()
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    if mask.shape[1] == length:
        positions = positions + seen
    elif isinstance(seen, Tensor):  # of a static cache, to be read on the device
        columns = seen + positions.new_zeros(length).add(1).cumsum(0) - 1
        positions = positions.index_select(1, columns.clamp(max=mask.shape[1] - 1))
    elif mask.shape[1] < seen + length:
        return None
    else:
        positions = positions[:, seen : seen + length]
    place = names.index("position_ids")
    if len(args) > place:
        return (*args[:place], positions, *args[place + 1 :]), kwargs
    return args, kwargs | {"position_ids": positions}
