"""The record of a call, from the public functions to the kernels: `Inputs`, `DecodeInputs` and `SumInputs`.

An op's schema is flat: `schema` writes it from a record's annotations, `flat()` and `of()` convert between the two.
Optional tensors are None if absent.
"""

from types import NoneType
from typing import NamedTuple, get_args, get_type_hints

from torch import Tensor

from .feature_maps import feature_dim


class StateTensors(NamedTuple):
    """The tensors of a prefix state: always a stack, always with a dimension for the centres."""

    z: Tensor | None = None  # [N, Hs, C, r, Dv]; of a low-rank pair [N, Hs, C, r, s]
    z_b: Tensor | None = None  # [N, Hs, C, s, Dv]
    k: Tensor | None = None  # [N, Hs, C, r]
    centers: Tensor | None = None  # [N, Hs, C, D]
    log_scale: Tensor | None = None  # [N, Hs, C]
    row_keys: Tensor | None = None  # [N, Hs, R, D]
    row_values: Tensor | None = None  # [N, Hs, R, Dv]
    row_bias: Tensor | None = None  # [N, Hs, R]
    state_index: Tensor | None = None  # [B], which state each batch row uses; -1 for none

    @property
    def exists(self) -> bool:
        return self.k is not None or self.row_keys is not None

    @property
    def num_states(self) -> int | None:
        """N; None without a state."""
        return (self.row_keys if self.k is None else self.k).shape[0] if self.exists else None


class Leaves(NamedTuple):
    """One entry for each differentiable input of attention: its gradient, or whether it is wanted."""

    query: object
    key: object
    value: object
    state: StateTensors  # without `state_index`

    @classmethod
    def of(cls, flat) -> "Leaves":
        return cls(*flat[:3], StateTensors(*flat[3:]))

    def flat(self) -> tuple:
        return (*self[:3], *self.state[:-1])


class Inputs(NamedTuple):
    """One call of attention."""

    query: Tensor  # [B, Hq, Lq, D]; of packed sequences [1, Hq, total, D], as key and value
    key: Tensor  # [B, Hkv, Lk, D]
    value: Tensor  # [B, Hkv, Lk, Dv]
    state: StateTensors = StateTensors()
    attn_mask: Tensor | None = None  # [B or 1, Hq or 1, Lq or 1, Lk or 1], bool or to be added
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

    cache_size = None  # keys are not a cache

    @classmethod
    def of(cls, *flat) -> "Inputs":
        return cls(*flat[:3], StateTensors(*flat[3:12]), *flat[12:])

    def flat(self) -> tuple:
        return (*self[:3], *self.state, *self[4:])

    @property
    def band(self) -> tuple[int, int, int]:
        return self.window_left, self.window_right, self.causal_offset

    def without_keys(self) -> "Inputs":
        """The call over the prefix alone; `value` gives its head dimension."""
        return Inputs(
            self.query, None, self.value, self.state, cu_seqlens_q=self.cu_seqlens_q, cu_seqlens_k=self.cu_seqlens_k,
            max_seqlen_q=self.max_seqlen_q, max_seqlen_k=self.max_seqlen_k, feature_map=self.feature_map,
            feature_scale=self.feature_scale, scale=self.scale, backend=self.backend,
        )  # fmt: skip


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

    # By the names that Inputs has for them, for the kernels' launcher.
    key, value = property(lambda self: self.key_cache), property(lambda self: self.value_cache)
    key_stop = property(lambda self: self.cache_seqlens)
    attn_mask = cu_seqlens_q = cu_seqlens_k = None

    @classmethod
    def of(cls, *flat) -> "DecodeInputs":
        return cls(*flat[:3], StateTensors(*flat[3:12]), *flat[12:])

    def flat(self) -> tuple:
        return (*self[:3], *self.state, *self[4:])

    @property
    def cache_size(self) -> int:
        """Keys that there is room for in a batch row."""
        return self.key_cache.shape[2] * (1 if self.block_table is None else self.block_table.shape[1])


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
    def of(cls, *flat) -> "SumInputs":
        return cls(*flat)

    def flat(self) -> tuple:
        return tuple(self)

    @property
    def num_features(self) -> int:
        return feature_dim(self.feature_map, self.keys.shape[2])

    @property
    def num_centers(self) -> int:
        return 1 if self.centers is None else self.centers.shape[1]


NUM_DIFFERENTIABLE = len(Leaves._fields) - 1 + len(StateTensors._fields) - 1
_SCHEMA_TYPES = {Tensor: "Tensor", int: "SymInt", float: "float", str: "str"}


def schema(record: type) -> str:
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
