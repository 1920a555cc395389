"""The record of a call, from the public functions to the kernels: `Inputs`, `DecodeInputs` and `SumInputs`.

An op's schema is flat: `schema` writes it from a record's annotations, `flat()` and `of()` convert between the two.
Optional tensors are None if absent. The ops take tensors in the shapes that users give them; `uniform()` makes those of
the comments, which backends and kernels take, by views.
"""

from collections.abc import Sequence
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

from torch import Tensor

from .feature_maps import feature_dim


class StateTensors(NamedTuple):
    """The tensors of a prefix state. Users may leave out N and C."""

    z: Tensor | None = None  # [N, Hs, C, r, Dv]; of a low-rank pair [N, Hs, C, r, s]
    z_b: Tensor | None = None  # [N, Hs, C, s, Dv]
    k: Tensor | None = None  # [N, Hs, C, r]
    centers: Tensor | None = None  # [N, Hs, C, D]
    log_scale: Tensor | None = None  # [N, Hs, C]
    row_keys: Tensor | None = None  # [N, Hs, R, D]
    row_values: Tensor | None = None  # [N, Hs, R, Dv]
    row_bias: Tensor | None = None  # [N, Hs, R]
    state_index: Tensor | None = None  # [B], which state each batch row uses; -1 for none

    def uniform(self) -> "StateTensors":
        """Returns the tensors with the dimensions N and C."""
        z, z_b, k, centers, log_scale, row_keys, row_values, row_bias, state_index = self
        if k is not None and k.dim() < 4:
            if centers is None:
                z, k = z.unsqueeze(-3), k.unsqueeze(-2)
                z_b = None if z_b is None else z_b.unsqueeze(-3)
                log_scale = None if log_scale is None else log_scale.unsqueeze(-1)
            if k.dim() == 3:
                z, k = z.unsqueeze(0), k.unsqueeze(0)
                z_b, centers, log_scale = (None if x is None else x.unsqueeze(0) for x in (z_b, centers, log_scale))
        if row_keys is not None and row_keys.dim() == 3:
            row_keys, row_values = row_keys.unsqueeze(0), row_values.unsqueeze(0)
            row_bias = None if row_bias is None else row_bias.unsqueeze(0)
        return StateTensors(z, z_b, k, centers, log_scale, row_keys, row_values, row_bias, state_index)

    @property
    def exists(self) -> bool:
        return self.k is not None or self.row_keys is not None

    @property
    def num_states(self) -> int | None:
        """N; None without a state."""
        any_tensor = self.row_keys if self.k is None else self.k
        return None if any_tensor is None else any_tensor.shape[0]


class Leaves(NamedTuple):
    """One entry for each differentiable input of attention: its gradient, or whether it is wanted."""

    query: Any
    key: Any
    value: Any
    state: StateTensors  # without `state_index`

    @classmethod
    def of(cls, flat: Sequence[Any]) -> "Leaves":
        query, key, value, *state = flat
        return cls(query, key, value, StateTensors(*state))

    def flat(self) -> tuple[Any, ...]:
        return (*self[:3], *self.state[:-1])


class Inputs(NamedTuple):
    """One call of attention."""

    query: Tensor  # [B, Hq, Lq, D]; of packed sequences [1, Hq, total, D], users: [total, Hq, D]; as key and value
    key: Tensor  # [B, Hkv, Lk, D]; None inside of the passes that add the prefix
    value: Tensor  # [B, Hkv, Lk, Dv]
    state: StateTensors = StateTensors()
    attn_mask: Tensor | None = None  # [B or 1, Hq or 1, Lq or 1, Lk or 1], bool or to be added; users: dimensions less
    key_start: Tensor | None = None  # [B], first visible key
    key_stop: Tensor | None = None  # [B], end of the visible keys
    cu_seqlens_q: Tensor | None = None  # [B + 1], where packed sequences begin
    cu_seqlens_k: Tensor | None = None  # [B + 1]
    max_seqlen_q: int = 0  # of packed sequences
    max_seqlen_k: int = 0
    feature_map: str | None = None
    feature_scale: float = 1.0
    scale: float = 1.0
    softcap: float = 0.0  # 0 for none
    window_left: int = -1  # row i sees key j if i + causal_offset - window_left <= j; -1 for no bound
    window_right: int = -1  # and if j <= i + causal_offset + window_right
    causal_offset: int = 0  # with packed sequences Lk - Lq of each instead
    backend: str = "torch"

    @classmethod
    def of(cls, *flat: Any) -> "Inputs":
        return cls(*_nested(flat))

    def flat(self) -> tuple[Any, ...]:
        return (*self[:3], *self.state, *self[4:])

    def uniform(self) -> "Inputs":
        """Returns the call with tensors in the shapes above."""
        query, key, value, mask = *self[:3], self.attn_mask
        if self.is_packed:
            query, key, value = (as_batch_row(x) for x in self[:3])
        if mask is not None:
            mask = mask[(None,) * (4 - mask.dim())]
        return self._replace(query=query, key=key, value=value, state=self.state.uniform(), attn_mask=mask)

    @property
    def is_packed(self) -> bool:
        """True if the tensors are [total, H, ...]."""
        return self.query.dim() == 3

    @property
    def cache_size(self) -> None:
        """None: the keys are not a cache."""

    @property
    def band(self) -> tuple[int, int, int]:
        return self.window_left, self.window_right, self.causal_offset

    def without_keys(self) -> "Inputs":
        """Returns the call over the prefix alone; `value` gives its head dimension."""
        return self._replace(**_WITHOUT_KEYS)


