"""`ntk_attention_varlen`: the same attention over packed sequences of different lengths."""

from typing import Literal, overload

import torch
from torch import Tensor

from . import checks, library, reference
from .arguments import autocast, check_options, check_state, features_of, state_tensors
from .dispatch import choose_backend
from .inputs import Inputs, as_batch_row
from .shortcuts import Shortcuts
from .state import PrefixState

_shortcuts = Shortcuts(library.forward, library.check_attention, has_backward=True)


@overload
def ntk_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, state: PrefixState | None = ..., *, is_causal: bool = ..., scale: float | None = ...,
    window: tuple[int, int] | None = ..., softcap: float | None = ..., state_index: Tensor | None = ...,
    return_lse: Literal[False] = False, backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def ntk_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, state: PrefixState | None = ..., *, is_causal: bool = ..., scale: float | None = ...,
    window: tuple[int, int] | None = ..., softcap: float | None = ..., state_index: Tensor | None = ...,
    return_lse: Literal[True], backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def ntk_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, state: PrefixState | None = ..., *, is_causal: bool = ..., scale: float | None = ...,
    window: tuple[int, int] | None = ..., softcap: float | None = ..., state_index: Tensor | None = ...,
    return_lse: bool, backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def ntk_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    state: PrefixState | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    state_index: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ntk_attention` over B sequences packed one after the other, without padding.

    The rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] of `query` attend to the rows cu_seqlens_k[b] to
    cu_seqlens_k[b + 1] of `key` and to the prefix. Shapes and lengths are those of `flash_attn_varlen_func`; causality
    and windows are aligned bottom-right in each sequence.

    Args:
        query: [total_q, Hq, D], any strides.
        key, value: [total_k, Hkv, D] and [total_k, Hkv, Dv].
        cu_seqlens_q, cu_seqlens_k: [B + 1] int32 or int64, rising from 0 to at most total_q and total_k.
        max_seqlen_q, max_seqlen_k: at least the longest sequence's length.
        state_index: [B] int, which state of a stack each sequence uses; -1 for none.
        state, is_causal, scale, window, softcap, return_lse, backend: as in `ntk_attention`.

    Returns:
        out [total_q, Hq, Dv]; with `return_lse` also lse [Hq, total_q], natural logarithm. Rows beyond the last
        sequence give 0 and -inf.

    Raises:
        TypeError, ValueError: an argument does not fit. The values of `cu_seqlens_*` and `state_index` are checked
            on the CPU; on a GPU only if NTK_KERNELS_CHECK=1 is set, because the check synchronises with the device.
        NotImplementedError: the backend asked for by name cannot serve the call.
    """
    call = None
    if not torch.compiler.is_compiling():
        result, call = _shortcuts.take(
            query, key, value, state, (state_index, cu_seqlens_q, cu_seqlens_k), window, return_lse,
            (max_seqlen_q, max_seqlen_k, is_causal, scale, softcap, backend),
        )  # fmt: skip
        if result is not None:
            return result
    query, key, value = autocast(query, key, value)
    for name, tensor, letters in (
        ("query", query, "total_q Hq D"),
        ("key", key, "total_k Hkv D"),
        ("value", value, "total_k Hkv Dv"),
    ):
        checks.check_floating(name, tensor)
        checks.check_shape(name, tensor, (None, None, None), letters)
    # As one batch row of [1, H, total, D]: what they must have in common is the same.
    q, k, v = (as_batch_row(x) for x in (query, key, value))
    checks.check_qkv(q, k, v)
    checks.check_bool("return_lse", return_lse)
    scale = check_options(query, state, scale, is_causal, window, softcap)
    checks.check_sequence_tensor("cu_seqlens_q", cu_seqlens_q, None, "B+1", query)
    if cu_seqlens_q.shape[0] == 0:
        raise ValueError("`cu_seqlens_q` must have shape [B+1], at least [1], got [0]")
    checks.check_sequence_tensor("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape[0], "B+1", query)
    checks.check_int("max_seqlen_q", max_seqlen_q, minimum=0)
    checks.check_int("max_seqlen_k", max_seqlen_k, minimum=0)
    check_state(state, q, k, v, state_index, cu_seqlens_q.shape[0] - 1)

    backend = choose_backend(backend, q, k, v, None, softcap)
    left, right = window or (-1, -1)
    feature_map, feature_scale = features_of(state, scale)
    inputs = Inputs(
        query, key, value, state_tensors(state, state_index), cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, scale=scale,
        softcap=softcap or 0.0, window_left=left, window_right=0 if is_causal else right, backend=backend,
        feature_map=feature_map, feature_scale=feature_scale,
    )  # fmt: skip
    if backend == "reference":
        if not torch.compiler.is_compiling():
            checks.check_values(inputs)
        return reference.ntk_attention_varlen(
            query, key, value, cu_seqlens_q, cu_seqlens_k, state, is_causal=is_causal,
            scale=scale, window=window, softcap=softcap, state_index=state_index, return_lse=return_lse,
        )  # fmt: skip
    if call is not None and query.device.type != "meta":  # there the op's fake tells shapes
        return _shortcuts.learn(call, inputs, return_lse)
    out, lse = library.attention(inputs)
    return (out, lse) if return_lse else out
