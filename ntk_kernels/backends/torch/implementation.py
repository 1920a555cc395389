"""The ops by PyTorch's fused attention over the input's keys, plus the prefix, merged by lse.

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

from ...inputs import DecodeInputs, Inputs, Leaves, StateTensors
from ..low_rank import pair_grads, with_full_z
from ..results import empty_grad, empty_out, in_layout, lse_dtype
from ..triton import kernels_lack
from . import add_prefix, cached, fused, packed
from .lse import merge
from .prefix_term import Prefix, merge_prefix, prefix_backward
from .row_tiles import row_tiles, tile_bias, without_hidden_keys
from .sums import sum_features, sum_features_backward

__all__ = ["backward", "decode", "forward", "sum_features", "sum_features_backward"]


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Returns out [B, Hq, Lq, Dv] and lse [B, Hq, Lq]."""
    _refuse_softcap(inputs)
    if inputs.cu_seqlens_q is not None:
        return packed.forward(inputs, forward)
    inputs = _with_key_range_as_mask(inputs)
    query = inputs.query
    out, lse = _keys_forward(query, inputs.key, inputs.value, inputs.attn_mask, inputs.scale, inputs.band)
    if inputs.state.exists and query.numel():
        inputs = with_full_z(inputs)
        if kernels := _kernels_for(inputs):
            lse = lse.contiguous()
            kernels.add_prefix(inputs, out, lse)
        else:
            lse = _add_prefix(inputs, query, out, lse)
    return out, lse.contiguous()


def decode(inputs: DecodeInputs) -> tuple[Tensor, Tensor]:
    """Returns out [B, Hq, Lq, Dv] and lse [B, Hq, Lq]."""
    _refuse_softcap(inputs)
    state = inputs.state
    out, lse = cached.forward(inputs, _keys_forward)
    if state.exists and inputs.query.numel():
        # Whatever shares a head of the state as rows of that head: a product over few rows would wait for Z each time.
        heads, shared = (state.row_keys if state.k is None else state.k).shape[1], state.state_index is None
        query, rows, lse_rows = (cached.rows_of_heads(tensor, heads, shared) for tensor in (inputs.query, out, lse))
        lse_rows = _add_prefix(with_full_z(inputs), query, rows, lse_rows)
        for tensor, packed_rows in ((out, rows), (lse, lse_rows)):
            if packed_rows.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():  # not in place
                tensor.copy_(cached.heads_of_rows(packed_rows, tensor.shape))
    return out, lse


def _add_prefix(inputs: Inputs | DecodeInputs, query: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """Adds the prefix to `out` in place; returns the new lse. `inputs` have a full Z."""
    if add_prefix.takes(inputs, query, out):
        return add_prefix.add_prefix(inputs, query, out, lse)
    lse = lse.contiguous()
    merge_prefix(Prefix(inputs, query, lse.dtype), query, out, lse)
    return lse


def backward(grad_out, grad_lse, inputs: Inputs, out: Tensor, lse: Tensor, needs: Leaves) -> Leaves:
    """Returns the gradients of query, key, value and the state; None for those that `needs` does not ask for."""
    _refuse_softcap(inputs)
    if inputs.cu_seqlens_q is not None:
        return packed.backward(grad_out, grad_lse, inputs, out, lse, needs, backward)
    inputs = _with_key_range_as_mask(inputs)
    query, key, value = inputs[:3]
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads: list[Tensor | None] = [None] * 3
    of_state = StateTensors()
    kernels = _kernels_for(inputs) if inputs.state.exists and query.numel() else None
    grad_query = None
    if inputs.state.exists and not kernels:
        grad_query, of_state = _prefix_grads(grad_out, grad_lse, inputs, out, lse, needs)
    if any(needs[:3]):
        key_grads = _keys_backward(
            grad_out, grad_lse, query, key, value, inputs.attn_mask, inputs.scale, inputs.band, out, lse
        )
        if grad_query is not None:
            key_grads[0] = grad_query.add_(key_grads[0])
        for i, tensor in enumerate((query, key, value)):
            if needs[i]:
                grads[i] = in_layout(key_grads[i], partial(empty_grad, tensor))
    if kernels and (needs.query or any(needs.state)):
        of_state = kernels.add_prefix_backward(grad_out, grad_lse, inputs, out, lse, grads[0], needs.state)
    return Leaves(*grads, of_state)


def _prefix_grads(grad_out, grad_lse, inputs: Inputs, out, lse, needs: Leaves) -> tuple[Tensor | None, StateTensors]:
    """Gradients of the query, through the prefix, and of the state, by PyTorch's operations."""
    pair = inputs.state
    delta = (grad_out.to(lse.dtype) * out).sum(-1)
    if grad_lse is not None:
        delta.sub_(grad_lse)
        delta.masked_fill_(lse == -torch.inf, 0)  # of rows that see nothing, whatever the gradient of their lse
    inputs = with_full_z(inputs)
    z, _, *others, _ = inputs.state
    _, _, *needs_others, _ = needs.state
    needs_grad = (needs.query, needs.state.z or needs.state.z_b, *needs_others)
    prefix = Prefix(inputs, inputs.query, lse.dtype)
    grad_query, grad_z, *grads = prefix_backward(prefix, grad_out, inputs.query, lse, delta, [z, *others], needs_grad)
    return grad_query, StateTensors(*pair_grads(pair, grad_z), *grads)


def _refuse_softcap(inputs: Inputs | DecodeInputs) -> None:
    """`ntk_attention` never picks a backend that cannot serve a call; a direct call of the op can."""
    if inputs.softcap:
        raise NotImplementedError("the 'torch' backend does not support softcap; use 'triton', or ntk_attention")


def _kernels_for(inputs: Inputs):
    """The implementation by Triton kernels, if they take the tensors of the call and are faster there; else None."""
    if not inputs.query.is_cuda or kernels_lack(inputs.query, inputs.value) is not None:
        return None
    from ..triton import implementation  # not at import: the package works without triton

    return implementation


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
        return in_layout(tile_out, partial(empty_out, query, value)), tile_lse
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
