"""NTK-Attention in place of a real prefix of 32,256 rows: error, time and memory.

Takes the keys and values that a pretrained encoder makes of 32,256 tokens of text as the prefix, other text as the
input, converts the prefix to states of several sizes, and compares with exact attention over the whole prefix.
Prints tables and leaves demo.json, demo.csv and demo.png in the folder it names. One to four minutes on two cores.
"""

import argparse

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ntk_kernels import PrefixState, ntk_attention, prefix_to_state
from ntk_kernels.dispatch import choose_backend

from ..lib import plots, record, timing
from ..models import encoder
from ..speed.sweep import crossing_text

NO_PREFIX = "no prefix"
# name: arguments of prefix_to_state
STATES = {
    "elu": {"feature_map": "elu", "centers": None},
    "taylor1": {"feature_map": "taylor1", "centers": None},
    "taylor2": {"feature_map": "taylor2", "centers": None},
    "taylor1, mean": {"feature_map": "taylor1", "centers": "mean"},
    "taylor2, mean": {"feature_map": "taylor2", "centers": "mean"},
    "taylor1, C=16": {"feature_map": "taylor1", "centers": 16},
    "taylor1, C=64": {"feature_map": "taylor1", "centers": 64},
}
FITTED = "fitted, 128 rows"
STATES[FITTED] = {"num_rows": 128}  # to other inputs than those compared
TIMED = ["elu", "taylor1, mean", FITTED, "taylor1, C=16", "taylor1, C=64"]
LENGTHS = [64, 256, 1024, 2048, 4096, 8192, 16384, 32256]
ERROR_SHOWN = 2.0  # above this the plot only says so
NUM_INPUTS = 2  # chunks of 512 tokens on which the error is measured
NUM_CALIBRATION = 16  # further ones that the fitted state is fitted to


def add_arguments(parser: argparse.ArgumentParser) -> None:
    record.add_arguments(parser)
    parser.add_argument(
        "--prefix-rows", type=_prefix_rows, default=32256, metavar="M",
        help="tokens of the prefix, a multiple of 512 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=record.positive(float), default=1.5, help="of timing for each length (default: %(default)s)"
    )


def _prefix_rows(text: str) -> int:
    rows = record.positive(int)(text)
    if rows % encoder.CHUNK:
        raise argparse.ArgumentTypeError(f"must be a multiple of {encoder.CHUNK}, got {text}")
    return rows


