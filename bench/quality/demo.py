"""NTK-Attention in place of a real prefix of 32,256 rows: error, time and memory.

Takes the keys and values that a pretrained encoder makes of 32,256 tokens of text as the prefix and other text as the
input, converts the prefix to states of several sizes, and compares each with exact attention over the whole prefix.
Prints tables and leaves demo.json, demo.csv and demo.png in the folder it names.

To take about two minutes on two idle cores, it compares three of the encoder's six layers (--layers), and the fitted
state has only 32 rows per head, fitted to 8 chunks of 512 tokens. `bench fit` compares all layers, sizes and methods.
"""

import argparse
from collections.abc import Callable

import torch
from rich.table import Table

from ntk_kernels import PrefixState, ntk_attention, prefix_to_state
from ntk_kernels.dispatch import choose_backend

from ..lib import plots, record, threads, timing
from ..lib.progress import Steps
from ..models import encoder
from ..speed.sweep import crossing_text

NO_PREFIX = "no prefix"
FITTED = "fitted, 32 rows"
# name: arguments of prefix_to_state
STATES = {
    "elu": {"feature_map": "elu", "centers": None},
    "taylor1": {"feature_map": "taylor1", "centers": None},
    "taylor2": {"feature_map": "taylor2", "centers": None},
    "taylor1, mean": {"feature_map": "taylor1", "centers": "mean"},
    "taylor2, mean": {"feature_map": "taylor2", "centers": "mean"},
    "taylor1, C=16": {"feature_map": "taylor1", "centers": 16},
    "taylor1, C=64": {"feature_map": "taylor1", "centers": 64},
    FITTED: {"num_rows": 32},  # to other inputs than those compared
}
TIMED = ["elu", "taylor1, mean", FITTED, "taylor1, C=16", "taylor1, C=64"]
LENGTHS = [64, 256, 1024, 2048, 4096, 8192, 16384, 32256]
ERROR_SHOWN = 2.0  # the plot does not draw larger errors, but names them
NUM_INPUTS = 2  # chunks of 512 tokens on which errors are measured
NUM_CALIBRATION = 8  # further chunks, to which the fitted state is fitted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    record.add_arguments(parser)
    parser.add_argument(
        "--prefix-rows", type=_prefix_rows, default=32256, metavar="M",
        help="length of the prefix, a multiple of 512 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--layers", type=int, nargs="+", choices=range(encoder.NUM_LAYERS), metavar="N", default=[0, 2, 5],
        help="layers of the encoder, 0 to 5 (default: 0 2 5)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds",
        type=record.positive(float),
        default=1.5,
        help="seconds of timing for each length (default: %(default)s)",
    )


def _prefix_rows(text: str) -> int:
    rows = record.positive(int)(text)
    if rows % encoder.CHUNK:
        raise argparse.ArgumentTypeError(f"must be a multiple of {encoder.CHUNK}, got {text}")
    return rows


def measure(arguments: argparse.Namespace, progress: Steps) -> dict:
    """Returns errors of each head by state and layer, and times and bytes by length of the prefix."""
    numbers, device = sorted(set(arguments.layers)), arguments.device
    try:
        reader = encoder.Reader(arguments.prefix_rows, NUM_INPUTS + NUM_CALIBRATION, numbers)
    except (ModuleNotFoundError, ValueError) as error:
        raise SystemExit(f"demo: {error}") from error
    lengths = [m for m in LENGTHS if m < arguments.prefix_rows] + [arguments.prefix_rows]
    chunks = arguments.prefix_rows // encoder.CHUNK + NUM_INPUTS + NUM_CALIBRATION
    reading = progress.add_task("the encoder reads", total=chunks)
    converting = progress.add_task("converting, comparing", total=len(numbers) * len(STATES))
    timed = progress.add_task("timing prefix lengths", total=len(lengths))
    layers = reader.layers(lambda: progress.advance(reading))
    layers = {i: encoder.Layer(*(t.to(device) for t in layer)) for i, layer in zip(numbers, layers, strict=True)}
    states, errors = convert(layers, lambda step: progress.advance(converting, step=step))
    last = inputs_of(layers[numbers[-1]], slice(NUM_INPUTS))
    times, held = measure_times(
        last, states[numbers[-1], FITTED], lengths, device, arguments.seconds,
        lambda m: progress.advance(timed, step=f"{m:,} rows"),
    )  # fmt: skip
    settings = {
        "encoder": encoder.MODEL, "text": "pydoc_data.topics", "prefix_rows": arguments.prefix_rows,
        "input_rows": encoder.CHUNK, "calibration": NUM_CALIBRATION, "heads": last.query.shape[1],
        "head_dim": last.query.shape[3], "backend": choose_backend(None, last.query, last.key, last.value),
    }  # fmt: skip
    return {
        "settings": settings,
        "layers": numbers,
        "relative_error": {name: [errors[i, name] for i in numbers] for name in (NO_PREFIX, *STATES)},
        "state_rows": {NO_PREFIX: 0} | {name: rows_of_state(states[numbers[-1], name]) for name in STATES},
        "prefix_lengths": lengths,
        "milliseconds": times,
        "bytes_held": held,
        "break_even": {
            name: timing.crossing(
                lengths, [e["ms"] - t["ms"] for e, t in zip(times["exact"], times[name], strict=True)]
            )
            for name in TIMED
        },
    }


