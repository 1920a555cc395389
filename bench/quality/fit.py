"""Error of converted prefixes by method and size of the state, on real keys and unseen text.

The prefix is the keys and values that a pretrained model makes of text. The fits see other chunks of the text; errors
are measured on chunks that no fit has seen, against exact attention over prefix and input. The record also has the
errors that the conversions report for their own held-out queries, and the seconds of each conversion (most of which the
report takes where a state is made in closed form). With several prefix lengths, the shorter prefixes are the ends of
the longest. Takes about an hour, too long for `bench all`.
"""

import argparse
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from ntk_kernels import merge_attention, ntk_attention, prefix_to_state

from ..lib import plots, record
from ..lib.progress import Steps
from ..models import decoder, encoder
from ..models.reading import CHUNK, Layer


class Model(NamedTuple):
    name: str
    num_layers: int
    layers: tuple[int, ...]  # by default
    prefix_rows: int  # by default


MODELS = {
    "encoder": Model(encoder.MODEL, encoder.NUM_LAYERS, tuple(range(encoder.NUM_LAYERS)), 32256),
    "decoder": Model(decoder.MODEL, 30, decoder.LAYERS, 6144),
}
NO_PREFIX, GRADIENT, BUDGET = "no prefix", "rows, gradient", "best for the budget"
OWN_SIZE = {  # closed forms of a single size
    "elu, closed form": {"feature_map": "elu", "centers": None},
    "taylor2, closed form": {"feature_map": "taylor2"},
}
MAX_BY_LEAST_SQUARES = 512  # rows; more take too long
FAILED = 0.25  # the tables list heads with a larger error by gradient at the largest size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    record.add_arguments(parser)
    parser.add_argument("--model", choices=MODELS, default="encoder",
                        help="the model whose keys and values are converted (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--prefix-rows", type=record.positive(int), nargs="+", metavar="M",
        help="lengths of the prefix, for the encoder multiples of 512 (default: 32256, for the decoder 6144)",
    )  # fmt: skip
    parser.add_argument("--name", help="name of the files (default: fit-encoder or fit-decoder)")
    parser.add_argument(
        "--layers", type=int, nargs="+", metavar="N",
        help="layers of the model (default: all six of the encoder, 0 3 8 15 22 29 of the decoder)",
    )  # fmt: skip
    parser.add_argument("--rows", type=record.positive(int), nargs="+", metavar="R", default=[32, 128, 512, 1024],
                        help="rows of the state per head (default: 32 128 512 1024)")  # fmt: skip
    parser.add_argument(
        "--budget", action="store_true",
        help="also the best state of each size that `prefix_to_state(budget=...)` finds, which fits up to seven",
    )  # fmt: skip
    parser.add_argument("--calibration", type=record.positive(int), default=32, metavar="N",
                        help="chunks of 512 tokens that the fits see (default: %(default)s)")  # fmt: skip
    parser.add_argument("--test", type=record.positive(int), default=4, metavar="N",
                        help="chunks of 512 tokens on which errors are measured (default: %(default)s)")  # fmt: skip


def stem_of(arguments: argparse.Namespace) -> str:
    return arguments.name or f"fit-{arguments.model}"


