"""Measures the candidate tiles of a shape class once and remembers the fastest, in memory and on disk.

Off by default: a call then runs with the first candidate in `tile_tables.py`. NTK_KERNELS_AUTOTUNE=1 switches it on;
the file lies in NTK_KERNELS_CACHE (default ~/.cache/ntk_kernels), one for each GPU and version of triton.
"""

import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import triton

from .configs import TileConfig

_tables: dict[Path, dict[str, TileConfig]] = {}


def enabled() -> bool:
    return os.environ.get("NTK_KERNELS_AUTOTUNE", "0") == "1"


def fastest(
    key: str,
    candidates: tuple[TileConfig, ...],
    launch_with: Callable,
    device_name: str,
    measure: Callable | None = None,
) -> TileConfig:
    """The fastest of `candidates` for the shape class `key`.

    `launch_with(config)` runs the kernel; a candidate that raises is passed over. `measure(function)` gives a time.
    While a CUDA graph is captured nothing can be measured: the first candidate is used and nothing remembered.
    """
    path = cache_file(device_name)
    if path not in _tables:
        _tables[path] = _read(path)
    table = _tables[path]
    known = table.get(key)
    if known in candidates:  # a table that has changed since is measured anew
        return known
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return candidates[0]
    times = {}
    for config in candidates:
        try:
            times[config] = (measure or median_time)(lambda config=config: launch_with(config))
        except (RuntimeError, triton.TritonError):  # too much shared memory, too many registers
            continue
    if not times:
        raise RuntimeError(f"none of the {len(candidates)} tile configurations for {key} runs on {device_name}")
    table[key] = min(times, key=times.get)
    _write(path, table)
    return table[key]


def cache_file(device_name: str) -> Path:
    folder = os.environ.get("NTK_KERNELS_CACHE") or Path.home() / ".cache" / "ntk_kernels"
    name = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return Path(folder) / f"{name}-triton-{triton.__version__}.json"


def median_time(function: Callable) -> float:
    return triton.testing.do_bench(function, warmup=10, rep=40, return_mode="median")


def _read(path: Path) -> dict[str, TileConfig]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {key: TileConfig(**fields) for key, fields in entries.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"ntk_kernels: cannot read the tuned tiles in {path}, measuring anew ({error})", stacklevel=2)
        return {}


def _write(path: Path, table: dict[str, TileConfig]) -> None:
    """Whole or not at all: several processes may tune at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            json.dump({key: asdict(config) for key, config in table.items()}, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"ntk_kernels: cannot keep the tuned tiles in {path} ({error})", stacklevel=2)