def run(arguments: argparse.Namespace) -> None:
    console = Console()
    try:
        read = encoder.Reader(arguments.prefix_rows, NUM_INPUTS + NUM_CALIBRATION)
    except (ModuleNotFoundError, ValueError) as error:
        raise SystemExit(f"demo: {error}") from error
    device = arguments.device
    lengths = [m for m in LENGTHS if m < arguments.prefix_rows] + [arguments.prefix_rows]
    columns = (TextColumn("{task.description:30}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        chunks = arguments.prefix_rows // encoder.CHUNK + NUM_INPUTS + NUM_CALIBRATION
        reading = progress.add_task("the encoder reads", total=chunks)
        converting = progress.add_task("converting, comparing", total=None)
        timed = progress.add_task("timing prefix lengths", total=len(lengths))
        layers = read.layers(lambda: progress.advance(reading))
        layers = [encoder.Layer(*(tensor.to(device) for tensor in layer)) for layer in layers]
        progress.update(converting, total=len(layers) * len(STATES))
        errors, sizes, fitted = measure_errors(layers, lambda: progress.advance(converting))
        last = inputs_of(layers[-1], slice(NUM_INPUTS))
        times, held = measure_times(last, fitted, lengths, device, arguments.seconds, lambda: progress.advance(timed))

    backend = choose_backend(None, layers[0].query, layers[0].key, layers[0].value)
    break_even = {
        name: timing.crossing(lengths, [e["ms"] - t["ms"] for e, t in zip(times["exact"], times[name], strict=True)])
        for name in TIMED
    }
    settings = {"encoder": "all-MiniLM-L6-v2", "text": "pydoc_data.topics", "prefix_rows": arguments.prefix_rows,
                "input_rows": encoder.CHUNK, "heads": layers[0].query.shape[1],
                "head_dim": layers[0].query.shape[3], "backend": backend}  # fmt: skip
    folder = record.results_folder(arguments)
    rows = [
        {"benchmark": "demo", "state": name, "layer": i, "head": head, "relative_error": error}
        for name, layers_errors in errors.items()
        for i, per_head in enumerate(layers_errors)
        for head, error in enumerate(per_head)
    ]
    rows += [
        {"benchmark": "demo", "state": name, "prefix_rows": m, **result}
        for name, results in times.items()
        for m, result in zip(lengths, results, strict=True)
    ]
    figures = {
        "settings": settings, "relative_error": errors, "state_rows": sizes, "prefix_lengths": lengths,
        "milliseconds": times, "bytes_held": held, "break_even": break_even,
    }  # fmt: skip
    record.save(folder / "demo.json", device, rows, **figures)
    for table in tables_of(figures):
        console.print(table)
    plot(folder / "demo.png", figures)
    console.print(f"served by backend={backend!r} on {record.environment(device)['device']}")
    for name, what in (("demo.json", "figures"), ("demo.png", "plot")):
        console.print(f"{what + ':':9}{folder / name}", soft_wrap=True)


def inputs_of(layer: encoder.Layer, which: slice) -> encoder.Layer:
    """The layer with some of its inputs."""
    return layer._replace(query=layer.query[which], key=layer.key[which], value=layer.value[which])


def exact_attention(layer: encoder.Layer, prefix_rows: int):
    """Plain attention over prefix and input, laid out beforehand as a cache would be."""
    inputs = layer.query.shape[0]
    key, value = (
        torch.cat([prefix[None, :, :prefix_rows].expand(inputs, -1, -1, -1), own], dim=2)
        for prefix, own in ((layer.prefix_key, layer.key), (layer.prefix_value, layer.value))
    )
    return lambda: torch.nn.functional.scaled_dot_product_attention(layer.query, key, value)


def measure_errors(layers, on_state):
    """{state: [relative error of each head] for each layer}, the states' rows per head, the last fitted state."""
    errors = {name: [] for name in (NO_PREFIX, *STATES)}
    sizes = {NO_PREFIX: 0}
    for whole in layers:
        layer, others = (inputs_of(whole, which) for which in (slice(NUM_INPUTS), slice(NUM_INPUTS, None)))
        exact = exact_attention(layer, layer.prefix_key.shape[1])()

        def error(state, layer=layer, exact=exact):
            out = ntk_attention(layer.query, layer.key, layer.value, state)
            per_head = [tensor.transpose(0, 1).flatten(1).norm(dim=1) for tensor in (out - exact, exact)]
            return [round(e, 5) for e in (per_head[0] / per_head[1]).tolist()]

        errors[NO_PREFIX].append(error(None))
        for name, options in STATES.items():
            if name == FITTED:
                attention = ntk_attention(others.query, others.key, others.value, return_lse=True)
                options = options | {"query": others.query, "attention": attention}
            state = prefix_to_state(layer.prefix_key, layer.prefix_value, **options)
            sizes[name] = rows_of(state)
            errors[name].append(error(state))
            on_state()
    return errors, sizes, state  # FITTED is the last of STATES


def rows_of(state: PrefixState) -> int:
    """Rows per head, of z and of its own: what the state costs, in units of a key/value row."""
    return state.num_rows + (0 if state.k is None else state.num_centers * state.k.shape[-1])


def measure_times(layer, fitted, lengths, device, seconds, on_length):
    """Milliseconds of one input, and bytes that have to be kept for the prefix, for each length and method."""
    one = layer._replace(query=layer.query[:1], key=layer.key[:1], value=layer.value[:1])
    row_bytes = 4 * one.query.shape[1] * (one.prefix_key.shape[2] + one.prefix_value.shape[2])
    times, held = {}, {}
    for m in lengths:
        functions = {
            NO_PREFIX: lambda: ntk_attention(one.query, one.key, one.value),
            "exact": exact_attention(one, m),
        }
        at_m = {"exact": m * row_bytes}
        for name in TIMED:
            options = STATES[name]
            if isinstance(options.get("centers"), int):  # where they lie does not matter for the time
                options = options | {"centers": one.prefix_key[:, : options["centers"]]}
            state = fitted  # whatever the length, it costs the same
            if name != FITTED:
                state = prefix_to_state(one.prefix_key[:, :m], one.prefix_value[:, :m], **options)
            functions[name] = lambda state=state: ntk_attention(one.query, one.key, one.value, state)
            at_m[name] = state.nbytes
        measured = timing.measure(functions, device, seconds=seconds)
        for name, result in measured.items():
            times.setdefault(name, []).append(result)
        for name, size in at_m.items():
            held.setdefault(name, []).append(size)
        on_length()
    return times, held


def tables_of(figures: dict) -> list[Table]:
    return [_error_table(figures), _time_table(figures)]


def _error_table(figures: dict) -> Table:
    errors, sizes, settings = figures["relative_error"], figures["state_rows"], figures["settings"]
    table = Table(
        title=f"Relative error against exact attention over a prefix of {settings['prefix_rows']:,} rows, "
        f"mean over the {settings['heads']} heads (worst head). States expanded around 0, around the mean key (mean) "
        "or around k-means centres (C), or rows fitted to other inputs; rows per head: C·r of z, and exact ones"
    )
    table.add_column("state", no_wrap=True)
    table.add_column("rows per head", justify="right")
    for i in range(len(errors[NO_PREFIX])):
        table.add_column(f"layer {i}", justify="right")
    for name, per_layer in errors.items():
        cells = [f"{_short(sum(heads) / len(heads))} ({_short(max(heads))})" for heads in per_layer]
        table.add_row(name, str(sizes[name]), *cells)
    return table


def _short(x: float) -> str:
    return f"{x:.2f}" if x < 10 else f"{x:.0f}"


def _time_table(figures: dict) -> Table:
    settings, lengths, times = figures["settings"], figures["prefix_lengths"], figures["milliseconds"]
    held, break_even = figures["bytes_held"], figures["break_even"]
    table = Table(
        title=f"Milliseconds for {settings['input_rows']} tokens, {settings['heads']} heads, D={settings['head_dim']}, "
        "by rows of the prefix; MiB that have to be kept for it"
    )
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("MiB, exact", justify="right")
    for name in times:
        table.add_column(name, justify="right")
    for i, m in enumerate(lengths):
        cells = (f"{results[i]['ms']:.2f}" for results in times.values())
        table.add_row(f"{m:,}", f"{held['exact'][i] / 2**20:.2f}", *cells)
    table.add_section()
    states = [name if name in break_even else None for name in times]
    table.add_row("MiB", "", *(f"{held[name][-1] / 2**20:.2f}" if name else "" for name in states))
    table.add_row(
        "break-even", "",
        *(crossing_text(break_even[name], lengths) if name else "" for name in states),
    )  # fmt: skip
    return table


def plot(path, figures: dict) -> None:
    errors, lengths, settings = figures["relative_error"], figures["prefix_lengths"], figures["settings"]
    times, held = figures["milliseconds"], figures["bytes_held"]
    figure, (left, middle, right) = plots.canvas(3, width=5.3)
    colors = {name: f"C{i}" for i, name in enumerate((NO_PREFIX, "exact", *STATES))}
    for name, per_layer in errors.items():
        means = [sum(heads) / len(heads) for heads in per_layer]
        label = name if min(means) < ERROR_SHOWN else f"{name} (above: {_short(min(means))} to {_short(max(means))})"
        left.plot(range(len(means)), means, marker="o", label=label, color=colors[name],
                  ls=":" if name == NO_PREFIX else "-")  # fmt: skip
    left.set(ylim=(0, ERROR_SHOWN), xlabel="layer", ylabel="relative error, mean over heads",
             title=f"Error of the state of a {settings['prefix_rows']:,}-row prefix")  # fmt: skip
    left.set_xticks(range(len(errors[NO_PREFIX])))
    for name, results in times.items():
        ms = [result["ms"] for result in results]
        style = {
            "color": colors[name],
            "ls": ":" if name == NO_PREFIX else "-",
            "marker": "s" if name == "exact" else "o",
        }
        label = "exact prefix attention" if name == "exact" else name
        middle.plot(lengths, ms, label=label, **style)
        if name in held:
            right.plot(lengths, [size / 2**20 for size in held[name]], label=label, **style)
    middle.set(xscale="log", yscale="log", xlabel="rows of the prefix, m", ylabel="ms",
               title=f"Time for {settings['input_rows']} tokens (backend {settings['backend']})")  # fmt: skip
    right.set(xscale="log", yscale="log", xlabel="rows of the prefix, m", ylabel="MiB",
              title="Memory to keep for the prefix, one layer")  # fmt: skip
    for axes in (middle, right):
        axes.set_xticks(lengths, [f"{m / 1000:.0f}k" if m >= 1000 else str(m) for m in lengths])
        axes.minorticks_off()
    plots.save(figure, path)
