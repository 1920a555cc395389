"""`PrefixState`: what is left of a prefix, however long it was."""

import json
import math
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import checks
from .feature_maps import FEATURE_MAPS, head_dim_of

_FORMAT, _VERSION = "ntk-kernels prefix state", 1
_TENSORS = ("z", "k", "z_a", "z_b", "centers", "log_scale", "keys", "values", "bias")


@dataclass(frozen=True, eq=False)
class PrefixState:
    """A fixed-size stand-in for a prefix of any length, per head: a linear-attention term and a few exact rows.

    For a query q it adds, to the numerator and the denominator of the softmax over the input tokens,

        N = Σ_c w_c · φ(x)ᵀ Z_c  + Σ_j e^{scale·q·κ_j + bias_j} v_j       x   = feature_scale · q
        M = max(0, Σ_c w_c · φ(x)·k_c) + Σ_j e^{scale·q·κ_j + bias_j}     w_c = exp(scale·q·μ_c + β_c)

    Every tensor may have a leading N: a stack of N states, of which `state_index` picks one per batch row. Hs is
    the number of query heads or of key/value heads, r = `feature_dim(feature_map, D)`. With `centers` there is a
    C in front of r, without them none. Tensors keep the dtype and the `requires_grad` they come with; float32 is
    advised, also under a half-precision model.

    Args:
        z: [N?, Hs, C?, r, Dv], the sum of φ(key)·valueᵀ. Or give `z_a` and `z_b`.
        k: [N?, Hs, C?, r], the sum of φ(key).
        feature_map: "elu", "taylor1" or "taylor2"; None only if the state has rows and nothing else.
        feature_scale: factor on the query inside φ; None means sqrt(scale) of the call.
        z_a, z_b: [N?, Hs, C?, r, s] and [N?, Hs, C?, s, Dv], a low-rank pair with z = z_a @ z_b.
        centers: [N?, Hs, C, D], the μ_c; several only with "taylor1". Default: one at the origin.
        log_scale: [N?, Hs, C?], the β_c; -inf switches a centre off. Default 0.
        keys, values: [N?, Hs, R, D] and [N?, Hs, R, Dv], rows κ_j, v_j kept exactly, visible to every query.
        bias: [N?, Hs, R], log weight of each row; -inf switches a row off. Default 0.

    Raises:
        TypeError, ValueError: naming the argument that doesn't fit the others.

    Source: "Towards Infinite-Long Prefix in Transformer", arXiv 2406.14036, Algorithm 2 (there without centres,
    log_scale and rows).
    """

    z: Tensor | None = None
    k: Tensor | None = None
    feature_map: str | None = None
    _: KW_ONLY
    feature_scale: float | None = None
    z_a: Tensor | None = None
    z_b: Tensor | None = None
    centers: Tensor | None = None
    log_scale: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    bias: Tensor | None = None

    def __post_init__(self):
        for name, tensor in self.tensors().items():
            checks.check_floating(name, tensor)
        if self.k is None and self.keys is None:
            raise ValueError("`k` must be given (with `z` or `z_a` and `z_b`), or `keys` and `values`, got neither")
        if self.k is not None:
            self._check_features()
        else:
            for name in ("z", "z_a", "z_b", "centers", "log_scale", "feature_map", "feature_scale"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` must come with `k`, got `k` = None")
        if self.keys is not None:
            self._check_rows()
        else:
            for name in ("values", "bias"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` must come with `keys`, got `keys` = None")
        if self.num_states == 0 or self.num_heads == 0:
            name = "keys" if self.k is None else "k"
            raise ValueError(f"`{name}` must have at least one state and head, got {list(self._any.shape)}")
        for name, tensor in self.tensors().items():
            if tensor.device != self.device:
                raise ValueError(f"`{name}` must be on the device of the other tensors, {self.device}, "
                                 f"got {tensor.device}")  # fmt: skip

    def _check_features(self) -> None:
        checks.check_one_of("feature_map", self.feature_map, FEATURE_MAPS)
        if self.feature_scale is not None:
            checks.check_finite("feature_scale", self.feature_scale)
        if self.centers is not None and self.centers.dim() not in (3, 4):
            raise ValueError(f"`centers` must have 3 or 4 dimensions, [N?, Hs, C, D], got {list(self.centers.shape)}")
        mid, mid_names = ((), "") if self.centers is None else ((self.centers.shape[-2],), "C ")
        stack = self.k.dim() - len(mid) - 2
        if stack not in (0, 1):
            ranks = "3 or 4" if mid else "2 or 3"
            raise ValueError(f"`k` must have {ranks} dimensions, [N?, Hs, {mid_names}r], got {list(self.k.shape)}")
        lead, lead_names = tuple(self.k.shape[: stack + 1]), "N Hs " if stack else "Hs "
        r = self.k.shape[-1]
        head_dim = head_dim_of(self.feature_map, r)
        if head_dim is None:
            raise ValueError(f"`k` must end in r = feature_dim({self.feature_map!r}, D) for some D, got r={r}")
        checks.check_shape("k", self.k, (*lead, *mid, r), f"{lead_names}{mid_names}r")
        if self.z is not None:
            if self.z_a is not None or self.z_b is not None:
                raise ValueError("`z` must not be given together with `z_a` and `z_b`, got both")
            checks.check_shape("z", self.z, (*lead, *mid, r, None), f"{lead_names}{mid_names}r Dv")
        elif self.z_a is None or self.z_b is None:
            raise ValueError("`z`, or both `z_a` and `z_b`, must come with `k`, got neither")
        else:
            checks.check_shape("z_a", self.z_a, (*lead, *mid, r, None), f"{lead_names}{mid_names}r s")
            rank = self.z_a.shape[-1]
            checks.check_shape("z_b", self.z_b, (*lead, *mid, rank, None), f"{lead_names}{mid_names}s Dv")
        if self.centers is not None:
            checks.check_shape("centers", self.centers, (*lead, None, head_dim), f"{lead_names}C D")
            if self.num_centers == 0:
                raise ValueError(f"`centers` must hold at least one centre, got {list(self.centers.shape)}")
            if self.num_centers > 1 and self.feature_map != "taylor1":
                raise ValueError(
                    f"`centers` must hold one centre (C=1) with feature_map={self.feature_map!r}, several go with "
                    f"'taylor1' only, got C={self.num_centers}"
                )
        if self.log_scale is not None:
            checks.check_shape("log_scale", self.log_scale, (*lead, *mid), f"{lead_names}{mid_names}")

    def _check_rows(self) -> None:
        if self.values is None:
            raise ValueError("`values` must come with `keys`, got None")
        if self.keys.dim() not in (3, 4):
            raise ValueError(f"`keys` must have 3 or 4 dimensions, [N?, Hs, R, D], got {list(self.keys.shape)}")
        lead, head_dim, value_dim = tuple(self.keys.shape[:-2]), None, None
        if self.k is not None:
            lead = tuple(self.k.shape[: 2 if self.is_stack else 1])
            head_dim, value_dim = self.head_dim, self.value_dim
        names = "N Hs " if len(lead) == 2 else "Hs "
        checks.check_shape("keys", self.keys, (*lead, None, head_dim), f"{names}R D")
        rows = self.keys.shape[-2]
        checks.check_shape("values", self.values, (*lead, rows, value_dim), f"{names}R Dv")
        if self.bias is not None:
            checks.check_shape("bias", self.bias, (*lead, rows), f"{names}R")

    # What the state is -----------------------------------------------------------------------------------------

    @property
    def is_stack(self) -> bool:
        """Whether the tensors have a leading N."""
        if self.k is not None:
            return self.k.dim() == (3 if self.centers is None else 4)
        return self.keys.dim() == 4

    @property
    def num_states(self) -> int:
        """N, 1 for a state that is no stack."""
        return self._any.shape[0] if self.is_stack else 1

    @property
    def num_heads(self) -> int:
        """Hs."""
        return self._any.shape[1 if self.is_stack else 0]

    @property
    def head_dim(self) -> int:
        """D, of queries and keys."""
        return head_dim_of(self.feature_map, self.k.shape[-1]) if self.k is not None else self.keys.shape[-1]

    @property
    def value_dim(self) -> int:
        """Dv, of values and output."""
        for tensor in (self.z, self.z_b):
            if tensor is not None:
                return tensor.shape[-1]
        return self.values.shape[-1]

    @property
    def num_centers(self) -> int:
        """C: 1 without `centers`, 0 for a state that has rows only."""
        if self.k is None:
            return 0
        return 1 if self.centers is None else self.centers.shape[-2]

    @property
    def num_rows(self) -> int:
        """R, the number of exact rows per head."""
        return 0 if self.keys is None else self.keys.shape[-2]

    @property
    def rank(self) -> int | None:
        """s of the pair `z_a`, `z_b`; None for a full `z`."""
        return None if self.z_a is None else self.z_a.shape[-1]

    @property
    def full_z(self) -> Tensor | None:
        """`z`, or the product of the low-rank pair (taken in float32 at least)."""
        if self.z_a is None:
            return self.z
        dtype = torch.promote_types(torch.promote_types(self.z_a.dtype, self.z_b.dtype), torch.float32)
        with torch.autocast(self.z_a.device.type, enabled=False):
            return self.z_a.to(dtype) @ self.z_b.to(dtype)

    @property
    def device(self) -> torch.device:
        return self._any.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    @property
    def _any(self) -> Tensor:
        return self.k if self.k is not None else self.keys

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that the state has, by name."""
        return {name: value for name in _TENSORS if (value := getattr(self, name)) is not None}

    def __repr__(self) -> str:
        tensors = ", ".join(f"{name}={list(tensor.shape)}" for name, tensor in self.tensors().items())
        kind = "" if self.k is None else f"feature_map={self.feature_map!r}, feature_scale={self.feature_scale}, "
        return f"PrefixState({kind}{tensors}, dtype={self._any.dtype}, device={str(self.device)!r})"

    # Making others of it ---------------------------------------------------------------------------------------

    def _map(self, function) -> "PrefixState":
        return replace(self, **{name: function(tensor) for name, tensor in self.tensors().items()})

    def to(self, *args, **kwargs) -> "PrefixState":
        """A state with every tensor moved or cast, as `torch.Tensor.to`."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def detach(self) -> "PrefixState":
        """A state with every tensor detached from autograd."""
        return self._map(Tensor.detach)

    def merge(self, other: "PrefixState") -> "PrefixState":
        """The state of both prefixes together: N and M of the result are the sums of the two.

        Equal centres are added, different ones ("taylor1") put side by side, low-rank pairs and rows joined.

        Raises:
            ValueError: if the feature map or scale, heads or head dimensions differ, or if centres differ that
                this feature map cannot hold side by side.
        """
        if not isinstance(other, PrefixState):
            raise TypeError(f"`other` must be a PrefixState, got {type(other).__name__}")
        same = ["num_heads", "head_dim", "value_dim", "is_stack", "num_states", "device"]
        if self.k is not None and other.k is not None:
            same += ["feature_map", "feature_scale"]
        for name in same:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise ValueError(f"`other` must have the same {name} as the state, {ours!r}, got {theirs!r}")
        with_features, with_rows = (
            [state for state in (self, other) if getattr(state, name) is not None] for name in ("k", "keys")
        )
        merged = {}
        if with_features:
            merged = _merge_features(*with_features) if len(with_features) == 2 else _features_of(*with_features)
        if with_rows:
            merged |= {
                "keys": torch.cat([state.keys for state in with_rows], dim=-2),
                "values": torch.cat([state.values for state in with_rows], dim=-2),
            }
            if any(state.bias is not None for state in with_rows):
                merged["bias"] = torch.cat([state._bias_or_zero() for state in with_rows], dim=-1)
        return PrefixState(**merged)

    def _bias_or_zero(self) -> Tensor:
        return self.keys.new_zeros(self.keys.shape[:-1]) if self.bias is None else self.bias

    def _log_scale_or_zero(self) -> Tensor:
        return self.k.new_zeros(self.k.shape[:-1]) if self.log_scale is None else self.log_scale

    @staticmethod
    def stack(states) -> "PrefixState":
        """Stacks single states [Hs, ...] to one [N, Hs, ...], for batches that mix tasks (`state_index`).

        States may differ in their number of centres and rows: missing ones are filled up, switched off by -inf.

        Raises:
            ValueError: if there is no state, one is a stack already, or feature maps, scales or sizes differ.
        """
        if isinstance(states, PrefixState):
            raise TypeError("`states` must be a sequence of PrefixStates, got one PrefixState")
        states = list(states)
        if not states:
            raise ValueError("`states` must hold at least one PrefixState, got none")
        first = states[0]
        for i, state in enumerate(states):
            if not isinstance(state, PrefixState):
                raise TypeError(f"`states[{i}]` must be a PrefixState, got {type(state).__name__}")
            if state.is_stack:
                raise ValueError(f"`states[{i}]` must be a single state, got a stack of {state.num_states}")
            for name in ("num_heads", "head_dim", "value_dim", "feature_map", "feature_scale", "device"):
                ours, theirs = getattr(first, name), getattr(state, name)
                if ours != theirs:
                    raise ValueError(f"`states[{i}]` must have the same {name} as states[0], {ours!r}, got {theirs!r}")

        stacked = {"feature_map": first.feature_map, "feature_scale": first.feature_scale}
        if first.k is not None:
            if len({state.rank for state in states}) == 1 and first.rank is not None:
                pair = [{"z_a": state.z_a, "z_b": state.z_b} for state in states]
            else:
                pair = [{"z": state.full_z} for state in states]
            parts = [{**z, "k": state.k} for z, state in zip(pair, states, strict=True)]
            if any(state.centers is not None for state in states):
                most = max(state.num_centers for state in states)
                for part, state in zip(parts, states, strict=True):
                    part["log_scale"] = state._log_scale_or_zero()
                    part["centers"] = state.centers
                    if state.centers is None:
                        part |= {name: tensor.unsqueeze(1) for name, tensor in part.items() if tensor is not None}
                        part["centers"] = state.k.new_zeros(state.num_heads, 1, state.head_dim)
                    missing = most - state.num_centers
                    for name, tensor in part.items():
                        part[name] = _pad(tensor, 1, missing, -math.inf if name == "log_scale" else 0)
            elif any(state.log_scale is not None for state in states):
                for part, state in zip(parts, states, strict=True):
                    part["log_scale"] = state._log_scale_or_zero()
            stacked |= {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        most = max(state.num_rows for state in states)
        if any(state.keys is not None for state in states):
            with_bias = any(state.bias is not None or state.num_rows < most for state in states)
            rows = []
            for state in states:
                if state.keys is None:
                    like = state._any
                    state = PrefixState(
                        keys=like.new_zeros(state.num_heads, 0, state.head_dim),
                        values=like.new_zeros(state.num_heads, 0, state.value_dim),
                    )
                missing = most - state.num_rows
                rows.append({"keys": _pad(state.keys, 1, missing, 0), "values": _pad(state.values, 1, missing, 0)})
                if with_bias:
                    rows[-1]["bias"] = _pad(state._bias_or_zero(), 1, missing, -math.inf)
            stacked |= {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return PrefixState(**stacked)

    # Files -----------------------------------------------------------------------------------------------------

    def save(self, path) -> None:
        """Writes the state to `path` as a safetensors file (needs the `io` extra)."""
        _, save_file = _safetensors()
        feature_scale = None if self.feature_scale is None else float(self.feature_scale)
        description = {"feature_map": self.feature_map, "feature_scale": feature_scale}
        metadata = {"format": _FORMAT, "version": str(_VERSION), "state": json.dumps(description)}
        # Copies: safetensors refuses tensors that share memory.
        tensors = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in self.tensors().items()
        }
        save_file(tensors, str(path), metadata=metadata)

    @classmethod
    def load(cls, path, *, device="cpu") -> "PrefixState":
        """Reads a state that `save` wrote (needs the `io` extra).

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no such file, of a later version, or its tensors don't fit each other.
        """
        safe_open, _ = _safetensors()
        if not Path(path).is_file():
            raise FileNotFoundError(f"`path` must be a prefix-state file, got {str(path)!r}, which is no file")
        try:
            device = torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"`device` must be a torch.device or its name, got {device!r}") from error
        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors raises its own types for what isn't one of its files
            raise ValueError(f"`path` must be a safetensors file, got {str(path)!r}: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"`path` must be a file written by PrefixState.save (format {_FORMAT!r}), got {str(path)!r} with "
                f"format {metadata.get('format')!r}"
            )
        if metadata.get("version") != str(_VERSION):
            raise ValueError(
                f"`path` must be a prefix-state file of version {_VERSION}, got {str(path)!r} of version "
                f"{metadata.get('version')}"
            )
        try:
            unknown = sorted(set(tensors) - set(_TENSORS))
            if unknown:
                raise ValueError(f"unknown tensors {unknown}")
            return cls(**tensors, **json.loads(metadata["state"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"`path` must hold a valid prefix state, got {str(path)!r}: {error}") from error


def _safetensors():
    try:
        from safetensors import safe_open
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("PrefixState.save and .load need safetensors: pip install 'ntk-kernels[io]'") from error
    return safe_open, save_file


def _pad(tensor: Tensor, dim: int, missing: int, fill: float) -> Tensor:
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_full(shape, fill)], dim=dim)


def _features_of(state: PrefixState) -> dict:
    names = ("z", "k", "z_a", "z_b", "centers", "log_scale", "feature_map", "feature_scale")
    return {name: getattr(state, name) for name in names}


def _merge_features(a: PrefixState, b: PrefixState) -> dict:
    merged = {"feature_map": a.feature_map, "feature_scale": a.feature_scale}
    if _same_centers(a.centers, b.centers):
        merged["centers"] = a.centers
        scale_a = scale_b = None
        if a.log_scale is not None or b.log_scale is not None:
            log_a, log_b = a._log_scale_or_zero(), b._log_scale_or_zero()
            merged["log_scale"] = torch.logaddexp(log_a, log_b)
            shift = merged["log_scale"].masked_fill(merged["log_scale"] == -math.inf, 0)
            scale_a, scale_b = (log_a - shift).exp(), (log_b - shift).exp()
        merged["k"] = _weigh(a.k, scale_a) + _weigh(b.k, scale_b)
        if a.rank is not None and b.rank is not None:
            merged["z_a"] = torch.cat([_weigh(a.z_a, scale_a), _weigh(b.z_a, scale_b)], dim=-1)
            merged["z_b"] = torch.cat([a.z_b, b.z_b], dim=-2)
        else:
            merged["z"] = _weigh(a.full_z, scale_a) + _weigh(b.full_z, scale_b)
        return merged
    if a.feature_map != "taylor1":
        raise ValueError(
            f"`other` must be expanded around the same centres, as several go with 'taylor1' only, got "
            f"feature_map={a.feature_map!r} and different centres"
        )
    sides = []
    for state in (a, b):
        side = {"k": state.k, "log_scale": state._log_scale_or_zero()}
        if a.rank is not None and a.rank == b.rank:
            side |= {"z_a": state.z_a, "z_b": state.z_b}
        else:
            side["z"] = state.full_z
        if state.centers is None:
            lead = state.k.shape[:-1]
            side = {name: tensor.unsqueeze(len(lead)) for name, tensor in side.items()}
            side["centers"] = state.k.new_zeros(*lead, 1, state.head_dim)
        else:
            side["centers"] = state.centers
        sides.append(side)
    axis = 2 if a.is_stack else 1
    return merged | {name: torch.cat([sides[0][name], sides[1][name]], dim=axis) for name in sides[0]}


def _weigh(tensor: Tensor, weight: Tensor | None) -> Tensor:
    """`tensor` [..., C?, r, ...] times `weight` [..., C?]."""
    return tensor if weight is None else tensor * weight.reshape(weight.shape + (1,) * (tensor.dim() - weight.dim()))


def _same_centers(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (a.shape == b.shape and torch.equal(a, b))


def _flatten(state: PrefixState):
    tensors = state.tensors()
    # A list, not a tuple: it has to be the same after a trip through JSON (torch.export.save).
    return list(tensors.values()), [list(tensors), state.feature_map, state.feature_scale]


def _flatten_with_keys(state: PrefixState):
    leaves, context = _flatten(state)
    return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(context[0], leaves, strict=True)], context


def _unflatten(leaves, context) -> PrefixState:
    # Leaves may be anything while a graph is traced (placeholders, specifications), so nothing is checked.
    names, feature_map, feature_scale = context
    state = object.__new__(PrefixState)
    values = dict.fromkeys(item.name for item in fields(PrefixState)) | dict(zip(names, leaves, strict=True))
    for name, value in (values | {"feature_map": feature_map, "feature_scale": feature_scale}).items():
        object.__setattr__(state, name, value)
    return state


pytree.register_pytree_node(
    PrefixState,
    _flatten,
    _unflatten,
    flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="ntk_kernels.PrefixState",
)
