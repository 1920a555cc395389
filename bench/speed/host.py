"""Host time of a call: CPU time of Python, PyTorch and Triton's launcher, on a GPU that does nothing.

B=2, 16 heads, 512 tokens, D=64, bfloat16, causal; decode of one token with 8 sequences (or one) and a cache of 2,048.
For each call the least and the median CPU time over blocks of calls, and how many functions of Python and of C one call
enters, which is the same in every run: `bench gate` compares that. How the GPU does nothing: `bench/idle_gpu/`. On a
machine with a GPU, a call takes this long (and some microseconds for each launch) before its kernels can run. cuDNN's
attention takes nothing here, though it does on a GPU's host.
"""

import argparse
import json
import os
import subprocess
import sys

from rich.table import Table

from ..idle_gpu.build import build
from ..lib import record
from ..lib.progress import Steps

_MODULE = "bench.speed.host_calls"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--blocks", type=record.positive(int), default=300, help="of calls (default: %(default)s)")
    record.add_arguments(parser)


def measure(arguments: argparse.Namespace, progress: Steps) -> dict:
    """Returns {"calls": {name: {"low_us", "median_us", "functions", "launches"}}}."""
    task = progress.add_task("compiling", total=2)
    folder = build()
    progress.advance(task, step="the idle GPU")
    figures = run(folder, arguments.blocks)
    progress.advance(task, step="calls")
    return {"blocks": arguments.blocks, "calls": figures}


def run(folder, blocks: int) -> dict:
    """Measures in a process of its own: one that believes in a GPU."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", _MODULE, str(folder), str(blocks)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the calls on an idle GPU fail:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(figures: dict) -> list[dict]:
    return [{"call": name} | call for name, call in figures["calls"].items()]


def tables_of(figures: dict) -> list[Table]:
    table = Table(title="Host time of a call")
    for column in ("call", "µs at least", "median", "functions", "launches"):
        table.add_column(column, justify="left" if column == "call" else "right")
    for name, call in figures["calls"].items():
        table.add_row(
            name, f"{call['low_us']:.1f}", f"{call['median_us']:.1f}", str(call["functions"]), str(call["launches"])
        )
    return [table]
