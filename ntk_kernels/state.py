"""`PrefixState`: a fixed-size stand-in for a prefix of any length."""

import functools
import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, fields, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import checks, combine
from .feature_maps import get_feature_map
from .files import Format

_FILES = Format("ntk-kernels prefix state", 1, "PrefixState.save")
_TENSORS = ("z", "k", "z_a", "z_b", "centers", "log_scale", "keys", "values", "bias")


@dataclass(frozen=True, eq=False)
class PrefixState:
    """A fixed-size stand-in for a prefix of any length, per head: a linear-attention term and a few exact rows.

    For a query q it adds N to the numerator and M to the denominator of the softmax over the input tokens:

        N = Σ_c w_c · φ(x)ᵀ Z_c  + Σ_j e^{scale·q·κ_j + bias_j} v_j       x   = feature_scale · q
        M = max(0, Σ_c w_c · φ(x)·k_c) + Σ_j e^{scale·q·κ_j + bias_j}     w_c = exp(scale·q·μ_c + β_c)

    Every tensor may have a leading N: a stack of N states, of which `state_index` picks one per batch row. Hs is the
    number of query heads or of key/value heads, r = `feature_dim(feature_map, D)`. There is a C in front of r if and
    only if there are `centers`. Tensors keep their dtype and `requires_grad`; float32 is recommended, also under a
    half-precision model.

    Args:
        z: [N?, Hs, C?, r, Dv], the sum of φ(key)·valueᵀ. Instead, `z_a` and `z_b` may be given.
        k: [N?, Hs, C?, r], the sum of φ(key).
        feature_map: "elu", "taylor1" or "taylor2"; None only for a state that has rows only.
        feature_scale: factor on the query inside φ; None means sqrt(scale) of the call.
        z_a, z_b: [N?, Hs, C?, r, s] and [N?, Hs, C?, s, Dv], a low-rank pair with z = z_a @ z_b.
        centers: [N?, Hs, C, D], the μ_c; more than one only with "taylor1". Default: one at the origin.
        log_scale: [N?, Hs, C?], the β_c; -inf switches a centre off. Default 0.
        keys, values: [N?, Hs, R, D] and [N?, Hs, R, Dv], exact rows κ_j, v_j, visible to every query.
        bias: [N?, Hs, R], log weight of each row; -inf switches a row off. Default 0.

    Raises:
        TypeError, ValueError: an argument does not fit the others; the message names it.

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

    def __post_init__(self) -> None:
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
        feature_map = get_feature_map(self.feature_map)
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
        head_dim = feature_map.head_dim(r)
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
            feature_map.check_num_centers(self.num_centers)
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

    @classmethod
    def unchecked(cls, values: dict[str, Any]) -> "PrefixState":
        """Makes a state of arguments that are known to fit each other; those left out are None."""
        state = object.__new__(cls)
        vars(state).update(_NOTHING | values)
        return state

    # Properties ------------------------------------------------------------------------------------------------------

    @property
    def is_stack(self) -> bool:
        """True if the tensors have a leading N."""
        if self.k is not None:
            return self.k.dim() == (3 if self.centers is None else 4)
        return self.keys.dim() == 4

    @property
    def num_states(self) -> int:
        """N, 1 for a single state."""
        return self._any.shape[0] if self.is_stack else 1

    @property
    def num_heads(self) -> int:
        """Hs, of query heads or of key/value heads."""
        return self._any.shape[1 if self.is_stack else 0]

    @property
    def head_dim(self) -> int:
        """D, of queries and keys."""
        if self.k is None:
            return self.keys.shape[-1]
        return get_feature_map(self.feature_map).head_dim(self.k.shape[-1])

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
        """R, of exact rows per head."""
        return 0 if self.keys is None else self.keys.shape[-2]

    @property
    def rank(self) -> int | None:
        """s, of the pair `z_a`, `z_b`; None for a full `z`."""
        return None if self.z_a is None else self.z_a.shape[-1]

    @property
    def full_z(self) -> Tensor | None:
        """`z`, or the product of the low-rank pair, computed in float32 at least; None without features."""
        if self.z_a is None:
            return self.z
        dtype = torch.promote_types(torch.promote_types(self.z_a.dtype, self.z_b.dtype), torch.float32)
        with nullcontext() if self.z_a.is_meta else torch.autocast(self.z_a.device.type, enabled=False):
            return self.z_a.to(dtype) @ self.z_b.to(dtype)

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self._any.device

    @property
    def nbytes(self) -> int:
        """Memory of all tensors in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    @functools.cached_property
    def op_tensors(self) -> tuple[tuple[bool, ...], tuple[Tensor, ...]]:
        """For each tensor of a state that an op takes whether it is there, and those that are."""
        tensors = (
            self.z if self.z_a is None else self.z_a, self.z_b, self.k, self.centers, self.log_scale, self.keys,
            self.values, self.bias,
        )  # fmt: skip
        return tuple(x is not None for x in tensors), tuple(x for x in tensors if x is not None)

    @property
    def _any(self) -> Tensor:
        """One of the tensors."""
        return self.k if self.k is not None else self.keys

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors that the state has, by name."""
        return {name: value for name in _TENSORS if (value := getattr(self, name)) is not None}

    def __repr__(self) -> str:
        tensors = ", ".join(f"{name}={list(tensor.shape)}" for name, tensor in self.tensors().items())
        kind = "" if self.k is None else f"feature_map={self.feature_map!r}, feature_scale={self.feature_scale}, "
        return f"PrefixState({kind}{tensors}, dtype={self._any.dtype}, device={str(self.device)!r})"

    # Other states ----------------------------------------------------------------------------------------------------

    def _map(self, function: Callable[[Tensor], Tensor]) -> "PrefixState":
        changes: dict[str, Any] = {name: function(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changes)

    def to(self, *args: Any, **kwargs: Any) -> "PrefixState":
        """Returns the state with every tensor moved or cast; arguments of `torch.Tensor.to`."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def detach(self) -> "PrefixState":
        """Returns the state with every tensor detached from autograd."""
        return self._map(Tensor.detach)

    def merge(self, other: "PrefixState") -> "PrefixState":
        """Returns the state of both prefixes together: its N and M are the sums of those of the two.

        Features around the same centres are added; different centres ("taylor1"), low-rank pairs and rows are joined.

        Raises:
            TypeError: if `other` is not a PrefixState.
            ValueError: if feature map or scale, heads or head dimensions differ, or if centres differ with a feature
                map that cannot have several.
        """
        if not isinstance(other, PrefixState):
            raise TypeError(f"`other` must be a PrefixState, got {type(other).__name__}")
        names = ["num_heads", "head_dim", "value_dim", "is_stack", "num_states", "device"]
        if self.k is not None and other.k is not None:
            names += ["feature_map", "feature_scale"]
        combine.check_alike([self, other], names, label=lambda i: "`other`" if i else "the state")
        return PrefixState(**combine.merged(self, other))

    @staticmethod
    def stack(states: Iterable["PrefixState"]) -> "PrefixState":
        """Returns the stack [N, Hs, ...] of single states [Hs, ...], for batches that mix tasks (`state_index`).

        States may differ in their numbers of centres and rows: all get the largest, switched off by -inf where missing.

        Raises:
            TypeError: if `states` has something other than PrefixStates.
            ValueError: if there is no state, one is a stack already, or feature maps, scales or sizes differ.
        """
        if isinstance(states, PrefixState):
            raise TypeError("`states` must be a sequence of PrefixStates, got one PrefixState")
        states = list(states)
        if not states:
            raise ValueError("`states` must hold at least one PrefixState, got none")
        for i, state in enumerate(states):
            if not isinstance(state, PrefixState):
                raise TypeError(f"`states[{i}]` must be a PrefixState, got {type(state).__name__}")
            if state.is_stack:
                raise ValueError(f"`states[{i}]` must be a single state, got a stack of {state.num_states}")
        names = ["num_heads", "head_dim", "value_dim", "feature_map", "feature_scale", "device"]
        combine.check_alike(states, names, label=lambda i: f"`states[{i}]`")
        return PrefixState(**combine.stacked(states))

    # Files -----------------------------------------------------------------------------------------------------------

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the state to `path` as a safetensors file (needs the `io` extra).

        Raises:
            FileNotFoundError: if the folder does not exist.
        """
        feature_scale = None if self.feature_scale is None else float(self.feature_scale)
        description = {"feature_map": self.feature_map, "feature_scale": feature_scale}
        _FILES.save(path, self.tensors(), state=json.dumps(description))

    @classmethod
    def load(cls, path: str | PathLike[str], *, device: torch.device | str | int = "cpu") -> "PrefixState":
        """Reads a state that `save` wrote (needs the `io` extra).

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if `save` of this version did not write the file, it has changed since, its tensors do not fit
                each other or are not finite (-inf may stand in `log_scale` and `bias`), or there is no such device.
        """
        try:
            device = torch.empty(0, device=device).device
        except (AssertionError, ImportError, RuntimeError) as error:
            what = "a torch.device or its name, one that this PyTorch has"
            raise ValueError(f"`device` must be {what}, got {device!r}: {error}") from error
        tensors, metadata = _FILES.load(path)
        try:
            unknown = sorted(set(tensors) - set(_TENSORS))
            if unknown:
                raise ValueError(f"unknown tensors {unknown}")
            arguments: dict[str, Any] = tensors | json.loads(metadata["state"])
            state = cls(**arguments)
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"`path` must hold a valid prefix state, got {str(path)!r}: {error}") from error
        return state.to(device)


_NOTHING: dict[str, Any] = dict.fromkeys(field.name for field in fields(PrefixState))


def _flatten(state: PrefixState) -> tuple[list[Tensor], list[Any]]:
    tensors = state.tensors()
    # A list, not a tuple: torch.export.save writes the context as JSON, which has no tuples.
    return list(tensors.values()), [list(tensors), state.feature_map, state.feature_scale]


def _flatten_with_keys(state: PrefixState) -> tuple[list[tuple[Any, Tensor]], list[Any]]:
    leaves, context = _flatten(state)
    return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(context[0], leaves, strict=True)], context


def _unflatten(leaves: Iterable[Any], context: list[Any]) -> PrefixState:
    # While a graph is traced, leaves may be anything (placeholders, specifications), so nothing is checked.
    names, feature_map, feature_scale = context
    values = dict(zip(names, leaves, strict=True))
    return PrefixState.unchecked(values | {"feature_map": feature_map, "feature_scale": feature_scale})


pytree.register_pytree_node(
    PrefixState,
    _flatten,
    _unflatten,
    flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="ntk_kernels.PrefixState",
)
