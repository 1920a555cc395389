"""Fine-tuning a pretrained decoder at equal trainable parameters: NTK-Attention, prefix tuning, LoRA.

The decoder (`bench/models/decoder.py`) is trained on running text, the Python language reference, each paragraph once.
The end of the text is held out: a part for validation, then a part for the test; neither overlaps the rest.
NTK-Attention is this package's PEFT method; prefix tuning (the same as P-Tuning v2 on every layer without a projection)
and LoRA are PEFT's own. Each method gets the size that brings its trainable parameters closest to `--budget`;
fine-tuning the whole model, for comparison, is not of that size.

With the same seed, all methods see the same batches in the same order, with the same schedule: the learning rate rises
over the first tenth of the steps, then falls to 0. Its peak is chosen on the validation part with the first seed, from
equally many candidates for each method; reported losses are those on the test part. The candidates and the initial mass
of our prefixes were found with shorter runs on validation text.

A method "from text" starts with the keys and values of as many tokens of the training text as it has rows; each seed
begins at another place. "Fitted to text" are as many rows, which `prefix_to_state` fits to the keys and values of the
first four sequences, on the 32 that follow.

With `--ablation`, the methods are feature maps by rank, regardless of their size: `elu` from a small initial mass;
polynomials, beside a row, from as many tokens of text as the rank (64 for a full Z).

Records losses, the loss of each step, seconds per step (measured in turns) and the memory of the first step beyond the
model. Takes more than an hour on two cores, too long for `bench all`.
"""

import argparse
import itertools
import math
import random
import statistics
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

from ..lib import plots, record, timing
from ..lib.progress import Steps
from ..models import decoder
from ..models.reading import text_without_repeats
from .finetune_methods import METHODS, WHOLE, Method, ablation

NO_TRAINING = "no training"
FAR = 0.5  # plots end this far above the loss of the untrained model


class Parts(NamedTuple):
    """Sequences of tokens [N, length] that do not overlap."""

    train: Tensor
    validation: Tensor
    test: Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    record.add_arguments(parser)
    listed = ", ".join(f"{name} ({method.name})" for name, method in METHODS.items())
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="NAME", help=f"of {listed} (default: all)")
    parser.add_argument("--budget", type=record.positive(int), default=230_400, metavar="N",
                        help="trainable parameters (default: %(default)s, 20 virtual tokens)")  # fmt: skip
    parser.add_argument("--steps", type=record.positive(int), default=40, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--batch", type=record.positive(int), default=4, help="sequences per step (default: %(default)s)"
    )
    parser.add_argument("--length", type=record.positive(int), default=128,
                        help="tokens per sequence (default: %(default)s)")  # fmt: skip
    parser.add_argument("--held-out", type=record.positive(int), default=32, metavar="N",
                        help="sequences for validation and as many for the test (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seeds", type=record.positive(int), default=3, metavar="N",
                        help="runs of each method (default: %(default)s)")  # fmt: skip
    parser.add_argument("--ablation", action="store_true", help="compare feature maps by rank instead of --methods")
    parser.add_argument("--ranks", type=record.positive(int), nargs="+", metavar="S",
                        help="ranks of the ablation, beside a full Z (default: 4 8 16)")  # fmt: skip
    parser.add_argument("--name", help="name of the files (default: finetune or finetune-ablation)")


def stem_of(arguments: argparse.Namespace) -> str:
    return arguments.name or ("finetune-ablation" if arguments.ablation else "finetune")


