"""Cost of NTK-Attention over plain attention, forward and forward+backward, next to the naive formula.

Every function and its gradients are checked against the float64 reference before they are timed. All get the same
inputs. Plain attention and ours are run in turns; then plain attention again and what keeps L×L scores in memory, which
would leave the others cold caches. Ratios are within these turns.
"""

import argparse

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from ntk_kernels import FEATURE_MAPS, PrefixState, feature_dim, ntk_attention, reference

from . import ceilings, record, timing

PLAIN = "SDPA, no prefix"
_LARGE = ("naive formula", "reference")  # keep L×L scores; timed in turns of their own
EXACT = "SDPA over a prefix of"
_SDPA_BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    record.add_arguments(parser)
    parser.add_argument(
        "--dtype", choices=record.DTYPES, default="float32", help="of query, key, value (default: %(default)s)"
    )
    parser.add_argument("--batch", type=record.positive(int), default=1, help="default: %(default)s")
    parser.add_argument("--heads", type=record.positive(int), default=8, help="default: %(default)s")
    parser.add_argument("--length", type=record.positive(int), default=1024, help="tokens (default: %(default)s)")
    parser.add_argument("--head-dim", type=record.positive(int), default=64, help="default: %(default)s")
    parser.add_argument("--feature-map", choices=FEATURE_MAPS, default="elu", help="default: %(default)s")
    parser.add_argument(
        "--prefix-rows",
        type=record.positive(int),
        metavar="M",
        help="also time exact attention over a real prefix of M rows (and copying it in front of the keys)",
    )
    parser.add_argument("--name", default="attention", help="of the file of figures (default: %(default)s)")
    parser.add_argument("--full", action="store_true", help="every token sees every other, instead of causal")
    parser.add_argument(
        "--seconds",
        type=record.positive(float),
        default=10,
        help="of timing for each pass and group (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    device, dtype, causal = arguments.device, record.DTYPES[arguments.dtype], not arguments.full
    on_gpu = torch.device(device).type == "cuda"
    shape = (arguments.batch, arguments.heads, arguments.length, arguments.head_dim)
    query, key, value, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
    r = feature_dim(arguments.feature_map, arguments.head_dim)
    z, k = torch.randn(shape[1], r, shape[3], device=device), torch.rand(shape[1], r, device=device)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value, z, k)]

    functions = contestants(device, causal, arguments.prefix_rows, shape)
    console = Console()
    figures = {}
    with Progress(console=console) as progress:
        task = progress.add_task("checking", total=3)
        _check(functions, leaves, arguments.feature_map, causal, grad)
        progress.advance(task)
        for name, backward in (("forward", False), ("forward + backward", True)):
            progress.update(task, description=f"timing {name}")
            passes = {
                label: _pass(function, leaves, arguments.feature_map, grad if backward else None)
                for label, function in functions.items()
            }
            figures[name] = {}
            large = [label for label in functions if label in _LARGE]
            for turns in ([label for label in functions if label not in _LARGE], [PLAIN, *large]):
                times = timing.measure({label: passes[label] for label in turns}, device, seconds=arguments.seconds)
                for label in turns:
                    times[label]["ratio"] = times[label]["ms"] / times[PLAIN]["ms"]
                    if on_gpu and label not in _LARGE:
                        times[label]["host_us"] = timing.host_time(passes[label], device)
                figures[name] = times | figures[name]
            figures[name] = {label: figures[name][label] for label in functions}
            progress.advance(task)

    rate = ceilings.matmul_rate(device, dtype)
    for backward, times in enumerate(figures.values()):
        for label, result in times.items():
            work = flops(shape, causal, r, label, arguments.prefix_rows) * (3.5 if backward else 1)
            result["tflop_per_s"] = work / result["ms"] / 1e9
    names = ("dtype", "batch", "heads", "length", "head_dim", "feature_map", "prefix_rows")
    settings = {name: getattr(arguments, name) for name in names} | {"causal": causal}
    Console(width=max(console.width, 100)).print(table_of(settings, figures, rate))
    path = record.results_folder(arguments) / f"{arguments.name}.json"
    rows = [
        {"benchmark": "attention", **settings, "pass": passes, "name": label, **result}
        for passes, times in figures.items()
        for label, result in times.items()
    ]
    record.save(path, device, rows, settings=settings, milliseconds=figures, matmul_tflop_per_s=rate)
    console.print(f"figures: {path}", soft_wrap=True)


def flops(shape: tuple, causal: bool, r: int, label: str, prefix_rows: int | None) -> int:
    """Of the matrix products of a forward, over what is visible; a backward takes 2.5 times as many."""
    batch, heads, length, dim = shape
    keys = length * (length + 1) // 2 if causal else length**2
    if label.startswith(EXACT):
        keys += length * prefix_rows
    features = 0 if "no prefix" in label or label.startswith(EXACT) else r
    return batch * heads * (4 * keys * dim + 2 * length * features * (dim + 1))


def table_of(settings: dict, figures: dict, matmul_rate: float) -> Table:
    """Median times, as multiples of SDPA's, and arithmetic as a share of what a matrix product reaches."""
    table = Table(
        title=f"B={settings['batch']}, H={settings['heads']}, L={settings['length']}, D={settings['head_dim']}, "
        f"{settings['dtype']}, {settings['feature_map']}, {'causal' if settings['causal'] else 'full'}"
    )
    table.add_column("median ms, times SDPA, share of a matrix product", no_wrap=True)
    for name in figures:
        table.add_column(name, justify="right")
    for label in next(iter(figures.values())):
        cells = (cell_of(times[label], matmul_rate) for times in figures.values())
        table.add_row(label, *cells)
    table.add_section()
    table.add_row("matrix product", f"{matmul_rate:,.3g} TFLOP/s", "")
    return table


