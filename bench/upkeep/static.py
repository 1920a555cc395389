"""Compiles every kernel for five kinds of GPU, without one: registers, spills, tensor cores, hazards.

Compiles the configuration that each head dimension, feature map and option runs with by default (--all: every
configuration the autotuner may try) and prints a table. Exits with 1 if the default configuration of a head dimension
and feature map in half precision spills registers (with triton 3.6 or 3.7), or one of any kind has no tensor-core
instruction (in a loop with exp2, where there is a softmax), exceeds the shared memory or has a known hazard; or if one
has grown since the figures in bench/baseline/ (for each version of triton; --accept makes the new ones the baseline).
"""

import argparse
import csv
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import triton
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ntk_kernels.kernels.host import configs
from ntk_kernels.kernels.jit.tiles import INTERPRETED

from ..lib import record
from . import aot
from .launches import HEAD_DIMS, Shape, shapes

# With these the tables are free of spills; with newer versions, and on sm86, a few kernels at D=256 spill some bytes.
_SPILL_FREE = {"sm80", "sm90", "sm100", "gfx942"} if triton.__version__.startswith(("3.6.", "3.7.")) else set()
# Bytes that spill all the same, and may not become more: (triton, class of GPU, kernel, D).
# Tiles of dK and dV without them have half the keys; in decode and merge it is a taylor2 state that spills.
_KNOWN_SPILLS = {
    ("3.6", "sm90", "dkdv", 128): 8,
    ("3.6", "sm90", "decode", 64): 8,
    ("3.6", "sm90", "decode", 256): 8,
    ("3.6", "sm100", "merge", 64): 8,  # where a split left something out
    ("3.6", "sm100", "sums_bwd keys", 256): 24,  # taylor2
    # Once, after the loop, in return for a second program on the multiprocessor.
    ("3.6", "sm90", "add_second_order", 64): 64,
    ("3.6", "sm90", "add_second_order", 128): 40,
    ("3.7", "sm90", "add_second_order", 64): 56,
    ("3.7", "sm90", "add_second_order", 128): 64,
    ("3.7", "sm90", "decode", 256): 16,  # elu
    ("3.7", "sm100", "forward", 64): 8,  # without a state
    ("3.7", "sm100", "rows values", 64): 8,
}
_MAY_NOT_GROW = {"registers": 0, "spilled": 0, "shared": 0, "instructions": 0.02}  # with the share that it may


def examine(shape: Shape) -> dict:
    """Compiles one shape and says what came out, and what is wrong with it."""
    compiled = aot.compile_launch(shape.launch(), shape.arch)
    limit = configs.SHARED_BYTES[shape.arch]
    found = {
        "config": str(shape.config()), "registers": compiled.registers, "spilled": compiled.spilled,
        "instructions": compiled.instructions, "shared": compiled.shared, "shared_limit": limit,
        "tensor_core": compiled.tensor_core, "exp2": compiled.exp2_in_main_loop, "hazards": compiled.hazards,
        "waits": compiled.waits_in_main_loop,
    }  # fmt: skip
    faults = list(found["hazards"])
    optional = shape.option and not shape.kernel.startswith("rows")
    known = _KNOWN_SPILLS.get((triton.__version__[:3], shape.arch, shape.kernel, shape.head_dim), 0)
    measured = shape.config() == shape.tuned()  # and the fastest all the same
    spill_free = shape.arch in _SPILL_FREE and shape.dtype != "float32" and not optional and not measured
    if found["spilled"] > known and spill_free:
        faults.append(f"spills {found['spilled']} bytes")
    config = shape.config()
    multiplies = shape.kernel not in ("delta", "merge", "second_order_pack z", "second_order_pack k")
    if multiplies and shape.arch == "sm90" and min(config.block_m, config.block_n) < 64:
        faults.append("a product with a dimension below 64")
    if multiplies and not found["tensor_core"]:
        faults.append("no tensor-core instruction")
    if shape.kernel in ("forward", "decode", "dkdv", "dk", "dv", "dq") and not found["exp2"]:
        faults.append("no loop with exp2 and tensor-core instructions")
    if compiled.shared > limit:
        faults.append(f"needs {compiled.shared} bytes of shared memory, has {limit}")
    return asdict(shape) | found | {"faults": faults}


def _baseline() -> Path:
    return record.ROOT / "bench" / "baseline" / f"triton-{triton.__version__}.csv"


def read_baseline() -> dict[str, dict[str, str]]:
    """Returns the lines by name of the kernel; empty for a version of triton without a file."""
    if not _baseline().exists():
        return {}
    with _baseline().open(encoding="utf-8", newline="") as file:
        return {line["kernel"]: line for line in csv.DictReader(file)}


