"""Error of converted and trained states against exact attention over random prefixes of 2 to 262,144 rows.

This is the approximation experiment of the paper (arXiv 2406.14036, section 4.4): attention with one head of dimension
64. The rows of prefix and inputs are normal, and so are the matrices that project them to queries, keys and values. A
variance of 1, "as published", gives logits of a standard deviation of 64 and attention to little more than one row; a
variance of 1/64 gives "logits of order one". Inputs have 128 rows. Prefixes are nested: each is the beginning of one
long stream, and a single pass over it, merged by lse, gives exact attention over each of them.

Errors are measured on inputs that no state was trained on. Compared are: leaving the prefix out; states converted in
closed form (`elu` around 0, `taylor1` and `taylor2` around the mean key); and trained states. States of all lengths are
trained at once, as a stack, by Adam with the authors' learning rate (1e-3) on the mean squared error: `elu` from the
authors' initialisation (Z normal, k the absolute value of a normal vector, no scale); `elu` with log_scale = log m,
initialised likewise but divided by 64, so that a row of the prefix weighs about 1; and `taylor1` from its conversion.

Keys and values are linear in the normal rows of the prefix. So for large m attention over the prefix is linear in the
query, as `taylor1` around the mean is. Real keys are harder (see `bench demo`).

Differences from the authors' script: There, the input contains the prefix, so that NTK-Attention sees all of its rows
exactly, beside the state; here, it sees only the input. Only the input has queries. The script does not run as
published (its loss is not a scalar, and it uses the comparison of a matrix with a number as a condition). The second
data set, the conversions, log_scale and the held-out inputs are ours. Training uses 64 inputs, 4 per step; the authors'
40,000 inputs correspond to --steps 10000.

Takes one to three minutes on two cores.
"""

import argparse
import math
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from ntk_kernels import (
    PrefixState,
    feature_dim,
    merge_attention,
    ntk_attention,
    prefix_attention_state,
    prefix_to_state,
)

from ..lib import plots, record
from ..lib.progress import Steps

HEAD_DIM, INPUT_ROWS = 64, 128
HELD_OUT = 16  # inputs on which errors are measured
BATCH, RATE = 4, 1e-3  # inputs a step, and rate, of Adam
DATA = {"as published": 1.0, "logits of order one": HEAD_DIM**-0.5}  # name: standard deviation of the matrices
NO_PREFIX = "no prefix"
# name: feature map and centers
CONVERTED = {
    "elu, converted": ("elu", None),
    "taylor1, converted": ("taylor1", "mean"),
    "taylor2, converted": ("taylor2", "mean"),
}
ELU, ELU_SCALED, TAYLOR1 = "elu, trained", "elu, trained, log_scale", "taylor1, trained"
TRAINED = (ELU, ELU_SCALED, TAYLOR1)
CURVES = (NO_PREFIX, *CONVERTED, *TRAINED)
_BLOCK_ROWS = 8192  # of the prefix at a time
_STILL = 1e-6  # a smaller relative movement counts as none
_SAME = 0.01  # curves that differ by less, relatively, count as the same


def add_arguments(parser: argparse.ArgumentParser) -> None:
    record.add_arguments(parser)
    parser.add_argument(
        "--max-rows", type=record.power_of_two(2), default=2**18, metavar="M",
        help="rows of the longest prefix, a power of two from 2 (default: %(default)s)",
    )  # fmt: skip
    for name, default, text in (("steps", 1000, "training steps"), ("inputs", 64, "inputs to train on")):
        parser.add_argument(
            f"--{name}", type=record.positive(int), default=default, help=f"{text} (default: %(default)s)"
        )


