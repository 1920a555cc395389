"""What a decoder predicts after a long prompt, with the prompt, without it, and with states in its place.

The prompt is the beginning of the Python language reference, each paragraph once. `prompt_to_states` converts what the
decoder (`bench/decoder.py`) makes of it to rows in every layer, fitted to chunks of the text that comes later. The loss
of a token is measured on other chunks, which no fit has seen; each is read as what follows the prompt. The time is that
of reading such a chunk. Too long for `bench all`.
"""

import argparse
import math
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from . import decoder, plots, record, timing
from .reading import CHUNK, text_without_repeats

NO_PROMPT, PROMPT = "no prompt", "the prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    record.add_arguments(parser)
    parser.add_argument("--prompt", type=record.positive(int), default=6144, metavar="M",
                        help="tokens of the prompt (default: %(default)s)")  # fmt: skip
    parser.add_argument("--rows", type=record.positive(int), nargs="+", metavar="R", default=[32, 128],
                        help="rows of the states per head (default: 32 128)")  # fmt: skip
    parser.add_argument("--calibration", type=record.positive(int), default=32, metavar="N",
                        help=f"chunks of {CHUNK} tokens that the fits see (default: %(default)s)")  # fmt: skip
    parser.add_argument("--test", type=record.positive(int), default=8, metavar="N",
                        help=f"chunks of {CHUNK} tokens that are predicted (default: %(default)s)")  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    console, sizes = Console(), sorted(set(arguments.rows))
    if sizes[-1] >= arguments.prompt:
        raise SystemExit(f"prompt: --rows must be less than the {arguments.prompt:,} tokens, got {sizes[-1]:,}")
    try:
        model, tokenizer = decoder.language_model()
    except ModuleNotFoundError as error:
        raise SystemExit(f"prompt: {error}") from error
    if arguments.prompt + CHUNK > (most := model.config.max_position_embeddings):
        raise SystemExit(f"prompt: --prompt must be at most {most - CHUNK:,}, got {arguments.prompt:,}")
    tokens = torch.tensor(tokenizer(text_without_repeats(), add_special_tokens=False)["input_ids"])
    prompt, rest = tokens[: arguments.prompt].to(arguments.device), tokens[arguments.prompt :].to(arguments.device)
    chunks = rest[: len(rest) // CHUNK * CHUNK].view(-1, CHUNK)
    if len(chunks) < arguments.test + arguments.calibration:
        raise SystemExit(
            f"prompt: --test and --calibration must be at most the {len(chunks)} chunks that the text has after the "
            f"prompt, together, got {arguments.test} and {arguments.calibration}"
        )
    figures = measure(
        model.to(arguments.device).eval(), prompt, chunks[: arguments.test],
        chunks[arguments.test : arguments.test + arguments.calibration], sizes,
    )  # fmt: skip
    for table in tables_of(figures):
        Console(width=max(console.width, 150)).print(table)
    path = record.results_folder(arguments) / "prompt.json"
    rows = [
        {"benchmark": "prompt", "in_place": result["in_place"], "rows": result["rows"], "chunk": chunk, "loss": loss}
        for result in figures["results"]
        for chunk, loss in enumerate(result["losses"])
    ]
    record.save(path, arguments.device, rows, **figures)
    plot(path.with_suffix(".png"), figures)
    console.print(f"figures: {path}\nplot: {path.with_suffix('.png')}", soft_wrap=True)


def measure(model, prompt: Tensor, test: Tensor, calibration: Tensor, sizes: list[int]) -> dict:
    """What `run` records."""
    from ntk_kernels.integrations.transformers import attach_prefix, prompt_to_states

    with torch.no_grad():
        cache = model.base_model(prompt[None], use_cache=True).past_key_values
    losses = {NO_PROMPT: loss_after(model, len(prompt)), PROMPT: loss_after(model, len(prompt), cache)}
    kept = {NO_PROMPT: 0, PROMPT: sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)}
    rows = {NO_PROMPT: 0, PROMPT: len(prompt)}
    for size in sizes:
        states = prompt_to_states(model, prompt, calibration, num_rows=size, text_position=len(prompt))
        with_states = decoder.copy_of(model)
        attach_prefix(with_states, prefixes=states)
        name = f"{size:,} rows"
        losses[name], rows[name] = loss_after(with_states, len(prompt)), size
        kept[name] = sum(state.nbytes for state in states.values())
    results = []
    for name, loss_of in track(losses.items(), "predicting"):
        results.append({"in_place": name, "rows": rows[name], "bytes": kept[name],
                        "losses": [round(loss_of(chunk), 6) for chunk in test]})  # fmt: skip
    calls = {name: lambda loss_of=loss_of: loss_of(test[0]) for name, loss_of in losses.items()}
    times = timing.measure(calls, str(test.device), seconds=0)
    for result in results:
        result |= times[result["in_place"]]
    settings = {
        "model": decoder.MODEL, "text": "pydoc_data.topics", "prompt": len(prompt), "chunk": test.shape[1],
        "test": len(test), "calibration": len(calibration), "layers": len(cache.layers),
    }  # fmt: skip
    return {"settings": settings, "results": results}