_WITHOUT_KEYS: dict[str, Any] = {
    "key": None, "attn_mask": None, "key_start": None, "key_stop": None, "softcap": 0.0, "window_left": -1,
    "window_right": -1, "causal_offset": 0,
}  # fmt: skip


class DecodeInputs(NamedTuple):
    """One call of decode."""

    query: Tensor  # [B, Hq, Lq, D]
    key_cache: Tensor  # [B, Hkv, Lk, D]; in pages [P, Hkv, page size, D]
    value_cache: Tensor  # [B, Hkv, Lk, Dv]; [P, Hkv, page size, Dv]
    state: StateTensors = StateTensors()
    cache_seqlens: Tensor | None = None  # [B], keys of each row; None for a full cache
    key_start: Tensor | None = None  # [B], first visible key
    block_table: Tensor | None = None  # [B, pages of a row], numbers of pages
    feature_map: str | None = None
    feature_scale: float = 1.0
    scale: float = 1.0
    softcap: float = 0.0
    window_left: int = -1  # as in Inputs, around the diagonal i + cache_seqlens - Lq
    window_right: int = -1
    num_splits: int = 0  # of the keys, among programs; 0 to choose
    backend: str = "torch"

    @classmethod
    def of(cls, *flat: Any) -> "DecodeInputs":
        return cls(*_nested(flat))

    def flat(self) -> tuple[Any, ...]:
        return (*self[:3], *self.state, *self[4:])

    def uniform(self) -> "DecodeInputs":
        """Returns the call with tensors in the shapes above."""
        return self._replace(state=self.state.uniform())

    @property
    def cache_size(self) -> int:
        """Keys that there is room for in a batch row."""
        return self.key_cache.shape[2] * (1 if self.block_table is None else self.block_table.shape[1])

    # The kernels' launcher reads them by the names that Inputs has.

    @property
    def key(self) -> Tensor:
        return self.key_cache

    @property
    def value(self) -> Tensor:
        return self.value_cache

    @property
    def key_stop(self) -> Tensor | None:
        return self.cache_seqlens

    @property
    def attn_mask(self) -> None:
        return None

    @property
    def cu_seqlens_q(self) -> None:
        return None

    @property
    def cu_seqlens_k(self) -> None:
        return None


class SumInputs(NamedTuple):
    """One sum of features over the rows of a prefix, head by head."""

    keys: Tensor  # [H, m, D]
    values: Tensor  # [H, m, Dv]
    weights: Tensor | None  # [H, m], of any sign; without a gradient
    centers: Tensor | None  # [H, C, D]; None: the origin
    feature_map: str
    key_scale: float
    backend: str

    @classmethod
    def of(cls, *flat: Any) -> "SumInputs":
        return cls(*flat)

    def flat(self) -> tuple[Any, ...]:
        return tuple(self)

    @property
    def num_features(self) -> int:
        return feature_dim(self.feature_map, self.keys.shape[2])

    @property
    def num_centers(self) -> int:
        return 1 if self.centers is None else self.centers.shape[1]


def as_batch_row(packed: Tensor) -> Tensor:
    """[total, H, D] -> [1, H, total, D]."""
    return packed.transpose(0, 1).unsqueeze(0)


def as_packed(batch_row: Tensor) -> Tensor:
    """[1, H, total, D] -> [total, H, D]."""
    return batch_row[0].transpose(0, 1)


def _nested(flat: Sequence[Any]) -> tuple[Any, ...]:
    """Returns the fields of Inputs or DecodeInputs from those of the op."""
    first = 3 + len(StateTensors._fields)
    return (*flat[:3], StateTensors(*flat[3:first]), *flat[first:])


NUM_DIFFERENTIABLE = len(Leaves._fields) - 1 + len(StateTensors._fields) - 1
_SCHEMA_TYPES = {Tensor: "Tensor", int: "SymInt", float: "float", str: "str"}


def schema(record: Any) -> str:
    """The arguments of an op that takes a record's fields, nested ones flattened, in the words of `torch.library`."""
    arguments = []
    for name, kind in get_type_hints(record).items():
        if hasattr(kind, "_fields"):
            arguments.append(schema(kind))
        else:
            optional = "?" if NoneType in get_args(kind) else ""
            (kind,) = set(get_args(kind) or (kind,)) - {NoneType}
            arguments.append(f"{_SCHEMA_TYPES[kind]}{optional} {name}")
    return ", ".join(arguments)
