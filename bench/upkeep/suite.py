"""Runs most benchmarks for this machine, one after the other; resumes where it was cut off.

Takes less than 10 minutes on two cores and less than 9 on a GPU. Each part runs in its own process. Parts that are done
at this commit, as listed in all.json in the folder of figures, are skipped, so the same command resumes a run that was
cut off. `fit`, `prompt` and `finetune` are not included, as they take longer; nor is `tune`, which should run before;
nor are `static`, `gate` and `report`, which measure no device.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..lib import record, tables
from ..speed import convert

_HALF = ["--dtype", "bfloat16"]
_ON_GPU = [kind for kind in convert.KINDS if not kind.endswith("found")]  # k-means runs on the CPU
PARTS = {
    "cpu": {
        "ceilings": ["ceilings"],
        "attention": ["attention", "--prefix-rows", "4096", "--seconds", "4"],
        "decode": ["decode", "--seconds", "3"],
        "sweep at D=64": ["sweep"],
        "sweep at D=128": ["sweep", "--head-dim", "128"],
        "convert": ["convert"],
        "accounting": ["accounting"],
        "scaling": ["scaling"],
        "approximation": ["approximation"],
        "demo": ["demo"],
    },
    "cuda": {
        "ceilings": ["ceilings"],
        "attention at D=128": ["attention", *_HALF, "--batch", "2", "--heads", "16", "--length", "4096", "--head-dim",
                               "128", "--seconds", "2", "--name", "attention-d128"],
        "attention at D=64": ["attention", *_HALF, "--batch", "2", "--heads", "16", "--length", "4096", "--head-dim",
                              "64", "--seconds", "2", "--name", "attention-d64"],
        "attention and an exact prefix": ["attention", *_HALF, "--heads", "16", "--length", "2048", "--head-dim", "128",
                                          "--prefix-rows", "65536", "--seconds", "2", "--name", "attention-prefix64k"],
        "decode": ["decode", *_HALF, "--batch", "32", "--heads", "32", "--kv-heads", "8", "--head-dim", "128",
                   "--prefix-rows", "1024", "4096", "16384", "65536", "--seconds", "2"],
        "convert": ["convert", *_HALF, "--prefix-rows", "4096", "65536", "1048576", "--only", *_ON_GPU, "--seconds",
                    "1"],
        "attention with taylor2": ["attention", *_HALF, "--batch", "2", "--heads", "16", "--length", "4096",
                                   "--feature-map", "taylor2", "--only", "ours", "--seconds", "1", "--name",
                                   "attention-taylor2"],
        "sweep at D=128": ["sweep", *_HALF, "--head-dim", "128", "--seconds", "1"],
        "sweep at D=64": ["sweep", *_HALF, "--seconds", "1"],
        "sweep at D=128, backward": ["sweep", *_HALF, "--head-dim", "128", "--backward", "--seconds", "1"],
        "demo": ["demo"],
    },
}  # fmt: skip
_WITHOUT_DEVICE = ("accounting",)  # it runs nothing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    record.add_arguments(parser)
    parser.add_argument("--again", action="store_true", help="run parts again that are done at this commit")
    parser.add_argument(
        "--minutes",
        type=record.positive(float),
        help="stop after so many minutes; the same command resumes (default: no limit)",
    )


def run(arguments: argparse.Namespace) -> None:
    console, folder = Console(), record.results_folder(arguments)
    parts = PARTS[torch.device(arguments.device).type]
    commit = record.environment(arguments.device)["commit"]
    state_file = folder / "all.json"
    done = {} if arguments.again else _done_at(commit, state_file)
    end = time.monotonic() + 60 * (arguments.minutes or 1e6)
    states = {}
    for i, (name, command) in enumerate(parts.items()):
        if name in done:
            states[name] = f"done before ({done[name]:.0f} s)"
            continue
        left = end - time.monotonic()
        if left <= 0:
            states[name] = "left for the next run"
            continue
        console.rule(f"{i + 1} of {len(parts)}: {name}")
        start = time.monotonic()
        code = _run_part([*command, *_options(command[0], arguments, folder)], left)
        seconds = time.monotonic() - start
        if code == 0:
            done[name] = seconds
            state_file.write_text(json.dumps({"commit": commit, "seconds": done}, indent=1) + "\n", encoding="utf-8")
        states[name] = {0: f"{seconds:.0f} s", None: "cut off"}.get(code, f"failed with {code} after {seconds:.0f} s")
    table = Table("part", "state")
    for name, state in states.items():
        table.add_row(name, state)
    tables.show(console, table)
    console.print(f"figures and plots: {folder}", soft_wrap=True)
    missing = [name for name in parts if name not in done]
    if missing:
        raise SystemExit(f"{len(missing)} of {len(parts)} parts are missing; the same command goes on with them")


def _options(benchmark: str, arguments: argparse.Namespace, folder: Path) -> list[str]:
    device = [] if benchmark in _WITHOUT_DEVICE else ["--device", arguments.device]
    return [*device, "--out", str(folder)]


def _run_part(command: list[str], seconds: float) -> int | None:
    """Runs a part for at most that long; returns its exit status, None if it was cut off."""
    try:
        return subprocess.run([sys.executable, "-m", "bench", *command], cwd=record.ROOT, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return None


def _done_at(commit: str | None, path: Path) -> dict[str, float]:
    """Returns the seconds that each finished part took, by name, if the file is from this commit."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state["seconds"] if state["commit"] == commit else {}
