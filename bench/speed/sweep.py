"""Time and memory by length of the prefix and of the input and by size of the state; break-even lengths.

Answers three questions, each by timing in turns: What does an exact prefix of m rows cost, and what a state in its
place? What does a state add to plain attention at each input length L? What do features, centres and the rank of a
low-rank pair cost? Exact prefixes are in front of the keys beforehand, as in a cache, and every token sees every other
unless --causal is given, which is the best case for PyTorch's fused attention. Results are compared with float64 before
they are timed.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from ntk_kernels import PrefixState, ntk_attention, prefix_to_state, reference

from ..lib import accuracy, plots, record, timing
from ..lib.progress import Steps
from . import ceilings
from .peers import sdpa

PLAIN, EXACT, NAIVE = "SDPA, no prefix", "SDPA, exact prefix", "naive formula, exact prefix"
MAPS = ("elu", "taylor1", "taylor2")  # the states of the first two questions, with at most one centre each
RANKS, CENTERS, ROWS = (8, 64), (4, 16, 64), (32, 128)
_CHECKED_ROWS = 64  # queries of the first head that are compared with float64
_CONVERTED_ROWS = 256  # rows of the prefix that states are converted from, which does not affect their time
# Sizes that suit each kind of device.
_DEFAULTS = {
    "cpu": {"heads": 8, "length": 512, "prefix_rows": [64, 256, 1024, 4096, 16384, 65536],
            "lengths": [128, 512, 2048], "naive_bytes": 2**28},
    "cuda": {"heads": 32, "length": 2048, "prefix_rows": [256, 1024, 4096, 16384, 65536, 262144],
             "lengths": [512, 1024, 2048, 4096, 8192, 16384], "naive_bytes": 2**32},
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """Query, key and value [B, H, L, D], with an exact prefix in front of key and value, or with a state."""

    query: Tensor
    key: Tensor
    value: Tensor
    causal: bool
    state: PrefixState | None = None

    def tensors(self) -> list[Tensor]:
        of_state = () if self.state is None else self.state.tensors().values()
        return [self.query, self.key, self.value, *of_state]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    record.add_arguments(parser)
    parser.add_argument(
        "--dtype", choices=record.DTYPES, default="float32", help="dtype of query, key and value (default: %(default)s)"
    )
    parser.add_argument("--batch", type=record.positive(int), default=1, help="batch size (default: %(default)s)")
    parser.add_argument("--heads", type=record.positive(int), help="number of heads (default: 8, on a GPU 32)")
    parser.add_argument(
        "--head-dim", type=record.positive(int), default=64, help="head dimension (default: %(default)s)"
    )
    parser.add_argument(
        "--length", type=record.positive(int),
        help="input length where the prefix or the state varies (default: 512, on a GPU 2048)",
    )  # fmt: skip
    parser.add_argument(
        "--lengths", type=record.positive(int), nargs="+", metavar="L",
        help="input lengths where they vary (default: 128 to 2k, on a GPU 512 to 16k)",
    )  # fmt: skip
    parser.add_argument(
        "--prefix-rows", type=record.positive(int), nargs="+", metavar="M",
        help="lengths of the exact prefix (default: 64 to 64k, on a GPU 256 to 256k)",
    )  # fmt: skip
    parser.add_argument(
        "--rows-at-length", type=record.positive(int), default=4096, metavar="M",
        help="length of the exact prefix where the input length varies (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--causal", action="store_true", help="let no token see a later one")
    parser.add_argument("--backward", action="store_true", help="time forward and backward instead of the forward")
    parser.add_argument(
        "--seconds",
        type=record.positive(float),
        default=1.5,
        help="seconds of timing for each size (default: %(default)s)",
    )


def stem_of(arguments: argparse.Namespace) -> str:
    return f"sweep-d{arguments.head_dim}{'-backward' if arguments.backward else ''}"


def measure(arguments: argparse.Namespace, progress: Steps) -> dict:
    """Returns times and bytes by prefix length, by input length and by state, and the states' break-even lengths."""
    for name, value in _DEFAULTS[torch.device(arguments.device).type].items():
        if getattr(arguments, name, None) is None:
            setattr(arguments, name, value)
    sweep, rows, lengths = Sweep(arguments), sorted(set(arguments.prefix_rows)), sorted(set(arguments.lengths))
    task = progress.add_task("timing", total=len(rows) + len(lengths) + 1)

    def step(name, function, *sizes):
        result = function(*sizes)
        progress.advance(task, step=name)
        return result

    by_rows = [step(f"{m:,} rows of the prefix", sweep.at_prefix_rows, m) for m in rows]
    by_length = [step(f"{length:,} tokens", sweep.at_length, length) for length in lengths]
    states = step("states", sweep.of_states)
    exact = [times[EXACT]["ratio"] for times in by_rows]
    for state in states.values():
        state["break_even"] = timing.crossing(rows, [ratio - state["ratio"] for ratio in exact])
    names = ("dtype", "batch", "heads", "head_dim", "length", "rows_at_length", "causal", "backward")
    return {
        "settings": {name: getattr(arguments, name) for name in names},
        "prefix_rows": rows, "by_prefix_rows": by_rows, "lengths": lengths, "by_length": by_length, "states": states,
        "matmul_tflop_per_s": ceilings.matmul_rate(arguments.device, record.DTYPES[arguments.dtype]),
    }  # fmt: skip


