"""NTK-Attention and exact prefix attention (arXiv 2406.14036, Algorithms 2 and 1), every step spelled out.

For batch row b, query head h, query row i:

    s_ij  = scale · q_i·k_j              over the keys j that row i sees (softcap, then mask)
    s_ij  = scale · q_i·κ_j + bias_j     over the rows (κ_j, v_j) of the state, which every row sees
    x_i   = feature_scale · q_i
    w_ic  = exp(scale · q_i·μ_c + β_c)   one weight per centre; without centres one c with μ = 0
    N_i   = Σ_c w_ic · φ(x_i)ᵀ Z_c
    M_i   = max(0, Σ_c w_ic · φ(x_i)·k_c)
    out_i = (Σ_j e^{s_ij} v_j + N_i) / (Σ_j e^{s_ij} + M_i)
    lse_i = log(Σ_j e^{s_ij} + M_i)

A row whose denominator is empty (no visible key, M_i = 0) gives out = 0, lse = -inf and gradient 0. Where a prefix, or
one of its centres, has no mass (M_i = 0, or φ(x_i)·k_c = 0), nothing bounds its weight w_ic e^{-lse_i} in the output;
there it is cut off at e^40, so that the output stays finite (the fused backends differentiate it as if it were not).

Gradients (what the fused backends compute; here autograd does). With P_ij = e^{s_ij - lse_i}, the gradient
dO_i of out_i and Δ_i = dO_i·out_i (minus the gradient of lse_i, if any):

    dS_ij = P_ij (dO_i·v_j − Δ_i)        the usual flash backward, with the combined out and lse
    u_ic  = w_ic e^{-lse_i}              one more "probability" per centre, without its φ
    dφ_i  = Σ_c u_ic (Z_c dO_i − 1[M_i>0] Δ_i k_c)
    dZ_c  = Σ_i u_ic φ_i dO_iᵀ           dk_c = −Σ_i u_ic 1[M_i>0] Δ_i φ_i
    dlogw_ic = u_ic φ_i·(Z_c dO_i − 1[M_i>0] Δ_i k_c), which flows into β_c, μ_c and q_i.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .feature_maps import feature_map


def visible_keys(
    seq_q: int, seq_k: int, is_causal: bool, window: tuple[int, int] | None, causal_offset: int | None,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """Returns [Lq, Lk] bool, True where row i sees key j: i + offset - left <= j <= i + offset + right."""
    offset = seq_k - seq_q if causal_offset is None else causal_offset
    left, right = window or (-1, -1)
    diagonal = torch.arange(seq_q, device=device)[:, None] + offset
    j = torch.arange(seq_k, device=device)[None, :]
    visible = torch.ones(seq_q, seq_k, dtype=torch.bool, device=device)
    if is_causal:
        visible &= j <= diagonal
    if left >= 0:
        visible &= j >= diagonal - left
    if right >= 0:
        visible &= j <= diagonal + right
    return visible


def _scores(
    query: Tensor, key: Tensor, scale: float, attn_mask: Tensor | None, is_causal: bool,
    window: tuple[int, int] | None, softcap: float | None, causal_offset: int | None,
    key_start: Tensor | None = None, key_stop: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Returns the logits [B, Hq, Lq, Lk] over the input's keys, -inf where a key is hidden."""
    key = key.repeat_interleave(query.shape[1] // max(key.shape[1], 1), dim=1)
    scores = scale * query @ key.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = visible_keys(query.shape[2], key.shape[2], is_causal, window, causal_offset, query.device)
    j = torch.arange(key.shape[2], device=query.device)
    if key_start is not None:
        visible = visible & (j >= key_start[:, None, None, None])
    if key_stop is not None:
        visible = visible & (j < key_stop[:, None, None, None])
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask.to(scores.dtype)
    return scores.masked_fill(~visible, -math.inf)


def ntk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Any = None,  # a PrefixState
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
    compute_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes the formula above; arguments, shapes and results as in `ntk_kernels.ntk_attention`.

    Every step is computed in `compute_dtype`, by default float64 for float64 inputs and float32 for all others. `lse`
    is returned in this dtype, `out` in the dtype of `query`.
    """
    dtype = compute_dtype or (torch.float64 if query.dtype == torch.float64 else torch.float32)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    num_heads = query.shape[1]

    def of_state(name: str) -> Tensor | None:  # [N?, Hs, ...] -> [B or 1, Hq, ...]; None if the state has none
        tensor = getattr(state, name, None)
        if tensor is None:
            return None
        tensor = tensor if state.is_stack else tensor[None]
        if state_index is not None:
            none = (state_index < 0).reshape(-1, *(1,) * (tensor.dim() - 1))
            tensor = tensor[state_index.long().clamp(min=0)].masked_fill(none, 0)
        return tensor.to(dtype).repeat_interleave(num_heads // tensor.shape[1], dim=1)

    def masked_if_absent(logits: Tensor) -> Tensor:  # batch rows with index -1 have no state
        none = torch.zeros(1, device=query.device).bool() if state_index is None else state_index < 0
        return logits.masked_fill(none[:, None, None, None], -math.inf)

    with nullcontext() if query.is_meta else torch.autocast(query.device.type, enabled=False):
        q, value = query.to(dtype), value.to(dtype)
        value = value.repeat_interleave(num_heads // max(value.shape[1], 1), dim=1)
        scores = _scores(
            q, key.to(dtype), scale, attn_mask, is_causal, window, softcap, causal_offset, key_start, key_stop
        )
        rows, row_bias = of_state("keys"), of_state("bias")
        if rows is not None:
            row_scores = scale * q @ rows.mT + (0 if row_bias is None else row_bias[:, :, None, :])
            scores = torch.cat([masked_if_absent(row_scores), scores], dim=-1)
            value = torch.cat([of_state("values").expand(*value.shape[:2], -1, -1), value], dim=-2)

        k = of_state("k")
        log_mass = torch.full_like(q[..., :1], -math.inf)
        if k is not None:
            z, centers, log_scale = of_state("full_z"), of_state("centers"), of_state("log_scale")
            if centers is None:  # one centre at the origin
                z, k, centers = z[:, :, None], k[:, :, None], q.new_zeros(1, 1, 1, q.shape[3])
                log_scale = None if log_scale is None else log_scale[:, :, None]
            log_w = masked_if_absent(scale * q @ centers.mT + (0 if log_scale is None else log_scale[:, :, None, :]))
            feature_scale = math.sqrt(scale) if state.feature_scale is None else state.feature_scale
            phi = feature_map(feature_scale * q, state.feature_map)
            masses = torch.einsum("bhir,bhcr->bhic", phi, k)  # of each centre, without its weight
            top = log_w.detach().masked_fill(masses == 0, -math.inf).amax(-1, keepdim=True)
            top = top.masked_fill(top == -math.inf, 0)
            log_v = torch.where(masses == 0, (log_w - top).clamp(max=40), log_w - top)  # 0 · inf = NaN
            mass = (log_v.exp() * masses).sum(-1, keepdim=True)
            log_mass = (top + mass.masked_fill(mass <= 0, 1).log()).masked_fill(mass <= 0, -math.inf)

        logits = torch.cat([scores, log_mass], dim=-1)
        empty = (logits == -math.inf).all(-1, keepdim=True)
        peak = logits.detach().amax(-1, keepdim=True).masked_fill(empty, 0)
        weights = (logits - peak).exp()
        log_total = weights.sum(-1, keepdim=True).masked_fill(empty, 1).log()
        lse = peak + log_total
        out = weights[..., :-1] @ value / log_total.exp()
        if k is not None:
            log_u = log_w - peak - log_total
            unbounded = (mass <= 0) | (masses == 0)
            log_u = torch.where(unbounded, log_u.clamp(max=40), log_u)
            out = out + torch.einsum("bhic,bhir,bhcrd->bhid", log_u.exp(), phi, z)
        out = out.masked_fill(empty, 0).to(query.dtype)
        lse = lse.masked_fill(empty, -math.inf).squeeze(-1)
    return (out, lse) if return_lse else out


def ntk_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    state: Any = None,  # a PrefixState
    *,
    state_index: Tensor | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes `ntk_attention` of each packed sequence.

    Arguments, shapes and results are those of `ntk_kernels.ntk_attention_varlen`.
    """
    outs, lses = [], []
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(bounds_q) - 1):
        rows, keys = slice(*bounds_q[b : b + 2]), slice(*bounds_k[b : b + 2])
        sequence = (tensor.transpose(0, 1)[None] for tensor in (query[rows], key[keys], value[keys]))
        index = None if state_index is None else state_index[b : b + 1]
        out, lse = ntk_attention(*sequence, state, state_index=index, return_lse=True, **options)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    # Rows that belong to no sequence see nothing.
    rest = (tensor.transpose(0, 1)[None] for tensor in (query[bounds_q[-1] :], key[:0], value[:0]))
    out, lse = ntk_attention(*rest, return_lse=True, compute_dtype=options.get("compute_dtype"))
    outs.append(out[0].transpose(0, 1))
    lses.append(lse[0])
    out, lse = torch.cat(outs), torch.cat(lses, dim=-1)
    return (out, lse) if return_lse else out


