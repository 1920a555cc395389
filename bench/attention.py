"""Cost of NTK-Attention over plain attention, forward and forward+backward, next to the naive formula.

Every function is checked against the float64 reference before it is timed; all are run in turns, on the same inputs.
"""

import argparse

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ntk_kernels import FEATURE_MAPS, PrefixState, feature_dim, ntk_attention, reference

from . import record, timing

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default=record.default_device(), help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="float32", help="of query, key, value (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--heads", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--length", type=int, default=1024, help="tokens (default: %(default)s)")
    parser.add_argument("--head-dim", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--feature-map", choices=FEATURE_MAPS, default="elu", help="default: %(default)s")
    parser.add_argument("--full", action="store_true", help="every token sees every other (default: causal)")
    parser.add_argument("--seconds", type=float, default=10, help="of timing for each pass (default: %(default)s)")
    parser.add_argument("--out", help="folder for the record (default: bench/results/<device>)")


def run(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    device, dtype, causal = arguments.device, _DTYPES[arguments.dtype], not arguments.full
    shape = (arguments.batch, arguments.heads, arguments.length, arguments.head_dim)
    query, key, value, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
    r = feature_dim(arguments.feature_map, arguments.head_dim)
    z, k = torch.randn(shape[1], r, shape[3], device=device), torch.rand(shape[1], r, device=device)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value, z, k)]

    def ours(backend):
        return lambda q, k_, v, z, k: ntk_attention(
            q, k_, v, PrefixState(z, k, arguments.feature_map), is_causal=causal, backend=backend
        )

    plain_name = "SDPA, no prefix"
    functions = {
        plain_name: lambda q, k_, v, z, k: torch.nn.functional.scaled_dot_product_attention(q, k_, v, is_causal=causal),
        "ours, no prefix": lambda q, k_, v, z, k: ntk_attention(q, k_, v, is_causal=causal),
        "ours, torch backend": ours("torch"),
        "naive formula": lambda *leaves: naive(*leaves, causal=causal, feature_map=arguments.feature_map),
        "reference": ours("reference"),
    }
    console = Console()
    figures = {}
    with Progress(console=console) as progress:
        task = progress.add_task("checking", total=3)
        _check(functions, leaves, causal, arguments.feature_map)
        progress.advance(task)
        for name, backward in (("forward", False), ("forward + backward", True)):
            progress.update(task, description=f"timing {name}")
            figures[name] = timing.measure(
                {label: _pass(function, leaves, grad if backward else None) for label, function in functions.items()},
                device,
                seconds=arguments.seconds,
            )
            progress.advance(task)

    table = Table(title=f"B={shape[0]}, H={shape[1]}, L={shape[2]}, D={shape[3]}, {arguments.dtype}, "
                        f"{arguments.feature_map}, {'causal' if causal else 'full'}, {device}")  # fmt: skip
    table.add_column("median ms, times SDPA", no_wrap=True)
    for name in figures:
        table.add_column(name, justify="right")
    for label in functions:
        cells = []
        for times in figures.values():
            ratio = times[label]["ms"] / times[plain_name]["ms"]
            cells.append(f"{times[label]['ms']:.2f}   {ratio:.2f}×")
        table.add_row(label, *cells)
    console.print(table)
    settings = {name: getattr(arguments, name) for name in ("dtype", "batch", "heads", "length", "head_dim",
                                                            "feature_map")} | {"causal": causal}  # fmt: skip
    path = record.results_folder(device, arguments.out) / "attention.json"
    record.save(path, device, settings=settings, milliseconds=figures)
    console.print(f"figures: {path}")


def naive(query, key, value, z, k, *, causal: bool, feature_map: str):
    """The formula as one would write it down: L×L scores, their exponentials, the features, all in memory."""
    scale = query.shape[3] ** -0.5
    scores = scale * query @ key.mT
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    shift = scores.detach().amax(-1, keepdim=True).clamp(min=0)
    p = (scores - shift).exp()
    phi = reference.feature_map(query.to(z.dtype) * scale**0.5, feature_map) * (-shift).exp()
    numerator = p @ value + phi @ z
    return (numerator / (p.sum(-1, keepdim=True) + (phi @ k.unsqueeze(-1)).relu())).to(query.dtype)


def _pass(function, leaves, grad):
    """One forward, or forward and backward into everything that the function uses."""
    if grad is None:
        detached = [leaf.detach() for leaf in leaves]
        return lambda: function(*detached)
    used = [
        leaf
        for leaf, g in zip(leaves, torch.autograd.grad(function(*leaves), leaves, grad, allow_unused=True), strict=True)
        if g is not None
    ]
    return lambda: torch.autograd.grad(function(*leaves), used, grad)


def _check(functions, leaves, causal, feature_map) -> None:
    """Nothing is timed that is wrong."""
    query, key, value, z, k = (
        leaf.detach()[:1].double() if leaf.dim() == 4 else leaf.detach().double() for leaf in leaves
    )
    state = PrefixState(z, k, feature_map)
    for name, function in functions.items():
        exact = reference.ntk_attention(
            query, key, value, None if "no prefix" in name else state, is_causal=causal
        )  # fmt: skip
        out = function(*(leaf.detach() for leaf in leaves))[:1].double()
        error = ((out - exact).norm() / exact.norm()).item()
        if not error < 8 * torch.finfo(leaves[0].dtype).eps:
            raise RuntimeError(f"{name} is wrong: relative error {error:.2g} against the float64 reference")
