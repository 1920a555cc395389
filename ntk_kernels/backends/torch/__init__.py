"""The `torch` backend: PyTorch's fused attention over the input's keys, plus the prefix, merged by lse.

Runs wherever PyTorch has a fused attention, forward and backward, in O(L) memory:

1. *Keys.* The query rows are cut into tiles of which each sees a few ranges of keys (`row_tiles.py`); each range is one
   fused call (`fused.py`), and ranges merge by lse. Most calls are one tile with one range.
2. *Prefix.* The state's own rows and its linear-attention term join (out, lse), on GPUs by the Triton kernels, if they
   take such tensors, else in chunks of rows (`prefix_term.py`).

The backward gives the *combined* out and lse to the fused backward, which makes its dQ, dK and dV exact, and adds the
prefix's own gradients (formulas in `reference/attention.py`).
"""

from functools import partial

import torch
from torch import Tensor

from ...dispatch import kernels_lack
from ...inputs import DecodeInputs, Inputs
from ..low_rank import full_state, low_rank_grads
from ..results import empty_grad, empty_out, in_layout, lse_dtype
from . import cached, fused, packed
from .lse import merge
from .prefix_term import Prefix, merge_prefix, prefix_backward
from .row_tiles import row_tiles, tile_bias, without_hidden_keys
from .sums import sum_features, sum_features_backward

__all__ = ["backward", "decode", "forward", "sum_features", "sum_features_backward"]


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Lq, Dv] and lse [B, Hq, Lq]."""
    if inputs.cu_seqlens_q is not None:
        return packed.forward(inputs, forward)
    inputs = _with_key_range_as_mask(inputs)
    query = inputs.query
    band = (inputs.window_left, inputs.window_right, inputs.causal_offset)
    out, lse = _keys_forward(query, inputs.key, inputs.value, inputs.attn_mask, inputs.scale, band)
    if inputs.has_state and query.numel():
        if kernels := _kernels_for(inputs):
            kernels.add_prefix(inputs, out, lse)
        else:
            prefix = Prefix(query, *_state_of(inputs), inputs.state_index, lse.dtype, _prefix_options(inputs))
            merge_prefix(prefix, query, out, lse)
    return out, lse


def decode(inputs: DecodeInputs) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Lq, Dv] and lse [B, Hq, Lq]."""
    out, lse = cached.forward(inputs, _keys_forward)
    if inputs.has_state and inputs.query.numel():
        z, k, *rest = _state_of(inputs)
        # Whatever shares a head of the state as rows of that head: a product over few rows would wait for Z each time.
        heads, shared = (rest[2] if k is None else k).shape[1], inputs.state_index is None
        query, rows, lse_rows = (cached.rows_of_heads(tensor, heads, shared) for tensor in (inputs.query, out, lse))
        prefix = Prefix(query, z, k, *rest, inputs.state_index, lse.dtype, _prefix_options(inputs))
        merge_prefix(prefix, query, rows, lse_rows)
        for tensor, packed in ((out, rows), (lse, lse_rows)):
            if packed.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():  # not a view of it
                tensor.copy_(cached.heads_of_rows(packed, tensor.shape))
    return out, lse


