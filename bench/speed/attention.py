"""Cost of NTK-Attention compared with plain attention, forward and forward + backward.

Compares every implementation at hand: each backend of PyTorch, FlexAttention, flash-attn, flash-linear-attention, and
the naive formula, compiled or not. All get the same inputs, and every result and gradient is checked against the
float64 reference before anything is timed. Implementations that keep L×L scores in memory leave cold caches to the
others; they are timed apart, beside plain attention once more, and ratios are within such a group. An implementation
that is not installed or cannot serve the call is listed with the reason.
"""

import argparse

import torch
from rich.table import Table
from torch.utils.checkpoint import checkpoint

from ntk_kernels import FEATURE_MAPS, PrefixState, feature_dim, reference

from ..lib import accuracy, record, timing
from ..lib.progress import Steps
from . import ceilings
from .peers import EXACT, NO_PREFIX, PLAIN, STATE, Peer, Setting, all_peers, prefix_of

PASSES = ("forward", "forward + backward")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    record.add_arguments(parser)
    parser.add_argument(
        "--dtype", choices=record.DTYPES, default="float32", help="dtype of query, key and value (default: %(default)s)"
    )
    parser.add_argument("--batch", type=record.positive(int), default=1, help="batch size (default: %(default)s)")
    parser.add_argument("--heads", type=record.positive(int), default=8, help="number of heads (default: %(default)s)")
    parser.add_argument("--length", type=record.positive(int), default=1024, help="tokens (default: %(default)s)")
    parser.add_argument(
        "--head-dim", type=record.positive(int), default=64, help="head dimension (default: %(default)s)"
    )
    parser.add_argument(
        "--feature-map", choices=FEATURE_MAPS, default="elu", help="feature map of the state (default: %(default)s)"
    )
    parser.add_argument(
        "--prefix-rows",
        type=record.positive(int),
        metavar="M",
        help="also time exact attention over a prefix of M rows, which includes copying it in front of the keys",
    )
    parser.add_argument("--full", action="store_true", help="let every token see every other, instead of causal")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="TEXT",
        help=f"time only {PLAIN!r} and implementations with one of these texts in their names (default: all)",
    )
    parser.add_argument("--name", default="attention", help="name of the files (default: %(default)s)")
    parser.add_argument(
        "--seconds",
        type=record.positive(float),
        default=10,
        help="seconds of timing for each pass and group (default: %(default)s)",
    )


def stem_of(arguments: argparse.Namespace) -> str:
    return arguments.name


def measure(arguments: argparse.Namespace, progress: Steps) -> dict:
    """Returns settings, times by pass and peer, which peers were left out and why, and the rate of a matrix product."""
    torch.manual_seed(0)
    device, dtype, causal = arguments.device, record.DTYPES[arguments.dtype], not arguments.full
    shape = (arguments.batch, arguments.heads, arguments.length, arguments.head_dim)
    query, key, value, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
    r = feature_dim(arguments.feature_map, arguments.head_dim)
    z, k = torch.randn(shape[1], r, shape[3], device=device), torch.rand(shape[1], r, device=device)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value, z, k)]

    setting = Setting(device, arguments.length, arguments.heads, arguments.head_dim, causal, arguments.prefix_rows)
    peers = all_peers(setting)
    for text in arguments.only or ():
        if not any(text in peer.name for peer in peers):
            raise SystemExit(f"--only must be part of the name of a peer here, got {text!r}: {[p.name for p in peers]}")
    chosen = [
        peer
        for peer in peers
        if not arguments.only or peer.name == PLAIN or any(text in peer.name for text in arguments.only)
    ]
    task = progress.add_task("checking", total=3)
    left_out = _check(chosen, setting, leaves, arguments.feature_map, grad)
    progress.advance(task)
    figures = {}
    for name in PASSES:
        progress.update(task, description=f"timing {name}")
        present = [peer for peer in chosen if name not in left_out.get(peer.name, ())]
        backward = grad if name == PASSES[1] else None
        calls = {peer.name: _pass(peer.function, leaves, arguments.feature_map, backward) for peer in present}
        figures[name] = _time(present, calls, device, arguments.seconds)
        for peer in present:
            work = flops(shape, causal, r, peer, arguments.prefix_rows) * (3.5 if backward is not None else 1)
            figures[name][peer.name]["tflop_per_s"] = work / figures[name][peer.name]["ms"] / 1e9
        progress.advance(task)
    names = ("dtype", "batch", "heads", "length", "head_dim", "feature_map", "prefix_rows")
    return {
        "settings": {name: getattr(arguments, name) for name in names} | {"causal": causal},
        "milliseconds": figures,
        "left_out": left_out,
        "matmul_tflop_per_s": ceilings.matmul_rate(device, dtype),
    }


