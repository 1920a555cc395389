"""Time of converting a prefix to a state in closed form, by length and kind of state.

A conversion cannot be faster than reading keys and values once, nor than the matrix products in it, which are
timed by themselves. States are checked against the float64 reference before they are timed. Centres found by k-means
are timed with the search (scikit-learn, on the CPU) and without it. For states that are fitted to queries see `bench
fit`.
"""

import argparse
import functools
from collections.abc import Callable

import torch
from rich.table import Table
from torch import Tensor

from ntk_kernels import prefix_to_state, reference

from ..lib import accuracy, plots, record, timing
from ..lib.progress import Steps
from . import ceilings

KINDS = {
    "elu": {"feature_map": "elu", "centers": None},
    "taylor1, mean": {"feature_map": "taylor1", "centers": "mean"},
    "taylor2, mean": {"feature_map": "taylor2", "centers": "mean"},
    "taylor1, C=16, found": {"feature_map": "taylor1", "centers": 16},
    "taylor1, C=16, given": {"feature_map": "taylor1", "centers": 16},
}
PRODUCTS, PRODUCTS_16 = "products only", "products only, C=16"
_CHECKED_ROWS = 512
_LIMIT = 1e-3  # of relative errors of checked states


def add_arguments(parser: argparse.ArgumentParser) -> None:
    record.add_arguments(parser)
    parser.add_argument("--dtype", choices=record.DTYPES, default="float32",
                        help="dtype of keys and values (default: %(default)s)")  # fmt: skip
    parser.add_argument("--heads", type=record.positive(int), default=8, help="number of heads (default: %(default)s)")
    parser.add_argument(
        "--head-dim", type=record.positive(int), default=64, help="head dimension (default: %(default)s)"
    )
    parser.add_argument("--prefix-rows", type=record.positive(int), nargs="+", metavar="M",
                        default=[2**10, 2**12, 2**14], help="lengths of the prefix (default: 1k, 4k, 16k)")  # fmt: skip
    parser.add_argument("--only", choices=KINDS, nargs="+", metavar="KIND", default=list(KINDS),
                        help=f"kinds of states: {', '.join(map(repr, KINDS))} (default: all)")  # fmt: skip
    parser.add_argument(
        "--seconds",
        type=record.positive(float),
        default=3,
        help="seconds of timing for each length (default: %(default)s)",
    )


def measure(arguments: argparse.Namespace, progress: Steps) -> dict:
    """Returns times by prefix length and kind of state, bytes of a row of keys and values, and the rate of a copy."""
    torch.manual_seed(0)
    device, dtype = arguments.device, record.DTYPES[arguments.dtype]
    lengths, times = sorted(set(arguments.prefix_rows)), []
    task = progress.add_task("converting", total=len(lengths))
    for m in lengths:
        key, value = torch.randn(2, arguments.heads, m, arguments.head_dim, device=device).to(dtype)
        calls = _calls(key, value, arguments.only)
        at_m = timing.measure(calls, device, seconds=arguments.seconds)
        for name, result in at_m.items():
            result["peak_bytes"] = timing.peak_bytes(calls[name], device)
        times.append(at_m)
        progress.advance(task, step=f"{m:,} rows")
    return {
        "settings": {name: getattr(arguments, name) for name in ("dtype", "heads", "head_dim")},
        "prefix_rows": lengths,
        "milliseconds": times,
        "row_bytes": 2 * arguments.heads * arguments.head_dim * dtype.itemsize,
        "copy_gb_per_s": ceilings.copy_bandwidth(device),
    }


def _calls(key: Tensor, value: Tensor, names: list[str]) -> dict[str, Callable]:
    """Returns what is timed, by name: checked conversions [H, m, D] -> state, and the matrix products in them."""
    several = key.shape[1] > 16  # rows enough for 16 centres
    calls = {}
    for name, options in KINDS.items():
        if name not in names or (options["centers"] == 16 and not several):
            continue
        if name.endswith("given"):
            options = options | {"centers": key[:, :16]}
        _check(name, key[:, :_CHECKED_ROWS], value[:, :_CHECKED_ROWS], options)
        calls[name] = functools.partial(prefix_to_state, key, value, **options)
    calls[PRODUCTS] = functools.partial(_products, key, value)
    if several:
        calls[PRODUCTS_16] = functools.partial(_products, key, value, key[:, :16])
    return calls


def rows_of(figures: dict) -> list[dict]:
    return [
        figures["settings"]
        | {"prefix_rows": m, "name": name}
        | result
        | {"gb_per_s": m * figures["row_bytes"] / result["ms"] / 1e6}
        for m, at_m in zip(figures["prefix_rows"], figures["milliseconds"], strict=True)
        for name, result in at_m.items()
    ]


def _products(key, value, centers=None):
    """Computes only the matrix products of a conversion with `taylor1`."""
    product = key.mT @ value
    return product if centers is None else (product, key @ centers.mT)


def _check(name: str, key, value, options: dict) -> None:
    """Compares the state of these rows with the formula in float64; raises RuntimeError if it is wrong."""
    state = prefix_to_state(key, value, **options)
    centers = None if state.centers is None else state.centers.double()
    formula = reference.prefix_to_state(key.double(), value.double(), state.feature_map, centers=centers)
    for tensor, expected in formula.items():
        error = accuracy.relative_error(getattr(state, tensor), expected)
        if accuracy.is_wrong(error, _LIMIT):
            raise RuntimeError(f"{name} is wrong: its {tensor} differs by {error:.2g} from that of the formula")


def tables_of(figures: dict) -> list[Table]:
    settings, times = figures["settings"], figures["milliseconds"]
    table = Table(
        title=f"Converting a prefix (H={settings['heads']}, D={settings['head_dim']}, {settings['dtype']}): ms, times "
        f"reading it once at {figures['copy_gb_per_s']:,.0f} GB/s"
    )
    table.add_column("rows", justify="right")
    names = list(dict.fromkeys(name for at_m in times for name in at_m))
    for name in names:
        table.add_column(name, justify="right")
    for m, at_m in zip(figures["prefix_rows"], times, strict=True):
        floor = m * figures["row_bytes"] / figures["copy_gb_per_s"] / 1e6
        cells = (
            f"{at_m[name]['ms']:,.3g} ms, {at_m[name]['ms'] / floor:,.3g}×" if name in at_m else "—" for name in names
        )
        table.add_row(f"{m:,}", *cells)
    return [table]


def plot(path, figures: dict) -> None:
    lengths, settings = figures["prefix_rows"], figures["settings"]
    figure, (axes,) = plots.canvas(width=8)
    for name in figures["milliseconds"][-1]:
        at = [(m, at_m[name]["ms"]) for m, at_m in zip(lengths, figures["milliseconds"], strict=True) if name in at_m]
        axes.plot([m for m, _ in at], [ms for _, ms in at], marker="o", label=name)
    floor = [m * figures["row_bytes"] / figures["copy_gb_per_s"] / 1e6 for m in lengths]
    axes.plot(lengths, floor, ls=":", color="black", label="reading keys and values once")
    axes.set(xscale="log", yscale="log", xlabel="rows of the prefix, m", ylabel="ms",
             title=f"Conversion, {settings['heads']} heads, D={settings['head_dim']}, {settings['dtype']}")  # fmt: skip
    plots.mark(axes.xaxis, lengths)
    plots.plain_log(axes.yaxis)
    plots.save(figure, path)
