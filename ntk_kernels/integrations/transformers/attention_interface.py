"""The attention implementation "ntk": the function that transformers calls instead of its own attention functions."""

import math
import warnings
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import sdpa_mask

from ...attention import ntk_attention
from ...decode import ntk_attention_decode
from ...state import PrefixState
from ...varlen import ntk_attention_varlen
from .attention_modules import find_shape
from .observer import Observer

IMPLEMENTATION = "ntk"  # no part of it may be a word that transformers looks for ("flash", "sdpa", "paged|", ...)
CHILD = "ntk_prefix"
# Arguments of some models that change which keys are visible, or the result.
_UNSUPPORTED = ("cache", "indices", "block_indices", "sinks", "head_mask")
_warned: set[str] = set()


class PrefixSource(Protocol):
    """The interface of the child `ntk_prefix` of an attention module."""

    def state_and_index(self, batch: int) -> tuple[PrefixState | None, Tensor | None]:
        """Returns the state for a batch of `batch` rows, and which state of a stack each row uses.

        The state is None for no prefix. The index is None for a single state, else int [batch] with -1 for no state, or
        shorter if each row of the batch has become several rows side by side (beams).
        """
        ...


def ntk_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes attention with the prefix of `module`, called by transformers' `AttentionInterface`.

    Args:
        query, key, value: [B or 1, Hq, Lq, D], [B, Hkv, Lk, D] and [B, Hkv, Lk, Dv], rotated, the cache included.
        attention_mask: [B or 1, Hq or 1, Lq, Lk], bool (True = visible) or added to the scores; sliding windows are
            part of it. None: all keys, or, if the module is causal and Lq > 1, row i sees keys 0 to i (the first rows
            of a cache with room for more).
        dropout: not applied; a warning says so.
        s_aux: [Hq], a logit per head that takes its share of the softmax and adds no value (attention sinks).
        position_bias: [B or 1, Hq, Lq, Lk], added to the scores.
        kwargs: with `cu_seq_lens_q` and `cu_seq_lens_k` [N + 1] the tokens of the one batch row are N sequences that do
            not see each other (`DataCollatorWithFlattening(return_flash_attn_kwargs=True)`). If the layer is causal and
            has no masks beside its window, `ntk_attention_varlen` serves them and `attention_mask` is not looked at.

    Returns:
        out [B, Lq, Hq, Dv], 0 for a query that sees neither key nor prefix, and None for the attention weights.

    Raises:
        NotImplementedError: the model passes an argument that changes attention in a way unknown here, or, to a module
            with a prefix, a part of its heads (tensor parallelism).
    """
    _check_call(module, dropout, kwargs)
    if query.shape[0] != key.shape[0]:  # learned queries, shared by all rows
        query = query.expand(key.shape[0], -1, -1, -1)
    seq_q, head_dim = query.shape[2], query.shape[3]
    scale = 1 / math.sqrt(head_dim) if scaling is None else scaling
    query_scale = _query_scale(module, scale, head_dim)
    child = getattr(module, CHILD, None)
    if child is not None:
        _check_all_heads(module, query)
    state, state_index = (None, None) if child is None else _prefix_of(child, query.shape[0], query_scale)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_layer_causal = bool(is_causal)
    is_causal = is_layer_causal and attention_mask is None and seq_q > 1
    if is_causal and key.shape[2] > seq_q:  # a static cache, filled with these tokens only
        key, value = key[:, :, :seq_q], value[:, :, :seq_q]
    mask = _mask(attention_mask, position_bias, key.shape[2])
    cu_seqlens, window = kwargs.get("cu_seq_lens_q"), None
    if cu_seqlens is not None:
        bounds = _bounds(query, cu_seqlens, kwargs.get("cu_seq_lens_k"))
        if is_layer_causal and position_bias is None:
            window = _window_of_packed(module, attention_mask, kwargs.get("sliding_window"))
        if window is None:
            mask = _within_sequences(mask, is_causal, *bounds, query.shape[2], key.shape[2])
            is_causal = False
    if isinstance(child, Observer):
        child.observe(query, key, value, mask, scale=scale, query_scale=query_scale, softcap=softcap, sink=s_aux)
    options: dict[str, Any] = {
        "scale": scale,
        "softcap": softcap,
        "state_index": state_index,
        "return_lse": s_aux is not None,
    }
    if window is not None:
        out = _attend_packed(query, key, value, state, *bounds, window=window, kwargs=kwargs, **options)
    elif seq_q == 1 and mask is None and not torch.is_grad_enabled():
        out = ntk_attention_decode(query, key, value, None, state, is_causal=False, **options)
    else:
        offset = 0 if is_causal else None
        out = ntk_attention(
            query, key, value, state, attn_mask=mask, is_causal=is_causal, causal_offset=offset, **options
        )
    if s_aux is not None:
        out, lse = out
        sink = s_aux.reshape(1, -1, 1).to(lse.dtype)
        out = (out * torch.sigmoid(lse - sink).unsqueeze(-1)).to(out.dtype)  # e^lse / (e^lse + e^sink)
    return out.transpose(1, 2).contiguous(), None


def _check_call(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"the attention implementation {IMPLEMENTATION!r} does not support `{name}`, which "
                f"{type(module).__name__} gives it"
            )
    if dropout:
        _warn(
            f"dropout of attention weights is not applied, the model asks for {dropout}; set it to 0 in the model's "
            f"configuration to train without this warning"
        )
    if kwargs.get("output_attentions"):
        _warn(
            "attention weights are never computed: with `output_attentions` a model returns `attentions` that are "
            "empty, or None for each layer"
        )


def _bounds(query: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns where the sequences of packed queries and keys begin."""
    if query.shape[0] != 1:
        raise ValueError(f"`cu_seq_lens_q` must come with one batch row of packed sequences, got {query.shape[0]}")
    cu_seqlens_q = cu_seqlens_q.to(query.device)
    return cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k.to(query.device)


