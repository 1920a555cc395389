"""`merged` and `stacked`: the arguments of the `PrefixState` that `merge` or `stack` makes of several states."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .feature_maps import get_feature_map, several_centers_rule

if TYPE_CHECKING:
    from .state import PrefixState


def check_alike(states: "Sequence[PrefixState]", names: Sequence[str], *, label: Callable[[int], str]) -> None:
    """Raises ValueError unless every state has the first one's value of each property.

    The message refers to state i by `label(i)`.
    """
    for i, state in enumerate(states[1:], start=1):
        for name in names:
            ours, theirs = getattr(states[0], name), getattr(state, name)
            if ours != theirs:
                raise ValueError(f"{label(i)} must have the same {name} as {label(0)}, {ours!r}, got {theirs!r}")


def merged(a: "PrefixState", b: "PrefixState") -> dict[str, Any]:
    """Returns the arguments of the state whose N and M are the sums of those of `a` and `b`, which are alike."""
    return _merged_features(a, b) | _merged_rows(a, b)


def _merged_features(a: "PrefixState", b: "PrefixState") -> dict[str, Any]:
    """Returns the arguments for the features, none if neither state has any."""
    with_features = [state for state in (a, b) if state.k is not None]
    if not with_features:
        return {}
    state = with_features[0]
    arguments = {"feature_map": state.feature_map, "feature_scale": state.feature_scale}
    if len(with_features) == 1:
        return arguments | {"log_scale": state.log_scale, "centers": state.centers, "k": state.k} | _z_of([state])[0]
    return arguments | (_sum_of_features(a, b) if _same_centers(a, b) else _side_by_side(a, b))


def _merged_rows(a: "PrefixState", b: "PrefixState") -> dict[str, Tensor]:
    """Returns the rows of both states, none if neither has any."""
    parts = [_rows_of(state) for state in (a, b) if state.keys is not None]
    if not parts:
        return {}
    dims = {"keys": -2, "values": -2, "bias": -1}
    return {name: torch.cat([rows[name] for rows in parts], dim=dim) for name, dim in dims.items()}


def stacked(states: "Sequence[PrefixState]") -> dict[str, Any]:
    """Returns the arguments of the stack of single states, which are alike.

    Missing centres and rows are added, switched off.
    """
    first = states[0]
    arguments = {"feature_map": first.feature_map, "feature_scale": first.feature_scale}
    parts: list[dict[str, Tensor]] = [{} for _ in states]
    if first.k is not None:
        if any(state.centers is not None for state in states):
            parts = [_with_centers(state, z) for state, z in zip(states, _z_of(states), strict=True)]
            size = max(state.num_centers for state in states)
            parts = [
                {name: _pad(tensor, size, -math.inf if name == "log_scale" else 0) for name, tensor in part.items()}
                for part in parts
            ]
        else:
            parts = [{"k": state.k, "log_scale": _log_scale_of(state)} | z
                     for state, z in zip(states, _z_of(states), strict=True)]  # fmt: skip
    if any(state.keys is not None for state in states):
        size = max(state.num_rows for state in states)
        for part, state in zip(parts, states, strict=True):
            rows = _rows_of(state).items()
            part |= {name: _pad(tensor, size, -math.inf if name == "bias" else 0) for name, tensor in rows}
    return arguments | {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


def _z_of(states: "Sequence[PrefixState]") -> list[dict[str, Tensor]]:
    """Returns the low-rank pairs if all states have one of the same rank, else the full matrices."""
    if len({state.rank for state in states}) == 1 and states[0].rank is not None:
        return [{"z_a": state.z_a, "z_b": state.z_b} for state in states]
    return [{"z": state.full_z} for state in states]


def _log_scale_of(state: "PrefixState") -> Tensor:
    return state.k.new_zeros(state.k.shape[:-1]) if state.log_scale is None else state.log_scale


def _rows_of(state: "PrefixState") -> dict[str, Tensor]:
    """Returns keys, values and bias, with R = 0 for a state without rows."""
    keys, values, bias = state.keys, state.values, state.bias
    if keys is None:
        lead = state.k.shape[: 2 if state.is_stack else 1]
        keys, values = (state.k.new_zeros(*lead, 0, dim) for dim in (state.head_dim, state.value_dim))
    return {"keys": keys, "values": values, "bias": keys.new_zeros(keys.shape[:-1]) if bias is None else bias}


def _with_centers(state: "PrefixState", z: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the features with a dimension for the centres; without centres, with one at the origin."""
    part = {"k": state.k, "log_scale": _log_scale_of(state)} | z
    if state.centers is not None:
        return part | {"centers": state.centers}
    heads = state.k.dim() - 1
    origin = state.k.new_zeros(*state.k.shape[:-1], state.head_dim)
    return {name: tensor.unsqueeze(heads) for name, tensor in (part | {"centers": origin}).items()}


