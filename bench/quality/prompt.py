"""Predictions of a decoder after a long prompt, without it, and with states in its place.

The prompt is the beginning of the Python language reference, each paragraph once. `prompt_to_states` converts the keys
and values that the decoder (`bench/models/decoder.py`) makes of it to rows in every layer, fitted to chunks of the text
that comes later. The loss per token is measured on other chunks, which no fit has seen; each is read as if it followed
the prompt, and the time is that of reading one. With `--train`, each state is also trained further on the chunks of the
fit, to predict for each token what the model predicts after the prompt. Takes twenty minutes, with `--train 96` under
an hour, too long for `bench all`.
"""

import argparse
import math
import random
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from ..lib import plots, record, timing
from ..lib.progress import Steps
from ..models import decoder
from ..models.reading import CHUNK, text_without_repeats

NO_PROMPT, PROMPT = "no prompt", "the prompt"
_RATE = 0.01  # of learning; 0.003 and 0.015 give the same on chunks outside the test


def add_arguments(parser: argparse.ArgumentParser) -> None:
    record.add_arguments(parser)
    parser.add_argument("--prompt", type=record.positive(int), default=6144, metavar="M",
                        help="tokens of the prompt (default: %(default)s)")  # fmt: skip
    parser.add_argument("--rows", type=record.positive(int), nargs="+", metavar="R", default=[32, 128],
                        help="rows of the states per head (default: 32 128)")  # fmt: skip
    parser.add_argument("--calibration", type=record.positive(int), default=32, metavar="N",
                        help=f"chunks of {CHUNK} tokens that the fits see (default: %(default)s)")  # fmt: skip
    parser.add_argument("--test", type=record.positive(int), default=8, metavar="N",
                        help=f"chunks of {CHUNK} tokens to measure the loss on (default: %(default)s)")  # fmt: skip
    parser.add_argument("--train", type=record.positive(int), metavar="STEPS",
                        help="also train each state for STEPS steps of one chunk (default: do not)")  # fmt: skip


def measure(arguments: argparse.Namespace, progress: Steps) -> dict:
    """Returns losses, memory and times with the prompt, without it and with each state in its place."""
    sizes = sorted(set(arguments.rows))
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
    return compare(
        model.to(arguments.device).eval(), prompt, chunks[: arguments.test],
        chunks[arguments.test : arguments.test + arguments.calibration], sizes, arguments.train, progress,
    )  # fmt: skip


def rows_of(figures: dict) -> list[dict]:
    return [
        {"in_place": result["in_place"], "rows": result["rows"], "chunk": chunk, "loss": loss}
        for result in figures["results"]
        for chunk, loss in enumerate(result["losses"])
    ]


def compare(
    model, prompt: Tensor, test: Tensor, calibration: Tensor, sizes: list[int], steps: int | None, progress: Steps
) -> dict:
    """Converts the prompt to states of each size, trains copies of them for `steps`, and measures all on `test`."""
    from ntk_kernels.integrations.transformers import attach_prefix, prompt_to_states

    with torch.no_grad():
        cache = model.base_model(prompt[None], use_cache=True).past_key_values
    readers = {NO_PROMPT: reader(model, len(prompt)), PROMPT: reader(model, len(prompt), cache)}
    kept = {NO_PROMPT: 0, PROMPT: sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)}
    rows = {NO_PROMPT: 0, PROMPT: len(prompt)}
    if steps is not None:
        task = progress.add_task("predicting after the prompt", total=len(calibration))
        wanted = []
        for chunk in calibration:
            with torch.no_grad():
                wanted.append(readers[PROMPT](chunk).logits[0].half())
            progress.advance(task)
    for size in sizes:
        states = prompt_to_states(model, prompt, calibration, num_rows=size, text_position=len(prompt))
        for name in (f"{size:,} rows", f"{size:,} rows, trained")[: 1 if steps is None else 2]:
            with_states = decoder.copy_of(model)
            attach_prefix(with_states, prefixes=states)
            readers[name], rows[name] = reader(with_states, len(prompt)), size
            kept[name] = sum(state.nbytes for state in states.values())
        if steps is not None:
            task = progress.add_task(f"training {size:,} rows", total=steps)
            train(with_states, readers[name], calibration, wanted, steps, lambda task=task: progress.advance(task))
    task = progress.add_task("testing", total=len(readers))
    results = []
    for name, read in readers.items():
        losses = [round(_loss_of(read, chunk), 6) for chunk in test]
        results.append({"in_place": name, "rows": rows[name], "bytes": kept[name], "losses": losses})
        progress.advance(task, step=name)
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
    """Returns a function that reads a chunk from this position on, after `past`, and gives its logits and mean loss."""

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


def train(model, read: Callable, chunks: Tensor, wanted: list[Tensor], steps: int, on_step: Callable) -> None:
    """Trains a model's prefixes, one chunk per step, towards the probabilities given by the `wanted` logits [L, V]."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_RATE, eps=1e-15, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    shuffler, order = random.Random(0), []
    while len(order) < steps:
        order += shuffler.sample(range(len(chunks)), len(chunks))
    for i in order[:steps]:
        given, target = (logits.float().log_softmax(-1) for logits in (read(chunks[i]).logits[0], wanted[i]))
        F.kl_div(given, target, log_target=True, reduction="batchmean").backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step()


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
    """Draws the loss of each chunk minus that without the prompt."""
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