def measure(arguments: argparse.Namespace, progress: Steps) -> dict:
    """Returns the errors of every curve by length, for both data sets."""
    lengths = [2**i for i in range(1, arguments.max_rows.bit_length())]
    data = {}
    for name, std in DATA.items():
        work = arguments.steps * len(TRAINED)
        task = progress.add_task(name, total=work + len(lengths) * (1 + len(CONVERTED)))
        sample = draw(std, arguments.inputs + HELD_OUT, arguments.max_rows, arguments.device)
        data[name] = compare(sample, lengths, arguments.steps, lambda task=task: progress.advance(task))
    return {
        "settings": {"head_dim": HEAD_DIM, "input_rows": INPUT_ROWS, "inputs": arguments.inputs, "held_out": HELD_OUT,
                     "steps": arguments.steps, "batch": min(BATCH, arguments.inputs), "rate": RATE},
        "prefix_rows": lengths,
        "state_rows": {name: 0 if name == NO_PREFIX else feature_dim(name.split(",")[0], HEAD_DIM) for name in CURVES},
        "data": data,
    }  # fmt: skip


def rows_of(figures: dict) -> list[dict]:
    measures = ("relative_error", "mean_squared_error", "without_mass", "movement")
    return [
        figures["settings"]
        | {"data": data, "state": name, "prefix_rows": m}
        | {measure: of_data[measure][name][i] for measure in measures if name in of_data[measure]}
        for data, of_data in figures["data"].items()
        for name in CURVES
        for i, m in enumerate(figures["prefix_rows"])
    ]


class Sample(NamedTuple):
    """Queries, keys and values of n inputs [n, 1, L, D]; keys and values of the longest prefix [1, m, D]."""

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor
    prefix_value: Tensor


def draw(std: float, num_inputs: int, max_rows: int, device: str) -> Sample:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, HEAD_DIM, generator=generator).to(device)

    to_query, to_key, to_value = std * randn(3, HEAD_DIM)
    inputs, prefix = randn(num_inputs, 1, INPUT_ROWS), randn(1, max_rows)
    return Sample(inputs @ to_query, inputs @ to_key, inputs @ to_value, prefix @ to_key, prefix @ to_value)


def exact(sample: Sample, lengths: list[int], on_length=lambda: None) -> tuple[Tensor, dict]:
    """Attends to the first m rows of the prefix and to the input, for ascending lengths m.

    Returns the outputs [len(lengths), n, 1, L, D] and means over all queries: the logarithm of the mass of the input's
    own keys, and for each length the prefix's share of the attention.
    """
    out_input, lse_input = ntk_attention(sample.query, sample.key, sample.value, return_lse=True)
    query = sample.query.flatten(0, 2)[None, None]  # queries of all inputs see the same prefix
    out = lse = None
    start, outs, shares = 0, [], []
    for m in lengths:
        for block in torch.arange(start, m).split(_BLOCK_ROWS):
            rows = slice(int(block[0]), int(block[-1]) + 1)
            part = ntk_attention(
                query, sample.prefix_key[None, :, rows], sample.prefix_value[None, :, rows], return_lse=True
            )
            out, lse = part if out is None else merge_attention(out, lse, *part)
        start = m
        lse_prefix = lse.reshape(lse_input.shape)
        merged, _ = merge_attention(out.reshape(out_input.shape), lse_prefix, out_input, lse_input)
        outs.append(merged)
        shares.append((lse_prefix - lse_input).sigmoid().mean().item())
        on_length()
    return torch.stack(outs), {"log_mass_of_input": lse_input.mean().item(), "prefix_share": shares}


def convert(sample: Sample, lengths: list[int], feature_map: str, centers, on_length=lambda: None) -> PrefixState:
    """Converts the prefix of each length; returns a stack of states."""
    states = []
    for m in lengths:
        states.append(
            prefix_to_state(sample.prefix_key[:, :m], sample.prefix_value[:, :m], feature_map, centers=centers)
        )
        on_length()
    return PrefixState.stack(states)


def start_of_elu(lengths: list[int], device: str, *, scaled: bool) -> PrefixState:
    """Returns a stack of equal states in the authors' initialisation or, `scaled`, with a mass that grows with m."""
    generator = torch.Generator().manual_seed(1)
    z, k = torch.randn(HEAD_DIM, HEAD_DIM, generator=generator), torch.randn(HEAD_DIM, generator=generator).abs()
    log_scale = None
    if scaled:
        z, k = z / HEAD_DIM, k / HEAD_DIM
        log_scale = torch.tensor(lengths, device=device).float().log()[:, None]
    z, k = (tensor.to(device).expand(len(lengths), 1, *tensor.shape).clone() for tensor in (z, k))
    return PrefixState(z, k, "elu", log_scale=log_scale)