def measure(arguments: argparse.Namespace, progress: Steps) -> dict:
    """Returns the conversions of every layer, prefix length, method and size."""
    model, device = MODELS[arguments.model], arguments.device
    lengths = sorted(set(arguments.prefix_rows or [model.prefix_rows]))
    numbers, sizes = sorted(set(arguments.layers or model.layers)), sorted(set(arguments.rows))
    _check(arguments.model, lengths, numbers, sizes)
    module = {"encoder": encoder, "decoder": decoder}[arguments.model]
    try:
        reader = module.Reader(lengths[-1], arguments.test + arguments.calibration, tuple(numbers))
    except (ModuleNotFoundError, ValueError) as error:
        raise SystemExit(f"fit: {error}") from error
    chunks = -(-lengths[-1] // CHUNK) + arguments.test + arguments.calibration
    reading = progress.add_task(f"the {arguments.model} reads", total=chunks)
    converting = progress.add_task("converting, comparing", total=None)
    layers = reader.layers(lambda: progress.advance(reading))
    methods = methods_of(layers[0].prefix_key.shape[2], sizes, arguments.budget)
    progress.update(converting, total=len(layers) * len(lengths) * len(methods))
    conversions = []
    for i, layer in zip(numbers, layers, strict=True):
        layer = Layer(*(tensor.to(device) for tensor in layer))
        for m in lengths:

            def on_state(name: str, i=i, m=m) -> None:
                progress.advance(converting, step=f"layer {i}, m={m:,}, {name}")

            end = layer._replace(prefix_key=layer.prefix_key[:, -m:], prefix_value=layer.prefix_value[:, -m:])
            of_layer = convert(end, methods, arguments.test, reader.is_causal, on_state)
            conversions += [{"layer": i, "prefix_rows": m} | conversion for conversion in of_layer]
    settings = {
        "model": model.name, "text": "pydoc_data.topics", "input_rows": CHUNK,
        "calibration": arguments.calibration, "test": arguments.test, "query_heads": layers[0].query.shape[1],
        "heads": layers[0].prefix_key.shape[0], "head_dim": layers[0].prefix_key.shape[2],
    }  # fmt: skip
    return {
        "settings": settings, "prefix_rows": lengths, "state_rows": sizes, "layers": numbers,
        "conversions": conversions,
    }  # fmt: skip


def rows_of(figures: dict) -> list[dict]:
    return [
        {"model": figures["settings"]["model"]}
        | {name: result for name, result in conversion.items() if not isinstance(result, list | dict)}
        | {"head": head, "relative_error": error, "held_out_error": held_out}
        for conversion in figures["conversions"]
        for head, (error, held_out) in enumerate(
            zip(conversion["relative_error"], conversion["held_out_error"], strict=True)
        )
    ]


def _check(model: str, lengths: list[int], numbers: list[int], sizes: list[int]) -> None:
    for prefix_rows in lengths:
        if model == "encoder" and prefix_rows % CHUNK:
            raise SystemExit(f"fit: --prefix-rows must be a multiple of {CHUNK} for the encoder, got {prefix_rows}")
    if not 0 <= numbers[0] <= numbers[-1] < MODELS[model].num_layers:
        raise SystemExit(f"fit: --layers must be from 0 to {MODELS[model].num_layers - 1}, got {numbers}")
    if sizes[-1] >= lengths[0]:
        raise SystemExit(f"fit: --rows must be less than the {lengths[0]:,} rows of the prefix, got {sizes[-1]:,}")


def methods_of(head_dim: int, sizes: list[int], budget: bool = False) -> list[tuple[str, int | None, dict]]:
    """Returns names, rows per head (None: the method has its own size) and arguments of `prefix_to_state`."""
    closed, least_squares = {"method": "closed_form"}, {"method": "least_squares"}
    methods = [(name, None, options | closed) for name, options in OWN_SIZE.items()]
    for size in sizes:
        solved = size <= MAX_BY_LEAST_SQUARES
        if num_centers := size // (head_dim + 1):
            taylor1 = {"feature_map": "taylor1", "centers": "mean" if num_centers == 1 else num_centers}
            methods.append(("taylor1, closed form", size, taylor1 | closed))
            if solved:
                methods.append(("taylor1, least squares", size, taylor1 | least_squares))
        rows = {"num_rows": size}
        methods.append(("rows, closed form", size, rows | closed))
        if solved:
            methods.append(("rows, least squares (attention matching)", size, rows | least_squares))
        methods.append((GRADIENT, size, rows | {"method": "gradient"}))
        if budget:
            methods.append((BUDGET, size, {"budget": size}))
    return methods


def convert(
    layer: Layer, methods: list[tuple], num_test: int, is_causal: bool, on_state: Callable = lambda name: None
) -> list[dict]:
    """Converts the prefix by each method. Returns the errors of each head, seconds and size; without a prefix first.

    Errors are measured on the first `num_test` inputs; the fits see the others.
    """
    test, others = (
        [tensor[which] for tensor in (layer.query, layer.key, layer.value)]
        for which in (slice(num_test), slice(num_test, None))
    )
    exact, heads = exact_attention(*test, layer.prefix_key, layer.prefix_value, is_causal), layer.prefix_key.shape[0]
    attention = ntk_attention(*others, is_causal=is_causal, return_lse=True)

    def result(name, size, state, rows_per_head, held_out, seconds):
        errors = errors_of(ntk_attention(*test, state, is_causal=is_causal), exact, heads)
        return {
            "method": name, "rows": size, "rows_per_head": rows_per_head, "relative_error": _rounded(errors),
            "held_out_error": _rounded(held_out), "seconds": seconds, "bytes": 0 if state is None else state.nbytes,
        }  # fmt: skip

    results = []
    for name, size, options in methods:
        start = _now(exact)
        state, report = prefix_to_state(
            layer.prefix_key, layer.prefix_value, **options, query=others[0], attention=attention, return_report=True
        )  # fmt: skip
        seconds = round(_now(exact) - start, 3)
        results.append(result(name, size, state, report.rows_per_head, report.error, seconds))
        if "budget" in options:
            results[-1]["tried"] = {made_of: round(error, 6) for made_of, error in report.tried.items()}
        on_state(name if size is None else f"{name}, {size:,} rows")
    return [result(NO_PREFIX, None, None, 0, report.no_prefix_error, 0.0), *results]


def exact_attention(query, key, value, prefix_key, prefix_value, is_causal: bool) -> Tensor:
    """Attends to prefix and input apart and merges the results, so that neither is copied."""
    prefix = (tensor[None].expand(query.shape[0], -1, -1, -1) for tensor in (prefix_key, prefix_value))
    of_prefix = ntk_attention(query, *prefix, return_lse=True)
    of_input = ntk_attention(query, key, value, is_causal=is_causal, return_lse=True)
    return merge_attention(*of_prefix, *of_input)[0]


def errors_of(out: Tensor, exact: Tensor, heads: int) -> Tensor:
    """Returns the relative error of each state head over all of its queries."""
    by_head = [tensor.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1) for tensor in (out - exact, exact)]
    return by_head[0].norm(dim=1) / by_head[1].norm(dim=1)