class Sweep:
    """Makes workloads of every size and measures them."""

    def __init__(self, arguments: argparse.Namespace):
        torch.manual_seed(0)
        self.arguments, self.device, self.dtype = arguments, arguments.device, record.DTYPES[arguments.dtype]
        self.batch, self.heads, self.head_dim = arguments.batch, arguments.heads, arguments.head_dim
        self.states = self._make_states()

    def at_prefix_rows(self, m: int) -> dict:
        return self._measure(self._contestants(self.arguments.length, m))

    def at_length(self, length: int) -> dict:
        contestants = self._contestants(length, self.arguments.rows_at_length)
        contestants.pop(NAIVE, None)
        return self._measure(contestants)

    def of_states(self) -> dict:
        """Returns, by name of the state, its times and its size."""
        workload = self._workload(self.arguments.length)
        measured = self._measure(
            {PLAIN: (_plain, workload)}
            | {name: (_ours, _with_state(workload, state)) for name, state in self.states.items()}
        )
        return {
            name: {
                "rows_per_head": features_of(state) + state.num_rows,
                "nbytes": state.nbytes,
                "on_paper": features_of(state) // 2 + state.num_rows,
            }
            | measured[name]
            for name, state in self.states.items()
        }

    def _workload(self, length: int) -> Workload:
        shape = (3, self.batch, self.heads, length, self.head_dim)
        return Workload(*torch.randn(shape, device=self.device).to(self.dtype), self.arguments.causal)

    def _contestants(self, length: int, m: int) -> dict[str, tuple[Callable, Workload]]:
        own, shape = self._workload(length), (2, self.batch, self.heads, m, self.head_dim)
        prefix = torch.randn(shape, device=self.device).to(self.dtype)
        key, value = (torch.cat(pair, dim=2) for pair in zip(prefix, (own.key, own.value), strict=True))
        exact = Workload(own.query, key, value, own.causal)
        listed = {PLAIN: (_plain, own), EXACT: (_plain, exact)}
        if self.batch * self.heads * length * (m + length) * self.dtype.itemsize <= self.arguments.naive_bytes:
            listed[NAIVE] = (_naive, exact)
        return listed | {_label(name): (_ours, _with_state(own, self.states[name])) for name in MAPS}

    def _make_states(self) -> dict[str, PrefixState]:
        shape = (2, self.heads, _CONVERTED_ROWS, self.head_dim)
        key, value = torch.randn(shape, device=self.device)
        states = {name: prefix_to_state(key, value, name) for name in MAPS}
        for count in CENTERS:
            states[f"taylor1, C={count}"] = prefix_to_state(key, value, centers=key[:, :count])
        full = states["taylor2"]
        for rank in RANKS:
            left = torch.randn(*full.z.shape[:-1], rank, device=self.device) * 0.1
            pair = left, torch.randn(*full.z.shape[:-2], rank, self.head_dim, device=self.device) * 0.1
            states[f"taylor2, rank {rank}"] = PrefixState(
                None, full.k, "taylor2", z_a=pair[0], z_b=pair[1], centers=full.centers, log_scale=full.log_scale,
                feature_scale=full.feature_scale,
            )  # fmt: skip
        for count in ROWS:
            states[f"{count} rows"] = PrefixState(keys=key[:, :count], values=value[:, :count])
        return states

    def _measure(self, contestants: dict[str, tuple[Callable, Workload]]) -> dict[str, dict]:
        """Checks and times contestants; adds ratios to plain attention and bytes beyond query, key and value."""
        own = contestants[PLAIN][1]
        held_by_all = sum(tensor.nbytes for tensor in own.tensors())
        calls = {}
        for name, (function, workload) in contestants.items():
            check(name, function, workload)
            calls[name] = self._call(function, workload)
        times = timing.measure(calls, self.device, seconds=self.arguments.seconds)
        for name, (_, workload) in contestants.items():
            held = sum(tensor.nbytes for tensor in workload.tensors()) - held_by_all
            times[name]["ratio"] = times[name]["ms"] / times[PLAIN]["ms"]
            times[name]["bytes"] = held + timing.peak_bytes(calls[name], self.device)
            work = flops(workload) * (3.5 if self.arguments.backward else 1)
            times[name]["tflop_per_s"] = work / times[name]["ms"] / 1e9
        return times

    def _call(self, function: Callable, workload: Workload) -> Callable:
        if not self.arguments.backward:
            return lambda: function(workload)
        leaves = [tensor.detach().requires_grad_() for tensor in workload.tensors()]
        query, key, value, *of_state = leaves
        state = workload.state
        if state is not None:
            state = replace(state, **dict(zip(state.tensors(), of_state, strict=True)))
        tracked = Workload(query, key, value, workload.causal, state)
        grad = torch.randn_like(query)
        return lambda: torch.autograd.grad(function(tracked), leaves, grad)


