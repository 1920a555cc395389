"""Shapes and strides of results, the same for the implementations and for their fake versions."""

import torch
from torch import Tensor


def lse_dtype(query: Tensor) -> torch.dtype:
    """Of `lse`, and of every sum that is accumulated."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def empty_out(query: Tensor, value: Tensor) -> Tensor:
    """[B, Hq, Lq, Dv], in memory like `query` if the head dimensions agree."""
    if query.shape[3] == value.shape[3]:
        return torch.empty_like(query)
    return query.new_empty(*query.shape[:3], value.shape[3])


def empty_grad(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Gradient of query, key or value: in memory as [B, L, H, D], which is what PyTorch's fused backwards write."""
    batch, heads, length, dim = tensor.shape
    return tensor.new_empty(batch, length, heads, dim, dtype=dtype).transpose(1, 2)


def in_layout(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` with the dtype and strides of `like`; no copy if it has them."""
    if tensor.dtype == like.dtype and tensor.stride() == like.stride():
        return tensor
    return like.copy_(tensor)
