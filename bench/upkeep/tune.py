"""Measures the tiles that the kernels may run with, shape class by shape class, and checks each against the default.

Every candidate in ntk_kernels/kernels/host/tile_tables.py (--search: a grid of tiles beyond them too) is compiled, in
as many processes as there are cores; its results must agree with those of the default; then it is timed. With --write
the fastest become the defaults for GPUs of this class, in ntk_kernels/kernels/host/tuned/; run `python -m bench
static` afterwards. Without a GPU, TRITON_INTERPRET=1 tries the command out; its times say nothing.
"""

import argparse
import itertools
import os
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from unittest import mock

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ntk_kernels import FEATURE_MAPS, PrefixState, feature_dim, ntk_attention, ntk_attention_decode
from ntk_kernels.kernels import add_second_order
from ntk_kernels.kernels.host import autotune, configs
from ntk_kernels.kernels.host.configs import TileConfig
from ntk_kernels.kernels.jit.tiles import INTERPRETED

from ..lib import record, timing

_TRAINING = ("forward", "dkdv", "dk", "dv", "dq")
_PASSES = ("add_resident", "add_resident_bwd")  # of the torch backend, for the maps of "state" below
# That run only where they were measured: checked against, and timed beside, calls that go without them.
_UNPROVEN = ("add_second_order",)  # of the torch backend
_KERNELS = (*_TRAINING, *_PASSES, *_UNPROVEN, "decode")
# Rows, keys and warps of more tiles, and stages for each.
_GRID = {
    (128, 128, 8): (2, 3), (128, 64, 8): (2, 3, 4), (128, 64, 4): (2, 3), (64, 128, 4): (2, 3), (64, 128, 8): (2, 3),
    (64, 64, 4): (2, 3, 4), (64, 64, 8): (2, 3, 4),
}  # fmt: skip
# Maps that share a kind of entry in the tables.
_MAPS_OF = {
    "plain": {None}, "state": {"elu", "taylor1"}, "taylor2": {"taylor2"}, "float32": {None, *FEATURE_MAPS},
}  # fmt: skip
_CHECKED_HEADS = 16
_PARTS = 4  # of the candidates for one kernel and shape, compiled by a process each


@dataclass(frozen=True)
class Shape:
    """One kind of call."""

    dtype: str
    head_dim: int
    feature_map: str | None
    causal: bool
    length: int
    decode: bool = False

    def __str__(self) -> str:
        name = self.feature_map or "plain"
        kind = "decode" if self.decode else "causal" if self.causal else "full"
        return f"{self.dtype} D={self.head_dim} {name} {kind} L={self.length}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    record.add_arguments(parser)
    parser.add_argument("--dtype", choices=record.DTYPES, nargs="+", default=["bfloat16"], help="default: bfloat16")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128, 256], help="default: 64 128 256")
    parser.add_argument(
        "--feature-map", choices=("plain", *FEATURE_MAPS), nargs="+", default=["plain", *FEATURE_MAPS],
        help="plain: no state (default: all)",
    )  # fmt: skip
    parser.add_argument("--length", type=int, nargs="+", default=[4096], help="tokens (default: 4096)")
    parser.add_argument("--full", action="store_true", help="also without causality")
    parser.add_argument("--kernel", choices=_KERNELS, nargs="+", default=_KERNELS,
                        help="default: all")  # fmt: skip
    parser.add_argument("--search", action="store_true", help="also tiles that are in no table")
    parser.add_argument("--write", action="store_true", help="make the fastest tiles those that the package ships")
    parser.add_argument("--heads", type=record.positive(int), default=16, help="default: %(default)s")
    parser.add_argument("--tokens", type=record.positive(int), default=16384,
                        help="in a batch, however long its sequences (default: %(default)s)")  # fmt: skip
    parser.add_argument("--jobs", type=record.positive(int), default=os.cpu_count(),
                        help="processes that compile (default: one for each processor)")  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    on_gpu = torch.device(arguments.device).type == "cuda"
    if not on_gpu and (not INTERPRETED or arguments.write):
        raise SystemExit(
            "bench tune needs a GPU, or TRITON_INTERPRET=1 to try it out (without --write): what tiles cost elsewhere "
            f"says nothing, got --device {arguments.device}"
        )
    console = Console()
    shapes = [
        Shape(dtype, dim, None if name == "plain" else name, causal, length)
        for dtype, dim, name, length, causal in itertools.product(
            arguments.dtype, arguments.head_dim, arguments.feature_map, arguments.length,
            (True, False) if arguments.full else (True,),
        )
    ]  # fmt: skip
    jobs = [(shape, kernel) for shape in shapes for kernel in arguments.kernel if _runs(kernel, shape)]
    if "decode" in arguments.kernel:
        decodes = {Shape(s.dtype, s.head_dim, s.feature_map, True, s.length, decode=True) for s in shapes}
        jobs += [(shape, "decode") for shape in sorted(decodes, key=str)]
    wrong, results = {}, []
    with Progress(console=console) as progress:
        task = progress.add_task("compiling and checking", total=len(jobs))
        with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
            futures = {
                pool.submit(check, *job, arguments.device, arguments.search, part): job
                for job in jobs
                for part in range(_PARTS)
            }
            for future in as_completed(futures):
                wrong.setdefault(futures[future], {}).update(future.result())
                progress.advance(task, 1 / _PARTS)
        task = progress.add_task("timing", total=len(jobs))
        for shape, kernel in jobs:
            results += time(shape, kernel, wrong[shape, kernel], arguments)
            progress.advance(task)
    for result in results:
        console.print(table_of(result))
    path = record.results_folder(arguments) / "tune.json"
    rows = [
        {"benchmark": "tune", "kernel": result["kernel"], **result["shape"], "tile": tile, "ms": ms}
        for result in results
        for tile, ms in result["ms"].items()
    ]
    record.save(path, arguments.device, rows, results=results)
    console.print(f"figures: {path}", soft_wrap=True)
    if arguments.write:
        arch = configs.arch_of(torch.device(arguments.device))
        found = best_tiles(results, arch)
        configs.write_tuned(arch, found)
        for key, tile in found.items():
            console.print(f"{key}: {tile}")
        console.print(f"{len(found)} entries written: {configs.tuned_file(arch)}", soft_wrap=True)


