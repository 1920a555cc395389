"""Which backend serves which call.

`None` (the default) takes the environment variable NTK_KERNELS_BACKEND or else the fastest backend for the device,
and moves on to one that can when that one can't, with one warning per reason. A backend asked for by name in the
call serves it or raises.
"""

import os
import warnings
from importlib.util import find_spec

import torch
from torch import Tensor

from . import checks

BACKENDS = ("triton", "torch", "reference")
_MAX_TRITON_HEAD_DIM = 256
# In float32, and in half precision where rows begin between multiples of 16 bytes, the tiles of wider heads would go to
# memory and back (not in the interpreter); in bfloat16 with D=130 triton 3.6.0 compiles them to what reads elsewhere.
_MAX_TRITON_HEAD_DIM_ANYHOW = 128
# From so many query rows and keys on, by head dimension, PyTorch's attention (cuDNN's) and the prefix added to it take
# less time on Hopper than the fused kernel (docs/what-was-tried.md).
_CUDNN_FROM = {64: 2048, 128: 1024}
_warned: set[tuple[str, str]] = set()
_devices: dict[tuple[str, int | None], str | None] = {}


def choose_backend(
    requested: str | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state=None,
    attn_mask: Tensor | None = None,
    softcap: float | None = None,
    *,
    is_square: bool = False,
) -> str:
    """The backend that serves the call. `is_square`: nothing is hidden, or all that lies right of the diagonal of as
    many rows as keys.

    Raises:
        ValueError: if `requested`, or the environment variable, is no backend.
        NotImplementedError: if `requested` cannot serve the call.
    """
    checks.check_one_of("backend", requested, (None, *BACKENDS))
    if requested is not None:
        first = requested
    else:
        first = os.environ.get("NTK_KERNELS_BACKEND") or _fastest(query, key, value, is_square and softcap is None)
        checks.check_one_of("NTK_KERNELS_BACKEND", first, BACKENDS)
    lacks = _lacks(first, query, key, value, state, attn_mask, softcap)
    if lacks is None:
        return first
    served = {
        backend: _lacks(backend, query, key, value, state, attn_mask, softcap)
        for backend in BACKENDS[BACKENDS.index(first) :]
    }
    backend = next(backend for backend, missing in served.items() if missing is None)
    if requested is not None:
        others = " or ".join(repr(other) for other, missing in served.items() if missing is None)
        raise NotImplementedError(f"backend={requested!r} does not support {lacks}; use backend=None or {others}")
    if not torch.compiler.is_compiling() and (first, lacks) not in _warned:
        _warned.add((first, lacks))
        cost = ", which is slower and takes O(Lq·Lk) memory" if backend == "reference" else ""
        warnings.warn(
            f"ntk_kernels: the {first!r} backend does not support {lacks}; this call, and later ones like it, go to "
            f"{backend!r}{cost}",
            stacklevel=3,
        )
    return backend


def sums_backend(keys: Tensor, values: Tensor) -> str:
    """The backend for sums of features: the kernels where they can be had, unless the environment asks for another."""
    first = os.environ.get("NTK_KERNELS_BACKEND") or ("triton" if keys.device.type == "cuda" else "torch")
    checks.check_one_of("NTK_KERNELS_BACKEND", first, BACKENDS)
    return "triton" if first == "triton" and kernels_lack(keys, values) is None else "torch"


def _fastest(query: Tensor, key: Tensor, value: Tensor, is_square: bool) -> str:
    if query.device.type != "cuda":
        return "torch"
    least = _CUDNN_FROM.get(query.shape[-1])
    if (
        is_square
        and least is not None
        and value.shape[-1] == query.shape[-1]
        and query.dtype in (torch.float16, torch.bfloat16)
        and min(query.shape[2], key.shape[2]) >= least
        and not torch.are_deterministic_algorithms_enabled()  # cuDNN's backward is not
        and _has_fast_cudnn(query.device.index)
    ):
        return "torch"
    return "triton"


@torch.compiler.assume_constant_result
def _has_fast_cudnn(index: int | None) -> bool:
    if torch.version.hip is not None or not torch.backends.cuda.cudnn_sdp_enabled():
        return False
    return torch.cuda.get_device_capability(index) == (9, 0)


def _lacks(backend, query, key, value, state, attn_mask, softcap) -> str | None:
    """What keeps a backend from serving a call; None if nothing does."""
    if backend == "reference":
        return None
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        return "a gradient for `attn_mask`"
    device = query.device
    if backend == "torch":
        if softcap is not None:
            return "softcap"
        if device.type not in ("cpu", "cuda"):
            return f"the device {device.type!r}"
        if device.type == "cuda" and query.dtype == torch.float64:
            return "float64 on a GPU"
        return None
    return kernels_lack(query, value)


def kernels_lack(query: Tensor, value: Tensor) -> str | None:
    """What keeps the Triton kernels from taking such tensors; None if nothing does."""
    device = query.device
    if query.dtype == torch.float64:
        return "float64"
    head_dim = max(query.shape[-1], value.shape[-1])
    if head_dim > _MAX_TRITON_HEAD_DIM:
        return f"head dimensions above {_MAX_TRITON_HEAD_DIM}"
    if head_dim > _MAX_TRITON_HEAD_DIM_ANYHOW and device.type == "cuda":
        if query.dtype == torch.float32:
            return f"float32 with head dimensions above {_MAX_TRITON_HEAD_DIM_ANYHOW}"
        if query.shape[-1] % 8 or value.shape[-1] % 8:
            return f"head dimensions above {_MAX_TRITON_HEAD_DIM_ANYHOW} that are not multiples of 8"
    return _device_lacks(device.type, device.index)


@torch.compiler.assume_constant_result
def _device_lacks(device_type: str, index: int | None) -> str | None:
    """What keeps the kernels from running on a device, found out once."""
    key = (device_type, index)
    if key not in _devices:  # functools.cache would make Dynamo warn
        _devices[key] = _find_out(*key)
    return _devices[key]


def _find_out(device_type: str, index: int | None) -> str | None:
    if find_spec("triton") is None:
        return "machines without the triton package"
    from .kernels.jit.tiles import INTERPRETED

    if INTERPRETED:
        return None if device_type == "cpu" else f"the device {device_type!r} under TRITON_INTERPRET=1"
    if device_type != "cuda":
        return f"the device {device_type!r} (but for tests under TRITON_INTERPRET=1)"
    if not torch.cuda.is_available():
        return "a GPU that is not there"
    if torch.version.hip is not None:
        arch = torch.cuda.get_device_properties(index).gcnArchName
        return None if arch.startswith("gfx9") else f"AMD GPUs other than CDNA ({arch})"
    if torch.cuda.get_device_capability(index) < (8, 0):
        return f"GPUs older than compute capability 8.0 ({torch.cuda.get_device_name(index)})"
    return None
