"""`ntk_attention`: check the arguments, choose a backend, call it."""

from typing import Literal, overload

import torch
from torch import Tensor

from . import checks, library, reference
from .arguments import autocast, check_options, check_state, features_of, state_tensors
from .dispatch import choose_backend
from .inputs import Inputs
from .shortcuts import Shortcuts
from .state import PrefixState

_shortcuts = Shortcuts(library.forward, library.check_attention, has_backward=True)


@overload
def ntk_attention(
    query: Tensor, key: Tensor, value: Tensor, state: PrefixState | None = ..., *, attn_mask: Tensor | None = ...,
    is_causal: bool = ..., scale: float | None = ..., window: tuple[int, int] | None = ...,
    softcap: float | None = ..., causal_offset: int | None = ..., key_start: Tensor | None = ...,
    key_stop: Tensor | None = ..., state_index: Tensor | None = ..., return_lse: Literal[False] = False,
    backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def ntk_attention(
    query: Tensor, key: Tensor, value: Tensor, state: PrefixState | None = ..., *, attn_mask: Tensor | None = ...,
    is_causal: bool = ..., scale: float | None = ..., window: tuple[int, int] | None = ...,
    softcap: float | None = ..., causal_offset: int | None = ..., key_start: Tensor | None = ...,
    key_stop: Tensor | None = ..., state_index: Tensor | None = ..., return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def ntk_attention(
    query: Tensor, key: Tensor, value: Tensor, state: PrefixState | None = ..., *, attn_mask: Tensor | None = ...,
    is_causal: bool = ..., scale: float | None = ..., window: tuple[int, int] | None = ...,
    softcap: float | None = ..., causal_offset: int | None = ..., key_start: Tensor | None = ...,
    key_stop: Tensor | None = ..., state_index: Tensor | None = ..., return_lse: bool, backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def ntk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: PrefixState | None = None,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    causal_offset: int | None = None,
    key_start: Tensor | None = None,
    key_stop: Tensor | None = None,
    state_index: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the input tokens and, in the same normalisation, a prefix of any length.

        out = (exp(Q·Kᵀ·scale)·V + φ(Q)·Z) / (exp(Q·Kᵀ·scale)·1 + φ(Q)·k)

    Without a state this is `torch.nn.functional.scaled_dot_product_attention` but for the causal alignment: row i
    sees key j if j <= i + Lk - Lq (bottom-right, as FlashAttention; SDPA aligns top-left). Every query sees the
    whole prefix. Masks, windows and softcap apply only to the input's keys. A query that sees no key and no prefix
    returns 0.

    Differentiable in `query`, `key`, `value` and every tensor of the state, also through `lse`.

    Args:
        query: [B, Hq, Lq, D], float16, bfloat16, float32 or float64; any strides.
        key, value: [B, Hkv, Lk, D] and [B, Hkv, Lk, Dv], the dtype and device of `query`; Hq % Hkv == 0, each
            key/value head serving Hq / Hkv consecutive query heads.
        state: the prefix, with Hq or Hkv heads. Its dtype is its own; float32 under a half-precision model is
            the normal case.
        attn_mask: broadcastable to [B, Hq, Lq, Lk]; bool (True = visible) or added to the scores, in float64 only to
            those of float64 queries.
        is_causal: hide the keys right of the diagonal. Goes together with `attn_mask`.
        scale: factor on Q·Kᵀ; default 1/sqrt(D).
        window: (left, right): row i sees the keys from `left` before to `right` after its diagonal position;
            -1 is unbounded (FlashAttention's `window_size`).
        softcap: scores become softcap · tanh(scores / softcap), before the mask. Not applied to the prefix.
        causal_offset: row i has its diagonal at key i + causal_offset; default Lk - Lq.
        key_start, key_stop: [B] int, the first visible key of each batch row and the end of its visible keys, for
            padded batches (left padding: key_start; per-row lengths: key_stop). They do not move the diagonal; beyond
            the keys they hide nothing.
        state_index: [B] int, which state of a stack each batch row uses; -1 for none.
        return_lse: also return the log of the denominator.
        backend: "triton" (fused kernels, GPUs), "torch" (PyTorch's fused attention, any device), "reference" (plain
            formula) or None, to choose; NTK_KERNELS_BACKEND sets the default.

    Returns:
        out [B, Hq, Lq, Dv] in the dtype of `query`; with `return_lse` also lse [B, Hq, Lq], natural logarithm, in
        float32 (float64 for float64 inputs), -inf for a row that sees nothing.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what it must be and what it got.
        NotImplementedError: the backend asked for by name cannot serve the call.

    Source: arXiv 2406.14036, Algorithm 2; `ntk_kernels.reference.ntk_attention` is this definition as code.
    """
    call = None
    if not torch.compiler.is_compiling():
        result, call = _shortcuts.take(
            query, key, value, state, (state_index, attn_mask, key_start, key_stop), window, return_lse,
            (is_causal, scale, softcap, causal_offset, backend),
        )  # fmt: skip
        if result is not None:
            return result
    query, key, value = autocast(query, key, value)
    checks.check_qkv(query, key, value)
    checks.check_bool("return_lse", return_lse)
    scale = check_options(query, state, scale, is_causal, window, softcap)
    if causal_offset is not None:
        checks.check_int("causal_offset", causal_offset)
        if not is_causal and window is None:
            raise ValueError("`causal_offset` must come with `is_causal` or `window`, got neither")
    if attn_mask is not None:
        checks.check_attn_mask(attn_mask, query, key)
    for name, tensor in (("key_start", key_start), ("key_stop", key_stop)):
        if tensor is not None:
            checks.check_sequence_tensor(name, tensor, query.shape[0], "B", query)
    check_state(state, query, key, value, state_index, query.shape[0])

    left, right = window or (-1, -1)
    offset = key.shape[2] - query.shape[2] if causal_offset is None else causal_offset
    hides_by_number = attn_mask is not None or key_start is not None or key_stop is not None or left >= 0 or right >= 0
    is_aligned = offset == 0 and key.shape[2] == query.shape[2]
    is_square = not hides_by_number and (is_aligned or not is_causal)
    backend = choose_backend(backend, query, key, value, attn_mask, softcap, is_square=is_square)
    if backend == "reference":
        if state_index is not None and not torch.compiler.is_compiling():
            checks.check_values(Inputs(query, key, value, state_tensors(state, state_index)))
        return reference.ntk_attention(
            query, key, value, state, attn_mask=attn_mask, is_causal=is_causal, scale=scale, window=window,
            softcap=softcap, causal_offset=causal_offset, key_start=key_start, key_stop=key_stop,
            state_index=state_index, return_lse=return_lse,
        )  # fmt: skip
    feature_map, feature_scale = features_of(state, scale)
    inputs = Inputs(
        query, key, value, state_tensors(state, state_index), attn_mask=attn_mask, key_start=key_start,
        key_stop=key_stop, scale=scale, softcap=softcap or 0.0, window_left=left,
        window_right=0 if is_causal else right, causal_offset=offset, backend=backend, feature_map=feature_map,
        feature_scale=feature_scale,
    )  # fmt: skip
    if call is not None and query.device.type != "meta":  # there the op's fake tells shapes
        return _shortcuts.learn(call, inputs, return_lse)
    out, lse = library.attention(inputs)
    return (out, lse) if return_lse else out
