"""The `triton` backend: the fused kernels of `ntk_kernels/kernels/` (`implementation.py`)."""

from importlib.util import find_spec

import torch
from torch import Tensor

_MAX_HEAD_DIM = 256
# Wider heads spill in float32, and with rows that are not 16-byte aligned (not in the interpreter); with D=130 in
# bfloat16, triton 3.6.0 generates out-of-bounds reads.
_MAX_HEAD_DIM_FLOAT32 = 128
# Minimum sequence length, by head dimension, above which cuDNN attention plus the prefix pass beats the fused kernel on
# Hopper (docs/what-was-tried.md).
_MIN_CUDNN_LENGTH = {64: 2048, 128: 1024}
_devices: dict[tuple[str, int | None], str | None] = {}


def lacks(query: Tensor, value: Tensor, attn_mask: Tensor | None = None, softcap: float | None = None) -> str | None:
    """The feature that keeps it from serving a call; None if there is none."""
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        return "a gradient for `attn_mask`"
    return kernels_lack(query, value)


def prefers(query: Tensor, key: Tensor, value: Tensor, is_square: bool) -> bool:
    """Returns whether a call should start with it: those on a GPU, but for long ones that cuDNN serves faster."""
    return query.device.type == "cuda" and not (is_square and _is_faster_by_cudnn(query, key, value))


def load():
    from . import implementation

    return implementation


def _is_faster_by_cudnn(query: Tensor, key: Tensor, value: Tensor) -> bool:
    min_length = _MIN_CUDNN_LENGTH.get(query.shape[-1])
    return (
        min_length is not None
        and value.shape[-1] == query.shape[-1]
        and query.dtype in (torch.float16, torch.bfloat16)
        and min(query.shape[2], key.shape[2]) >= min_length
        and not torch.are_deterministic_algorithms_enabled()  # cuDNN's backward is not
        and _has_fast_cudnn(query.device.index)
    )


@torch.compiler.assume_constant_result
def _has_fast_cudnn(index: int | None) -> bool:
    if torch.version.hip is not None or not torch.backends.cuda.cudnn_sdp_enabled():
        return False
    return torch.cuda.get_device_capability(index) == (9, 0)


def kernels_lack(query: Tensor, value: Tensor) -> str | None:
    """The property that keeps the kernels from taking such tensors; None if there is none."""
    device = query.device
    if query.dtype == torch.float64:
        return "float64"
    head_dim = max(query.shape[-1], value.shape[-1])
    if head_dim > _MAX_HEAD_DIM:
        return f"head dimensions above {_MAX_HEAD_DIM}"
    if head_dim > _MAX_HEAD_DIM_FLOAT32 and device.type == "cuda":
        if query.dtype == torch.float32:
            return f"float32 with head dimensions above {_MAX_HEAD_DIM_FLOAT32}"
        if query.shape[-1] % 8 or value.shape[-1] % 8:
            return f"head dimensions above {_MAX_HEAD_DIM_FLOAT32} that are not multiples of 8"
    return _device_lacks(device.type, device.index)


@torch.compiler.assume_constant_result
def _device_lacks(device_type: str, index: int | None) -> str | None:
    """The property that keeps the kernels from running on a device, found out once."""
    key = (device_type, index)
    if key not in _devices:  # functools.cache would make Dynamo warn
        _devices[key] = _probe_device(*key)
    return _devices[key]


def _probe_device(device_type: str, index: int | None) -> str | None:
    if find_spec("triton") is None:
        return "machines without the triton package"
    from ...kernels.jit.tiles import INTERPRETED

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
