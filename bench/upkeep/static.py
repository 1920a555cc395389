"""Compiles every kernel for five kinds of GPU, without one: registers, spills, tensor cores, hazards.

Compiles the configuration that each head dimension, feature map and option runs with by default (--all: every
configuration the autotuner may try) and prints a table. Exits with 1 if the default configuration of a head dimension
and feature map in half precision spills registers (with triton 3.6 or 3.7), or one of any kind has no tensor-core
instruction (in a loop with exp2, where there is a softmax), exceeds the shared memory or has a known hazard; or if one
has grown since the figures in bench/baseline/ (for each version of triton; --accept makes the new ones the baseline).
"""

import argparse
import csv
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ntk_kernels import feature_dim
from ntk_kernels.inputs import DecodeInputs, Inputs, StateTensors
from ntk_kernels.kernels.add_prefix import ADD_PREFIX
from ntk_kernels.kernels.add_prefix_backward import add_prefix_dq_launch, add_resident_bwd_launch
from ntk_kernels.kernels.backward_delta import delta_launch
from ntk_kernels.kernels.backward_keys import dkdv_launch
from ntk_kernels.kernels.backward_query import DQ
from ntk_kernels.kernels.backward_state import StateGrads, rows_launch, state_launch
from ntk_kernels.kernels.decode import DecodeResults, decode_launch, merge_launch
from ntk_kernels.kernels.forward import FORWARD
from ntk_kernels.kernels.host import configs
from ntk_kernels.kernels.host.launch import prepare
from ntk_kernels.kernels.host.sections import SECTIONS, num_features
from ntk_kernels.kernels.jit.row_terms import RowTerms
from ntk_kernels.kernels.jit.tiles import INTERPRETED
from ntk_kernels.kernels.sums import (
    GRAD_SECTIONS,
    PrefixRows,
    SumGrads,
    Sums,
    prepare_rows,
    sums_bwd_launch,
    sums_launch,
)

from ..lib import record
from . import aot

# With these the tables are free of spills; with newer versions, and on sm86, a few kernels at D=256 spill some bytes.
_SPILL_FREE = {"sm80", "sm90", "sm100", "gfx942"} if triton.__version__.startswith(("3.6.", "3.7.")) else set()
# Bytes that spill all the same, and may not become more: (triton, class of GPU, kernel, D).
# Tiles of dK and dV without them have half the keys; in decode and merge it is a taylor2 state that spills.
_KNOWN_SPILLS = {
    ("3.6", "sm90", "dkdv", 128): 8,
    ("3.6", "sm90", "decode", 64): 8,
    ("3.6", "sm90", "decode", 256): 8,
    ("3.6", "sm100", "merge", 64): 8,  # where a split left something out
    ("3.6", "sm100", "sums_bwd keys", 256): 24,  # taylor2
    ("3.7", "sm90", "decode", 256): 16,  # elu
    ("3.7", "sm100", "forward", 64): 8,  # without a state
    ("3.7", "sm100", "rows values", 64): 8,
}
_MAY_NOT_GROW = {"registers": 0, "spilled": 0, "shared": 0, "instructions": 0.02}  # with the share that it may
FEATURE_MAPS = ("none", "elu", "taylor1", "taylor2")
_BATCH, _HEADS, _LENGTH = 2, 8, 4096


