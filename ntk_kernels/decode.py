"""`ntk_attention_decode`: the next tokens of each sequence against a key/value cache and a prefix."""

from typing import Literal, overload

import torch
from torch import Tensor

from . import checks, library, reference
from .arguments import autocast, check_options, check_state, features_of, state_tensors
from .dispatch import choose_backend
from .inputs import DecodeInputs
from .shortcuts import Shortcuts
from .state import PrefixState

_shortcuts = Shortcuts(library.decode, library.check_decode, has_backward=False)

MAX_ROWS = 16  # queries a sequence
MIN_PAGE_SIZE = 16


@overload
def ntk_attention_decode(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_seqlens: Tensor | None = ...,
    state: PrefixState | None = ..., *, block_table: Tensor | None = ..., key_start: Tensor | None = ...,
    is_causal: bool = ..., scale: float | None = ..., window: tuple[int, int] | None = ...,
    softcap: float | None = ..., state_index: Tensor | None = ..., num_splits: int | None = ...,
    return_lse: Literal[False] = False, backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def ntk_attention_decode(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_seqlens: Tensor | None = ...,
    state: PrefixState | None = ..., *, block_table: Tensor | None = ..., key_start: Tensor | None = ...,
    is_causal: bool = ..., scale: float | None = ..., window: tuple[int, int] | None = ...,
    softcap: float | None = ..., state_index: Tensor | None = ..., num_splits: int | None = ...,
    return_lse: Literal[True], backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def ntk_attention_decode(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, cache_seqlens: Tensor | None = ...,
    state: PrefixState | None = ..., *, block_table: Tensor | None = ..., key_start: Tensor | None = ...,
    is_causal: bool = ..., scale: float | None = ..., window: tuple[int, int] | None = ...,
    softcap: float | None = ..., state_index: Tensor | None = ..., num_splits: int | None = ..., return_lse: bool,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def ntk_attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor | None = None,
    state: PrefixState | None = None,
    *,
    block_table: Tensor | None = None,
    key_start: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    state_index: Tensor | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ntk_attention` of the last 1 to 16 tokens of each sequence, whose keys are in a cache already.

    What is in the cache of batch row b are the keys of the tokens 0 to cache_seqlens[b] - 1; the queries are those of
    the last Lq of them. Query i has its diagonal at key cache_seqlens[b] - Lq + i; where that is before the first key,
    it sees the prefix alone.

    On GPUs the keys of a sequence are divided among several programs if the batch alone does not keep the device busy.
    Lengths, block table and state index are read on the device: after one call, which compiles, a call can be captured
    in a CUDA graph and replayed with other values in them. There is no backward: under `torch.compile`, which traces
    one where an input requires grad, call it in `torch.no_grad()`.

    Args:
        query: [B, Hq, Lq, D], Lq <= 16; any strides.
        key_cache, value_cache: [B, Hkv, Lk, D] and [B, Hkv, Lk, Dv], room for Lk keys a sequence. With `block_table`
            pages, [P, Hkv, page_size, D] and [P, Hkv, page_size, Dv], page_size a power of two from 16 on. Last stride
            1, or they are copied. (Pages as FlashAttention has them, [P, page_size, Hkv, D], come in as
            `cache.transpose(1, 2)`, without a copy.)
        cache_seqlens: [B] int, keys that each sequence has in the cache; default Lk. 0 for none.
        state: the prefix, with Hq or Hkv heads.
        block_table: [B, n] int, the pages of each sequence in order: pages that exist up to its length; beyond,
            anything may stand there.
        key_start: [B] int, the first visible key of each sequence (left padding).
        is_causal: hide the keys right of each query's diagonal; True by default, in contrast to `ntk_attention`.
        window: (left, right) around the diagonal, as in `ntk_attention`.
        state_index: [B] int, which state of a stack each sequence uses; -1 for none. One call serves a batch of many
            tasks; on GPUs the states are not copied.
        num_splits: programs that share the keys of a sequence and head (Triton kernels only); default: as many as the
            device needs. The result depends on it by rounding; given it, not on the other sequences of the batch.
        scale, softcap, return_lse, backend: as in `ntk_attention`.

    Returns:
        out [B, Hq, Lq, Dv] in the dtype of `query`; with `return_lse` also lse [B, Hq, Lq], natural logarithm, in
        float32 (float64 for float64 inputs), -inf for a query that sees nothing.

    Raises:
        TypeError, ValueError: an argument does not fit. The values of `cache_seqlens`, `block_table` and `state_index`
            are checked on the CPU; on a GPU only if NTK_KERNELS_CHECK=1 is set, because the check synchronises with the
            device. Unchecked there, a length beyond the cache is taken as that of a full cache; pages and states that
            do not exist are read where they would be.
        NotImplementedError: the backend asked for by name cannot serve the call.
    """
    call = None
    if not torch.compiler.is_compiling():
        result, call = _shortcuts.take(
            query, key_cache, value_cache, state, (state_index, cache_seqlens, key_start, block_table), window,
            return_lse, (is_causal, scale, softcap, num_splits, backend),
        )  # fmt: skip
        if result is not None:
            return result
    paged = block_table is not None
    query, key_cache, value_cache = autocast(query, key_cache, value_cache)
    checks.check_qkv(query, key_cache, value_cache, "_cache", paged=paged)
    checks.check_bool("return_lse", return_lse)
    scale = check_options(query, state, scale, is_causal, window, softcap)
    batch, _, rows, _ = query.shape
    if rows > MAX_ROWS:
        raise ValueError(f"`query` must have at most {MAX_ROWS} rows (Lq), got {rows}; ntk_attention takes any number")
    if num_splits is not None:
        checks.check_int("num_splits", num_splits, minimum=1, maximum=2**15)
    for name, tensor in (("cache_seqlens", cache_seqlens), ("key_start", key_start)):
        if tensor is not None:
            checks.check_sequence_tensor(name, tensor, batch, "B", query)
    if block_table is not None:
        _check_pages(query, key_cache, cache_seqlens, block_table)
    check_state(state, query, key_cache, value_cache, state_index, batch)

    backend = choose_backend(backend, query, key_cache, value_cache, None, softcap)
    left, right = window or (-1, -1)
    feature_map, feature_scale = features_of(state, scale)
    inputs = DecodeInputs(
        query, key_cache, value_cache, state_tensors(state, state_index),
        cache_seqlens=cache_seqlens, key_start=key_start, block_table=block_table, scale=scale, softcap=softcap or 0.0,
        window_left=left, window_right=0 if is_causal else right, num_splits=num_splits or 0, backend=backend,
        feature_map=feature_map, feature_scale=feature_scale,
    )  # fmt: skip
    if backend == "reference":
        if not torch.compiler.is_compiling():
            checks.check_cache_values(inputs)
        return reference.ntk_attention_decode(
            query, key_cache, value_cache, cache_seqlens, state, block_table=block_table, key_start=key_start,
            is_causal=is_causal, scale=scale, window=window, softcap=softcap, state_index=state_index,
            return_lse=return_lse,
        )  # fmt: skip
    if call is not None and query.device.type != "meta":  # there the op's fake tells shapes
        return _shortcuts.learn(call, inputs, return_lse)
    out, lse = library.attention_decode(inputs)
    return (out, lse) if return_lse else out


def _check_pages(query: Tensor, key_cache: Tensor, cache_seqlens: Tensor | None, block_table: Tensor) -> None:
    page_size = key_cache.shape[2]
    if page_size < MIN_PAGE_SIZE or page_size & (page_size - 1):
        raise ValueError(
            f"`key_cache` must have pages [P, Hkv, page_size, D] of a power of two from {MIN_PAGE_SIZE} on, got "
            f"page_size={page_size}"
        )
    if cache_seqlens is None:
        raise ValueError("`cache_seqlens` must come with `block_table`, got None")
    checks.check_tensor("block_table", block_table)
    if block_table.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"`block_table` must be int32 or int64, got {block_table.dtype}")
    checks.check_shape("block_table", block_table, (query.shape[0], None), "B n")
    if block_table.device != query.device:
        raise ValueError(f"`block_table` must be on the device of `query`, {query.device}, got {block_table.device}")