def measure(arguments: argparse.Namespace, progress: Steps) -> dict:
    """Returns losses, sizes and costs of every method."""
    _check(arguments)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT asks for it
    try:
        model, tokenizer = decoder.language_model()
    except ModuleNotFoundError as error:
        raise SystemExit(f"finetune: {error}") from error
    tokens = torch.tensor(tokenizer(text_without_repeats(), add_special_tokens=False)["input_ids"])
    parts = Parts(*(part.to(arguments.device) for part in split(tokens, arguments.length, arguments.held_out)))
    if len(parts.train) < arguments.batch:
        raise SystemExit(
            f"finetune: --batch must be at most {len(parts.train)}, the sequences of {arguments.length} tokens that "
            f"--held-out leaves for training, got {arguments.batch}"
        )
    if arguments.length > (most := model.config.max_position_embeddings):
        raise SystemExit(f"finetune: --length must be at most {most}, which the decoder reads, got {arguments.length}")
    methods = [METHODS[name] for name in dict.fromkeys(arguments.methods or METHODS)]
    if arguments.ablation:
        methods = ablation(model.config, sorted(set(arguments.ranks or [4, 8, 16])))
    figures = Comparison(model.to(arguments.device).eval(), parts, arguments).measure(methods, progress)
    if not figures["results"]:
        raise SystemExit("\n".join(["finetune: no method could be run", *notes_of(figures)]))
    return figures


def rows_of(figures: dict) -> list[dict]:
    return [
        {name: value for name, value in result.items() if not isinstance(value, list)}
        | {"seed": seed, "test_loss_before": before, "test_loss": after}
        for result in figures["results"]
        for seed, (before, after) in enumerate(zip(result["test_losses_before"], result["test_losses"], strict=True))
    ]


def _check(arguments: argparse.Namespace) -> None:
    if arguments.length < 2:
        raise SystemExit("finetune: --length must be at least 2, a token and the one it predicts, got 1")
    if arguments.ablation and arguments.methods is not None:
        raise SystemExit(f"finetune: --methods must not come with --ablation, got {' '.join(arguments.methods)}")
    if not arguments.ablation and arguments.ranks is not None:
        raise SystemExit(f"finetune: --ranks must come with --ablation, got {arguments.ranks} without it")


