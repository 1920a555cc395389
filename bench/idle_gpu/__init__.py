"""A GPU that does nothing, to measure the host's part of a call without one.

PyTorch's dispatcher, its autograd engine with the thread of the device, Triton's launcher, driver and compiler (for
sm_90) run as they do on a GPU; kernels are launched into nothing, and the numbers in tensors are arbitrary. Missing
against a real one are the time of the driver's own launch, of PyTorch's launches, and of looking at pointers.

A process turns the GPU on before it imports ntk_kernels, with `build.build()` done before, in another process:

    LD_LIBRARY_PATH=<folder of build()> python -c "from bench import idle_gpu; idle_gpu.turn_on(folder)"
"""

import ctypes
import importlib.machinery
import importlib.util
import os
import sys
import types

_NAME = "idle_gpu_device"
_PROPERTIES = {"major": 9, "minor": 0, "multi_processor_count": 132, "name": "idle GPU", "total_memory": 141 << 30}


def turn_on(folder: str) -> None:
    """Makes this process believe in a GPU; `folder` is that of `build.build()`."""
    os.environ["TRITON_LIBCUDA_PATH"] = folder
    ctypes.CDLL(os.path.join(folder, "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    path = os.path.join(folder, f"{_NAME}{importlib.machinery.EXTENSION_SUFFIXES[0]}")
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)  # before PyTorch asks for its CUDA hooks
    import torch

    spec = importlib.util.spec_from_file_location(_NAME, path)
    device = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(device)
    sys.modules[_NAME] = device
    for name in dir(device):
        if name.startswith("_cuda"):
            setattr(torch._C, name, getattr(device, name))
    cuda, properties = torch.cuda, types.SimpleNamespace(**_PROPERTIES)
    cuda._initialized = True
    cuda._exchange_device = device._cuda_exchangeDevice
    cuda._maybe_exchange_device = device._cuda_maybeExchangeDevice
    cuda.is_available, cuda.device_count = lambda: True, lambda: 1
    cuda.get_device_properties = lambda device=None: properties
    cuda.get_device_capability = lambda device=None: (properties.major, properties.minor)
    cuda.get_device_name = lambda device=None: properties.name
    cuda.synchronize = lambda device=None: None
    cuda.get_rng_state, cuda.set_rng_state = lambda device=None: torch.empty(0), lambda state, device=None: None
    cuda.is_current_stream_capturing = lambda: False
    torch.version.cuda = "12.8"


def reuse_memory(reused: bool) -> None:
    """Says whether freed memory is given out again, as it is at first; otherwise no two tensors ever have the same."""
    sys.modules[_NAME].reuse_memory(reused)


def launches() -> int:
    """Returns the number of kernels that have been launched."""
    return ctypes.CDLL("libcuda.so.1").idle_gpu_launches()
