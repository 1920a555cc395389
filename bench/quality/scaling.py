"""Movement of prefixes of 2 to 16,384 rows, and of states in their place, in training on one small task.

This illustrates the claim of the paper (arXiv 2406.14036, section 3) that longer prefixes move less. n inputs x of unit
norm attend only to a prefix of m rows. Each row w_r is a key and, up to a fixed sign a_r, a value:

    F(x) = √m · Σ_r softmax(W·x)_r · a_r · w_r

The rows are normal and come in pairs (w, +1), (w, -1), so that F = 0 initially for every m. Targets are normal. Only W
is trained, by gradient descent on ½ Σ ‖F(x) - y‖² over all inputs at once, in float64 (float32 cannot represent how
little a step moves a row of a long prefix). All m share one step size, 1 / (2 λ), where λ is the largest eigenvalue of
the initial tangent kernel K = J·Jᵀ of the longest prefix (J is the derivative of the n·d outputs by W). Steps below
2 / λ are stable; the kernels of some short prefixes have a λ that is a few times larger.

If, as the theory says for large m, training is that of a linear model, then prefix and kernel hardly change. This
measures ‖W_T - W_0‖ / ‖W_0‖, the largest movement of a row divided by the root mean square of the rows' norms, and
‖K_T - K_0‖ / ‖K_0‖. In the limit they fall like 1/√m, a slope of -1/2 between logarithms, the second one more slowly: a
row moves in proportion to its softmax weight, and the largest of m weights grows with m. The measured slopes tell how
far these lengths are from the limit.

In place of the prefix, states of fixed size are trained: F(x) = √m · N(x) / M(x) with the m of the longest prefix, from
Z = 0 and a mass of about 1, by as many steps of size 1 / (2 λ) with the λ of their own kernel.

Takes one to two minutes on two cores.
"""

import argparse
import math
import statistics

import torch
from rich.table import Table

from ntk_kernels import PrefixState, feature_dim, prefix_attention_state

from ..lib import plots, record
from ..lib.progress import Steps

DIM = 8  # dimension of inputs, rows and outputs
STATES = ("elu", "taylor2")
GOALS = (0.1, 0.01)  # shares of the initial loss
CHANGES = {"movement": "movement of the prefix", "row_movement": "largest movement of a row",
           "kernel_change": "change of the kernel"}  # fmt: skip
_KERNEL_ROWS = 4096  # rows of a prefix whose derivatives are in memory at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    record.add_arguments(parser)
    parser.add_argument(
        "--max-rows", type=record.power_of_two(8), default=2**14, metavar="M",
        help="rows of the longest prefix, a power of two from 8 (default: %(default)s)",
    )  # fmt: skip
    for name, default, text in (
        ("inputs", 16, "number n of inputs and targets"), ("steps", 2000, "steps of gradient descent"),
        ("draws", 5, "random draws of each prefix; figures are their medians"),
    ):  # fmt: skip
        parser.add_argument(
            f"--{name}", type=record.positive(int), default=default, help=f"{text} (default: %(default)s)"
        )


def measure(arguments: argparse.Namespace, progress: Steps) -> dict:
    """Trains prefixes of all lengths and the states; returns their losses and how far they moved."""
    device, steps = arguments.device, arguments.steps
    lengths = [2**i for i in range(1, arguments.max_rows.bit_length())]
    inputs, targets = task(arguments.inputs, device)
    prefixes = {m: draw_prefixes(m, arguments.draws, device) for m in lengths}
    longest, signs = prefixes[lengths[-1]]
    step_size = step_size_of(tangent_kernel(longest[0], signs, inputs))
    descending = progress.add_task("gradient descent", total=steps * (len(lengths) + len(STATES)))

    def on_step():
        progress.advance(descending)

    measured = {
        m: of_prefix(rows, signs, inputs, targets, step_size, steps, on_step) for m, (rows, signs) in prefixes.items()
    }
    states = {name: of_state(name, math.sqrt(lengths[-1]), inputs, targets, steps, on_step) for name in STATES}
    figures = {
        "settings": {"inputs": arguments.inputs, "dim": DIM, "steps": steps, "draws": arguments.draws,
                     "step_size": step_size},
        "prefix_rows": lengths,
        **{name: [measured[m][name] for m in lengths] for name in measured[lengths[0]]},
        "curve_steps": curve_steps(steps),
        "states": states,
    }  # fmt: skip
    figures["slopes"] = {name: slope(lengths, medians(figures[name])) for name in CHANGES}
    return figures


