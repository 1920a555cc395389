"""Which backend serves which call.

`None` (the default) takes the environment variable NTK_KERNELS_BACKEND or else the fastest backend for the device,
and moves on to one that can when that one can't, with one warning per reason. A backend asked for by name in the
call serves it or raises.
"""

import os
import warnings

import torch
from torch import Tensor

from . import checks

BACKENDS = ("torch", "reference")
_warned: set[str] = set()


def torch_backend_lacks(query: Tensor, attn_mask: Tensor | None, softcap: float | None) -> str | None:
    """What keeps the `torch` backend from serving a call; None if nothing does."""
    if softcap is not None:
        return "softcap"
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        return "a gradient for `attn_mask`"
    if query.device.type not in ("cpu", "cuda"):
        return f"the device {query.device.type!r}"
    if query.device.type == "cuda" and query.dtype == torch.float64:
        return "float64 on a GPU"
    return None


def choose_backend(
    requested: str | None, query: Tensor, attn_mask: Tensor | None = None, softcap: float | None = None
) -> str:
    """The backend that serves the call: "torch" or "reference".

    Raises:
        ValueError: if `requested`, or the environment variable, is no backend.
        NotImplementedError: if `requested` cannot serve the call.
    """
    checks.check_one_of("backend", requested, (None, *BACKENDS))
    default = None
    if requested is None:
        default = os.environ.get("NTK_KERNELS_BACKEND") or "torch"
        checks.check_one_of("NTK_KERNELS_BACKEND", default, BACKENDS)
    if "reference" in (requested, default):
        return "reference"
    lacks = torch_backend_lacks(query, attn_mask, softcap)
    if lacks is None:
        return "torch"
    if requested is not None:
        raise NotImplementedError(f"backend='torch' does not support {lacks}; use backend=None or 'reference'")
    if not torch.compiler.is_compiling() and lacks not in _warned:
        _warned.add(lacks)
        warnings.warn(
            f"ntk_attention: the 'torch' backend does not support {lacks}; this call, and later ones like it, go to "
            f"'reference', which is slower and takes O(Lq·Lk) memory",
            stacklevel=3,
        )
    return "reference"