def rows_of(figures: dict) -> list[dict]:
    rows = [
        {"state": name, "layer": i, "head": head, "relative_error": error}
        for name, of_layers in figures["relative_error"].items()
        for i, of_heads in zip(figures["layers"], of_layers, strict=True)
        for head, error in enumerate(of_heads)
    ]
    return rows + [
        {"state": name, "prefix_rows": m, **result}
        for name, results in figures["milliseconds"].items()
        for m, result in zip(figures["prefix_lengths"], results, strict=True)
    ]


def inputs_of(layer: encoder.Layer, which: slice) -> encoder.Layer:
    """Returns the layer with some of its inputs."""
    return layer._replace(query=layer.query[which], key=layer.key[which], value=layer.value[which])


def exact_attention(layer: encoder.Layer, prefix_rows: int):
    """Returns a call of plain attention over prefix and input, which are laid out beforehand, as in a cache."""
    inputs = layer.query.shape[0]
    key, value = (
        torch.cat([prefix[None, :, :prefix_rows].expand(inputs, -1, -1, -1), own], dim=2)
        for prefix, own in ((layer.prefix_key, layer.key), (layer.prefix_value, layer.value))
    )
    return lambda: torch.nn.functional.scaled_dot_product_attention(layer.query, key, value)


def convert(layers: dict, on_step: Callable) -> tuple[dict, dict]:
    """Converts the prefix of each layer to each of `STATES`.

    Returns the states and the relative errors of each head, by (layer, name); also the errors without a prefix.
    """
    test = {i: inputs_of(layer, slice(NUM_INPUTS)) for i, layer in layers.items()}
    exact = dict(_each(lambda i: exact_attention(test[i], test[i].prefix_key.shape[1])(), layers, layers))

    def errors_of(i: int, state: PrefixState | None) -> list[float]:
        out = ntk_attention(test[i].query, test[i].key, test[i].value, state)
        difference, norm = (x.transpose(0, 1).flatten(1).norm(dim=1) for x in (out - exact[i], exact[i]))
        return [round(error, 5) for error in (difference / norm).tolist()]

    def convert_to(at: tuple[int, str]):
        i, name = at
        options = STATES[name]
        if name == FITTED:
            others = inputs_of(layers[i], slice(NUM_INPUTS, None))
            attention = ntk_attention(others.query, others.key, others.value, return_lse=True)
            options = options | {"query": others.query, "attention": attention}
        state = prefix_to_state(layers[i].prefix_key, layers[i].prefix_value, **options)
        return state, errors_of(i, state)

    states, errors = {}, {(i, NO_PREFIX): errors_of(i, None) for i in layers}
    jobs = [(i, name) for name in sorted(STATES, key=lambda name: name != FITTED) for i in layers]  # the longest first
    for at, (states[at], errors[at]) in _each(convert_to, jobs, layers):
        on_step(f"layer {at[0]}, {at[1]}")
    return states, errors


def _each(function: Callable, items, layers: dict):
    """Works in threads on a CPU; a GPU takes one call after the other anyway."""
    if next(iter(layers.values())).query.is_cuda:
        return ((item, function(item)) for item in items)
    return threads.each(function, items)


def rows_of_state(state: PrefixState) -> int:
    """Returns the rows per head, features and the state's own, which are its cost in key/value rows."""
    return state.num_rows + (0 if state.k is None else state.num_centers * state.k.shape[-1])


def measure_times(layer, fitted, lengths, device, seconds, on_length):
    """Returns milliseconds for one input, and bytes to keep for the prefix, by method and length."""
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
            if isinstance(options.get("centers"), int):  # the time does not depend on where they are
                options = options | {"centers": one.prefix_key[:, : options["centers"]]}
            state = fitted  # its cost does not depend on the length
            if name != FITTED:
                state = prefix_to_state(one.prefix_key[:, :m], one.prefix_value[:, :m], **options)
            functions[name] = lambda state=state: ntk_attention(one.query, one.key, one.value, state)
            at_m[name] = state.nbytes
        measured = timing.measure(functions, device, seconds=seconds)
        for name, result in measured.items():
            times.setdefault(name, []).append(result)
        for name, size in at_m.items():
            held.setdefault(name, []).append(size)
        on_length(m)
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
    for i in _layers_of(figures):
        table.add_column(f"layer {i}", justify="right")
    for name, per_layer in errors.items():
        cells = [f"{_short(sum(heads) / len(heads))} ({_short(max(heads))})" for heads in per_layer]
        table.add_row(name, str(sizes[name]), *cells)
    return table


def _layers_of(figures: dict) -> list[int]:
    return figures.get("layers", list(range(len(figures["relative_error"][NO_PREFIX]))))  # older records have all


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
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys((NO_PREFIX, "exact", *figures["state_rows"])))}
    for name, per_layer in errors.items():
        means = [sum(heads) / len(heads) for heads in per_layer]
        label = name if min(means) < ERROR_SHOWN else f"{name} (above: {_short(min(means))} to {_short(max(means))})"
        left.plot(_layers_of(figures), means, marker="o", label=label, color=colors[name],
                  ls=":" if name == NO_PREFIX else "-")  # fmt: skip
    left.set(ylim=(0, ERROR_SHOWN), xlabel="layer", ylabel="relative error, mean over heads",
             title=f"Error of the state of a {settings['prefix_rows']:,}-row prefix")  # fmt: skip
    left.set_xticks(_layers_of(figures))
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