def rows_of(figures: dict) -> list[dict]:
    return [
        figures["settings"] | {"pass": passes, "name": name} | result
        for passes, times in figures["milliseconds"].items()
        for name, result in times.items()
    ]


def _time(present: list[Peer], calls: dict, device: str, seconds: float) -> dict[str, dict]:
    """Returns the times of one pass by name, with the ratio to `PLAIN` in the same turns and the peak allocation."""
    found = {}
    large = [peer.name for peer in present if peer.large]
    for group in ([peer.name for peer in present if not peer.large], [PLAIN, *large] if large else []):
        if not group:
            continue
        times = timing.measure({name: calls[name] for name in group}, device, seconds=seconds)
        for name in group:
            times[name]["ratio"] = times[name]["ms"] / times[PLAIN]["ms"]
            times[name]["peak_bytes"] = timing.peak_bytes(calls[name], device)
            if torch.device(device).type == "cuda" and name not in large:
                times[name]["host_us"] = timing.host_time(calls[name], device)
        found = times | found
    return {peer.name: found[peer.name] for peer in present}


def flops(shape: tuple, causal: bool, r: int, peer: Peer, prefix_rows: int | None) -> int:
    """Counts the operations of a forward's matrix products over what is visible; a backward takes 2.5 times as many."""
    batch, heads, length, dim = shape
    keys = length * (length + 1) // 2 if causal else length**2
    if peer.prefix == EXACT:
        keys += length * prefix_rows
    features = r if peer.prefix == STATE else 0
    return batch * heads * (4 * keys * dim + 2 * length * features * (dim + 1))


def tables_of(figures: dict) -> list[Table]:
    """Returns a table of median times, their ratio to SDPA's, arithmetic as a share of a matrix product's, memory."""
    settings, passes, rate = figures["settings"], figures["milliseconds"], figures["matmul_tflop_per_s"]
    table = Table(
        title=f"B={settings['batch']}, H={settings['heads']}, L={settings['length']}, D={settings['head_dim']}, "
        f"{settings['dtype']}, {settings['feature_map']}, {'causal' if settings['causal'] else 'full'}"
    )
    table.add_column("times SDPA, share of a matrix product, memory allocated")
    for name in passes:
        table.add_column(name, justify="right", no_wrap=True)
    for label in dict.fromkeys(label for times in passes.values() for label in times):
        table.add_row(label, *(cell_of(times.get(label), rate) for times in passes.values()))
    table.add_section()
    table.add_row("a matrix product", f"{rate:,.3g} TFLOP/s", "")
    return [table]


def notes_of(figures: dict) -> list[str]:
    """Says which implementations were left out, and why."""
    by_reason = {}
    for name, reasons in figures.get("left_out", {}).items():  # records from before 2026-11-26 have none
        for reason in dict.fromkeys(reasons.values()):
            passes = [which for which in reasons if reasons[which] == reason]
            of_name = f"{name} ({', '.join(passes)})" if len(passes) < len(PASSES) else name
            by_reason.setdefault(reason, []).append(of_name)
    return [f"left out: {'; '.join(names)}: {reason}" for reason, names in by_reason.items()]


def cell_of(result: dict | None, matmul_rate: float) -> str:
    if result is None:
        return "—"
    digits = 2 if result["ms"] >= 1 else 3
    text = f"{result['ms']:.{digits}f} ms, {result['ratio']:.2f}×, {100 * result['tflop_per_s'] / matmul_rate:.0f}%"
    if "peak_bytes" in result:  # not in records from before 2026-11-26
        text += f", {result['peak_bytes'] / 2**20:,.0f} MiB"
    return text