def rows_of(figures: dict) -> list[dict]:
    rows = []
    for i, m in enumerate(figures["prefix_rows"]):
        for draw in range(figures["settings"]["draws"]):
            of_draw = {name: figures[name][i][draw] for name in ("final_loss", *CHANGES)}
            steps_to = {f"steps_to_{goal}": figures["steps_to"][i][draw][j] for j, goal in enumerate(GOALS)}
            rows.append({"name": "prefix", "prefix_rows": m, "draw": draw} | of_draw | steps_to)
    for name, state in figures["states"].items():
        steps_to = {f"steps_to_{goal}": state["steps_to"][j] for j, goal in enumerate(GOALS)}
        rows.append({"name": name, "step_size": state["step_size"], "final_loss": state["final_loss"]} | steps_to)
    return [figures["settings"] | row for row in rows]


def task(num_inputs: int, device: str):
    """Returns inputs of unit norm and targets, both [n, d]."""
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(2, num_inputs, DIM, generator=generator, dtype=torch.float64).to(device)
    return torch.nn.functional.normalize(inputs, dim=1), targets


def draw_prefixes(m: int, draws: int, device: str):
    """Returns rows [draws, m, d] in pairs of equal rows, and their signs [m]."""
    generator = torch.Generator().manual_seed(m)
    rows = torch.randn(draws, m // 2, DIM, generator=generator, dtype=torch.float64).to(device)
    return rows.repeat_interleave(2, dim=1), torch.tensor([1.0, -1.0], dtype=rows.dtype, device=device).repeat(m // 2)


def prefix_function(rows, signs, inputs):
    """Computes F: rows [..., m, d], signs [m], inputs [n, d] -> [..., n, d]."""
    weights = torch.softmax(inputs @ rows.mT, dim=-1)
    return math.sqrt(rows.shape[-2]) * (weights * signs) @ rows


def tangent_kernel(rows, signs, inputs):
    """Returns K = J·Jᵀ [n·d, n·d] of one prefix [m, d], where J is the derivative of F by the rows.

    With p = softmax(W·x) and o = Σ p_r a_r w_r, ∂F/∂w_r = √m p_r (a_r I + (a_r w_r - o) xᵀ).
    """
    n, d = inputs.shape
    weights = torch.softmax(inputs @ rows.mT, dim=-1)
    mean = (weights * signs) @ rows
    identity = torch.eye(d, dtype=rows.dtype, device=rows.device)
    kernel = rows.new_zeros(n * d, n * d)
    for part in torch.arange(rows.shape[0], device=rows.device).split(_KERNEL_ROWS):
        sign, row = signs[part], rows[part]
        outer = torch.einsum("nra,nb->nrab", sign[:, None] * row - mean[:, None], inputs)
        jacobian = weights[:, part, None, None] * (sign[:, None, None] * identity + outer)
        jacobian = jacobian.transpose(1, 2).reshape(n * d, -1)
        kernel += jacobian @ jacobian.mT
    return rows.shape[0] * kernel


def step_size_of(kernel) -> float:
    """Returns half the step that brings the fastest direction of a linear model to its target at once."""
    return 0.5 / torch.linalg.eigvalsh(kernel)[-1].item()


def descend(function, parameters, targets, step_size: float, steps: int, on_step=lambda: None):
    """Minimises ½ Σ ‖function(*parameters) - targets‖² by gradient descent, in place.

    Returns the losses before each step and after the last, [steps + 1, ...], for each entry of the leading dimensions.
    """
    losses = []
    for step in range(steps + 1):
        loss = 0.5 * (function(*parameters) - targets).square().sum(dim=(-2, -1))
        losses.append(loss.detach())
        if step == steps:
            break
        gradients = torch.autograd.grad(loss.sum(), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= step_size * gradient
        on_step()
    return torch.stack(losses)


def of_prefix(rows, signs, inputs, targets, step_size: float, steps: int, on_step=lambda: None) -> dict:
    """Trains prefixes [draws, m, d]; returns figures with one number per draw, losses as shares of the initial one."""
    trained = rows.clone().requires_grad_()

    def function(rows):
        return prefix_function(rows, signs, inputs)

    losses = descend(function, (trained,), targets, step_size, steps, on_step)
    moved = (trained.detach() - rows).norm(dim=-1)  # [draws, m]
    length = rows.norm(dim=(-2, -1))
    kernels = [
        [tangent_kernel(one, signs, inputs) for one in (before, after)]
        for before, after in zip(rows, trained.detach(), strict=True)
    ]
    shares = (losses / losses[0]).mT.tolist()
    return {
        "final_loss": [_finite(share[-1]) for share in shares],
        "steps_to": [steps_to(share) for share in shares],
        "movement": _finite((moved.norm(dim=-1) / length).tolist()),
        "row_movement": _finite((moved.amax(-1) * math.sqrt(rows.shape[1]) / length).tolist()),
        "kernel_change": [_finite(((after - before).norm() / before.norm()).item()) for before, after in kernels],
        "curve": [_median([share[step] for share in shares]) for step in curve_steps(steps)],
    }


def of_state(feature_map: str, factor: float, inputs, targets, steps: int, on_step=lambda: None) -> dict:
    """Trains a state in place of a prefix, F = factor · N / M; returns its figures."""
    r = feature_dim(feature_map, DIM)
    z, k = inputs.new_zeros(1, r, DIM), inputs.new_zeros(1, r)
    if feature_map == "elu":
        k += 1 / r
    else:
        k[:, 0] = 1  # the feature that is 1 everywhere
    query = inputs[None, None]

    def function(z, k):
        return factor * prefix_attention_state(query, PrefixState(z, k, feature_map), scale=1.0)[0][0, 0]

    jacobian = torch.cat([j.flatten(2).flatten(0, 1) for j in torch.autograd.functional.jacobian(function, (z, k))], 1)
    step_size = step_size_of(jacobian @ jacobian.mT)
    parameters = z.requires_grad_(), k.requires_grad_()
    losses = descend(function, parameters, targets, step_size, steps, on_step)
    share = (losses / losses[0]).tolist()
    log_mass = prefix_attention_state(query, PrefixState(z.detach(), k.detach(), feature_map), scale=1.0)[1]
    return {
        "parameters": z.numel() + k.numel(),
        "step_size": step_size,
        "final_loss": _finite(share[-1]),
        "steps_to": steps_to(share),
        "curve": [_finite(share[step]) for step in curve_steps(steps)],
        "smallest_mass": _finite(log_mass.min().exp().item()),
    }


def curve_steps(steps: int) -> list[int]:
    """Returns the steps at which a curve is recorded: 0, and about 20 per factor of 10."""
    return sorted({0, *(min(steps, int(10 ** (i / 20))) for i in range(20 * len(str(steps)) + 1))})


def steps_to(share: list[float]) -> list[int | None]:
    """Returns the first step at which the loss reaches each of GOALS, None if it never does."""
    return [next((step for step, loss in enumerate(share) if loss <= goal), None) for goal in GOALS]


def _finite(x):
    """Replaces infinities and NaN, which JSON does not have, with None."""
    if isinstance(x, list):
        return [_finite(one) for one in x]
    return x if math.isfinite(x) else None


def _median(values: list[float | None]) -> float | None:
    """Returns the median over draws; None (diverged, or a goal never reached) counts as infinite."""
    return _finite(statistics.median_high(math.inf if x is None or math.isnan(x) else x for x in values))


def medians(per_draw: list[list[float | None]]) -> list[float | None]:
    return [_median(draws) for draws in per_draw]


def upper_half(lengths: list[int]) -> list[int]:
    return lengths[len(lengths) // 2 :]


def slope(lengths: list[int], values: list[float | None]) -> float | None:
    """Returns the fitted slope between logarithms over the upper half of the lengths; None if a value is missing."""
    values = values[len(lengths) // 2 :]
    if not all(values):  # None, or 0, which has no logarithm
        return None
    return statistics.linear_regression([math.log(m) for m in upper_half(lengths)], [math.log(x) for x in values]).slope


def tables_of(figures: dict) -> list[Table]:
    settings, lengths = figures["settings"], figures["prefix_rows"]
    result = Table(
        title=f"Prefixes of m rows after {settings['steps']:,} steps on {settings['inputs']} inputs in "
        f"{settings['dim']} dimensions, medians of {settings['draws']} draws. Loss as a share of the initial one. "
        "Below: slopes between logarithms over the upper half of m (1/√m has -0.50), and states, trained likewise"
    )
    result.add_column("rows", no_wrap=True, justify="right")
    headers = ("parameters", "loss", *(f"steps to {goal:.0%}" for goal in GOALS), *CHANGES.values())
    for header in headers:
        result.add_column(header, justify="right")
    losses, changes = medians(figures["final_loss"]), [medians(figures[name]) for name in CHANGES]
    for i, m in enumerate(lengths):
        steps = [_median([draw[j] for draw in figures["steps_to"][i]]) for j in range(len(GOALS))]
        cells = (_cell(losses[i], ".1e"), *(_cell(s, ",") for s in steps), *(_cell(x[i], ".3f") for x in changes))
        result.add_row(f"{m:,}", f"{m * settings['dim']:,}", *cells)
    result.add_section()
    slopes = (_cell(figures["slopes"][name], ".2f") for name in CHANGES)
    result.add_row(f"slope, m ≥ {upper_half(lengths)[0]:,}", "", "", *("" for _ in GOALS), *slopes)
    result.add_section()
    for name, state in figures["states"].items():
        cells = (_cell(state["final_loss"], ".1e"), *(_cell(s, ",") for s in state["steps_to"]))
        result.add_row(f"{name} state", f"{state['parameters']:,}", *cells, *("" for _ in CHANGES))
    return [result]


def _cell(x: float | None, form: str) -> str:
    return "-" if x is None else f"{x:{form}}"


def plot(path, figures: dict) -> None:
    settings, lengths = figures["settings"], figures["prefix_rows"]
    figure, (left, middle, right) = plots.canvas(3, width=5.6)
    state_colors = dict(zip(STATES, ("C1", "C3"), strict=True))
    left.plot(lengths, _gaps(medians(figures["final_loss"])), color="C0", marker="o", label="prefix, final loss")
    for name, state in figures["states"].items():
        if state["final_loss"]:
            left.axhline(state["final_loss"], color=state_colors[name],
                         label=f"{name} state, final loss ({state['parameters']:,} parameters)")  # fmt: skip
    counts = left.twinx()
    for j, (goal, style) in enumerate(zip(GOALS, ("--", ":"), strict=True)):
        steps = [_median([draw[j] for draw in draws]) for draws in figures["steps_to"]]
        counts.plot(lengths, _gaps(steps), color="C2", ls=style, marker=".")
        left.plot([], [], color="C2", ls=style, marker=".", label=f"prefix, steps to {goal:.0%} (right)")
    left.set(xscale="log", yscale="log", ylabel="loss / initial loss",
             title=f"Loss after {settings['steps']:,} steps; steps to a loss")  # fmt: skip
    counts.set(yscale="log", ylabel="steps", ylim=(10, max(100, settings["steps"])))
    left.legend(fontsize=8, loc=(0.02, 0.08))  # below the curves

    for i, (name, label) in enumerate(CHANGES.items()):
        fitted = figures["slopes"][name]
        label += "" if fitted is None else f": slope {fitted:.2f}"
        middle.plot(lengths, _gaps(medians(figures[name])), color=f"C{i}", marker="o", label=label)
        ends = [[x for x in draws if x is not None] or [math.nan] for draws in figures[name]]
        middle.fill_between(lengths, [min(x) for x in ends], [max(x) for x in ends], color=f"C{i}", alpha=0.15)
    far = upper_half(lengths)
    last = medians(figures["movement"])[-1]
    if last:
        middle.plot(far, [0.7 * last * math.sqrt(far[-1] / m) for m in far], color="black", ls=":", label="1/√m")
    middle.set(xscale="log", yscale="log", ylabel="relative change", title="How far training moves the prefix")

    shown = lengths[1::2] if len(lengths) > 4 else lengths
    for i, m in enumerate(shown):
        curve = figures["curve"][lengths.index(m)]
        right.plot(_from_one(figures["curve_steps"]), _gaps(curve), color="C0", alpha=(i + 2) / (len(shown) + 1),
                   label=f"m = {plots.short(m)}")  # fmt: skip
    for name, state in figures["states"].items():
        right.plot(_from_one(figures["curve_steps"]), _gaps(state["curve"]), color=state_colors[name], ls="--",
                   label=f"{name} state")  # fmt: skip
    right.set(xscale="log", yscale="log", xlabel="step + 1", ylabel="loss / initial loss", title="Loss while training")
    for axes in (left, middle):
        axes.set_xlabel("rows of the prefix, m")
        plots.mark(axes.xaxis, lengths[1::2] if len(lengths) > 8 else lengths)
    plots.save(figure, path)


def _gaps(values: list[float | None]) -> list[float]:
    return [math.nan if x is None else x for x in values]


def _from_one(steps: list[int]) -> list[int]:
    """Adds 1 to each step, as a logarithmic axis has no 0."""
    return [step + 1 for step in steps]
