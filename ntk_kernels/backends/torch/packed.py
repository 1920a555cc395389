"""Packed sequences for a backend without support for them: one call for each."""

from collections.abc import Callable, Iterator

import torch

from ...inputs import NUM_DIFFERENTIABLE, Inputs, Leaves
from ...replay import refuse
from ..results import empty_grad, empty_out, lse_dtype


def _sequences(inputs: Inputs) -> Iterator[tuple[slice, slice, Inputs]]:
    """Rows, keys and inputs of each sequence, with the differentiable tensors of all but query, key, value whole."""
    refuse("lengths are read")
    bounds_q, bounds_k = inputs.cu_seqlens_q.tolist(), inputs.cu_seqlens_k.tolist()
    for b in range(len(bounds_q) - 1):
        rows, keys = slice(*bounds_q[b : b + 2]), slice(*bounds_k[b : b + 2])
        state, index = inputs.state, inputs.state.state_index
        if index is not None:
            state = state._replace(state_index=index[b : b + 1])
        yield (
            rows,
            keys,
            inputs._replace(
                query=inputs.query[:, :, rows], key=inputs.key[:, :, keys], value=inputs.value[:, :, keys],
                state=state, cu_seqlens_q=None, cu_seqlens_k=None,
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


def backward(grad_out, grad_lse, inputs: Inputs, out, lse, needs: Leaves, backward_one: Callable) -> Leaves:
    """Gradients of all inputs, those of the state summed in the order of the sequences."""
    leaves = (*inputs[:3], *inputs.state[:-1])
    sums: list[torch.Tensor | None] = [None] * NUM_DIFFERENTIABLE
    for i, (tensor, needed) in enumerate(zip(leaves, needs.flat(), strict=True)):
        if needed:
            sums[i] = empty_grad(tensor).zero_() if i < 3 else torch.zeros_like(tensor, dtype=lse.dtype).contiguous()
    for rows, keys, sequence in _sequences(inputs):
        parts = (None if tensor is None else tensor[:, :, rows] for tensor in (grad_out, grad_lse))
        grads = backward_one(*parts, sequence, out[:, :, rows], lse[:, :, rows], needs).flat()
        for i, (total, grad) in enumerate(zip(sums, grads, strict=True)):
            if total is not None:
                part = total[:, :, (rows, keys, keys)[i]] if i < 3 else total
                part.add_(grad)
    sums = (None if total is None else total.to(tensor.dtype) for total, tensor in zip(sums, leaves, strict=True))
    return Leaves.of(tuple(sums))