def _pass(function, leaves, feature_map, grad):
    """Returns a call of one forward or, with `grad`, of forward and backward to all inputs that the function uses."""
    if grad is None:
        leaves = [leaf.detach() for leaf in leaves]
    *qkv, z, k = leaves
    state = PrefixState(z, k, feature_map)
    if grad is None:
        return lambda: function(*qkv, state)
    grads = torch.autograd.grad(function(*qkv, state), leaves, grad, allow_unused=True)
    used = [leaf for leaf, g in zip(leaves, grads, strict=True) if g is not None]
    return lambda: torch.autograd.grad(function(*qkv, state), used, grad)


def _check(chosen: list[Peer], setting: Setting, leaves, feature_map, grad) -> dict[str, dict[str, str]]:
    """Compares results and gradients of the first row of the batch with the reference in float64.

    Returns {name of a peer: {pass that it is left out of: reason}}. Ours are never left out; if one fails or is wrong,
    this raises.
    """
    *qkv, z, k = (leaf.detach() for leaf in leaves)
    inputs, grad = [*(tensor[:1] for tensor in qkv), z, k], grad[:1]
    left_out = {}
    for prefix in (NO_PREFIX, STATE, EXACT):
        group = [peer for peer in chosen if peer.prefix == prefix]
        if not group:
            continue

        def exact(q, k, v, state, prefix=prefix):
            if prefix == EXACT:
                return _over_rows(q, k, v, prefix_of(setting).to(q), setting.causal)
            return reference.ntk_attention(q, k, v, state if prefix == STATE else None, is_causal=setting.causal)

        doubles = [tensor.double() for tensor in inputs]
        expected = _results(exact, doubles, feature_map, grad.double(), PASSES[1])
        plain = _errors(_results(exact, inputs, feature_map, grad, PASSES[1]), expected)
        for peer in group:
            for name in PASSES:
                try:
                    errors = _errors(_results(peer.function, inputs, feature_map, grad, name), expected)
                except Exception as error:  # a library or its compiler may raise anything
                    if peer.ours:
                        raise
                    problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
                    left_out.setdefault(peer.name, {})[name] = problem
                    continue
                for what, found in errors.items():
                    if accuracy.is_wrong(found, accuracy.limit_of(qkv[0].dtype, plain[what])):
                        problem = f"wrong: relative error {found:.2g} of {what} against float64"
                        if peer.ours:
                            raise RuntimeError(f"{peer.name} is {problem}")
                        left_out.setdefault(peer.name, {})[name] = problem
    return left_out


def _over_rows(query, key, value, prefix, causal: bool) -> torch.Tensor:
    """Attends over an exact prefix [2, 1, H, m, D] with the reference, by head: scores of all would not fit a GPU."""

    def one_head(q, k, v, rows):
        return reference.prefix_attention(q, k, v, *rows[:, 0], is_causal=causal)

    parts = (tensor.split(1, dim=-3) for tensor in (query, key, value, prefix))
    heads = [checkpoint(one_head, *head, use_reentrant=False) for head in zip(*parts, strict=True)]
    return torch.cat(heads, dim=1)


def _results(function, inputs, feature_map, grad, passes) -> dict[str, torch.Tensor]:
    """Returns the output and, for forward + backward, the gradients of all inputs that it depends on, by name."""
    backward = passes == PASSES[1]
    leaves = [tensor.detach().requires_grad_(backward) for tensor in inputs]
    *qkv, z, k = leaves
    out = function(*qkv, PrefixState(z, k, feature_map))
    found = {"out": out.detach()}
    if backward:
        gradients = torch.autograd.grad(out, leaves, grad, allow_unused=True)
        names = ("query", "key", "value", "z", "k")
        found |= {f"the gradient of {name}": g for name, g in zip(names, gradients, strict=True) if g is not None}
    return found


def _errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    return {what: accuracy.relative_error(result, expected[what]) for what, result in found.items()}
