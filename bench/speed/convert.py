"""How long it takes to turn a prefix into a state, by its length and kind of state, next to reading it once.

The floor of a conversion is reading keys and values, and the matrix products in it, of all keys and values and of keys
and centres, which are timed by themselves. States are checked against the float64 reference before they are timed.
Centres found by k-means are timed with the search (scikit-learn, on the CPU) and without it. States that are fitted to
queries are the subject of `fit`.
"""

import argparse
import functools

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ntk_kernels import prefix_to_state, reference

from ..lib import plots, record, tables, timing
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    record.add_arguments(parser)
    parser.add_argument("--dtype", choices=record.DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--heads", type=record.positive(int), default=8, help="default: %(default)s")
    parser.add_argument("--head-dim", type=record.positive(int), default=64, help="default: %(default)s")
    parser.add_argument("--prefix-rows", type=record.positive(int), nargs="+", metavar="M",
                        default=[2**10, 2**12, 2**14], help="default: 1k, 4k, 16k")  # fmt: skip
    parser.add_argument("--only", choices=KINDS, nargs="+", metavar="KIND", default=list(KINDS),
                        help=f"kinds of states, of {', '.join(map(repr, KINDS))} (default: all)")  # fmt: skip
    parser.add_argument(
        "--seconds", type=record.positive(float), default=3, help="of timing for each length (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    console, device, dtype = Console(), arguments.device, record.DTYPES[arguments.dtype]
    lengths, times = sorted(set(arguments.prefix_rows)), []
    with Progress(console=console) as progress:
        task = progress.add_task("converting", total=len(lengths))
        for m in lengths:
            key, value = torch.randn(2, arguments.heads, m, arguments.head_dim, device=device).to(dtype)
            kinds = {
                name: options
                for name, options in KINDS.items()
                if name in arguments.only and (m > 16 or options["centers"] != 16)
            }
            for name, options in kinds.items():
                if name.endswith("given"):
                    kinds[name] = options | {"centers": key[:, :16]}
                _check(name, key[:, :_CHECKED_ROWS], value[:, :_CHECKED_ROWS], kinds[name])
            calls = {name: functools.partial(prefix_to_state, key, value, **kind) for name, kind in kinds.items()}
            calls[PRODUCTS] = functools.partial(_products, key, value)
            if m > 16:
                calls[PRODUCTS_16] = functools.partial(_products, key, value, key[:, :16])
            at_m = timing.measure(calls, device, seconds=arguments.seconds)
            for name, result in at_m.items():
                result["peak_bytes"] = timing.peak_bytes(calls[name], device)
            times.append(at_m)
            progress.advance(task)
    row_bytes = 2 * arguments.heads * arguments.head_dim * dtype.itemsize
    figures = {
        "settings": {name: getattr(arguments, name) for name in ("dtype", "heads", "head_dim")},
        "prefix_rows": lengths, "milliseconds": times, "row_bytes": row_bytes,
        "copy_gb_per_s": ceilings.copy_bandwidth(device),
    }  # fmt: skip
    rows = [
        {"benchmark": "convert", **figures["settings"], "prefix_rows": m, "name": name, **result,
         "gb_per_s": m * row_bytes / result["ms"] / 1e6}
        for m, at_m in zip(lengths, times, strict=True)
        for name, result in at_m.items()
    ]  # fmt: skip
    path = record.results_folder(arguments) / "convert.json"
    record.save(path, device, rows, **figures)
    plot(path.with_suffix(".png"), figures)
    for table in tables_of(figures):
        tables.show(console, table)
    console.print(f"figures: {path}\nplot: {path.with_suffix('.png')}", soft_wrap=True)


def _products(key, value, centers=None):
    """The matrix products that a conversion with `taylor1` contains."""
    product = key.mT @ value
    return product if centers is None else (product, key @ centers.mT)


def _check(name: str, key, value, options: dict) -> None:
    """The state of these rows against the formula in float64."""
    state = prefix_to_state(key, value, **options)
    centers = None if state.centers is None else state.centers.double()
    formula = reference.prefix_to_state(key.double(), value.double(), state.feature_map, centers=centers)
    for tensor, expected in formula.items():
        error = ((getattr(state, tensor).double() - expected).norm() / expected.norm()).item()
        if not error < 1e-3:
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
