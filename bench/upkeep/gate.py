"""Fails if NTK-Attention has become slow compared with plain attention or the naive formula, on a CPU.

For continuous integration, without a GPU and beside other work: compares ratios of lower quartiles within one run, on
one thread (threads that wait for each other suffer most from other work), with wide margins, and fails only if each of
five runs is too slow. `bench static` checks the kernels for GPUs.
"""

import argparse

import torch
from rich.console import Console

from ..lib import record
from ..lib.progress import Steps
from ..speed import attention

# Maximum ratios of our time to a peer's; on a quiet machine they are 1.2, 1.2, 0.15 and 0.25.
LIMITS = {
    ("SDPA, no prefix", "forward"): 2.2, ("SDPA, no prefix", "forward + backward"): 2.2,
    ("naive formula", "forward"): 0.5, ("naive formula", "forward + backward"): 0.6,
}  # fmt: skip
OURS = "ours, torch backend"
_ATTEMPTS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--length", type=record.positive(int), default=1024, help="tokens (default: %(default)s)")
    parser.add_argument(
        "--seconds",
        type=record.positive(float),
        default=3,
        help="seconds of timing for each pass (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    console = Console()
    settings = argparse.Namespace(
        device="cpu", dtype="float32", batch=1, heads=8, length=arguments.length, head_dim=64, feature_map="elu",
        prefix_rows=None, full=False, only=[OURS, "naive formula"], seconds=arguments.seconds,
    )  # fmt: skip
    torch.set_num_threads(1)
    for _ in range(_ATTEMPTS):
        with Steps(console) as progress:
            times = attention.measure(settings, progress)["milliseconds"]
        too_slow = []
        for (peer, name), limit in LIMITS.items():
            ratio = times[name][OURS]["low"] / times[name][peer]["low"]
            verdict = "" if ratio <= limit else ": too slow"
            console.print(f"{name}: {OURS} takes {ratio:.2f}× {peer}, at most {limit}×{verdict}")
            too_slow += [verdict] if verdict else []
        if not too_slow:
            return
    raise SystemExit(f"too slow in each of {_ATTEMPTS} runs")
