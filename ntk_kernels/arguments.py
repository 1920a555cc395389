"""Shared by the three public functions of attention: checks of arguments, and a `PrefixState` as tensors of a call."""

import math
from typing import Any

import torch
from torch import Tensor

from . import checks
from .inputs import StateTensors
from .state import PrefixState


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns the tensors as an op that autocast knows would take them, before they are checked."""
    if not isinstance(tensors[0], Tensor):
        return tensors
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )


def check_options(query: Tensor, state: Any, scale: Any, is_causal: Any, window: Any, softcap: Any) -> float:
    """Checks the options of a call; returns its scale."""
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    checks.check_finite("scale", scale)
    checks.check_bool("is_causal", is_causal)
    if softcap is not None:
        checks.check_finite("softcap", softcap, positive=True)
    if window is not None:
        checks.check_window(window)
    if isinstance(state, PrefixState) and scale < 0 and state.k is not None and state.feature_scale is None:
        raise ValueError(f"`scale` must not be negative for a state without feature_scale, got {scale}")
    return scale


def check_state(state: Any, query: Tensor, key: Tensor, value: Tensor, state_index: Any, batch: int) -> None:
    """Checks that `state` is None or fits the call, and that `state_index` [B] comes with a state only."""
    if state is None:
        if state_index is not None:
            raise ValueError("`state_index` must come with a `state`, got `state` = None")
    elif isinstance(state, PrefixState):
        checks.check_state_fits(state, query, key, value, state_index, batch)
    else:
        hint = ""
        if isinstance(state, torch.nn.Module):
            hint = ", which gives one when it is called"
        elif isinstance(state, Tensor):
            hint = "; a mask goes in `attn_mask`"
        elif isinstance(state, list | tuple):
            hint = "; PrefixState.stack makes one of several, `state_index` says which each batch row uses"
        raise TypeError(f"`state` must be a PrefixState, got {type(state).__name__}{hint}")


def features_of(state: PrefixState | None, scale: float) -> tuple[str | None, float]:
    """Returns `feature_map` and `feature_scale` of a call."""
    if state is None or state.k is None:
        return None, 1.0
    return state.feature_map, math.sqrt(scale) if state.feature_scale is None else state.feature_scale


def state_tensors(state: PrefixState | None, state_index: Tensor | None) -> StateTensors:
    """Returns the tensors of a state for an op."""
    if state is None:
        return StateTensors()
    return StateTensors(
        state.z if state.z_a is None else state.z_a, state.z_b, state.k, state.centers, state.log_scale, state.keys,
        state.values, state.bias, state_index,
    )  # fmt: skip
