"""Compiles the driver and the device of the idle GPU, once for each version of PyTorch, into build/ of the checkout."""

import importlib.machinery
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch
from torch.utils import cpp_extension

_SOURCES = Path(__file__).parent
_BUILD = _SOURCES.parents[1] / "build"


def build() -> Path:
    """Returns the folder with libcuda.so.1 and the module idle_gpu_device.

    Raises:
        RuntimeError: if there is no compiler, or it fails.
    """
    folder = _BUILD / f"idle-gpu-torch-{torch.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    _compile("cc", folder / "libcuda.so.1", "driver.c", ["-Wl,-soname,libcuda.so.1"])
    includes = [f"-I{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_paths()["include"])]
    libraries = [f(path) for path in cpp_extension.library_paths() for f in ("-L{}".format, "-Wl,-rpath,{}".format)]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    options = ["-std=c++20", "-w", abi, *includes, *libraries, "-lc10", "-ltorch_cpu", "-ltorch"]
    _compile("c++", folder / f"idle_gpu_device{importlib.machinery.EXTENSION_SUFFIXES[0]}", "device.cpp", options)
    return folder


def _compile(compiler: str, target: Path, source: str, options: list[str]) -> None:
    path = _SOURCES / source
    if target.exists() and target.stat().st_mtime >= path.stat().st_mtime:
        return
    if shutil.which(compiler) is None:
        raise RuntimeError(f"the idle GPU must be compiled with {compiler!r}, got no such compiler")
    made = target.with_name(f"{target.name}.{os.getpid()}")  # several processes may compile at once
    command = [compiler, "-O1", "-shared", "-fPIC", str(path), "-o", str(made), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{compiler} fails on {path}:\n{done.stderr[:2000]}")
    made.replace(target)