def _window_of_packed(
    module: nn.Module, attention_mask: Tensor | None, sliding_window: int | None
) -> tuple[int, int] | None:
    """Returns the window of a causal layer whose mask hides nothing else within a sequence; None for other layers."""
    config: Any = getattr(module, "config", None)
    kinds, number = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    kind = None if kinds is None or number is None else kinds[number]
    if kind not in (None, "full_attention", "sliding_attention") or getattr(config, "attention_chunk_size", None):
        return None
    if attention_mask is not None and (attention_mask.dtype != torch.bool or attention_mask.shape[1] != 1):
        return None
    if sliding_window is not None:
        return sliding_window - 1, -1
    has_window = kind == "sliding_attention" or (kind is None and getattr(config, "sliding_window", None) is not None)
    return None if has_window else (-1, -1)


def _within_sequences(
    mask: Tensor | None, is_causal: bool, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, seq_q: int, seq_k: int
) -> Tensor:
    """Returns the mask with keys of other sequences hidden."""
    i, j = (torch.arange(length, device=cu_seqlens_q.device) for length in (seq_q, seq_k))
    of_query, of_key = (
        torch.bucketize(x, bounds[1:].contiguous(), right=True) for x, bounds in ((i, cu_seqlens_q), (j, cu_seqlens_k))
    )
    visible = of_query[:, None] == of_key
    if is_causal:
        visible = visible & (j <= i[:, None])
    if mask is None:
        return visible
    return mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, -math.inf)