def _now(tensor: Tensor) -> float:
    """Returns the time in seconds once the device of `tensor` has nothing left to do."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def _rounded(errors: Tensor) -> list[float]:
    return [round(error, 6) for error in errors.tolist()]


def tables_of(figures: dict) -> list[Table]:
    return [table for m in figures["prefix_rows"] for table in _tables_of_length(figures, m)]


def _tables_of_length(figures: dict, m: int) -> list[Table]:
    settings = figures["settings"]
    conversions = [c for c in figures["conversions"] if c["prefix_rows"] == m]
    no_prefix = [c for c in conversions if c["method"] == NO_PREFIX]
    of_own_size = [c for c in conversions if c["method"] in OWN_SIZE]
    of_size = {size: [c for c in conversions if c["rows"] == size] for size in figures["state_rows"]}
    on = (
        f"{settings['model']}, prefix of m={m:,} rows, {settings['test']} chunks of {settings['input_rows']} tokens "
        f"that no fit has seen (fits see {settings['calibration']} others)"
    )
    tables = [
        _error_table(f"States of {size:,} rows a head: {on}", no_prefix + of_this_size, settings)
        for size, of_this_size in of_size.items()
    ]
    tables += [
        _tried_table(f"Budgets of {size:,} rows a head: {on}", [c for c in of_this_size if c["method"] == BUDGET])
        for size, of_this_size in of_size.items()
        if any(c["method"] == BUDGET for c in of_this_size)
    ]
    if len(figures["prefix_rows"]) > 1:
        return tables
    tables.append(_error_table(f"States that have one size only: {on}", of_own_size, settings))
    failed = [
        (c["layer"], head, error)
        for c in of_size[max(of_size)]
        if c["method"] == GRADIENT
        for head, error in enumerate(c["relative_error"])
        if error > FAILED
    ]
    if failed:
        table = Table(
            title=f"Heads that do not compress ({settings['model']}, m={m:,}): an error above {FAILED} with "
            f"{max(of_size):,} rows by the gradient"
        )
        for column in ("layer", "head", "error"):
            table.add_column(column, justify="right")
        for layer, head, error in failed:
            table.add_row(str(layer), str(head), _short(error))
        tables.append(table)
    return tables


def _error_table(title: str, conversions: list[dict], settings: dict) -> Table:
    table = Table(
        title=f"{title}. Relative error, median / mean over the {settings['heads']} heads (worst head); rows per head "
        "that the method has; seconds of a conversion, mean over the layers"
    )
    table.add_column("method")
    table.add_column("rows", justify="right")
    for i in dict.fromkeys(c["layer"] for c in conversions):
        table.add_column(f"layer {i}", justify="right", no_wrap=True)
    table.add_column("s", justify="right", no_wrap=True)
    for name in dict.fromkeys(c["method"] for c in conversions):
        of_name = [c for c in conversions if c["method"] == name]
        seconds = sum(c["seconds"] for c in of_name) / len(of_name)
        cells = (_cell(c["relative_error"]) for c in of_name)
        table.add_row(name, f"{of_name[0]['rows_per_head']:,}", *cells, f"{seconds:.1f}")
    return table


def _tried_table(title: str, conversions: list[dict]) -> Table:
    table = Table(
        title=f"{title}. What was tried, and its relative error on held-out queries of the calibration text, mean over "
        "the heads; the least (*) is taken"
    )
    table.add_column("made of")
    for c in conversions:
        table.add_column(f"layer {c['layer']}", justify="right", no_wrap=True)
    for made_of in conversions[0]["tried"]:
        errors = ((c["tried"][made_of], min(c["tried"].values())) for c in conversions)
        table.add_row(made_of, *(f"{error:.4f}{' *' if error == least else ''}" for error, least in errors))
    return table


def _cell(errors: list[float]) -> str:
    return f"{_short(_median(errors))} / {_short(sum(errors) / len(errors))} ({_short(max(errors))})"


def _median(errors: list[float]) -> float:
    return torch.tensor(errors).quantile(0.5).item()


def _short(x: float) -> str:
    return f"{x:.3f}" if x < 1 else f"{x:.2f}" if x < 10 else f"{x:.0f}"


def plot(path, figures: dict) -> None:
    """Draws errors by size of the state or, of several prefixes, by their length at the largest size."""
    numbers, settings, lengths = figures["layers"], figures["settings"], figures["prefix_rows"]
    by_length, conversions, largest = len(lengths) > 1, figures["conversions"], figures["state_rows"][-1]
    if by_length:
        conversions = [c for c in conversions if c["rows"] in (None, largest)]
    columns = min(len(numbers), 3)
    figure, panels = plots.canvas(columns, math.ceil(len(numbers) / columns), width=5.2, height=3.8)
    names = list(dict.fromkeys(c["method"] for c in conversions))
    lines = {}
    for number, axes in zip(numbers, panels, strict=False):
        for i, name in enumerate(names):
            points = [
                (c["prefix_rows" if by_length else "rows_per_head"], _median(c["relative_error"]))
                for c in conversions
                if (c["layer"], c["method"]) == (number, name)
            ]
            if name == NO_PREFIX and not by_length:
                lines[name] = axes.axhline(points[0][1], ls=":", color="black")
            else:
                style = {"ls": ":", "color": "black"} if name == NO_PREFIX else {"color": f"C{i - 1}"}
                (lines[name],) = axes.plot(*zip(*points, strict=True), marker="osD^vXP*"[i - 1], **style)
        axes.set(xscale="log", yscale="log", ylabel="relative error, median over heads", title=f"layer {number}",
                 xlabel="rows of the prefix" if by_length else "rows of the state per head")  # fmt: skip
        plots.mark(axes.xaxis, lengths if by_length else figures["state_rows"])
        plots.plain_log(axes.yaxis)
    for axes in panels[len(numbers) :]:
        axes.remove()
    of = f"{largest:,} rows a head" if by_length else f"a {lengths[0]:,}-row prefix"
    figure.suptitle(f"{settings['model']}: states of {of}, on unseen text")
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=min(columns + 1, 4), fontsize=9)
    plots.save(figure, path)