def _runs(kernel: str, shape: Shape) -> bool:
    """Whether a call of that shape, forward and backward, launches the kernel."""
    if kernel in _PASSES:
        return shape.dtype == "bfloat16" and shape.head_dim <= 128 and shape.feature_map in _MAPS_OF["state"]
    if kernel in _UNPROVEN:
        return shape.dtype == "bfloat16" and shape.head_dim <= 128 and shape.feature_map == "taylor2"
    return kernel in _TRAINING


def best_tiles(results: list[dict], arch: str) -> dict[str, TileConfig]:
    """Returns the fastest tile for each entry of the tuned file, by the geometric mean of times as multiples of the
    default's.

    A tile must have run for every shape that shares the entry, all maps that share it must have been timed, and it must
    gain 2% to replace the default; for a kernel that is none, calls with it must gain as much on those without it.
    """
    groups = {}
    for result in results:
        shape = Shape(**result["shape"])
        kind = configs.kinds_of(record.DTYPES[shape.dtype], shape.feature_map)[0]
        dim = configs.blocks(arch, shape.head_dim, shape.head_dim).block_d
        groups.setdefault((result["kernel"], kind, max(64, dim)), []).append(result)
    found = {}
    for (kernel, kind, dim), group in groups.items():
        missing = _MAPS_OF[kind.split()[0]] - {result["shape"]["feature_map"] for result in group}
        tiles = set.intersection(*({TileConfig(**tile) for tile in result["tiles"]} for result in group))
        if missing or not tiles:
            continue
        cost = {
            tile: statistics.geometric_mean(r["ms"][str(tile)] / r["ms"][r["default"]] for r in group)
            for tile in tiles
        }  # fmt: skip
        best = min(tiles, key=cost.get)
        gain = max(r["calls"]["with"] / r["calls"]["without"] for r in group) if kernel in _UNPROVEN else cost[best]
        if gain < 0.98:
            found[configs.tuned_key(kernel, kind, dim)] = best
    return found


def candidates_of(kernel: str, default: tuple[TileConfig, ...], search: bool) -> tuple[TileConfig, ...]:
    if not search:
        return default
    grid = [
        TileConfig(m, n, warps, stages, use_descriptors=tma)
        for (m, n, warps), all_stages in _GRID.items()
        for stages in all_stages
        for tma in ((False, True) if kernel == "forward" and stages < 3 else (False,))  # as in configs.candidates
        if kernel in _TRAINING or (m == 64 and (kernel == "decode" or n == 64))
    ]
    return tuple(dict.fromkeys([*default, *grid]))


def check(shape: Shape, kernel: str, device: str, search: bool, part: int) -> dict[str, str]:
    """Runs a part of the candidates of a kernel on a small batch; what is wrong with those that fail, by name."""
    call, found = maker(shape, kernel, device, _CHECKED_HEADS, tokens=shape.length), []

    def look(key, candidates, launch_with, device_name):
        if key.split()[0] == kernel:
            found.append(candidates_of(kernel, candidates, search))
        return candidates[0]

    expected = _with(look, call, without=_UNPROVEN)
    if kernel in _UNPROVEN:
        _with(look, call, without=())
    without = () if kernel in _UNPROVEN else _UNPROVEN
    problems = {}
    for config in found[0][part::_PARTS] if found else ():

        def take(key, candidates, launch_with, device_name, config=config):
            return config if key.split()[0] == kernel else candidates[0]

        try:
            results = _with(take, call, without)
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:  # of the compiler, of the launcher: what kind is not known beforehand
            problems[str(config)] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            continue
        for name, result in results.items():
            difference = (result.double() - expected[name].double()).norm() / expected[name].double().norm()
            if not difference < 2 * torch.finfo(record.DTYPES[shape.dtype]).eps:
                problems[str(config)] = f"wrong: {name} differs by {difference:.2g} from the default's"
    return problems