def _same_centers(a: "PrefixState", b: "PrefixState") -> bool:
    if a.centers is None or b.centers is None:
        return a.centers is b.centers
    return a.centers is b.centers or (a.centers.shape == b.centers.shape and torch.equal(a.centers, b.centers))


def _sum_of_features(a: "PrefixState", b: "PrefixState") -> dict[str, Tensor | None]:
    """Returns the features of two states with the same centres added up.

    Z = Z_a e^{β_a - β} + Z_b e^{β_b - β}, likewise k, with e^β = e^{β_a} + e^{β_b}.
    """
    arguments: dict[str, Tensor] = {"centers": a.centers}
    weights: tuple[Tensor | None, ...] = (None, None)
    if a.log_scale is not None or b.log_scale is not None:
        both = torch.stack([_log_scale_of(a), _log_scale_of(b)])
        off = (both == -math.inf).all(0)  # centres that are off in both stay off, with gradient 0
        total = both.masked_fill(off, 0).logsumexp(0)
        arguments["log_scale"] = total.masked_fill(off, -math.inf)
        weights = (both - total).exp().unbind()
    arguments["k"] = _times(a.k, weights[0]) + _times(b.k, weights[1])
    if a.rank is not None and b.rank is not None:
        arguments["z_a"] = torch.cat([_times(a.z_a, weights[0]), _times(b.z_a, weights[1])], dim=-1)
        arguments["z_b"] = torch.cat([a.z_b, b.z_b], dim=-2)
    else:
        arguments["z"] = _times(a.full_z, weights[0]) + _times(b.full_z, weights[1])
    return arguments


def _side_by_side(a: "PrefixState", b: "PrefixState") -> dict[str, Tensor]:
    """Returns the features of two states with their centres side by side."""
    if not get_feature_map(a.feature_map).several_centers:
        raise ValueError(
            f"`other` must be expanded around the same centres, as {several_centers_rule()}, got "
            f"feature_map={a.feature_map!r} and different centres"
        )
    sides = [_with_centers(state, z) for state, z in zip((a, b), _z_of((a, b)), strict=True)]
    axis = 2 if a.is_stack else 1
    return {name: torch.cat([side[name] for side in sides], dim=axis) for name in sides[0]}


def _times(tensor: Tensor, weight: Tensor | None) -> Tensor:
    """Returns `tensor` [..., C?, r, ...] times `weight` [..., C?], None for 1."""
    return tensor if weight is None else tensor * weight.reshape(weight.shape + (1,) * (tensor.dim() - weight.dim()))


def _pad(tensor: Tensor, size: int, fill: float) -> Tensor:
    """Fills up the second dimension: [Hs, n, ...] -> [Hs, size, ...]."""
    shape = (tensor.shape[0], size - tensor.shape[1], *tensor.shape[2:])
    return torch.cat([tensor, tensor.new_full(shape, fill)], dim=1)
