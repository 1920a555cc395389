"""`ntk_attention`: check the arguments, choose a backend, call it."""

import math

import torch
from torch import Tensor

from . import checks, library, reference
from .dispatch import choose_backend
from .state import PrefixState

_MAX_FUSED_RANK = 64  # what a kernel holds beside its tile of the output


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
    whole prefix; masks, windows and softcap concern the input's keys only. A row that sees nothing gives 0.

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
    is_square = (
        attn_mask is None and key_start is None and key_stop is None and left < 0 and right < 0
        and not (is_causal and (offset != 0 or key.shape[2] != query.shape[2]))
    )  # fmt: skip
    backend = choose_backend(backend, query, key, value, state, attn_mask, softcap, is_square=is_square)
    if backend == "reference":
        if state_index is not None and not torch.compiler.is_compiling():
            checks.check_values(query, key, state_index, state.num_states)
        return reference.ntk_attention(
            query, key, value, state, attn_mask=attn_mask, is_causal=is_causal, scale=scale, window=window,
            softcap=softcap, causal_offset=causal_offset, key_start=key_start, key_stop=key_stop,
            state_index=state_index, return_lse=return_lse,
        )  # fmt: skip

    out, lse = library.attention(
        query,
        key,
        value,
        *state_arguments(state, backend),
        state_index,
        _four_dimensional(attn_mask),
        key_start,
        key_stop,
        None,  # no packed sequences
        None,
        0,
        0,
        None if state is None else state.feature_map,
        feature_scale_of(state, scale),
        scale,
        softcap or 0.0,
        left,
        0 if is_causal else right,
        offset,
        backend,
    )
    return (out, lse) if return_lse else out


def check_options(query, state, scale, is_causal, window, softcap) -> float:
    """Checks what both public functions take, and gives the scale."""
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    checks.check_finite("scale", scale)
    checks.check_bool("is_causal", is_causal)
    if softcap is not None:
        checks.check_finite("softcap", softcap, positive=True)
    if window is not None:
        checks.check_window(window)
    if isinstance(state, PrefixState) and scale < 0 and state.k is not None and state.feature_scale is None:
        raise ValueError(f"`scale` must not be negative for a state without feature_scale, got {scale}")
    return scale


def check_state(state, query: Tensor, key: Tensor, value: Tensor, state_index: Tensor | None, batch: int) -> None:
    """`state` is None or a state that fits the call, and `state_index` [B] comes with a state only."""
    if state is None:
        if state_index is not None:
            raise ValueError("`state_index` must come with a `state`, got `state` = None")
    elif isinstance(state, PrefixState):
        checks.check_state_fits(state, query, key, value, state_index, batch)
    else:
        hint = ""
        if isinstance(state, torch.nn.Module):
            hint = ", which gives one when it is called"
        elif isinstance(state, Tensor):
            hint = "; a mask goes in `attn_mask`"
        raise TypeError(f"`state` must be a PrefixState, got {type(state).__name__}{hint}")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as an op that autocast knows would take them, before they are checked."""
    if not isinstance(tensors[0], Tensor):
        return tensors
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )


def feature_scale_of(state: PrefixState | None, scale: float) -> float:
    if state is None or state.k is None:
        return 1.0  # unused without features
    return math.sqrt(scale) if state.feature_scale is None else state.feature_scale


def _four_dimensional(attn_mask: Tensor | None) -> Tensor | None:
    if attn_mask is None:
        return None
    return attn_mask[(None,) * (4 - attn_mask.dim())]


def state_arguments(state: PrefixState | None, backend: str, *, few_rows: bool = False) -> list[Tensor | None]:
    """z, z_b, k, centers, log_scale, row_keys, row_values, row_bias as the ops take them (`inputs.py`)."""
    if state is None:
        return [None] * 8
    k, log_scale = state.k, state.log_scale
    z, z_b = (state.z_a, state.z_b) if _keeps_low_rank(state, backend, few_rows) else (state.full_z, None)
    if state.centers is None:
        heads = 2 if state.is_stack else 1
        z, z_b, k, log_scale = (
            None if tensor is None else tensor.unsqueeze(heads) for tensor in (z, z_b, k, log_scale)
        )
    tensors = [z, z_b, k, state.centers, log_scale, state.keys, state.values, state.bias]
    return tensors if state.is_stack else [None if tensor is None else tensor.unsqueeze(0) for tensor in tensors]


def _keeps_low_rank(state: PrefixState, backend: str, few_rows: bool) -> bool:
    """Whether the pair saves work: for many rows and few features it costs less to multiply it out once."""
    if backend != "triton" or state.z_a is None or not (few_rows or state.feature_map == "taylor2"):
        return False
    return 0 < state.rank <= min(state.value_dim, _MAX_FUSED_RANK)
