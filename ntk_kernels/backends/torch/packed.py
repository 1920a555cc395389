"""Packed sequences for a backend that does not know them: one call for each."""

from collections.abc import Callable, Iterator

import torch

from ...inputs import NUM_DIFFERENTIABLE, Inputs
from ..results import empty_grad, empty_out, lse_dtype


def _sequences(inputs: Inputs) -> Iterator[tuple[slice, slice, Inputs]]:
    """Rows, keys and inputs of each sequence, with the differentiable tensors of all but query, key, value whole."""
    bounds_q, bounds_k = inputs.cu_seqlens_q.tolist(), inputs.cu_seqlens_k.tolist()
    for b in range(len(bounds_q) - 1):
        rows, keys = slice(*bounds_q[b : b + 2]), slice(*bounds_k[b : b + 2])
        index = inputs.state_index
        yield (
            rows,
            keys,
            inputs._replace(
                query=inputs.query[:, :, rows], key=inputs.key[:, :, keys], value=inputs.value[:, :, keys],
                state_index=None if index is None else index[b : b + 1],
                cu_seqlens_q=None, cu_seqlens_k=None,
                causal_offset=(keys.stop - keys.start) - (rows.stop - rows.start),
            ),
        )  # fmt: skip


def forward(inputs: Inputs, forward_one: Callable):
    """out and lse of all sequences; rows that belong to none see nothing."""
    out = empty_out(inputs.query, inputs.value).zero_()
    lse = torch.full(inputs.query.shape[:3], -torch.inf, dtype=lse_dtype(inputs.query), device=inputs.query.device)
    for rows, _, sequence in _sequences(inputs):
        out[:, :, rows], lse[:, :, rows] = forward_one(sequence)
    return out, lse


def backward(grad_out, grad_lse, inputs: Inputs, out, lse, needs_grad, backward_one: Callable):
    """Gradients of all inputs, those of the state summed in the order of the sequences."""
    sums = [inputs.query.new_empty(0) for _ in range(NUM_DIFFERENTIABLE)]
    for i, (tensor, needed) in enumerate(zip(inputs[:NUM_DIFFERENTIABLE], needs_grad, strict=True)):
        if needed:
            sums[i] = empty_grad(tensor).zero_() if i < 3 else torch.zeros_like(tensor, dtype=lse.dtype).contiguous()
    for rows, keys, sequence in _sequences(inputs):
        parts = (None if tensor is None else tensor[:, :, rows] for tensor in (grad_out, grad_lse))
        grads = backward_one(*parts, sequence, out[:, :, rows], lse[:, :, rows], needs_grad)
        for i, (total, grad) in enumerate(zip(sums, grads, strict=True)):
            if needs_grad[i]:
                part = total[:, :, (rows, keys, keys)[i]] if i < 3 else total
                part.add_(grad)
    return tuple(
        total.to(tensor.dtype) if needed else total
        for total, tensor, needed in zip(sums, inputs[:NUM_DIFFERENTIABLE], needs_grad, strict=True)
    )
