"""Shapes and strides of results, the same for the implementations and for their fake versions."""

from collections.abc import Callable

import torch
from torch import Tensor


def lse_dtype(query: Tensor) -> torch.dtype:
    """Returns the dtype of `lse` and of every sum that is accumulated."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def empty_out(query: Tensor, value: Tensor, device=None) -> Tensor:
    """[B, Hq, Lq, Dv], in memory like `query` if the head dimensions agree."""
    if query.shape[3] == value.shape[3]:
        return torch.empty_like(query, device=device)
    return query.new_empty(*query.shape[:3], value.shape[3], device=device)


def empty_grad(tensor: Tensor, dtype: torch.dtype | None = None, device=None) -> Tensor:
    """Gradient of query, key or value, in memory as PyTorch's fused backwards write it: like the tensor itself on GPUs
    (where elements of a row lie side by side), as [B, L, H, D] on the CPU."""
    if tensor.device.type == "cuda" and tensor.stride(3) == 1:
        grad = torch.empty_like(tensor, dtype=dtype, device=device)
        if grad.stride(3) == 1:
            return grad
    batch, heads, length, dim = tensor.shape
    return tensor.new_empty(batch, length, heads, dim, dtype=dtype, device=device).transpose(1, 2)


def empty_sums(inputs) -> tuple[Tensor, Tensor, Tensor]:
    """z [H, C, r, Dv], k [H, C, r] and count [H, C] of `SumInputs`."""
    shape, r = (inputs.keys.shape[0], inputs.num_centers), inputs.num_features
    shapes = (*shape, r, inputs.values.shape[2]), (*shape, r), shape
    return tuple(inputs.keys.new_empty(size, dtype=lse_dtype(inputs.keys)) for size in shapes)


def empty_sum_grads(inputs, needs_grad) -> tuple[Tensor, ...]:
    """Gradients of keys, values and centres, without elements where none is asked for."""
    tensors = zip((inputs.keys, inputs.values, inputs.centers), needs_grad, strict=True)
    return tuple(t.new_empty(t.shape) if needed else inputs.keys.new_empty(0) for t, needed in tensors)


def in_layout(tensor: Tensor, empty: Callable[..., Tensor]) -> Tensor:
    """`tensor` with the dtype and strides of what `empty(device=...)` makes; no copy if it has them."""
    expected = empty(device="meta")  # costs no memory
    if tensor.dtype == expected.dtype and tensor.stride() == expected.stride():
        return tensor
    return empty(device=tensor.device).copy_(tensor)