def loss_after(model, position: int, past=None) -> Callable[[Tensor], float]:
    """Gives the mean loss of the tokens of a chunk that is read from this position on, all but its first."""

    def loss_of(chunk: Tensor) -> float:
        positions = position + torch.arange(len(chunk), device=chunk.device)
        with torch.no_grad():
            out = model(input_ids=chunk[None], position_ids=positions[None], labels=chunk[None], past_key_values=past,
                        use_cache=past is not None)  # fmt: skip
        if past is not None:
            past.crop(-len(chunk))
        return out.loss.item()

    return loss_of


def tables_of(figures: dict) -> list[Table]:
    settings, results = figures["settings"], figures["results"]
    table = Table(
        title=f"{settings['model']}, a prompt of {settings['prompt']:,} tokens: loss of {settings['test']} chunks of "
        f"{settings['chunk']} tokens that come later ({settings['text']}); how much of what the prompt gains is left; "
        f"memory of all {settings['layers']} layers; median time of reading a chunk"
    )
    for name in ("in the prompt's place", "rows per head", "MiB", "loss", "perplexity", "of the gain", "ms"):
        table.add_column(name, justify="left" if name == "in the prompt's place" else "right", no_wrap=True)
    losses = {result["in_place"]: sum(result["losses"]) / len(result["losses"]) for result in results}
    gain = losses[NO_PROMPT] - losses[PROMPT]
    for result in results:
        loss = losses[result["in_place"]]
        table.add_row(
            result["in_place"], f"{result['rows']:,}", f"{result['bytes'] / 2**20:,.1f}", f"{loss:.3f}",
            f"{math.exp(loss):.2f}", f"{100 * (losses[NO_PROMPT] - loss) / gain:.0f}%" if gain else "—",
            f"{result['ms']:,.0f}",
        )  # fmt: skip
    return [table]


def plot(path, figures: dict) -> None:
    """The loss of each chunk less that without the prompt."""
    results = figures["results"]
    figure, (axes,) = plots.canvas(width=8)
    base = results[0]["losses"]
    chunks = range(1, len(base) + 1)
    for result, marker in zip(results[1:], "o^sDvXP*" * len(results), strict=False):
        gains = [loss - without for loss, without in zip(result["losses"], base, strict=True)]
        axes.plot(
            chunks, gains, marker=marker, ls="-" if result["in_place"] == PROMPT else "--", label=result["in_place"]
        )
    axes.axhline(0, ls=":", color="black", label=NO_PROMPT)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel=f"chunk of {figures['settings']['chunk']} tokens after the prompt",
             ylabel="loss less that without the prompt")  # fmt: skip
    plots.save(figure, path)
