"""Time of a decoding step with a prefix state and with exact prefixes of many lengths.

Each batch row has its own cache of `--length` keys and attends to a prefix of m rows in addition: to a state in its
place; to the rows themselves, in front of its own cache; or, where the whole batch shares one prefix, to rows that are
read once and merged by lse (a cascade). Peers get the heads of a group as query rows, so that they too read keys only
once. Everything is checked against float64, then timed in turns; ratios are within these turns.
"""

import argparse
import math

import torch
from rich.table import Table

from ntk_kernels import (
    FEATURE_MAPS,
    PrefixState,
    feature_dim,
    merge_attention,
    ntk_attention,
    ntk_attention_decode,
    reference,
)

from ..lib import accuracy, plots, record, timing
from ..lib.progress import Steps
from . import ceilings

PLAIN, OURS_PLAIN = "SDPA, no prefix", "ours, no prefix"
ONE_TASK, MANY_TASKS = "ours, one state", "ours, a state per row"
EXACT, CASCADE = "exact", "exact, shared"
CONTESTANTS = (PLAIN, OURS_PLAIN, ONE_TASK, MANY_TASKS, EXACT, CASCADE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    record.add_arguments(parser)
    parser.add_argument(
        "--dtype", choices=record.DTYPES, default="float32", help="dtype of queries and caches (default: %(default)s)"
    )
    for name, default, text in (
        ("batch", 4, "number of sequences"), ("heads", 8, "query heads"), ("kv-heads", 2, "key/value heads"),
        ("length", 4096, "keys in the cache of each sequence"), ("head-dim", 64, "head dimension"),
    ):  # fmt: skip
        parser.add_argument(
            f"--{name}", type=record.positive(int), default=default, help=f"{text} (default: %(default)s)"
        )
    parser.add_argument(
        "--feature-map", choices=FEATURE_MAPS, default="elu", help="feature map of the states (default: %(default)s)"
    )
    parser.add_argument(
        "--prefix-rows", type=record.positive(int), nargs="+", metavar="M", default=[2**i for i in range(10, 19, 2)],
        help="lengths of the exact prefix (default: 1k to 256k)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds",
        type=record.positive(float),
        default=5,
        help="seconds of timing for each length (default: %(default)s)",
    )


def measure(arguments: argparse.Namespace, progress: Steps) -> dict:
    """Returns times by contestant and prefix length, bytes that each reads, and the lengths that do not fit."""
    if arguments.heads % arguments.kv_heads:
        raise SystemExit(f"--heads must be a multiple of --kv-heads, got {arguments.heads} and {arguments.kv_heads}")
    step, lengths = Step(arguments), sorted(set(arguments.prefix_rows))
    free = 0.7 * _free_bytes(arguments.device)
    left_out = [m for m in lengths if step.bytes_of_exact(m) > free]
    lengths = [m for m in lengths if m not in left_out]
    if not lengths:
        raise SystemExit(f"no exact prefix of {min(left_out):,} rows fits into memory; try a smaller --batch")
    times = []
    task = progress.add_task("decoding", total=len(lengths))
    for m in lengths:
        functions = step.contestants(m)
        step.check(functions, m)
        at_m = timing.measure(functions, arguments.device, seconds=arguments.seconds)
        for name, result in at_m.items():
            result["peak_bytes"] = timing.peak_bytes(functions[name], arguments.device)
            if torch.device(arguments.device).type == "cuda":
                result["host_us"] = timing.host_time(functions[name], arguments.device)
        times.append(at_m)
        progress.advance(task, step=f"{m:,} rows")
    names = ("dtype", "batch", "heads", "kv_heads", "length", "head_dim", "feature_map")
    return {
        "settings": {name: getattr(arguments, name) for name in names},
        "prefix_rows": lengths,
        "left_out": left_out,
        "milliseconds": {name: [at_m[name] for at_m in times] for name in CONTESTANTS},
        "bytes": {PLAIN: step.cache_bytes, OURS_PLAIN: step.cache_bytes, ONE_TASK: step.cache_bytes + step.state_bytes,
                  MANY_TASKS: step.cache_bytes + arguments.batch * step.state_bytes},
        "copy_gb_per_s": ceilings.copy_bandwidth(arguments.device),
    }  # fmt: skip


def rows_of(figures: dict) -> list[dict]:
    return [
        figures["settings"] | {"prefix_rows": m, "name": name} | results[i]
        for name, results in figures["milliseconds"].items()
        for i, m in enumerate(figures["prefix_rows"])
    ]


class Step:
    """The inputs of a decoding step, and the contestants that may take it."""

    def __init__(self, arguments: argparse.Namespace):
        torch.manual_seed(0)
        self.device, self.dtype = arguments.device, record.DTYPES[arguments.dtype]
        self.batch, self.heads, self.kv_heads = arguments.batch, arguments.heads, arguments.kv_heads
        self.length, self.head_dim = arguments.length, arguments.head_dim
        self.query = self._rand(self.batch, self.heads, 1)
        self.key, self.value = (self._rand(self.batch, self.kv_heads, self.length) for _ in range(2))
        self.lengths = torch.full((self.batch,), self.length, dtype=torch.int32, device=self.device)
        r = feature_dim(arguments.feature_map, self.head_dim)
        shape = (self.batch, self.kv_heads, r)
        z = torch.randn(*shape, self.head_dim, device=self.device)
        self.states = PrefixState(z, torch.rand(shape, device=self.device), arguments.feature_map)
        self.index = torch.arange(self.batch, dtype=torch.int32, device=self.device)
        self.cache_bytes = 2 * self.key.numel() * self.key.element_size()
        self.state_bytes = self.states.nbytes // self.batch

    def _rand(self, *shape):
        return torch.randn(*shape, self.head_dim, device=self.device).to(self.dtype)

    def bytes_of_exact(self, m: int) -> int:
        return 2 * self.key.element_size() * self.kv_heads * self.head_dim * (self.batch * (self.length + m) + m)

    def packed(self, query, batch):
        """Turns the heads of a group into query rows, and so the batch rows unless each has its own keys (`batch`)."""
        query = query.unflatten(1, (self.kv_heads, -1)).flatten(2, 3)
        return query if batch else query.transpose(0, 1).flatten(1, 2)[None]

    def contestants(self, m: int) -> dict:
        """Returns calls by name, whose outputs are [B, Hkv, G, D] or [B, Hq, 1, D]."""
        sdpa = torch.nn.functional.scaled_dot_product_attention
        shared = [self._rand(1, self.kv_heads, m) for _ in range(2)]
        key, value = (
            torch.cat([prefix.expand(self.batch, -1, -1, -1), cache], dim=2)
            for prefix, cache in zip(shared, (self.key, self.value), strict=True)
        )
        one = PrefixState(self.states.z[0], self.states.k[0], self.states.feature_map)

        def decode(state=None, index=None):
            return ntk_attention_decode(self.query, self.key, self.value, self.lengths, state, state_index=index)

        def cascade():
            parts = [
                ntk_attention(self.packed(self.query, batch=True), self.key, self.value, return_lse=True),
                ntk_attention(self.packed(self.query, batch=False), *shared, return_lse=True),
            ]
            group = self.heads // self.kv_heads
            out, lse = (tensor[0].unflatten(1, (self.batch, group)).transpose(0, 1) for tensor in parts[1])
            return merge_attention(*parts[0], out, lse)[0]

        return {
            PLAIN: lambda: sdpa(self.packed(self.query, batch=True), self.key, self.value),
            OURS_PLAIN: decode,
            ONE_TASK: lambda: decode(one),
            MANY_TASKS: lambda: decode(self.states, self.index),
            EXACT: lambda: sdpa(self.packed(self.query, batch=True), key, value),
            CASCADE: cascade,
        }

    def check(self, functions: dict, m: int) -> None:
        """Compares states with the reference in float64 and exact prefixes with each other; raises RuntimeError."""
        q, k, v = (tensor.double() for tensor in (self.query, self.key, self.value))
        states = self.states.to(torch.float64)
        one = PrefixState(states.z[0], states.k[0], states.feature_map)
        expected = {PLAIN: reference.ntk_attention(q, k, v), ONE_TASK: reference.ntk_attention(q, k, v, one)}
        expected[MANY_TASKS] = reference.ntk_attention(q, k, v, states, state_index=self.index)
        expected |= {OURS_PLAIN: expected[PLAIN], CASCADE: functions[EXACT]().double()}
        for name, result in expected.items():
            error = accuracy.relative_error(
                functions[name]().reshape(self.query.shape), result.reshape(self.query.shape)
            )
            if accuracy.is_wrong(error, accuracy.limit_of(self.dtype)):
                raise RuntimeError(f"{name} is wrong at m = {m:,}: relative error {error:.2g}")


def _free_bytes(device: str) -> float:
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            return 1024 * int(next(line for line in file if line.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration):
        return math.inf  # not Linux: a prefix that is too long fails when it is allocated


def tables_of(figures: dict) -> list[Table]:
    settings, times = figures["settings"], figures["milliseconds"]
    table = Table(
        title=f"Milliseconds for a token of each of {settings['batch']} sequences with {settings['length']:,} keys in "
        f"their caches (heads {settings['heads']}/{settings['kv_heads']}, D={settings['head_dim']}, "
        f"{settings['dtype']}, {settings['feature_map']}), by rows of an exact prefix"
    )
    table.add_column("rows", justify="right", no_wrap=True)
    for name in (*CONTESTANTS, "exact / ours"):
        table.add_column(name, justify="right")
    for i, m in enumerate(figures["prefix_rows"]):
        ms = {name: times[name][i]["ms"] for name in CONTESTANTS}
        cells = (f"{ms[name]:.3f}" for name in CONTESTANTS)
        table.add_row(f"{m:,}", *cells, f"{ms[EXACT] / ms[MANY_TASKS]:.1f}×")
    copied = figures["copy_gb_per_s"]
    cells = []
    for name in CONTESTANTS:
        if name in figures["bytes"]:
            best = min(result["ms"] for result in times[name])
            cells.append(f"{100 * figures['bytes'][name] / best / 1e6 / copied:.0f}%")
        else:
            cells.append("")
    table.add_section()
    table.add_row(f"of {copied:,.0f} GB/s", *cells, "")
    return [table]


def notes_of(figures: dict) -> list[str]:
    batch = figures["settings"]["batch"]
    return [
        f"an exact prefix of {m:,} rows for each of {batch} sequences does not fit into memory"
        for m in figures.get("left_out", ())  # older records have none
    ]


def plot(path, figures: dict) -> None:
    settings, lengths = figures["settings"], figures["prefix_rows"]
    figure, (axes,) = plots.canvas(width=8)
    styles = {PLAIN: ":", OURS_PLAIN: ":", ONE_TASK: "-", MANY_TASKS: "-", EXACT: "-", CASCADE: "--"}
    labels = {EXACT: "exact prefix in each cache", CASCADE: "exact prefix shared by the batch (cascade)"}
    for i, name in enumerate(CONTESTANTS):
        results, color = figures["milliseconds"][name], f"C{i}"
        axes.plot(lengths, [r["ms"] for r in results], label=labels.get(name, name), color=color, ls=styles[name],
                  marker="s" if name in labels else "o")  # fmt: skip
        axes.fill_between(lengths, [r["low"] for r in results], [r["high"] for r in results], color=color, alpha=0.15)
    axes.set(
        xscale="log", yscale="log", xlabel="rows of the exact prefix, m", ylabel="ms for a token of each sequence",
        title=f"Decode: batch {settings['batch']}, {settings['length']:,} keys, heads {settings['heads']}/"
        f"{settings['kv_heads']}, D={settings['head_dim']}, {settings['dtype']}, {settings['feature_map']}",
    )  # fmt: skip
    plots.mark(axes.xaxis, lengths)
    plots.plain_log(axes.yaxis)
    plots.save(figure, path)