def backward(grad_out, grad_lse, inputs: Inputs, out, lse, needs_grad) -> tuple[Tensor, ...]:
    """Gradients of query, key, value and the eight tensors of the state; those that `needs_grad` does not ask for
    have no elements."""
    if inputs.cu_seqlens_q is not None:
        return packed.backward(grad_out, grad_lse, inputs, out, lse, needs_grad, backward)
    inputs = _with_key_range_as_mask(inputs)
    query, key, value = inputs[:3]
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads: list[Tensor | None] = [None] * len(needs_grad)
    kernels = _kernels_for(inputs) if inputs.has_state and query.numel() else None
    grad_query = None
    if inputs.has_state and not kernels:
        grad_query, *grads[3:] = _prefix_grads(grad_out, grad_lse, inputs, out, lse, needs_grad)
    if any(needs_grad[:3]):
        band = (inputs.window_left, inputs.window_right, inputs.causal_offset)
        key_grads = _keys_backward(
            grad_out, grad_lse, query, key, value, inputs.attn_mask, inputs.scale, band, out, lse
        )
        if grad_query is not None:
            key_grads[0] = grad_query.add_(key_grads[0])
        for i, tensor in enumerate((query, key, value)):
            if needs_grad[i]:
                grads[i] = in_layout(key_grads[i], partial(empty_grad, tensor))
    if kernels and (needs_grad[0] or any(needs_grad[3:])):
        grads[3:] = kernels.add_prefix_backward(grad_out, grad_lse, inputs, out, lse, grads[0], needs_grad)
    return tuple(grad if needed else query.new_empty(0) for grad, needed in zip(grads, needs_grad, strict=True))


def _prefix_grads(grad_out, grad_lse, inputs: Inputs, out, lse, needs_grad) -> list[Tensor | None]:
    """Gradients of the query, through the prefix, and of the state's eight tensors, by PyTorch's operations."""
    delta = (grad_out.to(lse.dtype) * out).sum(-1)
    if grad_lse is not None:
        delta.sub_(grad_lse)
        delta.masked_fill_(lse == -torch.inf, 0)  # of rows that see nothing, whatever the gradient of their lse
    state = _state_of(inputs)
    prefix = Prefix(inputs.query, *state, inputs.state_index, lse.dtype, _prefix_options(inputs))
    needs_z = needs_grad[3] or needs_grad[4]
    grad_query, grad_z, *others = prefix_backward(
        prefix, grad_out, inputs.query, lse, delta, state, (needs_grad[0], needs_z, *needs_grad[5:])
    )
    return [grad_query, *low_rank_grads(inputs, grad_z), *others]


def _kernels_for(inputs: Inputs):
    """The module of the Triton kernels, if they take the tensors of the call and are faster there; else None."""
    if not inputs.query.is_cuda or kernels_lack(inputs.query, inputs.value) is not None:
        return None
    from .. import triton as kernels  # not at import: the package works without triton

    return kernels


def _state_of(inputs: Inputs | DecodeInputs) -> list[Tensor | None]:
    """z, k, centers, log_scale, row_keys, row_values, row_bias."""
    z, _, *rest = full_state(inputs)
    return [z, *rest]


def _prefix_options(inputs: Inputs | DecodeInputs) -> tuple:
    return inputs.feature_map, inputs.feature_scale, inputs.scale


def _with_key_range_as_mask(inputs: Inputs) -> Inputs:
    """The first and last visible key of each batch row as a mask [B, 1, 1, Lk], or within the mask there is."""
    if inputs.key_start is None and inputs.key_stop is None:
        return inputs
    j = torch.arange(inputs.key.shape[2], device=inputs.key.device)
    visible = torch.ones_like(j, dtype=torch.bool).expand(inputs.key.shape[0], -1)
    if inputs.key_start is not None:
        visible = visible & (j >= inputs.key_start[:, None])
    if inputs.key_stop is not None:
        visible = visible & (j < inputs.key_stop[:, None])
    visible = visible[:, None, None, :]
    mask = inputs.attn_mask
    if mask is not None:
        visible = visible & mask if mask.dtype == torch.bool else mask.masked_fill(~visible, -torch.inf)
    return inputs._replace(attn_mask=visible, key_start=None, key_stop=None)