def _attend_packed(
    query: Tensor, key: Tensor, value: Tensor, state: PrefixState | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    *, window: tuple[int, int], kwargs: dict[str, Any], state_index: Tensor | None, return_lse: bool, **options: Any,
) -> Any:  # fmt: skip
    """Returns what `ntk_attention` would of one batch row that is several sequences."""
    if state_index is not None:
        state_index = state_index.expand(cu_seqlens_q.shape[0] - 1)
    longest_q, longest_k = kwargs.get("max_length_q"), kwargs.get("max_length_k")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out, lse = ntk_attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, longest_q if isinstance(longest_q, int) else q.shape[0],
        longest_k if isinstance(longest_k, int) else k.shape[0], state, is_causal=True, window=window,
        state_index=state_index, return_lse=True, **options,
    )  # fmt: skip
    out = out.transpose(0, 1)[None]
    return (out, lse[None]) if return_lse else out


def _check_all_heads(module: nn.Module, query: Tensor) -> None:
    """Refuses a part of the module's heads: the Hkv heads of a state would be taken for them if they are as many."""
    shape = find_shape(module)
    if shape is not None and query.shape[1] < shape.num_heads:
        raise NotImplementedError(
            f"a prefix of {type(module).__name__} must meet all Hq={shape.num_heads} query heads of the module, got "
            f"{query.shape[1]}; under tensor parallelism, where a rank has a part of the heads, none is supported"
        )


def _warn(what: str) -> None:
    if not torch.compiler.is_compiling() and what not in _warned:
        _warned.add(what)
        warnings.warn(f"ntk_kernels: {what}", stacklevel=4)


def _query_scale(module: nn.Module, scale: float, head_dim: int) -> float:
    """Returns the factor that the model has put on the query already: 1/sqrt(D) in OPT and Whisper, 1 in others."""
    own = getattr(module, "scaling", None)
    comes_scaled = scale == 1.0 and isinstance(own, float) and math.isclose(own, 1 / math.sqrt(head_dim))
    return own if comes_scaled else 1.0


def _prefix_of(child: PrefixSource, batch: int, query_scale: float) -> tuple[PrefixState | None, Tensor | None]:
    """Returns state and index of `child` for a batch of queries that have been multiplied by `query_scale`."""
    state, index = child.state_and_index(batch)
    if state is None:
        return None, None
    if index is not None and index.shape[0] != batch:
        if index.dim() != 1 or index.shape[0] == 0 or batch % index.shape[0]:
            raise ValueError(
                f"`{CHILD}` must give the state of each batch row, [batch={batch}] or a divisor of it, got "
                f"{list(index.shape)}"
            )
        index = index.repeat_interleave(batch // index.shape[0])  # the beams of a row lie side by side
    if state.k is not None and query_scale != 1.0:  # φ takes the query without that factor
        feature_scale = math.sqrt(query_scale) if state.feature_scale is None else state.feature_scale
        state = replace(state, feature_scale=feature_scale / query_scale)
    return state, index


def _mask(attention_mask: Tensor | None, position_bias: Tensor | None, seq_k: int) -> Tensor | None:
    """Returns both masks as one, cut to the `seq_k` keys that exist."""
    if attention_mask is not None:
        attention_mask = attention_mask[..., :seq_k]
    if position_bias is None:
        return attention_mask
    position_bias = position_bias[..., :seq_k]
    if attention_mask is None:
        return position_bias
    if attention_mask.dtype == torch.bool:
        return position_bias.masked_fill(~attention_mask, -math.inf)
    return position_bias + attention_mask


def _ntk_mask(
    *args: Any, config: PretrainedConfig | None = None, allow_is_causal_skip: bool = True, **kwargs: Any
) -> Tensor | None:
    """Returns the mask of SDPA.

    Models that share keys between layers (Gemma 4) slice it, and guard against None for "sdpa" only, by name. They
    always get one.
    """
    if getattr(config, "num_kv_shared_layers", None):
        allow_is_causal_skip = False
    return sdpa_mask(*args, config=config, allow_is_causal_skip=allow_is_causal_skip, **kwargs)


AttentionInterface.register(IMPLEMENTATION, ntk_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, _ntk_mask)  # without one, transformers drops padding masks silently
