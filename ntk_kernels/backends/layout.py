"""Shapes and strides of results, the same for the implementations and for their fake versions."""

from collections.abc import Callable

import torch
from torch import Tensor


def lse_dtype(query: Tensor) -> torch.dtype:
    """Of `lse`, and of every sum that is accumulated."""
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


def in_layout(tensor: Tensor, empty: Callable[..., Tensor]) -> Tensor:
    """`tensor` with the dtype and strides of what `empty(device=...)` makes; no copy if it has them."""
    expected = empty(device="meta")  # costs no memory
    if tensor.dtype == expected.dtype and tensor.stride() == expected.stride():
        return tensor
    return empty(device=tensor.device).copy_(tensor)