def _wide_enough(attn_mask: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """The tensors, in float32 where an additive mask is more precise than they are."""
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        dtype = torch.promote_types(attn_mask.dtype, tensors[0].dtype)
        if dtype != tensors[0].dtype and tensors[0].dtype.itemsize < 4:
            return [tensor.to(torch.float32) for tensor in tensors]
    return list(tensors)


def _keys_forward(query, key, value, attn_mask, scale, band) -> tuple[Tensor, Tensor]:
    """Attention over the input's keys alone."""
    q, k, v = _wide_enough(attn_mask, query, key, value)
    tiles = row_tiles(q.shape[2], k.shape[2], *band, attn_mask) if query.numel() else []
    if len(tiles) == 1:
        tile_out, tile_lse = _tile_forward(tiles[0], q, k, v, attn_mask, scale, band)
        return in_layout(tile_out, partial(empty_out, query, value)), tile_lse.contiguous()
    out = empty_out(query, value)
    lse = torch.empty(query.shape[:3], dtype=lse_dtype(query), device=query.device)
    for tile in tiles:
        rows = slice(tile.start, tile.stop)
        out[:, :, rows], lse[:, :, rows] = _tile_forward(tile, q, k, v, attn_mask, scale, band)
    return out, lse


def _tile_forward(tile, q, k, v, attn_mask, scale, band) -> tuple[Tensor, Tensor]:
    q = q[:, :, tile.start : tile.stop]
    out = lse = None
    for keys in tile.ranges:
        tile_k, tile_v, bias = _range_of(keys, tile, q, k, v, attn_mask, band)
        part, part_lse = fused.forward(q, tile_k, tile_v, scale, keys.is_causal, bias)
        out, lse = (part, part_lse) if out is None else merge(out, lse, part, part_lse)
    if out is None:
        shape = (*q.shape[:3], v.shape[3])
        return q.new_zeros(shape), torch.full(shape[:3], -torch.inf, dtype=lse_dtype(q), device=q.device)
    return out, lse


def _range_of(keys, tile, q, k, v, attn_mask, band) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values of a range, and what to add to its scores."""
    k, v = (tensor[:, :, keys.start : keys.stop] for tensor in (k, v))
    if not keys.has_bias:
        return k, v, None
    bias = tile_bias(tile, keys, *band, attn_mask, like=q)
    return *without_hidden_keys(bias, k, v), bias


def _keys_backward(grad_out, grad_lse, query, key, value, attn_mask, scale, band, out, lse) -> list[Tensor]:
    """Gradients of query, key and value through the input's keys."""
    q, k, v, out, grad_out = _wide_enough(attn_mask, query, key, value, out, grad_out)
    if grad_lse is not None:
        # dS = P (dO·v + dlse - Δ): one more value column of ones, whose gradient is dlse and whose out is 0. The lse of
        # a row that sees nothing has none, whatever is given for it.
        grad_lse = grad_lse.masked_fill(lse == -torch.inf, 0)
        v = torch.cat([v, v.new_ones(*v.shape[:3], 1)], dim=-1)
        out = torch.nn.functional.pad(out, (0, 1))
        grad_out = torch.cat([grad_out, grad_lse.unsqueeze(-1).to(grad_out.dtype)], dim=-1)
    tiles = row_tiles(q.shape[2], k.shape[2], *band, attn_mask) if query.numel() else []
    whole = len(tiles) == 1 and [(keys.start, keys.stop) for keys in tiles[0].ranges] == [(0, k.shape[2])]
    grads = [] if whole else [torch.zeros(t.shape, dtype=lse.dtype, device=t.device) for t in (q, k, v)]
    for tile in tiles:
        rows = slice(tile.start, tile.stop)
        for keys in tile.ranges:
            columns = slice(keys.start, keys.stop)
            tile_k, tile_v, bias = _range_of(keys, tile, q, k, v, attn_mask, band)
            part = fused.backward(
                grad_out[:, :, rows], q[:, :, rows], tile_k, tile_v, out[:, :, rows], lse[:, :, rows], scale,
                keys.is_causal, bias,
            )  # fmt: skip
            if whole:
                grads = list(part)
            else:
                for grad, grad_part, where in zip(grads, part, (rows, columns, columns), strict=True):
                    grad[:, :, where].add_(grad_part)
    grads[2] = grads[2][..., : value.shape[3]]
    return grads
