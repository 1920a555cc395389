"""What `PrefixState.merge` and `PrefixState.stack` compute: from several states, the arguments of the combined one."""

import math

import torch
from torch import Tensor

from .feature_maps import get_feature_map, several_centers_rule


def check_alike(states, names: list[str], called) -> None:
    """Every state has the first one's value of each property; `called(i)` is what the message calls state i."""
    for i, state in enumerate(states[1:], start=1):
        for name in names:
            ours, theirs = getattr(states[0], name), getattr(state, name)
            if ours != theirs:
                raise ValueError(f"{called(i)} must have the same {name} as {called(0)}, {ours!r}, got {theirs!r}")


def merged(a, b) -> dict:
    """Arguments of the state whose N and M are the sums of those of `a` and `b`, which are alike."""
    arguments = {}
    with_features = [state for state in (a, b) if state.k is not None]
    if len(with_features) == 2:
        arguments = _sum_of_features(a, b) if _same_centers(a, b) else _side_by_side(a, b)
    elif with_features:
        arguments = {"log_scale": with_features[0].log_scale, "centers": with_features[0].centers}
        arguments |= _z_of(with_features)[0] | {"k": with_features[0].k}
    for state in with_features[:1]:
        arguments |= {"feature_map": state.feature_map, "feature_scale": state.feature_scale}
    with_rows = [_rows_of(state) for state in (a, b) if state.keys is not None]
    for name, dim in (("keys", -2), ("values", -2), ("bias", -1)) if with_rows else ():
        arguments[name] = torch.cat([rows[name] for rows in with_rows], dim=dim)
    return arguments


def stacked(states) -> dict:
    """Arguments of the stack of single states that are alike; missing centres and rows are added, switched off."""
    first = states[0]
    arguments = {"feature_map": first.feature_map, "feature_scale": first.feature_scale}
    parts: list[dict] = [{} for _ in states]
    if first.k is not None:
        if any(state.centers is not None for state in states):
            parts = [_with_centers(state, z) for state, z in zip(states, _z_of(states), strict=True)]
            most = max(state.num_centers for state in states)
            parts = [
                {name: _pad(tensor, most, -math.inf if name == "log_scale" else 0) for name, tensor in part.items()}
                for part in parts
            ]
        else:
            parts = [{"k": state.k, "log_scale": _log_scale_of(state)} | z
                     for state, z in zip(states, _z_of(states), strict=True)]  # fmt: skip
    if any(state.keys is not None for state in states):
        most = max(state.num_rows for state in states)
        for part, state in zip(parts, states, strict=True):
            rows = _rows_of(state).items()
            part |= {name: _pad(tensor, most, -math.inf if name == "bias" else 0) for name, tensor in rows}
    return arguments | {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


def _z_of(states) -> list[dict[str, Tensor]]:
    """The pairs, if all states have one of the same rank, else the full matrices."""
    if len({state.rank for state in states}) == 1 and states[0].rank is not None:
        return [{"z_a": state.z_a, "z_b": state.z_b} for state in states]
    return [{"z": state.full_z} for state in states]


def _log_scale_of(state) -> Tensor:
    return state.k.new_zeros(state.k.shape[:-1]) if state.log_scale is None else state.log_scale


def _rows_of(state) -> dict[str, Tensor]:
    """keys, values and bias; of a state without rows, none of them."""
    keys, values, bias = state.keys, state.values, state.bias
    if keys is None:
        lead = state.k.shape[: 2 if state.is_stack else 1]
        keys, values = (state.k.new_zeros(*lead, 0, dim) for dim in (state.head_dim, state.value_dim))
    return {"keys": keys, "values": values, "bias": keys.new_zeros(keys.shape[:-1]) if bias is None else bias}


def _with_centers(state, z: dict[str, Tensor]) -> dict[str, Tensor]:
    """Features with an axis for the centres; without centres, one at the origin."""
    part = {"k": state.k, "log_scale": _log_scale_of(state)} | z
    if state.centers is not None:
        return part | {"centers": state.centers}
    heads = state.k.dim() - 1
    origin = state.k.new_zeros(*state.k.shape[:-1], state.head_dim)
    return {name: tensor.unsqueeze(heads) for name, tensor in (part | {"centers": origin}).items()}


def _same_centers(a, b) -> bool:
    if a.centers is None or b.centers is None:
        return a.centers is b.centers
    return a.centers is b.centers or (a.centers.shape == b.centers.shape and torch.equal(a.centers, b.centers))


def _sum_of_features(a, b) -> dict:
    """Around the same centres: Z = Z_a e^{β_a - β} + Z_b e^{β_b - β}, likewise k, with e^β = e^{β_a} + e^{β_b}."""
    arguments, weights = {"centers": a.centers}, (None, None)
    if a.log_scale is not None or b.log_scale is not None:
        both = torch.stack([_log_scale_of(a), _log_scale_of(b)])
        off = (both == -math.inf).all(0)  # in both: it stays off, and its gradient is 0
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


def _side_by_side(a, b) -> dict:
    if not get_feature_map(a.feature_map).several_centers:
        raise ValueError(
            f"`other` must be expanded around the same centres, as {several_centers_rule()}, got "
            f"feature_map={a.feature_map!r} and different centres"
        )
    sides = [_with_centers(state, z) for state, z in zip((a, b), _z_of((a, b)), strict=True)]
    axis = 2 if a.is_stack else 1
    return {name: torch.cat([side[name] for side in sides], dim=axis) for name in sides[0]}


def _times(tensor: Tensor, weight: Tensor | None) -> Tensor:
    """`tensor` [..., C?, r, ...] times `weight` [..., C?]."""
    return tensor if weight is None else tensor * weight.reshape(weight.shape + (1,) * (tensor.dim() - weight.dim()))


def _pad(tensor: Tensor, size: int, fill: float) -> Tensor:
    """[Hs, ...] -> [Hs, size, ...]."""
    shape = (tensor.shape[0], size - tensor.shape[1], *tensor.shape[2:])
    return torch.cat([tensor, tensor.new_full(shape, fill)], dim=1)