def cell_of(result: dict, matmul_rate: float) -> str:
    digits = 2 if result["ms"] >= 1 else 3
    return f"{result['ms']:.{digits}f} ms, {result['ratio']:.2f}×, {100 * result['tflop_per_s'] / matmul_rate:.0f}%"


def contestants(device: str, causal: bool, prefix_rows: int | None, shape: tuple) -> dict:
    """Functions of query, key, value and state, by name; "no prefix" in the name if it leaves the state out."""
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def ours(backend):
        return lambda q, k, v, state: ntk_attention(q, k, v, state, is_causal=causal, backend=backend)

    functions = {
        PLAIN: lambda q, k, v, state: sdpa(q, k, v, is_causal=causal),
        "ours, no prefix": lambda q, k, v, state: ntk_attention(q, k, v, is_causal=causal),
    }
    if torch.device(device).type == "cuda":
        for name, backend in _SDPA_BACKENDS.items():

            def by_backend(q, k, v, state, backend=backend):
                with sdpa_kernel(backend):
                    return sdpa(q, k, v, is_causal=causal)

            functions[f"SDPA by {name}, no prefix"] = by_backend
        functions["ours, triton backend, no prefix"] = lambda q, k, v, state: ntk_attention(
            q, k, v, is_causal=causal, backend="triton"
        )
        functions["ours, triton backend"] = ours("triton")
    functions["ours, torch backend"] = ours("torch")
    functions["naive formula"] = lambda q, k, v, state: naive(q, k, v, state, causal=causal)
    functions["reference"] = ours("reference")
    if prefix_rows:
        heads, length, head_dim = shape[1:]
        rows = torch.randn(2, 1, heads, prefix_rows, head_dim, device=device)
        bias = causal_lower_right(length, prefix_rows + length) if causal else None

        def exact(q, k, v, state):
            k, v = (
                torch.cat([prefix.to(tensor.dtype).expand(shape[0], -1, -1, -1), tensor], dim=2)
                for prefix, tensor in zip(rows, (k, v), strict=True)
            )
            return sdpa(q, k, v, attn_mask=bias)

        functions[f"{EXACT} {prefix_rows:,} rows"] = exact
    return functions


def naive(query, key, value, state, *, causal: bool):
    """The formula as one would write it down: L×L scores, their exponentials, the features, all in memory."""
    scale = query.shape[3] ** -0.5
    scores = scale * query @ key.mT
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    shift = scores.detach().amax(-1, keepdim=True).clamp(min=0)
    p = (scores - shift).exp()
    phi = reference.feature_map(query.to(state.z.dtype) * scale**0.5, state.feature_map) * (-shift).exp()
    numerator = p @ value + phi @ state.z
    return (numerator / (p.sum(-1, keepdim=True) + (phi @ state.k.unsqueeze(-1)).relu())).to(query.dtype)


def _pass(function, leaves, feature_map, grad):
    """One forward, or forward and backward into everything that the function uses."""
    if grad is None:
        leaves = [leaf.detach() for leaf in leaves]
    *qkv, z, k = leaves
    state = PrefixState(z, k, feature_map)
    if grad is None:
        return lambda: function(*qkv, state)
    grads = torch.autograd.grad(function(*qkv, state), leaves, grad, allow_unused=True)
    used = [leaf for leaf, g in zip(leaves, grads, strict=True) if g is not None]
    return lambda: torch.autograd.grad(function(*qkv, state), used, grad)


def _check(functions, leaves, feature_map, causal, grad) -> None:
    """Nothing is timed that is wrong: results and gradients of the first batch row against float64.

    Relative errors may be 8 eps of the dtype, and twice those of the reference in float32, as some sums cancel.
    """
    *qkv, z, k = (leaf.detach() for leaf in leaves)
    inputs, grad = [*(tensor[:1] for tensor in qkv), z, k], grad[:1]

    def errors(function, expected):
        ours = _with_gradients(function, inputs, feature_map, grad)
        return {
            what: ((result.double() - expected[what]).norm() / expected[what].norm()).item()
            for what, result in ours.items()
        }

    for has_prefix in (True, False):

        def exact(q, k, v, state, has_prefix=has_prefix):
            return reference.ntk_attention(q, k, v, state if has_prefix else None, is_causal=causal)

        expected = _with_gradients(exact, [tensor.double() for tensor in inputs], feature_map, grad.double())
        plain = errors(exact, expected)
        for name, function in functions.items():
            if name.startswith(EXACT) or has_prefix == ("no prefix" in name):
                continue  # PyTorch's own, of another prefix; or compared with the other reference
            for what, error in errors(function, expected).items():
                if not error < 8 * torch.finfo(qkv[0].dtype).eps + 2 * plain[what]:
                    raise RuntimeError(f"{name} is wrong: relative error {error:.2g} of {what} against float64")


def _with_gradients(function, inputs, feature_map, grad) -> dict[str, torch.Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    *qkv, z, k = leaves
    out = function(*qkv, PrefixState(z, k, feature_map))
    gradients = torch.autograd.grad(out, leaves, grad, allow_unused=True)
    names = ("query", "key", "value", "z", "k")
    found = {f"the gradient of {name}": g for name, g in zip(names, gradients, strict=True) if g is not None}
    return {"out": out.detach()} | found