def write_baseline(results: list[dict]) -> None:
    """Adds these kernels, or replaces what is there."""
    lines = read_baseline()
    for found in results:
        figures = {name: str(found[name]) for name in ("config", *_MAY_NOT_GROW)}
        lines[name_of(found)] = {"kernel": name_of(found)} | figures
    _baseline().parent.mkdir(exist_ok=True)
    with _baseline().open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ("kernel", "config", *_MAY_NOT_GROW), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines[name] for name in sorted(lines))


def grown_since(baseline: dict[str, dict[str, str]], found: dict) -> list[str]:
    """Returns a message for each figure that exceeds the baseline by more than its slack."""
    before = baseline.get(name_of(found))
    if before is None:
        return []
    return [
        f"{name} grew from {int(before[name]):,} to {found[name]:,}"
        for name, slack in _MAY_NOT_GROW.items()
        if found[name] > int(before[name]) * (1 + slack)
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    record.add_output_arguments(parser)
    parser.add_argument(
        "--arch", choices=aot.TARGETS, action="append", help="a GPU to compile for; may be repeated (default: all)"
    )
    parser.add_argument(
        "--head-dim", type=int, choices=HEAD_DIMS, action="append", help="may be repeated (default: all)"
    )
    parser.add_argument("--dtype", choices=record.DTYPES, action="append", help="may be repeated (default: all)")
    parser.add_argument(
        "--quick", action="store_true", help="options and dtypes for sm90 at D=64 only, sm86 not at all"
    )
    parser.add_argument("--all", action="store_true", help="every configuration, not only the default ones")
    parser.add_argument("--accept", action="store_true", help="these figures are the baseline from now on")
    parser.add_argument(
        "--jobs", type=record.positive(int), default=os.cpu_count(), help="processes (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> None:
    if INTERPRETED:
        raise SystemExit("nothing is compiled under TRITON_INTERPRET=1; unset it")
    archs = arguments.arch or [arch for arch in aot.TARGETS if not (arguments.quick and arch == "sm86")]
    todo = shapes(archs, quick=arguments.quick)
    if arguments.head_dim:
        todo = [shape for shape in todo if shape.head_dim in arguments.head_dim]
    if arguments.dtype:
        todo = [shape for shape in todo if shape.dtype in arguments.dtype]
    if not todo:
        raise SystemExit("no kernel is of these kinds; without --quick there are more")
    if arguments.all:
        todo = [replace(shape, candidate=i) for shape in todo for i in range(len(shape.candidates()))]
    console = Console()
    results, baseline = [], {} if arguments.accept else read_baseline()
    with Progress(console=console) as progress, ProcessPoolExecutor(arguments.jobs) as pool:
        task = progress.add_task(f"compiling with triton {triton.__version__}", total=len(todo))
        for result in pool.map(examine, todo):
            if result["candidate"] == 0:
                result["faults"] += grown_since(baseline, result)
            results.append(result)
            progress.advance(task)

    table = Table(title=f"triton {triton.__version__}; registers and spilled bytes of a thread, KiB of shared memory")
    table.add_column("kernel", no_wrap=True)
    table.add_column("tiles", no_wrap=True)
    for column in ("regs", "spilled", "instr", "shared", "exp2"):
        table.add_column(column, justify="right")
    table.add_column("tensor cores", no_wrap=True)
    for found in results:
        table.add_row(
            name_of(found), found["config"],
            str(found["registers"]), str(found["spilled"]), str(found["instructions"]),
            f"{found['shared'] // 1024}/{found['shared_limit'] // 1024}", str(found["exp2"]), found["tensor_core"],
            style="red" if found["faults"] else None,
        )  # fmt: skip
    Console(width=max(console.width, 110)).print(table)
    path = record.results_folder(arguments, "static") / f"triton-{triton.__version__}.json"
    record.save(path, "cpu", results, kernels=results)
    console.print(f"figures: {path}", soft_wrap=True)
    if arguments.accept:
        write_baseline([found for found in results if found["candidate"] == 0])
        console.print(f"baseline: {_baseline()}", soft_wrap=True)
    faulty = [found for found in results if found["faults"] and found["candidate"] == 0]
    for found in faulty:
        console.print(f"{name_of(found)}: {'; '.join(found['faults'])}", soft_wrap=True)
    if faulty:
        raise SystemExit(f"{len(faulty)} of {len(results)} kernels have faults in their default configuration")
    console.print(f"{len(results)} kernels, none has a fault in its default configuration")


def name_of(found: dict) -> str:
    parts = [found["arch"], found["kernel"], f"D={found['head_dim']}", found["feature_map"], found["option"]]
    return " ".join(part for part in parts if part) + (f" {found['dtype']}" if found["dtype"] != "bfloat16" else "")
