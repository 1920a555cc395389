"""What a backend is called with: the arguments of the ops, in one order everywhere."""

from typing import NamedTuple

from torch import Tensor

NUM_DIFFERENTIABLE = 11
SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor? z, Tensor? z_b, Tensor? k, Tensor? centers, Tensor? log_scale, "
    "Tensor? row_keys, Tensor? row_values, Tensor? row_bias, "
    "Tensor? state_index, Tensor? attn_mask, Tensor? key_start, Tensor? key_stop, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "str? feature_map, float feature_scale, float scale, float softcap, "
    "SymInt window_left, SymInt window_right, SymInt causal_offset, str backend"
)


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

    @property
    def state(self) -> tuple[Tensor | None, ...]:
        """z, z_b, k, centers, log_scale, row_keys, row_values, row_bias."""
        return self[3:NUM_DIFFERENTIABLE]

    @property
    def has_state(self) -> bool:
        return self.k is not None or self.row_keys is not None

    @property
    def num_states(self) -> int | None:
        """N; None without a state."""
        return (self.row_keys if self.k is None else self.k).shape[0] if self.has_state else None
