"""What a decoder predicts after a long prompt, with the prompt, without it, and with states in its place.

The prompt is the beginning of the Python language reference, each paragraph once. `prompt_to_states` converts what the
decoder (`bench/models/decoder.py`) makes of it to rows in every layer, fitted to chunks of the text that comes later.
The loss of a token is measured on other chunks, which no fit has seen; each is read as what follows the prompt. The
time is that of reading such a chunk. With `--train` states are there a second time, trained further on the chunks of
the fit: to predict for each token what the model predicts after the prompt. Too long for `bench all`.
"""

import argparse
import math
import random
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from ..lib import plots, record, tables, timing
from ..models import decoder
from ..models.reading import CHUNK, text_without_repeats

NO_PROMPT, PROMPT = "no prompt", "the prompt"
_RATE = 0.01  # 0.003 and 0.015 give the same on chunks that are not of the test


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
    parser.add_argument("--train", type=record.positive(int), metavar="STEPS",
                        help="also states that are trained further, for so many chunks (default: none)")  # fmt: skip


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
        chunks[arguments.test : arguments.test + arguments.calibration], sizes, arguments.train,
    )  # fmt: skip
    for table in tables_of(figures):
        tables.show(console, table)
    path = record.results_folder(arguments) / "prompt.json"
    rows = [
        {"benchmark": "prompt", "in_place": result["in_place"], "rows": result["rows"], "chunk": chunk, "loss": loss}
        for result in figures["results"]
        for chunk, loss in enumerate(result["losses"])
    ]
    record.save(path, arguments.device, rows, **figures)
    plot(path.with_suffix(".png"), figures)
    console.print(f"figures: {path}\nplot: {path.with_suffix('.png')}", soft_wrap=True)


def measure(model, prompt: Tensor, test: Tensor, calibration: Tensor, sizes: list[int], steps: int | None) -> dict:
    """What `run` records; trains for so many steps."""
    from ntk_kernels.integrations.transformers import attach_prefix, prompt_to_states

    with torch.no_grad():
        cache = model.base_model(prompt[None], use_cache=True).past_key_values
    readers = {NO_PROMPT: reader(model, len(prompt)), PROMPT: reader(model, len(prompt), cache)}
    kept = {NO_PROMPT: 0, PROMPT: sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)}
    rows = {NO_PROMPT: 0, PROMPT: len(prompt)}
    if steps is not None:
        with torch.no_grad():
            wanted = [readers[PROMPT](chunk).logits[0].half() for chunk in track(calibration, "predicting")]
    for size in sizes:
        states = prompt_to_states(model, prompt, calibration, num_rows=size, text_position=len(prompt))
        for name in (f"{size:,} rows", f"{size:,} rows, trained")[: 1 if steps is None else 2]:
            with_states = decoder.copy_of(model)
            attach_prefix(with_states, prefixes=states)
            readers[name], rows[name] = reader(with_states, len(prompt)), size
            kept[name] = sum(state.nbytes for state in states.values())
        if steps is not None:
            train(with_states, readers[name], calibration, wanted, steps)
    results = [
        {"in_place": name, "rows": rows[name], "bytes": kept[name],
         "losses": [round(_loss_of(read, chunk), 6) for chunk in test]}
        for name, read in track(readers.items(), "testing")
    ]  # fmt: skip
    calls = {name: partial(_loss_of, read, test[0]) for name, read in readers.items()}
    times = timing.measure(calls, str(test.device), seconds=0)
    for result in results:
        result |= times[result["in_place"]]
    settings = {
        "model": decoder.MODEL, "text": "pydoc_data.topics", "prompt": len(prompt), "chunk": test.shape[1],
        "test": len(test), "calibration": len(calibration), "layers": len(cache.layers), "train": steps,
    }  # fmt: skip
    return {"settings": settings, "results": results}


def reader(model, position: int, past=None) -> Callable:
    """Gives what the model says of a chunk that is read from this position on: logits, the mean loss of its tokens."""

    def read(chunk: Tensor):
        positions = position + torch.arange(len(chunk), device=chunk.device)
        out = model(input_ids=chunk[None], position_ids=positions[None], labels=chunk[None], past_key_values=past,
                    use_cache=past is not None)  # fmt: skip
        if past is not None:
            past.crop(-len(chunk))
        return out

    return read


def _loss_of(read: Callable, chunk: Tensor) -> float:
    with torch.no_grad():
        return read(chunk).loss.item()


def train(model, read: Callable, chunks: Tensor, wanted: list[Tensor], steps: int) -> None:
    """The prefixes of a model, a chunk a step, to give the probabilities that the `wanted` logits [L, V] stand for."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_RATE, eps=1e-15, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    shuffler, order = random.Random(0), []
    while len(order) < steps:
        order += shuffler.sample(range(len(chunks)), len(chunks))
    for i in track(order[:steps], "training"):
        given, target = (logits.float().log_softmax(-1) for logits in (read(chunks[i]).logits[0], wanted[i]))
        F.kl_div(given, target, log_target=True, reduction="batchmean").backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def tables_of(figures: dict) -> list[Table]:
    settings, results = figures["settings"], figures["results"]
    trained = f". Trained: for {steps} steps of a chunk" if (steps := settings.get("train")) else ""
    table = Table(
        title=f"{settings['model']}, a prompt of {settings['prompt']:,} tokens: loss of {settings['test']} chunks of "
        f"{settings['chunk']} tokens that come later ({settings['text']}); how much of what the prompt gains is left; "
        f"memory of all {settings['layers']} layers; median time of reading a chunk{trained}"
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
