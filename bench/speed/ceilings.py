"""What this machine can do at most: bytes copied and matrix products, each in a second (upper quartile of the runs)."""

import argparse

import torch
from rich.console import Console
from rich.table import Table

from ..lib import record, tables, timing

_SECONDS = 0.3
_COPIED = {"cuda": 2**28, "cpu": 2**26}  # float32 numbers, many times what caches hold
_SIZE = {"cuda": 8192, "cpu": 1024}  # of square matrices


def add_arguments(parser: argparse.ArgumentParser) -> None:
    record.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    console = Console()
    dtypes = (torch.bfloat16, torch.float32)
    figures = {
        "copy_gb_per_s": copy_bandwidth(arguments.device),
        "matmul_tflop_per_s": {str(dtype)[6:]: matmul_rate(arguments.device, dtype) for dtype in dtypes},
    }
    for table in tables_of(figures):
        tables.show(console, table)
    path = record.results_folder(arguments) / "ceilings.json"
    rows = [{"benchmark": "ceilings", "name": "copy", "gb_per_s": figures["copy_gb_per_s"]}]
    rows += [
        {"benchmark": "ceilings", "name": f"matmul {name}", "tflop_per_s": rate}
        for name, rate in figures["matmul_tflop_per_s"].items()
    ]
    record.save(path, arguments.device, rows, **figures)
    console.print(f"figures: {path}", soft_wrap=True)


def tables_of(figures: dict) -> list[Table]:
    table = Table(title="Ceilings")
    for column in ("what", "at most"):
        table.add_column(column)
    table.add_row("copying, read and written", f"{figures['copy_gb_per_s']:,.0f} GB/s")
    for name, rate in figures["matmul_tflop_per_s"].items():
        table.add_row(f"matrix products of {name}", f"{rate:,.3g} TFLOP/s")
    return [table]


def copy_bandwidth(device: str) -> float:
    """GB/s read and written by copying a large tensor."""
    source = torch.randn(_COPIED[torch.device(device).type], device=device)
    target = torch.empty_like(source)
    ms = timing.measure({"copy": lambda: target.copy_(source)}, device, seconds=_SECONDS)["copy"]["low"]
    return 2 * source.numel() * source.element_size() / ms / 1e6


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """TFLOP/s of a product of two square matrices with random entries."""
    size = _SIZE[torch.device(device).type]
    a, b = torch.randn(2, size, size, device=device).to(dtype).unbind()
    ms = timing.measure({"product": lambda: a @ b}, device, seconds=_SECONDS)["product"]["low"]
    return 2 * size**3 / ms / 1e9
