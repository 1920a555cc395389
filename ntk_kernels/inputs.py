"""What a backend is called with: the arguments of the ops, in one order everywhere."""

from typing import NamedTuple

from torch import Tensor

from .feature_maps import feature_dim

NUM_DIFFERENTIABLE = 11
_STATE_SCHEMA = (
    "Tensor? z, Tensor? z_b, Tensor? k, Tensor? centers, Tensor? log_scale, Tensor? row_keys, Tensor? row_values, "
    "Tensor? row_bias, Tensor? state_index"
)
SCHEMA = (
    f"Tensor query, Tensor key, Tensor value, {_STATE_SCHEMA}, Tensor? attn_mask, Tensor? key_start, Tensor? key_stop, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "str? feature_map, float feature_scale, float scale, float softcap, "
    "SymInt window_left, SymInt window_right, SymInt causal_offset, str backend"
)
DECODE_SCHEMA = (
    f"Tensor query, Tensor key_cache, Tensor value_cache, {_STATE_SCHEMA}, "
    "Tensor? cache_seqlens, Tensor? key_start, Tensor? block_table, str? feature_map, float feature_scale, "
    "float scale, float softcap, SymInt window_left, SymInt window_right, SymInt num_splits, str backend"
)
SUMS_SCHEMA = (
    "Tensor keys, Tensor values, Tensor? weights, Tensor? centers, str feature_map, float key_scale, str backend"
)


def _state(inputs) -> tuple[Tensor | None, ...]:
    """z, z_b, k, centers, log_scale, row_keys, row_values, row_bias."""
    return inputs[3:NUM_DIFFERENTIABLE]


def _has_state(inputs) -> bool:
    return inputs.k is not None or inputs.row_keys is not None


def _num_states(inputs) -> int | None:
    """N; None without a state."""
    return (inputs.row_keys if inputs.k is None else inputs.k).shape[0] if inputs.has_state else None


class Inputs(NamedTuple):
    """One call. The state is always a stack with a dimension for the centres; None for what there is not."""

    query: Tensor  # [B, Hq, Lq, D]; of packed sequences [1, Hq, total, D], as key and value
    key: Tensor  # [B, Hkv, Lk, D]
    value: Tensor  # [B, Hkv, Lk, Dv]
    z: Tensor | None  # [N, Hs, C, r, Dv]; of a low-rank pair [N, Hs, C, r, s]
    z_b: Tensor | None  # [N, Hs, C, s, Dv]
    k: Tensor | None  # [N, Hs, C, r]
    centers: Tensor | None  # [N, Hs, C, D]
    log_scale: Tensor | None  # [N, Hs, C]
    row_keys: Tensor | None  # [N, Hs, R, D]
    row_values: Tensor | None  # [N, Hs, R, Dv]
    row_bias: Tensor | None  # [N, Hs, R]
    state_index: Tensor | None  # [B]
    attn_mask: Tensor | None  # [B or 1, Hq or 1, Lq or 1, Lk or 1], bool or to be added
    key_start: Tensor | None  # [B], first visible key
    key_stop: Tensor | None  # [B], end of the visible keys
    cu_seqlens_q: Tensor | None  # [B + 1], where packed sequences begin
    cu_seqlens_k: Tensor | None  # [B + 1]
    max_seqlen_q: int  # of packed sequences, else 0
    max_seqlen_k: int
    feature_map: str | None
    feature_scale: float
    scale: float
    softcap: float  # 0 for none
    window_left: int  # row i sees key j if i + causal_offset - window_left <= j; -1 for no bound
    window_right: int  # and if j <= i + causal_offset + window_right
    causal_offset: int  # with packed sequences Lk - Lq of each instead
    backend: str

    state, has_state, num_states = property(_state), property(_has_state), property(_num_states)


class DecodeInputs(NamedTuple):
    """One call of decode; the state as above."""

    query: Tensor  # [B, Hq, Lq, D]
    key_cache: Tensor  # [B, Hkv, Lk, D]; in pages [P, Hkv, page size, D]
    value_cache: Tensor  # [B, Hkv, Lk, Dv]; [P, Hkv, page size, Dv]
    z: Tensor | None
    z_b: Tensor | None
    k: Tensor | None
    centers: Tensor | None
    log_scale: Tensor | None
    row_keys: Tensor | None
    row_values: Tensor | None
    row_bias: Tensor | None
    state_index: Tensor | None
    cache_seqlens: Tensor | None  # [B], keys of each row; None for a full cache
    key_start: Tensor | None  # [B], first visible key
    block_table: Tensor | None  # [B, pages of a row], numbers of pages
    feature_map: str | None
    feature_scale: float
    scale: float
    softcap: float
    window_left: int  # as above, around the diagonal i + cache_seqlens - Lq
    window_right: int
    num_splits: int  # of the keys, among programs; 0 to choose
    backend: str

    state, has_state, num_states = property(_state), property(_has_state), property(_num_states)

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

    @property
    def num_features(self) -> int:
        return feature_dim(self.feature_map, self.keys.shape[2])

    @property
    def num_centers(self) -> int:
        return 1 if self.centers is None else self.centers.shape[1]