def attend(sample: Sample, states: PrefixState, picked) -> Tensor:
    """Attends with each state of the stack in place of the prefix; returns [N, n, 1, L, D] of the picked inputs."""
    query, key, value = (tensor[picked] for tensor in sample[:3])
    index = torch.arange(states.num_states, dtype=torch.int32, device=query.device).repeat_interleave(len(query))
    query, key, value = (tensor.repeat(states.num_states, 1, 1, 1) for tensor in (query, key, value))
    return ntk_attention(query, key, value, states, state_index=index).unflatten(0, (states.num_states, -1))


def train(start: PrefixState, sample: Sample, targets: Tensor, steps: int, on_step=lambda: None) -> PrefixState:
    """Trains Z and k of a stack. Adam's steps do not mix the states, so each is trained as it would be alone."""
    inputs = targets.shape[1] - HELD_OUT
    z, k = (tensor.clone().requires_grad_() for tensor in (start.z, start.k))
    optimizer = torch.optim.Adam([z, k], lr=RATE)
    generator = torch.Generator().manual_seed(2)

    def state():
        positive = k.abs() if start.feature_map == "elu" else k  # as in the authors' script
        return PrefixState(z, positive, start.feature_map, feature_scale=start.feature_scale, centers=start.centers,
                           log_scale=start.log_scale)  # fmt: skip

    for _ in range(steps):
        picked = torch.randperm(inputs, generator=generator)[:BATCH].to(targets.device)
        loss = (attend(sample, state(), picked) - targets[:, picked]).square().flatten(1).mean(1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        on_step()
    return PrefixState(**{name: tensor.detach() for name, tensor in state().tensors().items()},
                       feature_map=start.feature_map, feature_scale=start.feature_scale)  # fmt: skip


def compare(sample: Sample, lengths: list[int], steps: int, on_step=lambda: None) -> dict:
    """Returns the figures of a data set, each a list with one number per length."""
    device = sample.query.device
    targets, figures = exact(sample, lengths, on_step)
    held_out = slice(len(sample.query) - HELD_OUT, None)
    states = {name: convert(sample, lengths, *how, on_step) for name, how in CONVERTED.items()}
    starts = {ELU: start_of_elu(lengths, device, scaled=False), ELU_SCALED: start_of_elu(lengths, device, scaled=True),
              TAYLOR1: states["taylor1, converted"]}  # fmt: skip
    for name, start in starts.items():
        states[name] = train(start, sample, targets, steps, on_step)
    outs = {NO_PREFIX: ntk_attention(*(tensor[held_out] for tensor in sample[:3]))[None]}
    outs |= {name: attend(sample, state, held_out) for name, state in states.items()}
    wanted = targets[:, held_out]
    figures["relative_error"], figures["mean_squared_error"] = {}, {}
    for name, out in outs.items():
        difference = (out - wanted).flatten(1)
        figures["relative_error"][name] = _finite(difference.norm(dim=1) / wanted.flatten(1).norm(dim=1))
        figures["mean_squared_error"][name] = _finite(difference.square().mean(1))
    figures["without_mass"] = {name: without_mass(sample.query[held_out], state) for name, state in states.items()}
    figures["movement"] = {name: movement(start, states[name]) for name, start in starts.items()}
    return figures


def without_mass(query: Tensor, states: PrefixState) -> list[float]:
    """Returns, for each state, the share of queries for which its mass is not positive and therefore clamped to 0."""
    shares = []
    for i in range(states.num_states):
        index = torch.full((len(query),), i, dtype=torch.int32, device=query.device)
        _, lse = prefix_attention_state(query, states, state_index=index)
        shares.append((lse == -torch.inf).float().mean().item())
    return shares


def movement(start: PrefixState, trained: PrefixState) -> list[float | None]:
    """Returns how far training moved Z and k of each state, relative to their norm."""
    before, after = (torch.cat([state.z.flatten(1), state.k.flatten(1)], dim=1) for state in (start, trained))
    return _finite((after - before).norm(dim=1) / before.norm(dim=1))


def _finite(values: Tensor) -> list[float | None]:
    """Replaces infinities and NaN, which JSON does not have, with None."""
    return [x if math.isfinite(x) else None for x in values.tolist()]


def tables_of(figures: dict) -> list[Table]:
    return [_table(figures, data) for data in figures["data"]]


def _table(figures: dict, data: str) -> Table:
    settings, of_data = figures["settings"], figures["data"][data]
    result = Table(
        title=f"{data[0].upper()}{data[1:]}: relative error against exact attention by rows of the prefix, on "
        f"{settings['held_out']} held-out inputs of {settings['input_rows']} rows (D={settings['head_dim']}; trained "
        f"for {settings['steps']:,} steps on {settings['inputs']} inputs), and the prefix's share of the attention"
    )
    for header in ("rows", "share", *CURVES):
        result.add_column(header, justify="right", no_wrap=header == "rows")
    for i, m in enumerate(figures["prefix_rows"]):
        errors = (of_data["relative_error"][name][i] for name in CURVES)
        result.add_row(f"{m:,}", f"{of_data['prefix_share'][i]:.2f}", *(_cell(error) for error in errors))
    result.add_section()
    result.add_row("state", "", *(f"{figures['state_rows'][name]:,} rows" for name in CURVES))
    return result


def _cell(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.3f}" if error < 10 else f"{error:.1e}"


def notes_of(figures: dict) -> list[str]:
    """Explains errors: states without mass, states that training does not move, the difference from the script."""
    notes = [f"{data}: {note}" for data in figures["data"] for note in _notes_of_data(figures, data)]
    return [
        *notes,
        "In contrast to the authors' script the states stand in place of the prefix, not beside it; more differences: "
        "python -m bench approximation --help",
    ]


def _notes_of_data(figures: dict, data: str) -> list[str]:
    of_data, lengths = figures["data"][data], figures["prefix_rows"]
    result = []
    for name, shares in of_data["without_mass"].items():
        if max(shares) > 0:
            result.append(
                f"{name}: no positive mass for {_percent(max(shares))} of the queries at "
                f"{lengths[shares.index(max(shares))]:,} rows, where it is cut off at 0"
            )
    for name, moved in of_data["movement"].items():
        if still := sum(x is not None and x < _STILL for x in moved):
            result.append(
                f"{name}: training does not move it at {still} of {len(lengths)} lengths: the input's own keys have a "
                f"mass of e^{of_data['log_mass_of_input']:.0f}, beside which it gets no gradient"
            )
    return result


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else f"{share:.1g}"


def plot(path, figures: dict) -> None:
    settings, lengths = figures["settings"], figures["prefix_rows"]
    figure, panels = plots.canvas(len(figures["data"]), width=7)
    colors = {"no prefix": "black", "elu": "C1", "taylor1": "C0", "taylor2": "C2"}
    for axes, (data, of_data) in zip(panels, figures["data"].items(), strict=True):
        for name in CURVES:
            errors = [math.nan if x is None else x for x in of_data["relative_error"][name]]
            color = "C3" if name == ELU else colors[name.split(",")[0]]
            style = ":" if name == NO_PREFIX else "--" if name in CONVERTED else "-"
            axes.plot(lengths, errors, label=f"{name} ({figures['state_rows'][name]:,} rows)", color=color, ls=style,
                      marker="o" if name in TRAINED else None, ms=4)  # fmt: skip
        if _on_each_other(of_data["relative_error"]):
            axes.text(0.03, 0.95, "all curves lie on each other", transform=axes.transAxes, va="top")
        axes.set(
            xscale="log", yscale="log", xlabel="rows of the prefix, m", ylabel="relative error on held-out inputs",
            title=f"{data[0].upper()}{data[1:]} (D={settings['head_dim']}, {settings['input_rows']} rows of input)",
        )  # fmt: skip
        plots.mark(axes.xaxis, lengths[1::2] if len(lengths) > 8 else lengths)
        plots.plain_log(axes.yaxis)
    plots.save(figure, path)


def _on_each_other(errors: dict) -> bool:
    return all(
        None not in at_m and max(at_m) - min(at_m) <= _SAME * max(at_m) for at_m in zip(*errors.values(), strict=True)
    )
