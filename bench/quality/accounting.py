"""Parameters and memory of states, LoRA and P-Tuning v2 for well-known models.

Nothing is timed. States are made on the meta device and counted: every tensor that fine-tuning trains, without centres
and scales, which a trained state does not need. The other methods are counted by their definition: LoRA adds A [r, in]
and B [out, r] to a weight; P-Tuning v2 keeps m keys and m values per layer (without the network that generates them in
some implementations).
"""

import argparse
from dataclasses import dataclass

import torch
from rich.table import Table

from ntk_kernels import FEATURE_MAPS, PrefixState, feature_dim

from ..lib import plots, record
from ..lib.progress import Steps


@dataclass(frozen=True)
class Model:
    """The shape of a model's attention layers and the number of all its parameters."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    parameters: float

    @property
    def kv_dim(self) -> int:
        return self.kv_heads * self.head_dim


# Taken from the models' configuration files.
MODELS = {
    "ViT-B/16": Model(12, 768, 12, 12, 64, 86.6e6),
    "OPT-125M": Model(12, 768, 12, 12, 64, 125e6),
    "OPT-350M": Model(24, 1024, 16, 16, 64, 331e6),
    "OPT-1.3B": Model(24, 2048, 32, 32, 64, 1.32e9),
    "OPT-2.7B": Model(32, 2560, 32, 32, 80, 2.65e9),
    "OPT-6.7B": Model(32, 4096, 32, 32, 128, 6.66e9),
    "LLaMA-3.2-1B": Model(16, 2048, 32, 8, 64, 1.24e9),
    "LLaMA-3.1-8B": Model(32, 4096, 32, 8, 128, 8.03e9),
    "ChatGLM3-6B": Model(28, 4096, 32, 2, 128, 6.24e9),
}
LORA_RANKS = (4, 8, 16, 64)
PREFIX_ROWS = (10, 32, 100, 200)
RANK = 8  # of a low-rank pair instead of Z


def add_arguments(parser: argparse.ArgumentParser) -> None:
    record.add_output_arguments(parser)
    parser.add_argument(
        "--model", choices=MODELS, nargs="+", default=list(MODELS), help="models to count for (default: all)"
    )


def measure(arguments: argparse.Namespace, progress: Steps) -> dict:
    """Returns the parameters of every method for each model."""
    return {"methods": [row for name in arguments.model for row in methods_of(name)]}


def rows_of(figures: dict) -> list[dict]:
    return figures["methods"]


def methods_of(name: str) -> list[dict]:
    """Returns the parameters of each method for a model: per layer, in total, as a share of the model, in MiB."""
    model = MODELS[name]
    per_layer = {}
    for feature_map in FEATURE_MAPS:
        for heads, what in ((model.kv_heads, ""), (model.heads, ", a state per query head")):
            if what and model.heads == model.kv_heads:
                continue
            per_layer[f"NTK-Attention, {feature_map}{what}"] = state_parameters(model, feature_map, heads)
        low_rank = state_parameters(model, feature_map, model.kv_heads, RANK)
        per_layer[f"NTK-Attention, {feature_map}, Z of rank {RANK}"] = low_rank
    for rank in LORA_RANKS:
        per_layer[f"LoRA, rank {rank}, query and value"] = lora_parameters(model, rank)
    for m in PREFIX_ROWS:
        per_layer[f"P-Tuning v2, {m} rows"] = 2 * m * model.kv_dim
    return [
        {
            "model": name, "method": method, "per_layer": count, "parameters": model.layers * count,
            "share_percent": 100 * model.layers * count / model.parameters,
            "float32_mib": 4 * model.layers * count / 2**20, "bfloat16_mib": 2 * model.layers * count / 2**20,
        }
        for method, count in per_layer.items()
    ]  # fmt: skip


def state_parameters(model: Model, feature_map: str, heads: int, rank: int | None = None) -> int:
    """Counts the parameters of one layer's state: k and Z, or k and a pair of that rank."""
    r, dim = feature_dim(feature_map, model.head_dim), model.head_dim

    def meta(*shape):
        return torch.empty(heads, *shape, device="meta")

    if rank is None:
        state = PrefixState(meta(r, dim), meta(r), feature_map)
    else:
        state = PrefixState(None, meta(r), feature_map, z_a=meta(r, rank), z_b=meta(rank, dim))
    return sum(tensor.numel() for tensor in state.tensors().values())


def lora_parameters(model: Model, rank: int) -> int:
    """Counts the parameters of LoRA on one layer's query and value projections, the usual choice."""
    to_query = rank * (model.hidden + model.heads * model.head_dim)
    return to_query + rank * (model.hidden + model.kv_dim)


def tables_of(figures: dict) -> list[Table]:
    rows, tables = figures["methods"], []
    for name in dict.fromkeys(row["model"] for row in rows):
        model = MODELS[name]
        table = Table(
            title=f"{name}: {model.layers} layers, {model.heads}/{model.kv_heads} heads, D={model.head_dim}, "
            f"{model.parameters / 1e6:,.0f} million parameters"
        )
        for column in ("method", "per layer", "in all", "of the model", "float32", "bfloat16"):
            table.add_column(column, justify="left" if column == "method" else "right")
        for row in rows:
            if row["model"] == name:
                table.add_row(
                    row["method"], f"{row['per_layer']:,}", f"{row['parameters']:,}", f"{row['share_percent']:.3g}%",
                    f"{row['float32_mib']:,.2f} MiB", f"{row['bfloat16_mib']:,.2f} MiB",
                )  # fmt: skip
        tables.append(table)
    return tables


def plot(path, figures: dict) -> None:
    """Draws the share of the model's parameters that each method trains."""
    shown = {
        "NTK-Attention, elu": "C3",
        f"NTK-Attention, elu, Z of rank {RANK}": "C1",
        "NTK-Attention, taylor2": "C4",
        "LoRA, rank 8, query and value": "C0",
        "LoRA, rank 64, query and value": "C9",
        "P-Tuning v2, 32 rows": "C2",
        "P-Tuning v2, 200 rows": "C8",
    }
    rows = figures["methods"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, (axes,) = plots.canvas(width=12)
    width = 0.8 / len(shown)
    for i, (method, color) in enumerate(shown.items()):
        shares = [row["share_percent"] for row in rows if row["method"] == method]
        places = [at + (i - (len(shown) - 1) / 2) * width for at in range(len(models))]
        axes.bar(places, shares, width, label=method, color=color)
    axes.set_xticks(range(len(models)), models)
    axes.set(yscale="log", ylabel="% of the model's parameters", title="Parameters that are trained and kept per task")
    axes.yaxis.set_major_formatter("{x:g}")
    plots.save(figure, path)