@dataclass(frozen=True)
class Shape:
    """One kernel for one kind of call."""

    arch: str
    head_dim: int
    feature_map: str = "none"
    option: str = ""
    dtype: str = "bfloat16"
    kernel: str = "forward"  # with the section of features, or "in splits", behind a space
    candidate: int = 0  # number in the table of configurations

    def launch(self):
        """The launch for a batch of 2, 8 heads and 4,096 tokens, on the meta device."""
        kernel, _, section = self.kernel.partition(" ")
        return CASES[kernel](self, section) if section else CASES[kernel](self)

    def value_dim(self) -> int:
        return 256 if self.option == "wide values" else self.head_dim

    def tensor(self, *shape: int) -> torch.Tensor:
        """A tensor of the model."""
        return _meta(*shape, dtype=record.DTYPES[self.dtype])

    def inputs(self) -> Inputs:
        """The record of a causal call with the shape's state and option."""
        dim, value_dim = self.head_dim, self.value_dim()
        query, key = (self.tensor(_BATCH, _HEADS, _LENGTH, dim) for _ in range(2))
        inputs = Inputs(
            query, key, self.tensor(_BATCH, _HEADS, _LENGTH, value_dim), self.state(), scale=dim**-0.5, window_right=0,
            feature_map=None if self.feature_map == "none" else self.feature_map,
        )  # fmt: skip
        per_row = {"dtype": torch.int32}
        changes = {
            "bool mask": {"attn_mask": _meta(_BATCH, 1, _LENGTH, _LENGTH, dtype=torch.bool)},
            "additive mask": {"attn_mask": self.tensor(_BATCH, 1, _LENGTH, _LENGTH)},
            "float32 mask": {"attn_mask": _meta(_BATCH, 1, _LENGTH, _LENGTH)},
            "softcap": {"softcap": 30.0},
            "full": {"window_right": -1},
            "window": {"window_left": 1024},
            "key range": {"key_start": _meta(_BATCH, **per_row), "key_stop": _meta(_BATCH, **per_row)},
            "packed": {
                "query": query[:1], "key": key[:1], "value": inputs.value[:1], "cu_seqlens_q": _meta(3, **per_row),
                "cu_seqlens_k": _meta(3, **per_row), "max_seqlen_q": _LENGTH, "max_seqlen_k": _LENGTH,
            },
        }  # fmt: skip
        return inputs._replace(**changes.get(self.option, {}))

    def num_centers(self) -> int:
        return 16 if self.option == "centres" else 1

    def state(self) -> StateTensors:
        dim, value_dim, centers, state = self.head_dim, self.value_dim(), self.num_centers(), StateTensors()
        if self.feature_map != "none":
            r, half = feature_dim(self.feature_map, dim), self.option == "state in half"
            dtype = record.DTYPES[self.dtype] if half else torch.float32
            state = state._replace(
                z=_meta(1, _HEADS, centers, r, value_dim, dtype=dtype), k=_meta(1, _HEADS, centers, r, dtype=dtype)
            )
            if self.option == "low rank":
                state = state._replace(z=_meta(1, _HEADS, 1, r, 64), z_b=_meta(1, _HEADS, 1, 64, value_dim))
            if centers > 1 or self.option == "centre":
                state = state._replace(centers=_meta(1, _HEADS, centers, dim), log_scale=_meta(1, _HEADS, centers))
        if self.option == "rows":
            keys, values = (_meta(1, _HEADS, 4, size) for size in (dim, value_dim))
            state = state._replace(row_keys=keys, row_values=values, row_bias=_meta(1, _HEADS, 4))
        if self.option == "state index":
            state = state._replace(state_index=_meta(_BATCH, dtype=torch.int64))
        return state

    def candidates(self) -> tuple[configs.TileConfig, ...]:
        masks = {"bool mask": 1, "additive mask": record.DTYPES[self.dtype].itemsize, "float32 mask": 4}
        crowded = self.option in ("centres", "rows", *masks)
        return configs.candidates(*self._kind(), crowded, masks.get(self.option, 0))

    def tuned(self) -> configs.TileConfig | None:
        return configs.tuned_tile(*self._kind())

    def _kind(self) -> tuple:
        feature_map = None if self.feature_map == "none" else self.feature_map
        blocks = configs.blocks(self.arch, self.head_dim, self.value_dim())
        return self.kernel.split()[0], self.arch, blocks, record.DTYPES[self.dtype], feature_map

    def config(self) -> configs.TileConfig:
        return self.candidates()[self.candidate]


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _results(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    out = _meta(*inputs.query.shape[:3], inputs.value.shape[3], dtype=inputs.query.dtype)
    return out, _meta(*inputs.query.shape[:3])


def _terms(shape: Shape, lse: torch.Tensor) -> tuple[RowTerms, torch.Tensor | None]:
    """Numbers of the query rows, and room for the gradients of log w with several centres."""
    if shape.feature_map == "none":
        return RowTerms(lse, lse, None, None), None
    weights = _meta(*lse.shape[:2], shape.num_centers(), lse.shape[2])
    return RowTerms(lse, lse, lse, weights), weights if shape.num_centers() > 1 else None


def _sums_of_state(state: StateTensors) -> StateGrads:
    """Room for all gradients that the state can have, in two partial sums."""
    tensors = (getattr(state, name) for name in StateGrads._fields)
    return StateGrads(*(None if tensor is None else _meta(2, *tensor.shape) for tensor in tensors))


def _forward(shape: Shape):
    inputs = shape.inputs()
    return _PASSES[shape.kernel].launch(prepare(inputs, shape.arch), *_results(inputs), shape.config())


def _add_prefix(shape: Shape):
    inputs = shape.inputs()
    call = prepare(inputs.without_keys(), shape.arch)
    return _PASSES[shape.kernel].launch(call, *_results(inputs), shape.config())


def _add_resident_bwd(shape: Shape):
    inputs = shape.inputs()
    out, lse = _results(inputs)
    sums, call = _sums_of_state(inputs.state), prepare(inputs.without_keys(), shape.arch)
    return add_resident_bwd_launch(call, out, None, out, lse, inputs.query, sums, 2, shape.config())


def _add_prefix_dq(shape: Shape):
    inputs = shape.inputs()
    out, lse = _results(inputs)
    terms, dlogw = _terms(shape, lse)
    call = prepare(inputs.without_keys(), shape.arch)
    return add_prefix_dq_launch(call, out, terms, inputs.query, dlogw, shape.config())


def _delta(shape: Shape):
    inputs = shape.inputs()
    out, lse = _results(inputs)
    return delta_launch(prepare(inputs, shape.arch), out, None, out, _terms(shape, lse)[0], shape.config())


def _dkdv(shape: Shape):
    inputs = shape.inputs()
    out, lse = _results(inputs)
    grad_key = None if shape.kernel == "dv" else inputs.key
    grad_value = None if shape.kernel == "dk" else inputs.value
    terms, _ = _terms(shape, lse)
    return dkdv_launch(prepare(inputs, shape.arch), out, terms, grad_key, grad_value, shape.config())


def _dq(shape: Shape):
    inputs = shape.inputs()
    out, lse = _results(inputs)
    terms, dlogw = _terms(shape, lse)
    call = prepare(inputs, shape.arch)
    return _PASSES[shape.kernel].launch(call, out, terms, inputs.query, dlogw, shape.config())


def _state(shape: Shape, section: str):
    inputs = shape.inputs()
    out, lse = _results(inputs)
    terms, dlogw = _terms(shape, lse)
    call, sums = prepare(inputs, shape.arch), _sums_of_state(inputs.state)
    return state_launch(call, out, terms, dlogw, sums, 2, section, shape.config())


def _rows(shape: Shape, section: str):
    inputs = shape.inputs()
    out, lse = _results(inputs)
    call, sums = prepare(inputs, shape.arch), _sums_of_state(inputs.state)
    return rows_launch(call, out, _terms(shape, lse)[0], sums, 2, section, shape.config())


def _decode_inputs(shape: Shape) -> DecodeInputs:
    """One token a batch row, four query heads a key/value head."""
    inputs = shape.inputs()
    kv_heads, value_dim = _HEADS // 4, shape.value_dim()
    key, value, table = inputs.key[:, :kv_heads], inputs.value[:, :kv_heads], None
    if shape.option == "paged":
        key, value = (shape.tensor(512, kv_heads, 16, size) for size in (shape.head_dim, value_dim))
        table = _meta(_BATCH, _LENGTH // 16, dtype=torch.int32)
    heads = _HEADS if shape.option == "state per query head" else kv_heads
    *tensors, index = inputs.state
    state = StateTensors(*(None if tensor is None else tensor[:, :heads] for tensor in tensors), index)
    return DecodeInputs(
        inputs.query[:, :, :1], key, value, state, cache_seqlens=_meta(_BATCH, dtype=torch.int32),
        key_start=inputs.key_start, block_table=table, feature_map=inputs.feature_map, scale=inputs.scale,
        softcap=inputs.softcap, window_left=inputs.window_left, window_right=0,
    )  # fmt: skip


def _split_results(shape: Shape, inputs: DecodeInputs, splits: int) -> DecodeResults:
    dtype = inputs.query.dtype if splits == 1 else torch.float32
    lse = _meta(splits, *inputs.query.shape[:3])
    out = _meta(splits, *inputs.query.shape[:3], shape.value_dim(), dtype=dtype)
    if splits == 1:
        return DecodeResults(out, lse)
    return DecodeResults(out, lse, lse, _meta(*inputs.query.shape[:3], dtype=torch.int32))


def _decode(shape: Shape, section: str = ""):
    """One token a batch row, its keys in a single split, or in four."""
    inputs, splits = _decode_inputs(shape), 4 if section == "in splits" else 1
    results = _split_results(shape, inputs, splits)
    return decode_launch(
        prepare(inputs, shape.arch), results, shape.config(), num_splits=splits, block_table=inputs.block_table
    )


def _merge(shape: Shape):
    inputs = _decode_inputs(shape)
    splits = _split_results(shape, inputs, 4)
    out = _meta(*inputs.query.shape[:3], shape.value_dim(), dtype=inputs.query.dtype)
    return merge_launch(prepare(inputs, shape.arch), splits, out, splits.lse[0], shape.config())


def _prefix_rows(shape: Shape) -> tuple[PrefixRows, int]:
    """8 heads and 4,096 rows around their mean key; "centres": 16 of them, and weights."""
    keys, values = (shape.tensor(_HEADS, _LENGTH, size) for size in (shape.head_dim, shape.value_dim()))
    centers = shape.num_centers()
    mu = _meta(_HEADS, centers, shape.head_dim)
    if centers == 1:
        return prepare_rows(keys, values, None, mu, None, None), centers
    order, offsets = (_meta(_HEADS, size, dtype=torch.int64) for size in (_LENGTH, centers + 1))
    return prepare_rows(keys, values, _meta(_HEADS, _LENGTH), mu, order, offsets), centers


def _sums(shape: Shape, section: str):
    rows, centers = _prefix_rows(shape)
    r, sizes = num_features(section, shape.head_dim), (2, _HEADS, centers)
    count = None if section in ("pairs", "squares") else _meta(*sizes)
    sums = Sums(_meta(*sizes, r, shape.value_dim()), _meta(*sizes, r), count)
    return sums_launch(rows, sums, section, 0.5, shape.config(), shape.arch)


def _sums_bwd(shape: Shape, section: str):
    rows, centers = _prefix_rows(shape)
    r, in_bfloat16 = feature_dim(shape.feature_map, shape.head_dim), shape.dtype == "bfloat16"
    z = _meta(_HEADS, centers, r, shape.value_dim(), dtype=torch.bfloat16 if in_bfloat16 else torch.float32)
    grads = SumGrads(rows.key.ptr, rows.value.ptr, _meta(2, _HEADS, centers, shape.head_dim))
    return sums_bwd_launch(
        rows, z, _meta(_HEADS, centers, r), grads, section, shape.feature_map, 2, 0.5, shape.config(), shape.arch
    )


_PASSES = {kernel.name: kernel for kernel in (*FORWARD, *ADD_PREFIX, *DQ)}
# The launch of each kernel; a section of features, or of gradients, follows its name behind a space.
CASES = {
    **{kernel.name: _forward for kernel in FORWARD},
    **{kernel.name: _add_prefix for kernel in ADD_PREFIX},
    **{kernel.name: _dq for kernel in DQ},
    "delta": _delta, "dkdv": _dkdv, "dk": _dkdv, "dv": _dkdv, "add_prefix_dq": _add_prefix_dq,
    "add_resident_bwd": _add_resident_bwd, "state": _state, "rows": _rows, "decode": _decode, "merge": _merge,
    "sums": _sums, "sums_bwd": _sums_bwd,
}  # fmt: skip
HEAD_DIMS = (32, 64, 128, 256)
DECODE_OPTIONS = ("paged", "rows", "state index", "state per query head", "low rank", "softcap", "window", "key range")
MASKS = ("bool mask", "additive mask", "float32 mask")
OPTIONS = ("rows", "state index", *MASKS, "softcap", "full", "window", "key range", "packed")


def shapes(archs, *, quick: bool = False) -> list[Shape]:
    """The default configuration of each kernel, head dimension and map; options and other dtypes too, which `quick`
    limits them to sm90 at D = 64."""
    listed = []
    for arch in archs:
        for dim in (64, 128, 256):
            listed += _every_kernel(arch, dim)
            if arch == "sm90":
                listed += [Shape(arch, dim, name, kernel=kernel)
                           for kernel in ("add_prefix", "add_prefix_dq") for name in FEATURE_MAPS[1:]]  # fmt: skip
            if arch == "sm90" and dim <= 128:
                passes = ("add_resident", "add_resident_bwd")
                listed += [Shape(arch, dim, name, kernel=kernel) for kernel in passes for name in ("elu", "taylor1")]
                listed += [Shape(arch, dim, "taylor1", "centre", kernel="add_resident")]
        if quick and arch != "sm90":
            if arch == "sm100":  # other tiles compile to a trap
                listed.append(Shape(arch, 128, dtype="float32", kernel="dkdv"))
            continue
        for dim in (64,) if quick else (64, 128):
            listed += [Shape(arch, dim, "taylor1", option) for option in ("centres", "state in half")]
            listed += [Shape(arch, dim, "taylor2", "low rank")]
            listed += [Shape(arch, dim, "elu", option) for option in OPTIONS]
            listed += [Shape(arch, dim, "elu", option, kernel="decode") for option in DECODE_OPTIONS]
            listed += [Shape(arch, dim, "elu", option, kernel="decode in splits") for option in ("", "rows", "paged")]
            listed += [Shape(arch, dim, "elu", option, kernel="dq") for option in OPTIONS if option != "state index"]
            listed += [Shape(arch, dim, "none", option, kernel="dkdv") for option in OPTIONS[2:]]
            listed += [Shape(arch, dim, "taylor1", "centres", kernel=kernel)
                       for kernel in ("delta", "dq", "state linear", "sums linear", "sums_bwd values",
                                      "sums_bwd keys")]  # fmt: skip
            listed += [Shape(arch, dim, "elu", option, kernel="state elu") for option in ("state index", "packed")]
            listed += [shape for dtype in ("float16", "float32") for shape in _every_kernel(arch, dim, dtype)]
            listed += [Shape(arch, dim, "elu", "rows", dtype=dtype) for dtype in ("float16", "float32")]
            listed += [Shape(arch, dim, name, "wide values", kernel=kernel)
                       for kernel in ("forward", "dq") for name in FEATURE_MAPS]  # fmt: skip
        if quick:  # the largest there are in shared memory
            listed += [
                Shape(arch, 128, "taylor2", dtype="float16", kernel="dq"),
                Shape(arch, 128, "elu", dtype="float32"),
                Shape(arch, 128, "elu", "wide values", "float16"),
                Shape(arch, 128, "taylor2", "wide values", kernel="dq"),
            ]
        else:
            listed += _every_kernel(arch, 32)
            listed += [Shape(arch, 256, "taylor2", "low rank"), Shape(arch, 256, "elu", "rows")]
    return listed


def _every_kernel(arch: str, head_dim: int, dtype: str = "bfloat16") -> list[Shape]:
    """Returns every kernel with the feature maps that make a difference to it."""
    blocks = configs.blocks(arch, head_dim, head_dim)
    maps = [
        (kernel.name, name)
        for kernel in FORWARD
        for name in FEATURE_MAPS
        if configs.has_tiles(kernel.name, arch, blocks, record.DTYPES[dtype], None if name == "none" else name)
    ]
    maps += [(kernel, "none") for kernel in (("dkdv",) if head_dim <= 128 else ("dk", "dv"))]
    maps += [("dq", name) for name in FEATURE_MAPS] + [("delta", name) for name in ("elu", "taylor2")]
    maps += [(f"state {section}", name) for name in ("elu", "taylor2") for section in SECTIONS[name]]
    maps += [("decode", name) for name in ("none", "elu", "taylor2")] + [("merge", "taylor2")]
    maps += [(f"sums {section}", name) for name in ("elu", "taylor2") for section in SECTIONS[name]]
    maps += [(f"sums_bwd {section}", name) for section in GRAD_SECTIONS for name in FEATURE_MAPS[1:]]
    listed = [Shape(arch, head_dim, name, dtype=dtype, kernel=kernel) for kernel, name in maps]
    return listed + [Shape(arch, head_dim, "none", "rows", dtype, f"rows {section}") for section in ("keys", "values")]


def examine(shape: Shape) -> dict:
    """Compiles one shape and says what came out, and what is wrong with it."""
    compiled = aot.compile_launch(shape.launch(), shape.arch)
    limit = configs.SHARED_BYTES[shape.arch]
    found = {
        "config": str(shape.config()), "registers": compiled.registers, "spilled": compiled.spilled,
        "instructions": compiled.instructions, "shared": compiled.shared, "shared_limit": limit,
        "tensor_core": compiled.tensor_core, "exp2": compiled.exp2_in_main_loop, "hazards": compiled.hazards,
    }  # fmt: skip
    faults = list(found["hazards"])
    optional = shape.option and not shape.kernel.startswith("rows")
    known = _KNOWN_SPILLS.get((triton.__version__[:3], shape.arch, shape.kernel, shape.head_dim), 0)
    measured = shape.config() == shape.tuned()  # and the fastest all the same
    spill_free = shape.arch in _SPILL_FREE and shape.dtype != "float32" and not optional and not measured
    if found["spilled"] > known and spill_free:
        faults.append(f"spills {found['spilled']} bytes")
    config = shape.config()
    multiplies = shape.kernel not in ("delta", "merge")
    if multiplies and shape.arch == "sm90" and min(config.block_m, config.block_n) < 64:
        faults.append("a product with a dimension below 64")
    if multiplies and not found["tensor_core"]:
        faults.append("no tensor-core instruction")
    if shape.kernel in ("forward", "decode", "dkdv", "dk", "dv", "dq") and not found["exp2"]:
        faults.append("no loop with exp2 and tensor-core instructions")
    if compiled.shared > limit:
        faults.append(f"needs {compiled.shared} bytes of shared memory, has {limit}")
    return asdict(shape) | found | {"faults": faults}


def _baseline() -> Path:
    return record.ROOT / "bench" / "baseline" / f"triton-{triton.__version__}.csv"


def read_baseline() -> dict[str, dict[str, str]]:
    """Returns the lines by name of the kernel; empty for a version of triton without a file."""
    if not _baseline().exists():
        return {}
    with _baseline().open(encoding="utf-8", newline="") as file:
        return {line["kernel"]: line for line in csv.DictReader(file)}


def write_baseline(results: list[dict]) -> None:
    """Adds these kernels, or replaces what is there."""
    lines = read_baseline()
    for found in results:
        figures = {name: str(found[name]) for name in ("config", *_MAY_NOT_GROW)}
        lines[_name(found)] = {"kernel": _name(found)} | figures
    _baseline().parent.mkdir(exist_ok=True)
    with _baseline().open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ("kernel", "config", *_MAY_NOT_GROW), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines[name] for name in sorted(lines))


def grown_since(baseline: dict[str, dict[str, str]], found: dict) -> list[str]:
    """Returns a message for each figure that exceeds the baseline by more than its slack."""
    before = baseline.get(_name(found))
    if before is None:
        return []
    return [
        f"{name} grew from {int(before[name]):,} to {found[name]:,}"
        for name, slack in _MAY_NOT_GROW.items()
        if found[name] > int(before[name]) * (1 + slack)
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    record.add_output_arguments(parser)
    parser.add_argument(
        "--arch", choices=aot.TARGETS, action="append", help="a GPU to compile for; may be repeated (default: all)"
    )
    parser.add_argument(
        "--head-dim", type=int, choices=HEAD_DIMS, action="append", help="may be repeated (default: all)"
    )
    parser.add_argument("--dtype", choices=record.DTYPES, action="append", help="may be repeated (default: all)")
    parser.add_argument(
        "--quick", action="store_true", help="options and dtypes for sm90 at D=64 only, sm86 not at all"
    )
    parser.add_argument("--all", action="store_true", help="every configuration, not only the default ones")
    parser.add_argument("--accept", action="store_true", help="these figures are the baseline from now on")
    parser.add_argument(
        "--jobs", type=record.positive(int), default=os.cpu_count(), help="processes (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> None:
    if INTERPRETED:
        raise SystemExit("nothing is compiled under TRITON_INTERPRET=1; unset it")
    archs = arguments.arch or [arch for arch in aot.TARGETS if not (arguments.quick and arch == "sm86")]
    todo = shapes(archs, quick=arguments.quick)
    if arguments.head_dim:
        todo = [shape for shape in todo if shape.head_dim in arguments.head_dim]
    if arguments.dtype:
        todo = [shape for shape in todo if shape.dtype in arguments.dtype]
    if not todo:
        raise SystemExit("no kernel is of these kinds; without --quick there are more")
    if arguments.all:
        todo = [replace(shape, candidate=i) for shape in todo for i in range(len(shape.candidates()))]
    console = Console()
    results, baseline = [], {} if arguments.accept else read_baseline()
    with Progress(console=console) as progress, ProcessPoolExecutor(arguments.jobs) as pool:
        task = progress.add_task(f"compiling with triton {triton.__version__}", total=len(todo))
        for result in pool.map(examine, todo):
            if result["candidate"] == 0:
                result["faults"] += grown_since(baseline, result)
            results.append(result)
            progress.advance(task)

    table = Table(title=f"triton {triton.__version__}; registers and spilled bytes of a thread, KiB of shared memory")
    table.add_column("kernel", no_wrap=True)
    table.add_column("tiles", no_wrap=True)
    for column in ("regs", "spilled", "instr", "shared", "exp2"):
        table.add_column(column, justify="right")
    table.add_column("tensor cores", no_wrap=True)
    for found in results:
        table.add_row(
            _name(found), found["config"],
            str(found["registers"]), str(found["spilled"]), str(found["instructions"]),
            f"{found['shared'] // 1024}/{found['shared_limit'] // 1024}", str(found["exp2"]), found["tensor_core"],
            style="red" if found["faults"] else None,
        )  # fmt: skip
    Console(width=max(console.width, 110)).print(table)
    path = record.results_folder(arguments, "static") / f"triton-{triton.__version__}.json"
    record.save(path, "cpu", results, kernels=results)
    console.print(f"figures: {path}", soft_wrap=True)
    if arguments.accept:
        write_baseline([found for found in results if found["candidate"] == 0])
        console.print(f"baseline: {_baseline()}", soft_wrap=True)
    faulty = [found for found in results if found["faults"] and found["candidate"] == 0]
    for found in faulty:
        console.print(f"{_name(found)}: {'; '.join(found['faults'])}", soft_wrap=True)
    if faulty:
        raise SystemExit(f"{len(faulty)} of {len(results)} kernels have faults in their default configuration")
    console.print(f"{len(results)} kernels, none has a fault in its default configuration")


def _name(found: dict) -> str:
    parts = [found["arch"], found["kernel"], f"D={found['head_dim']}", found["feature_map"], found["option"]]
    return " ".join(part for part in parts if part) + (f" {found['dtype']}" if found["dtype"] != "bfloat16" else "")
