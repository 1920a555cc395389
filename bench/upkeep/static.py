"""What the compiler makes of every kernel for five kinds of GPU, without one: registers, spills, tensor cores, hazards.

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
from ntk_kernels.inputs import NUM_DIFFERENTIABLE, Inputs
from ntk_kernels.kernels.add_prefix import prefix_pass_launch
from ntk_kernels.kernels.add_prefix_backward import prefix_pass_backward_launch
from ntk_kernels.kernels.backward_delta import RowTerms, delta_launch
from ntk_kernels.kernels.backward_keys import dkdv_launch
from ntk_kernels.kernels.backward_query import dq_launch
from ntk_kernels.kernels.backward_state import StateGrads, rows_launch, sections_of, state_launch
from ntk_kernels.kernels.decode import decode_launch, merge_launch
from ntk_kernels.kernels.forward import fwd_launch
from ntk_kernels.kernels.host import configs
from ntk_kernels.kernels.host.launch import prepare
from ntk_kernels.kernels.jit.tiles import INTERPRETED
from ntk_kernels.kernels.sums import (
    GRAD_SECTIONS,
    Rows,
    SumGrads,
    Sums,
    num_features_of,
    sums_backward_launch,
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
    ("3.6", "sm100", "sums_backward keys", 256): 24,  # taylor2
    ("3.7", "sm90", "decode", 256): 8,  # elu
    ("3.7", "sm90", "forward without keys", 128): 32,  # taylor2
    ("3.7", "sm90", "forward without keys", 256): 8,  # taylor2
    ("3.7", "sm90", "prefix_pass_backward", 128): 8,  # taylor1
}
_MAY_NOT_GROW = {"registers": 0, "spilled": 0, "shared": 0, "instructions": 0.02}  # with the share that it may
FEATURE_MAPS = ("none", "elu", "taylor1", "taylor2")


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
        batch, heads, length, dim, dtype = 2, 8, 4096, self.head_dim, record.DTYPES[self.dtype]

        def meta(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device="meta")

        value_dim = self.value_dim()
        query, key = (meta(batch, heads, length, dim, dtype=dtype) for _ in range(2))
        value, out, grad = (meta(batch, heads, length, value_dim, dtype=dtype) for _ in range(3))
        lse = meta(batch, heads, length)
        arguments = {"scale": dim**-0.5, "causal_offset": 0, "window_right": 0}
        centers = 16 if self.option == "centres" else 1
        if self.feature_map != "none":
            state = dtype if self.option == "state in half" else torch.float32
            r = feature_dim(self.feature_map, dim)
            arguments |= {"feature_map": self.feature_map, "k": meta(1, heads, centers, r, dtype=state)}
            if self.option == "low rank":
                arguments |= {"z": meta(1, heads, 1, r, 64), "z_b": meta(1, heads, 1, 64, value_dim)}
            else:
                arguments["z"] = meta(1, heads, centers, r, value_dim, dtype=state)
            if centers > 1 or self.option == "centre":
                arguments |= {"centers": meta(1, heads, centers, dim), "log_scale": meta(1, heads, centers)}
        options = {
            "rows": {"row_keys": meta(1, heads, 4, dim), "row_values": meta(1, heads, 4, value_dim),
                     "row_bias": meta(1, heads, 4)},
            "state index": {"state_index": meta(batch, dtype=torch.int64)},
            "bool mask": {"attn_mask": meta(batch, 1, length, length, dtype=torch.bool)},
            "additive mask": {"attn_mask": meta(batch, 1, length, length, dtype=dtype)},
            "float32 mask": {"attn_mask": meta(batch, 1, length, length)},
            "softcap": {"softcap": 30.0},
            "full": {"window_right": -1},
            "window": {"window_left": 1024},
            "key range": {"key_start": meta(batch, dtype=torch.int32), "key_stop": meta(batch, dtype=torch.int32)},
        }  # fmt: skip
        arguments |= options.get(self.option, {})
        if self.option == "packed":
            cu_seqlens = meta(3, dtype=torch.int32)
            arguments |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": length,
                          "max_seqlen_k": length}  # fmt: skip
            query, key, value, out, grad, lse = (tensor[:1] for tensor in (query, key, value, out, grad, lse))
        config = self.config()
        kernel, _, section = self.kernel.partition(" ")
        if kernel in ("decode", "merge"):
            return self._decode_launch(query, key, value, arguments, meta)
        if kernel in ("sums", "sums_backward"):
            return self._sums_launch(section, meta)
        if section == WITHOUT_KEYS or kernel in ("prefix_pass", "prefix_pass_backward"):
            key, section = None, ""
            arguments["window_right"] = -1
        call = prepare(query, key, value, arch=self.arch, **arguments)
        terms = RowTerms(lse, lse, None, None)
        dlogw = None
        if self.feature_map != "none":
            weights = meta(*lse.shape[:2], centers, length)
            terms = terms._replace(mass_delta=lse, weights=weights)
            dlogw = weights if centers > 1 else None
        # All gradients that the state can have, in two partial sums.
        sums = StateGrads(
            *(meta(2, *arguments[name].shape) if name in arguments else None for name in StateGrads._fields)
        )
        return {
            "forward": lambda: fwd_launch(call, out, lse, config),
            "prefix_pass": lambda: prefix_pass_launch(call, out, lse, config),
            "prefix_pass_backward": lambda: prefix_pass_backward_launch(
                call, grad, None, out, lse, query, sums, 2, config
            ),
            "delta": lambda: delta_launch(call, grad, None, out, terms, config),
            "dkdv": lambda: dkdv_launch(call, grad, terms, key, value, config),
            "dk": lambda: dkdv_launch(call, grad, terms, key, None, config),
            "dv": lambda: dkdv_launch(call, grad, terms, None, value, config),
            "dq": lambda: dq_launch(call, grad, terms, query, dlogw, config),
            "state": lambda: state_launch(call, grad, terms, dlogw, sums, 2, section, config),
            "rows": lambda: rows_launch(call, grad, terms, sums, 2, section, config),
        }[kernel]()

    def value_dim(self) -> int:
        return 256 if self.option == "wide values" else self.head_dim

    def _decode_launch(self, query, key, value, arguments, meta):
        """One token a batch row, four query heads a key/value head; "decode in splits": in four."""
        batch, heads, length, dim = query.shape
        value_dim = value.shape[3]
        query, key, value = query[:, :, :1], key[:, : heads // 4], value[:, : heads // 4]
        state_heads = heads if self.option == "state per query head" else heads // 4
        for name in Inputs._fields[3:NUM_DIFFERENTIABLE]:
            if name in arguments:
                arguments[name] = arguments[name][:, :state_heads]
        options = {}
        if self.option == "paged":
            key, value = (meta(512, heads // 4, 16, size, dtype=query.dtype) for size in (dim, value_dim))
            options["block_table"] = meta(batch, length // 16, dtype=torch.int32)
        arguments["key_stop"] = meta(batch, dtype=torch.int32)
        call = prepare(query, key, value, arch=self.arch, cache_size=length, **arguments)
        splits = 1 if self.kernel == "decode" else 4
        out = meta(splits, *query.shape[:3], value_dim, dtype=query.dtype if splits == 1 else torch.float32)
        lse = meta(splits, batch, heads, 1)
        left_out = meta(batch, heads, 1, dtype=torch.int32)
        if self.kernel == "merge":
            result = meta(*query.shape[:3], value_dim, dtype=query.dtype)
            return merge_launch(call, out, lse, lse, left_out, result, lse[0], self.config())
        if splits > 1:
            options |= {"num_splits": splits, "sums": lse, "left_out": left_out}
        return decode_launch(call, out, lse, self.config(), **options)

    def _sums_launch(self, section: str, meta):
        """Of 8 heads and 4,096 rows around their mean key, in two splits; "centres": 16 of them, and weights."""
        heads, length, dim, dtype = 8, 4096, self.head_dim, record.DTYPES[self.dtype]
        value_dim = self.value_dim()
        keys, values = (meta(heads, length, size, dtype=dtype) for size in (dim, value_dim))
        centers, rows = 1, Rows(keys, values, None, meta(heads, 1, dim), None, None)
        if self.option == "centres":
            centers = 16
            order, offsets = (meta(heads, size, dtype=torch.int64) for size in (length, centers + 1))
            rows = Rows(*rows[:2], meta(heads, length), meta(heads, centers, dim), order, offsets)
        if self.kernel.startswith("sums_backward"):
            r = feature_dim(self.feature_map, dim)
            z = meta(heads, centers, r, value_dim, dtype=dtype if dtype == torch.bfloat16 else torch.float32)
            grads = SumGrads(*rows[:2], meta(2, heads, centers, dim))
            return sums_backward_launch(
                rows, z, meta(heads, centers, r), grads, section, self.feature_map, 2, 0.5, self.config(), self.arch
            )
        shape, r = (2, heads, centers), num_features_of(section, dim)
        count = None if section in ("pairs", "squares") else meta(*shape)
        sums = Sums(meta(*shape, r, value_dim), meta(*shape, r), count)
        return sums_launch(rows, sums, section, 0.5, self.config(), self.arch)

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


HEAD_DIMS = (32, 64, 128, 256)
WITHOUT_KEYS = "without keys"  # the prefix, added to another attention
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
                listed += [Shape(arch, dim, name, kernel=f"{kernel} {WITHOUT_KEYS}")
                           for kernel in ("forward", "dq") for name in FEATURE_MAPS[1:]]  # fmt: skip
            if arch == "sm90" and dim <= 128:
                passes = ("prefix_pass", "prefix_pass_backward")
                listed += [Shape(arch, dim, name, kernel=kernel) for kernel in passes for name in ("elu", "taylor1")]
                listed += [Shape(arch, dim, "taylor1", "centre", kernel="prefix_pass")]
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
                       for kernel in ("delta", "dq", "state linear", "sums linear", "sums_backward values",
                                      "sums_backward keys")]  # fmt: skip
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
    """With every feature map that makes a difference to it."""
    maps = [("forward", name) for name in FEATURE_MAPS]
    maps += [(kernel, "none") for kernel in (("dkdv",) if head_dim <= 128 else ("dk", "dv"))]
    maps += [("dq", name) for name in FEATURE_MAPS] + [("delta", name) for name in ("elu", "taylor2")]
    maps += [(f"state {section}", name) for name in ("elu", "taylor2") for section in sections_of(name)]
    maps += [("decode", name) for name in ("none", "elu", "taylor2")] + [("merge", "taylor2")]
    maps += [(f"sums {section}", name) for name in ("elu", "taylor2") for section in sections_of(name)]
    maps += [(f"sums_backward {section}", name) for section in GRAD_SECTIONS for name in FEATURE_MAPS[1:]]
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
    """By name of the kernel; none for a version of triton that has no file."""
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
    """What a kernel has more of than the baseline says, beyond the slack."""
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
