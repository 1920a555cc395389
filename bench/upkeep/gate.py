"""Fails if NTK-Attention has become slow compared with plain attention or the naive formula, on a CPU, or if calls on a
GPU enter more functions on the host.

For continuous integration, without a GPU and beside other work: compares ratios of lower quartiles within one run, on
one thread (threads that wait for each other suffer most from other work), with wide margins, and fails only if each of
five runs is too slow. Functions of Python and of C are counted on a GPU that does nothing (`bench host`): their number
is the same in every run. `bench static` checks the kernels for GPUs.
"""

import argparse

import torch
from rich.console import Console

from ..idle_gpu.build import build
from ..lib import record
from ..lib.progress import Steps
from ..speed import attention, host

# Maximum ratios of our time to a peer's; on a quiet machine they are 1.1, 1.2, 0.15 and 0.25.
LIMITS = {
    ("SDPA, no prefix", "forward"): 2.2, ("SDPA, no prefix", "forward + backward"): 2.2,
    ("naive formula", "forward"): 0.5, ("naive formula", "forward + backward"): 0.6,
}  # fmt: skip
# Functions of Python and of C that a call may enter; versions of Python and PyTorch differ by a few.
FUNCTIONS = {
    "forward, no state": 60, "forward, elu": 70, "forward, gradients wanted": 100,
    "forward and backward, no state": 220, "forward and backward, frozen state": 240,
    "forward and backward, all gradients": 260, "decode, no state": 65, "decode, elu": 70,
    "decode, elu, in splits": 80, "decode, a cache that grows": 480, "cuDNN and prefix, forward": 70,
    "cuDNN and prefix, forward and backward": 250, "in torch.compile, forward": 260, "NTKPrefix()": 35,
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


def check_functions(console: Console) -> None:
    """Raises SystemExit if a call enters more functions than it may."""
    too_many = []
    for name, call in host.run(build(), blocks=1).items():
        count, limit = call["functions"], FUNCTIONS[name]
        verdict = "" if count <= limit else ": too many"
        console.print(f"{name}: enters {count} functions, at most {limit}{verdict}")
        too_many += [name] if verdict else []
    if too_many:
        raise SystemExit(f"calls enter too many functions: {'; '.join(too_many)}")


def run(arguments: argparse.Namespace) -> None:
    console = Console()
    check_functions(console)
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
