"""`add_prefix.cpp`: the prefix added to attention over other keys on the CPU, in one pass.

It is compiled for the machine when it is first needed, in about a second, and kept in the user's cache. Without a
compiler `prefix_term.py` does the same in PyTorch's operations, and does all that this pass does not take.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ... import replay
from ...feature_maps import ELU, LINEAR, get_feature_map
from ...inputs import DecodeInputs, Inputs
from .prefix_term import MAX_EXPONENT

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-w")
_MAX_FEATURES = 512
_SECTIONS = ((ELU,), (LINEAR,))


class _Call(ctypes.Structure):
    """`Call` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "z", "k", "centers", "log_scale", "lse", "out", "new_lse")),
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "heads", "state_heads", "rows", "head_dim", "value_dim", "num_features")
        ),
        *((name, ctypes.c_int64 * 3) for name in ("query_strides", "out_strides", "lse_strides")),
        ("is_elu", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("scale", "feature_scale", "max_exponent")),
        ("threads", ctypes.c_int32),
    ]  # fmt: skip


def takes(inputs: Inputs | DecodeInputs, query: Tensor, out: Tensor) -> bool:
    """Returns whether the pass serves a call: elu or taylor1 around one centre or none, in float32, without rows of the
    state's own, one state for all batch rows; and whether it could be compiled."""
    state = inputs.state
    if query.device.type != "cpu" or inputs.feature_map is None:
        return False
    if get_feature_map(inputs.feature_map).sections not in _SECTIONS:
        return False
    if state.row_keys is not None or state.state_index is not None or state.k.shape[:3:2] != (1, 1):
        return False
    of_state = (state.z, state.k, state.centers, state.log_scale)
    return (
        state.k.shape[3] <= _MAX_FEATURES
        and query.dtype == torch.float32
        and query.stride(3) == out.stride(3) == 1
        and all(x is None or (x.dtype == torch.float32 and x.is_contiguous()) for x in of_state)
        and compiled() is not None
    )


def add_prefix(inputs: Inputs | DecodeInputs, query: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """Adds the prefix to `out` [B, Hq, L, Dv] in place, given the `lse` [B, Hq, L] without it; returns that with it."""
    z, _, k, centers, log_scale, *_ = inputs.state
    new_lse = lse.new_empty(lse.shape)
    tensors = (query, z, k, centers, log_scale, lse, out, new_lse)
    is_elu = get_feature_map(inputs.feature_map).sections == (ELU,)
    numbers = (is_elu, inputs.scale, inputs.feature_scale)
    recording = replay.current_recording()
    if recording is None:
        _run(tensors, numbers)
    else:
        with recording.paused():
            _run(tensors, numbers)
        recording.launch(_run, (tensors, numbers))
    return new_lse


def _run(tensors: tuple[Tensor | None, ...], numbers: tuple[bool, float, float]) -> None:
    query, _, k, _, _, lse, out, _ = tensors
    batch, heads, rows, head_dim = query.shape
    compiled()(
        ctypes.byref(
            _Call(
                *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
                batch, heads, k.shape[1], rows, head_dim, out.shape[3], k.shape[3],
                query.stride()[:3], out.stride()[:3], lse.stride(),
                *numbers, MAX_EXPONENT, torch.get_num_threads(),
            )
        )
    )  # fmt: skip


@functools.cache
def compiled() -> Callable | None:
    """Returns the compiled function, None where there is no compiler that makes one."""
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL(str(_library())).add_prefix
    except (OSError, RuntimeError, subprocess.SubprocessError):
        return None


def _library() -> Path:
    """Returns the shared library, compiled if the user's cache has none for this source, compiler and processor."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        raise OSError(f"no compiler {compiler[0]!r}")
    parts = (_SOURCE.read_text(), *compiler, *_FLAGS, _processor())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ntk_kernels"
    library = cache / f"add_prefix-{key}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            objects, linked = Path(folder) / "add_prefix.o", Path(folder) / "add_prefix.so"
            for command in (
                [*compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(objects)],
                [*compiler, "-shared", str(objects), "-o", str(linked)],  # its OpenMP is PyTorch's, loaded already
            ):
                subprocess.run(command, check=True, capture_output=True, timeout=120)
            linked.replace(library)
    return library


def _processor() -> str:
    """The instructions that the processor has."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    flags = next((line for line in info.splitlines() if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()} {flags}"