def ntk_attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor | None = None,
    state: Any = None,  # a PrefixState
    *,
    block_table: Tensor | None = None,
    key_start: Tensor | None = None,
    is_causal: bool = True,
    state_index: Tensor | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes `ntk_attention` of each sequence over its keys in the cache.

    Arguments, shapes and results are those of `ntk_kernels.ntk_attention_decode`.
    """
    outs, lses = [], []
    for b in range(query.shape[0]):
        row = slice(b, b + 1)
        key, value = key_cache[row], value_cache[row]
        if block_table is not None:
            length = cache_seqlens[b]
            pages = block_table[b, : -(-length // key_cache.shape[2])].long()
            key, value = (cache[pages].transpose(0, 1).flatten(1, 2)[None] for cache in (key_cache, value_cache))
        if cache_seqlens is not None:
            key, value = key[:, :, : cache_seqlens[b]], value[:, :, : cache_seqlens[b]]
        out, lse = ntk_attention(
            query[row], key, value, state, is_causal=is_causal, key_start=None if key_start is None else key_start[row],
            state_index=None if state_index is None else state_index[row], return_lse=True, **options,
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
    if not outs:  # no batch row
        return ntk_attention(query, key_cache[:0], value_cache[:0], return_lse=return_lse)
    out, lse = torch.cat(outs), torch.cat(lses)
    return (out, lse) if return_lse else out


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    causal_offset: int | None = None,
) -> Tensor:
    """Computes exact attention over a prefix that every row sees and the input: softmax([Q·P_Kᵀ, Q·Kᵀ]·scale)·[P_V; V].

    `prefix_key` is [Hkv, m, D] and `prefix_value` [Hkv, m, Dv], or with a leading B one for each batch row; everything
    else is as in `ntk_attention`. Masks and softcap apply to the input's keys only.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    group = query.shape[1] // key.shape[1]
    prefix_key, prefix_value, value = (
        tensor.repeat_interleave(group, dim=-3).expand(query.shape[0], -1, -1, -1)
        for tensor in (prefix_key, prefix_value, value)
    )
    scores = _scores(query, key, scale, attn_mask, is_causal, window, softcap, causal_offset)
    scores = torch.cat([scale * query @ prefix_key.mT, scores], dim=-1)
    return torch.softmax(scores, dim=-1) @ torch.cat([prefix_value, value], dim=-2)