def time(shape: Shape, kernel: str, wrong: dict[str, str], arguments: argparse.Namespace) -> list[dict]:
    """Milliseconds of every candidate that works."""
    results = []

    def measure(key, candidates, launch_with, device_name):
        if key.split()[0] == kernel:
            tiles = [c for c in candidates_of(kernel, candidates, arguments.search) if str(c) not in wrong]
            times = {str(tile): _median_time(lambda tile=tile: launch_with(tile), arguments.device) for tile in tiles}
            results.append(
                {"shape": asdict(shape), "kernel": kernel, "class": key, "default": str(candidates[0]), "ms": times,
                 "tiles": [asdict(tile) for tile in tiles], "wrong": wrong}
            )  # fmt: skip
        return candidates[0]

    tokens = max(arguments.tokens, shape.length)
    call = maker(shape, kernel, arguments.device, arguments.heads, tokens)
    _with(measure, call, without=() if kernel in _UNPROVEN else _UNPROVEN)
    if kernel in _UNPROVEN:

        def first(key, candidates, launch_with, device_name):
            return candidates[0]

        ways = {"without": _UNPROVEN, "with": ()}
        times = {
            name: _with(first, lambda: _median_time(call, arguments.device), without=without)
            for name, without in ways.items()
        }  # fmt: skip
        results = [result | {"calls": times} for result in results]
    return results


def _median_time(function, device: str) -> float:
    if torch.device(device).type == "cuda":
        return autotune.median_time(function)
    return timing.measure({"": function}, device, seconds=0, min_rounds=2)[""]["ms"]


def _with(choose, call, without: tuple[str, ...]):
    """A call in which `choose` stands for the autotuner, and the kernels `without` are not chosen."""
    with (
        mock.patch.dict(os.environ, NTK_KERNELS_AUTOTUNE="1"),
        mock.patch.object(autotune, "fastest", choose),
        mock.patch.object(add_second_order, "is_chosen", lambda call, kernel: kernel not in without),
    ):
        return call()


def maker(shape: Shape, kernel: str, device: str, heads: int, tokens: int):
    """A call of that shape that launches the kernel, forward and backward, and gives its results by name."""
    torch.manual_seed(0)
    dtype, dim = record.DTYPES[shape.dtype], shape.head_dim
    batch = max(1, tokens // shape.length)
    if shape.decode:
        batch = max(8, batch)
        query = torch.randn(batch, 4 * heads, 1, dim, device=device).to(dtype)
        key, value = torch.randn(2, batch, heads, shape.length, dim, device=device).to(dtype)
        lengths = torch.full((batch,), shape.length, dtype=torch.int32, device=device)
        state = _state(shape, heads, device)
        return lambda: {"out": ntk_attention_decode(query, key, value, lengths, state, backend="triton")}
    query, key, value, grad = torch.randn(4, batch, heads, shape.length, dim, device=device).to(dtype)
    inputs = {"query": query, "key": key, "value": value}
    state = _state(shape, heads, device)
    if state is not None:
        inputs |= {"z": state.z, "k": state.k}
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def call():
        backend = "torch" if kernel in (*_PASSES, *_UNPROVEN) else "triton"
        out = ntk_attention(query, key, value, state, is_causal=shape.causal, backend=backend)
        grads = torch.autograd.grad(out, leaves, grad)
        return {"out": out.detach()} | {f"gradient of {name}": g for name, g in zip(inputs, grads, strict=True)}

    return call


def _state(shape: Shape, heads: int, device: str) -> PrefixState | None:
    if shape.feature_map is None:
        return None
    r = feature_dim(shape.feature_map, shape.head_dim)
    z, k = torch.randn(heads, r, shape.head_dim, device=device), torch.rand(heads, r, device=device)
    return PrefixState(z, k, shape.feature_map)


def table_of(result: dict) -> Table:
    table = Table(title=f"{result['kernel']}: {Shape(**result['shape'])} ({result['class']})")
    table.add_column("tile")
    table.add_column("ms", justify="right")
    for name, ms in sorted(result["ms"].items(), key=lambda item: item[1]):
        table.add_row(name + (" (default)" if name == result["default"] else ""), f"{ms:.4f}")
    for name, problem in result["wrong"].items():
        table.add_row(name, problem)
    return table
