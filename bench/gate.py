"""Fails if NTK-Attention has become slow next to plain attention or the naive formula, on a CPU.

For continuous integration, where no GPU is to be had: ratios within one run, with wide margins, and the best of three
runs, as such machines are noisy. What the kernels for GPUs are made of is watched by `bench static`.
"""

import argparse

from rich.console import Console
from rich.progress import Progress

from . import attention, record

# Ratios of ours to a peer that are too much: recorded were 1.2 to 1.4 and 1.1 to 1.3; 0.13 to 0.16 and 0.2 to 0.25.
LIMITS = {
    ("SDPA, no prefix", "forward"): 2.2, ("SDPA, no prefix", "forward + backward"): 2.0,
    ("naive formula", "forward"): 0.5, ("naive formula", "forward + backward"): 0.6,
}  # fmt: skip
OURS = "ours, torch backend"
_ATTEMPTS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--length", type=record.positive(int), default=1024, help="tokens (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=record.positive(float), default=3, help="of timing for each pass (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> None:
    console = Console()
    settings = argparse.Namespace(
        device="cpu", dtype="float32", batch=1, heads=8, length=arguments.length, head_dim=64, feature_map="elu",
        prefix_rows=None, full=False, only=[OURS, "naive formula"], seconds=arguments.seconds,
    )  # fmt: skip
    for _ in range(_ATTEMPTS):
        with Progress(console=console) as progress:
            times = attention.measure(settings, progress)["milliseconds"]
        too_slow = []
        for (peer, name), limit in LIMITS.items():
            # Each over plain attention in its own turns: the naive formula is timed apart.
            ratio = times[name][OURS]["ratio"] / times[name][peer]["ratio"]
            verdict = "" if ratio <= limit else ": too slow"
            console.print(f"{name}: {OURS} takes {ratio:.2f}× {peer}, at most {limit}×{verdict}")
            too_slow += [verdict] if verdict else []
        if not too_slow:
            return
    raise SystemExit(f"too slow in each of {_ATTEMPTS} runs")