def split(tokens: Tensor, length: int, held_out: int) -> Parts:
    """Cuts the text into sequences, in its order, for training, validation and test."""
    sequences = tokens[: len(tokens) // length * length].view(-1, length)
    if len(sequences) <= 2 * held_out:
        raise SystemExit(
            f"finetune: --held-out must be less than half of the {len(sequences)} sequences of {length} tokens that "
            f"the text has, got {held_out}"
        )
    return Parts(sequences[: -2 * held_out], sequences[-2 * held_out : -held_out], sequences[-held_out:])


class Comparison:
    """The model, the text and the settings that all methods share."""

    def __init__(self, model: nn.Module, parts: Parts, arguments: argparse.Namespace):
        self.model, self.parts, self.budget = model.requires_grad_(False), parts, arguments.budget
        self.steps, self.batch, self.seeds = arguments.steps, arguments.batch, range(arguments.seeds)
        self.device, self.is_ablation = arguments.device, arguments.ablation
        self._starts = {}  # by method, size and seed

    def measure(self, methods: list[Method], progress: Steps) -> dict:
        """Returns the figures of the record; a method of others that fails is left out, with the reason."""
        results, left_out, ready = [], {}, {}
        task = progress.add_task(NO_TRAINING, total=len(self.seeds) * self.steps)
        base = self._without_training(lambda: progress.advance(task))
        for method in methods:
            runs = len(method.rates) + len(self.seeds) - 1
            task = progress.add_task(method.name, total=runs * self.steps)
            try:
                result = self.compare(method, lambda task=task: progress.advance(task))
                steps = self._endless(method, result)
                result["peak_bytes"] = timing.peak_bytes(lambda steps=steps: next(steps), self.device)
            except Exception as error:  # a library may raise anything
                if method.ours:
                    raise
                left_out[method.name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
                progress.remove_task(task)
                continue
            results.append(result)
            ready[method.name] = steps
        task = progress.add_task("timing steps", total=1)
        calls = {name: lambda steps=steps: next(steps) for name, steps in ready.items()}
        times = timing.measure(calls, self.device, seconds=0) if calls else {}
        progress.advance(task)
        for result in results:
            result["step_ms"] = times[result["method"]]["ms"]
        settings = {
            "model": decoder.MODEL, "text": "pydoc_data.topics", "steps": self.steps, "batch": self.batch,
            "length": self.parts.train.shape[1], "budget": None if self.is_ablation else self.budget,
            "seeds": len(self.seeds), "ablation": self.is_ablation,
        } | {f"{name}_sequences": len(part) for name, part in self.parts._asdict().items()}  # fmt: skip
        return {"settings": settings, "base": base, "results": results, "left_out": left_out}

    def compare(self, method: Method, on_step=lambda: None) -> dict:
        """Chooses the learning rate and trains with every seed; returns losses and parameters."""
        size = method.size if method.size is not None else self.size_of(method)
        validation, first = {}, None
        for rate in method.rates:
            trained = self.train(method, size, rate, 0, on_step)
            validation[rate] = evaluate(trained[0], self.parts.validation, self.batch)
            if first is None or validation[rate] < _last_if_nan(validation[first[0]]):
                first = rate, trained
        rate, trained = first
        before, after, curves = [], [], []
        for seed in self.seeds:
            before.append(evaluate(self.build(method, size, seed), self.parts.test, self.batch))
            model, curve = trained if seed == 0 else self.train(method, size, rate, seed, on_step)
            after.append(evaluate(model, self.parts.test, self.batch))
            curves.append(curve)
        return {
            "method": method.name, "counts": method.counts, "size": size, "parameters": num_trained(model),
            "rates": list(method.rates), "validation_losses": _finite(validation.values()), "rate": rate,
            "test_losses_before": _finite(before), "test_losses": _finite(after),
            "curves": [_finite(curve) for curve in curves],
        }  # fmt: skip

    def size_of(self, method: Method) -> int | str:
        """Returns the size whose trained parameters, which grow evenly with it, are closest to the budget; of two such
        sizes, the smaller one."""

        def count(size):
            return num_trained(self.build(method, size, None))

        first = count(1)
        size = max(1, 1 + math.ceil((self.budget - first) / (count(2) - first) - 0.5))
        if method.counts == "rank" and method.ours:
            whole = count(WHOLE)
            if count(size) >= whole or abs(whole - self.budget) <= abs(count(size) - self.budget):
                return WHOLE
        return size

    def build(self, method: Method, size: int | str, seed: int | None) -> nn.Module:
        """Returns a model that shares the given one's parameters, with those that the method trains.

        Without a seed, it does not start from text.
        """
        start = None if method.start is None or seed is None else self._start(method, size, seed)
        torch.manual_seed(seed or 0)
        return method.build(decoder.copy_of(self.model), size, start)

    def _start(self, method: Method, size: int | str, seed: int):
        """Returns what the method starts from; each seed begins at another place of the text."""
        name = method.name, size, seed
        if name not in self._starts:
            train = self.parts.train
            text = train.roll(-_order(len(train), seed)[0], dims=0)
            self._starts[name] = method.start(self.model, size, text)
        return self._starts[name]

    def train(self, method: Method, size, rate: float, seed: int, on_step) -> tuple[nn.Module, list[float]]:
        """Returns the trained model, and the loss at every step before the update."""
        model, losses = self.build(method, size, seed), []
        for loss in steps_of(model, self.batches(seed), self.schedule(rate), method.eps):
            losses.append(loss)
            on_step()
        return model, losses

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Yields batches without end; every sequence comes once per epoch."""
        for epoch in itertools.count():
            order = _order(len(self.parts.train), seed, epoch)
            for i in range(0, len(order) - self.batch + 1, self.batch):
                yield self.parts.train[order[i : i + self.batch]]

    def schedule(self, rate: float) -> list[float]:
        """Returns the learning rate of each step: rising over the first tenth of the steps, then falling to 0."""
        rise = math.ceil(self.steps / 10)
        return [rate * min((i + 1) / rise, (self.steps - i) / (self.steps - rise + 1)) for i in range(self.steps)]

    def _without_training(self, on_step) -> dict:
        """Returns the losses of the untrained model, also on the batches of training."""
        curves = []
        for seed in self.seeds:
            curves.append([])
            for batch in itertools.islice(self.batches(seed), self.steps):
                curves[-1].append(evaluate(self.model, batch, self.batch))
                on_step()
        validation, test = (evaluate(self.model, part, self.batch) for part in self.parts[1:])
        return {"validation_loss": validation, "test_loss": test, "curves": curves}

    def _endless(self, method: Method, result: dict) -> Iterator[float]:
        """Yields steps for timing; the first one allocates the gradients and the optimizer's state."""
        model = self.build(method, result["size"], 0)
        return steps_of(model, self.batches(0), itertools.repeat(0.0), method.eps)


def steps_of(model: nn.Module, batches, rates, eps: float) -> Iterator[float]:
    """Trains with one batch and learning rate per step; yields the losses."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, eps=eps, weight_decay=0.0)
    model.train()
    for rate, batch in zip(rates, batches, strict=False):  # batches never end
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def evaluate(model: nn.Module, sequences: Tensor, batch: int) -> float:
    """Returns the mean loss per token."""
    model.eval()
    total = 0.0
    with torch.no_grad():
        for chunk in sequences.split(batch):
            total += model(input_ids=chunk, labels=chunk).loss.item() * len(chunk)
    return total / len(sequences)


def num_trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _order(count: int, seed: int, epoch: int = 0) -> list[int]:
    return random.Random(f"{seed}, {epoch}").sample(range(count), count)


def _last_if_nan(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss


def _finite(losses) -> list[float | None]:
    """Rounds losses; replaces infinities and NaN, which JSON does not have, with None."""
    return [round(loss, 6) if math.isfinite(loss) else None for loss in losses]


def tables_of(figures: dict) -> list[Table]:
    """Returns a table of losses, sizes and costs of every method."""
    settings, base, budget = figures["settings"], figures["base"], figures["settings"]["budget"]
    what = "NTK-Attention by feature map and rank of Z, polynomials from text and beside a row"
    if budget is not None:
        what = f"Methods at {budget:,} trainable parameters, as near as whole sizes come"
    validation, test = (settings[f"{part}_sequences"] * settings["length"] for part in ("validation", "test"))
    tried = sorted({len(result["rates"]) for result in figures["results"]})
    table = Table(
        title=f"{what}: {settings['model']} on {settings['text']}, {settings['steps']} steps of {settings['batch']}×"
        f"{settings['length']} tokens. Loss of a token before and after, on {test:,} tokens for the test, mean ± "
        f"standard deviation over {_count(settings['seeds'], 'seed')}, and the perplexity after. Learning rate: the "
        f"best of {' or '.join(map(str, tried))} for each method on {validation:,} other tokens, with the first seed. "
        "Median time of a step; memory of the first step beyond the model"
    )
    rows = [
        {"method": NO_TRAINING, "size": "—", "parameters": "0", "of budget": "—", "learning rate": "—", "before": "—",
         "after": _number(base["test_loss"], 3), "perplexity": _number(_exp(base["test_loss"]), 2), "step": "—",
         "memory": "—"}
    ]  # fmt: skip
    for result in figures["results"]:
        after = result["test_losses"]
        rows.append({
            "method": result["method"],
            "size": f"{result['counts']} {result['size']}" if result["size"] != WHOLE else WHOLE,
            "parameters": f"{result['parameters']:,}",
            "of budget": "—" if budget is None else f"{100 * result['parameters'] / budget:,.1f}%",
            "learning rate": f"{result['rate']:g}",
            "before": _number(_mean(result["test_losses_before"]), 3),
            "after": _number(_mean(after), 3) + _spread(after),
            "perplexity": _number(_exp(_mean(after)), 2),
            "step": f"{result['step_ms']:,.0f} ms",
            "memory": f"{result['peak_bytes'] / 2**20:,.0f} MiB",
        })  # fmt: skip
    for name in rows[0]:
        if budget is not None or name not in ("size", "of budget"):  # which the names of the ablation tell
            table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[column.header] for column in table.columns))
    return [table]


def notes_of(figures: dict) -> list[str]:
    """Says which methods were left out and why, and whose best learning rate may be beyond those tried."""
    notes = [f"left out: {name}: {reason}" for name, reason in figures["left_out"].items()]
    for result in figures["results"]:
        rates = result["rates"]
        if len(rates) > 1 and result["rate"] in (rates[0], rates[-1]):
            tried = ", ".join(
                f"{rate:g}: {_number(loss, 3)}" for rate, loss in zip(rates, result["validation_losses"], strict=True)
            )
            end = "smallest" if result["rate"] == rates[0] else "largest"
            notes.append(f"{result['method']}: the {end} learning rate was the best (loss on validation, {tried})")
    return notes


def plot(path, figures: dict) -> None:
    """Draws the loss of each step minus the untrained model's on the same batches, and the test loss of every run.

    Losses far above the untrained model's, such as those of random prefixes, are not drawn to scale: otherwise nothing
    else could be told apart.
    """
    results, base, by_size = figures["results"], figures["base"], figures["settings"]["ablation"]
    far = base["test_loss"] + FAR
    figure, (curves, ends) = plots.canvas(2, width=7, height=5.5)
    for i, result in enumerate(results):
        differences = [
            [math.nan if loss is None else loss - untrained for loss, untrained in zip(curve, as_it_is, strict=True)]
            for curve, as_it_is in zip(result["curves"], base["curves"], strict=True)
        ]
        means = [statistics.fmean(losses) for losses in zip(*differences, strict=True)]
        (line,) = curves.plot(range(1, len(means) + 1), means, label=result["method"], ls="-" if i < 10 else "--")
        losses = [math.nan if loss is None else loss for loss in result["test_losses"]]
        if by_size:
            ends.plot([result["parameters"]] * len(losses), losses, "o", color=line.get_color())
        else:
            ends.plot([min(loss, far) for loss in losses], [-i] * len(losses), "o", color=line.get_color())
            beyond = ", ".join(f"{loss:.2f}" for loss in losses if loss > far)
            ends.annotate(beyond, (far, -i), (-8, 8), textcoords="offset points", ha="right", fontsize=8)
    curves.axhline(0, ls=":", color="black")
    curves.set_ylim(top=min(curves.get_ylim()[1], FAR))
    curves.xaxis.get_major_locator().set_params(integer=True)
    curves.set(xlabel="step", ylabel="training loss less the untrained model's, mean over seeds")
    if by_size:
        ends.axhline(base["test_loss"], ls=":", color="black", label=NO_TRAINING)
        ends.set(xscale="log", xlabel="trained parameters", ylabel="loss on the test part, each seed")
    else:
        ends.axvline(base["test_loss"], ls=":", color="black", label=NO_TRAINING)
        ends.set_yticks([-i for i in range(len(results))], [result["method"] for result in results])
        ends.set(xlabel="loss on the test part, each seed")
    plots.save(figure, path)


def _mean(losses: list[float | None]) -> float | None:
    return None if None in losses else statistics.fmean(losses)


def _exp(loss: float | None) -> float | None:
    return None if loss is None else math.exp(min(loss, 700))  # the largest that a float holds


def _spread(losses: list[float | None]) -> str:
    return "" if len(losses) == 1 or None in losses else f" ± {statistics.stdev(losses):.3f}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _number(x: float | None, digits: int) -> str:
    return "NaN" if x is None else f"{x:,.{digits}f}"