def _label(name: str) -> str:
    return f"ours, {name}"


def _with_state(workload: Workload, state: PrefixState) -> Workload:
    return Workload(workload.query, workload.key, workload.value, workload.causal, state)


def _plain(workload: Workload) -> Tensor:
    length, num_keys = workload.query.shape[2], workload.key.shape[2]
    if workload.causal and num_keys > length:
        return sdpa(workload.query, workload.key, workload.value, attn_mask=causal_lower_right(length, num_keys))
    return sdpa(workload.query, workload.key, workload.value, is_causal=workload.causal)


def _naive(workload: Workload) -> Tensor:
    scores = workload.query @ workload.key.mT * workload.query.shape[3] ** -0.5
    if workload.causal:
        later = scores.shape[3] - scores.shape[2] + 1
        future = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu(later)
        scores = scores.masked_fill(future, -torch.inf)
    return scores.softmax(-1) @ workload.value


def _ours(workload: Workload) -> Tensor:
    return ntk_attention(workload.query, workload.key, workload.value, workload.state, is_causal=workload.causal)


def flops(workload: Workload) -> int:
    """Counts the operations of a forward's matrix products over what is visible; a low-rank pair counts as a full Z."""
    batch, heads, length, dim = workload.query.shape
    keys = length * workload.key.shape[2]
    if workload.causal:
        keys -= length * (length - 1) // 2
    features = features_of(workload.state)
    if workload.state is not None:
        keys += length * workload.state.num_rows
    return batch * heads * (4 * keys * dim + 2 * length * features * (dim + 1))


def features_of(state: PrefixState | None) -> int:
    """Returns the number of features per head, of all centres together."""
    return 0 if state is None or state.k is None else state.num_centers * state.k.shape[-1]


def check(name: str, function: Callable, workload: Workload) -> None:
    """Compares the last rows of the first head with the reference in float64; raises RuntimeError if they are wrong."""
    state = workload.state
    if state is not None:
        state = replace(state, **{name: tensor[:1] for name, tensor in state.tensors().items()})

    def exact(dtype):
        query, key, value = (t[:1, :1].to(dtype) for t in (workload.query, workload.key, workload.value))
        return reference.ntk_attention(
            query[:, :, -_CHECKED_ROWS:], key, value, None if state is None else state.to(dtype),
            is_causal=workload.causal,
        )  # fmt: skip

    expected = exact(torch.float64)
    limit = accuracy.limit_of(workload.query.dtype, accuracy.relative_error(exact(torch.float32), expected))
    error = accuracy.relative_error(function(workload)[:1, :1, -_CHECKED_ROWS:], expected)
    if accuracy.is_wrong(error, limit):
        raise RuntimeError(f"{name} is wrong: relative error {error:.2g} against float64")


def rows_of(figures: dict) -> list[dict]:
    common, rows = figures["settings"], []
    for m, times in zip(figures["prefix_rows"], figures["by_prefix_rows"], strict=True):
        rows += [common | {"prefix_rows": m, "name": name} | result for name, result in times.items()]
    for length, times in zip(figures["lengths"], figures["by_length"], strict=True):
        at = {"length": length, "prefix_rows": common["rows_at_length"]}
        rows += [common | at | {"name": name} | result for name, result in times.items()]
    return rows + [common | {"name": _label(name)} | result for name, result in figures["states"].items()]


