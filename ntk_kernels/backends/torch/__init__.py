"""The `torch` backend: PyTorch's fused attention over the input's keys, plus the prefix (`implementation.py`)."""

import torch
from torch import Tensor


def lacks(query: Tensor, value: Tensor, attn_mask: Tensor | None = None, softcap: float | None = None) -> str | None:
    """The feature that keeps it from serving a call; None if there is none."""
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        return "a gradient for `attn_mask`"
    if query.device.type == "meta":  # nothing is computed: the op tells shapes
        return None
    if softcap is not None:
        return "softcap"
    if query.device.type not in ("cpu", "cuda"):
        return f"the device {query.device.type!r}"
    if query.device.type == "cuda" and query.dtype == torch.float64:
        return "float64 on a GPU"
    return None


def prefers(query: Tensor, key: Tensor, value: Tensor, is_square: bool) -> bool:
    """Returns whether a call should start with it: all that no other backend prefers."""
    return True


def load():
    from . import implementation

    return implementation
