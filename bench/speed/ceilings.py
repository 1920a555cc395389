"""Rates at which this machine copies memory and multiplies matrices (upper quartile of the runs)."""

import argparse

import torch
from rich.table import Table

from ..lib import record, timing
from ..lib.progress import Steps

_SECONDS = 0.3
_COPIED = {"cuda": 2**28, "cpu": 2**26}  # float32 numbers, many times the size of the caches
_SIZE = {"cuda": 8192, "cpu": 1024}  # of the square matrices


def add_arguments(parser: argparse.ArgumentParser) -> None:
    record.add_arguments(parser)


def measure(arguments: argparse.Namespace, progress: Steps) -> dict:
    """Returns GB/s of a copy and TFLOP/s of a matrix product by dtype."""
    dtypes = (torch.bfloat16, torch.float32)
    task = progress.add_task("measuring", total=1 + len(dtypes))
    figures = {"copy_gb_per_s": copy_bandwidth(arguments.device), "matmul_tflop_per_s": {}}
    progress.advance(task, step="copying")
    for dtype in dtypes:
        name = str(dtype)[6:]
        figures["matmul_tflop_per_s"][name] = matmul_rate(arguments.device, dtype)
        progress.advance(task, step=f"matrix products of {name}")
    return figures


def rows_of(figures: dict) -> list[dict]:
    rates = figures["matmul_tflop_per_s"].items()
    return [
        {"name": "copy", "gb_per_s": figures["copy_gb_per_s"]},
        *({"name": f"matmul {name}", "tflop_per_s": rate} for name, rate in rates),
    ]


def tables_of(figures: dict) -> list[Table]:
    table = Table(title="Ceilings")
    for column in ("what", "at most"):
        table.add_column(column)
    table.add_row("copying, read and written", f"{figures['copy_gb_per_s']:,.0f} GB/s")
    for name, rate in figures["matmul_tflop_per_s"].items():
        table.add_row(f"matrix products of {name}", f"{rate:,.3g} TFLOP/s")
    return [table]


def copy_bandwidth(device: str) -> float:
    """Returns the GB/s that copying a large tensor reads and writes."""
    source = torch.randn(_COPIED[torch.device(device).type], device=device)
    target = torch.empty_like(source)
    ms = timing.measure({"copy": lambda: target.copy_(source)}, device, seconds=_SECONDS)["copy"]["low"]
    return 2 * source.numel() * source.element_size() / ms / 1e6


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Returns the TFLOP/s of a product of two square random matrices."""
    size = _SIZE[torch.device(device).type]
    a, b = torch.randn(2, size, size, device=device).to(dtype).unbind()
    ms = timing.measure({"product": lambda: a @ b}, device, seconds=_SECONDS)["product"]["low"]
    return 2 * size**3 / ms / 1e9