def tables_of(figures: dict) -> list[Table]:
    settings = figures["settings"]
    what = f"H={settings['heads']}, D={settings['head_dim']}, {settings['dtype']}"
    passes = "forward + backward" if settings["backward"] else "forward"
    tables = []
    for title, column, sizes, by_size in (
        (f"{passes}, {settings['length']:,} tokens, {what}, by rows of the exact prefix: ms, MiB beyond the input",
         "rows", figures["prefix_rows"], figures["by_prefix_rows"]),
        (f"{passes}, {what}, by tokens (exact prefix: {settings['rows_at_length']:,} rows): ms, times plain attention",
         "tokens", figures["lengths"], figures["by_length"]),
    ):  # fmt: skip
        table = Table(title=title)
        table.add_column(column, justify="right")
        names = dict.fromkeys(name for times in by_size for name in times)
        for name in names:
            table.add_column(name, justify="right")
        for size, times in zip(sizes, by_size, strict=True):
            table.add_row(f"{size:,}", *(_cell(times.get(name), memory=column == "rows") for name in names))
        tables.append(table)
    table = Table(
        title=f"Cost of a state over plain attention ({passes}, {settings['length']:,} tokens, {what}), and from how "
        "many rows on it is faster than an exact prefix"
    )
    for column in ("state", "rows per head", "KiB", "ms", "cost", "break-even", "on paper"):
        table.add_column(column, justify="left" if column == "state" else "right")
    for name, state in figures["states"].items():
        table.add_row(
            name, f"{state['rows_per_head']:,}", f"{state['nbytes'] / 1024:,.0f}", f"{state['ms']:.3f}",
            f"{state['ratio']:.2f}×", crossing_text(state["break_even"], figures["prefix_rows"]),
            f"{state.get('on_paper', state['rows_per_head'] // 2):,}",  # older records have no states of rows
        )  # fmt: skip
    return [*tables, table]


def _cell(result: dict | None, *, memory: bool) -> str:
    if result is None:
        return "—"
    other = f"{result['bytes'] / 2**20:,.0f} MiB" if memory else f"{result['ratio']:.2f}×"
    return f"{result['ms']:,.3g} ms, {other}"


def crossing_text(m: float | None, lengths: list[int]) -> str:
    """Returns the result of `timing.crossing` in words."""
    if m is None:
        return f"> {lengths[-1]:,}"
    return f"≤ {lengths[0]:,}" if m == 0 else f"≈ {float(f'{m:.2g}'):,.0f}"


def plot(path, figures: dict) -> None:
    settings, rows, lengths = figures["settings"], figures["prefix_rows"], figures["lengths"]
    figure, (time, memory, cost, states) = plots.canvas(2, 2, height=4.5)
    names = [PLAIN, EXACT, NAIVE, *map(_label, MAPS)]
    for i, name in enumerate(names):
        style = {"color": f"C{i}", "marker": "o" if name.startswith("ours") else "s", "ls": ":" if i == 0 else "-"}
        at = [(m, times[name]) for m, times in zip(rows, figures["by_prefix_rows"], strict=True) if name in times]
        if at:
            time.plot([m for m, _ in at], [result["ms"] for _, result in at], label=name, **style)
            memory.plot([m for m, _ in at], [result["bytes"] / 2**20 for _, result in at], label=name, **style)
        at = [(n, times[name]) for n, times in zip(lengths, figures["by_length"], strict=True) if name in times]
        if at and name != PLAIN:
            label = f"{name} of {settings['rows_at_length']:,} rows" if name == EXACT else name
            cost.plot([n for n, _ in at], [result["ratio"] for _, result in at], label=label, **style)
    passes = "forward + backward" if settings["backward"] else "forward"
    time.set(xscale="log", yscale="log", xlabel="rows of the prefix, m", ylabel="ms",
             title=f"Time, {passes}, {settings['length']:,} tokens")  # fmt: skip
    memory.set(xscale="log", yscale="log", xlabel="rows of the prefix, m", ylabel="MiB beyond the input",
               title="Memory: prefix or state, and peak allocation")  # fmt: skip
    cost.set(xscale="log", yscale="log", xlabel="tokens, L", ylabel="times plain attention",
             title="Cost over plain attention")  # fmt: skip
    for axes, sizes in ((time, rows), (memory, rows), (cost, lengths)):
        plots.mark(axes.xaxis, sizes)
        plots.plain_log(axes.yaxis)
    values = list(figures["states"].values())
    bars = states.barh(list(figures["states"]), [state["ratio"] for state in values], color="C3")
    texts = [f" {v['ratio']:.2f}×, m {crossing_text(v['break_even'], rows)}" for v in values]
    states.bar_label(bars, texts, fontsize=8)
    states.invert_yaxis()
    states.set(xlabel="times plain attention", title="Cost of each state, and its break-even m",
               xlim=(0, 1.5 * max(state["ratio"] for state in values)))  # fmt: skip
    figure.suptitle(
        f"batch {settings['batch']}, {settings['heads']} heads, D={settings['head_dim']}, {settings['dtype']}, "
        f"{'causal' if settings['causal'] else 'every token sees every other'}"
    )
    plots.save(figure, path)
