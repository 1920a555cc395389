"""Rules that choose the tiles of a kernel from `tile_tables.py` and make an entry valid."""

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from ... import replay
from .tile_tables import TABLES, TileConfig

# Bytes of shared memory that a program may have, for each class of GPU that has a table.
SHARED_BYTES = {"sm80": 163 * 1024, "sm86": 99 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024, "gfx942": 64 * 1024}

_TUNED = Path(__file__).parent / "tuned"  # see `tuned_file`
_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])


class Blocks(NamedTuple):
    """Padded sizes: head dimensions, rank of a low-rank Z, and features (or rows of the state) a step."""

    block_d: int
    block_dv: int
    block_rank: int
    chunk: int


class Precisions(NamedTuple):
    """`input_precision` of products of float32 operands: over the keys, for logits of the state, for Z and values."""

    keys: str
    logits: str
    prefix: str


def arch_of(device: torch.device) -> str:
    """The class of a GPU: a key of SHARED_BYTES; "interpreter" for other devices."""
    if device.type != "cuda":
        return "interpreter"
    return _arch_of_gpu(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _arch_of_gpu(index: int) -> str:
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(index)
    # Consumer GPUs have less shared memory than the data centre's of the same generation.
    return {(8, 0): "sm80", (9, 0): "sm90", (10, 0): "sm100", (10, 3): "sm100"}.get((major, minor), "sm86")


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # enough to test that work is split among them
    return torch.cuda.get_device_properties(device).multi_processor_count


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def min_dot_dimension(arch: str) -> int:
    """Returns the min dimension of a dot product; with 16 or 32, Triton gives wrong results on Hopper (issues 10486,
    10573, 11366)."""
    return 64 if arch == "sm90" else 16


def min_rows(arch: str) -> int:
    """Returns the min number of query rows in a tile that the tensor cores take."""
    return 64 if arch in ("sm90", "sm100") else 16


@functools.cache
def blocks(arch: str, head_dim: int, value_dim: int, rank: int = 1) -> Blocks:
    smallest = min_dot_dimension(arch)
    sizes = (head_dim, value_dim, rank)
    block_d, block_dv, block_rank = (max(smallest, triton.next_power_of_2(size)) for size in sizes)
    # On sm_80 a tile of Z in two parts sits in registers, where there is no room for 64 features.
    chunk = 32 if arch in ("sm80", "sm86") else 64
    return Blocks(block_d, block_dv, block_rank, min(chunk, block_d))


@functools.cache
def precisions(arch: str, dtype: torch.dtype) -> Precisions:
    if arch == "interpreter" or arch.startswith("gfx"):
        return Precisions("ieee", "ieee", "ieee")
    # Three products of TensorFloat-32 are as good as one of float32, as PyTorch's own fused attention computes them.
    return Precisions("tf32x3", "tf32x3", "tf32x3" if dtype == torch.float32 else "tf32")


def can_describe(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor map can describe a [B, H, L, D] tensor: addresses in multiples of 16 bytes."""
    if tensor.device.type != "meta" and tensor.data_ptr() % 16:
        return False
    return tensor.numel() > 0 and all(
        stride > 0 and stride * tensor.element_size() % 16 == 0
        for stride in tensor.stride()[:3]
    )  # fmt: skip


def _with_less_in_flight(entry: TileConfig, shared_bytes: Callable[[TileConfig], int]) -> TileConfig | None:
    """The entry with as many stages as fit into the shared memory of sm86; None if not even one does."""
    for stages in range(entry.num_stages, 0, -1):
        fewer = replace(entry, num_stages=stages)
        if shared_bytes(fewer) <= SHARED_BYTES["sm86"]:
            return fewer
    return None


def _shared_bytes(
    kernel: str, config: TileConfig, blocks: Blocks, dtype: torch.dtype, feature_map: str | None, mask_bytes: int
) -> int:
    """Returns the shared memory of a program on sm80 and sm86: tiles that stay or are in flight, in float32 also pieces
    of operands."""
    m, n, stages = config.block_m, config.block_n, config.num_stages
    rows = {
        "forward": stages * n, "add_prefix": stages * n, "decode": stages * n, "merge": 0,
        "delta": 0, "dq": m + stages * n, "add_prefix_dq": m + stages * n, "dkdv": n + stages * m, "dk": n + stages * m,
        "dv": n + stages * m, "state": stages * m, "rows": m, "sums": stages * m, "sums_bwd": m,
        "add_second_order": stages * n, "second_order_rows": m, "second_order_pack": 0,
    }[kernel]  # fmt: skip
    numbers = rows * (blocks.block_d + blocks.block_dv)
    if dtype == torch.float32:
        numbers += (m + n) * blocks.block_d
    of_query = kernel in ("dq", "add_prefix_dq")
    if of_query and feature_map == "taylor2" and dtype == torch.float16:  # whose Z may exceed float16
        return 4 * numbers
    total = numbers * dtype.itemsize
    if of_query:  # whose tiles are counted generously, so that there is room for a mask
        return total + (16 * blocks.block_d if feature_map == "taylor1" else 0)
    if mask_bytes:
        total += mask_bytes * (stages - 1) * m * n + 16 * m  # in flight, and on their way to another layout
    return total


def kinds_of(dtype: torch.dtype, feature_map: str | None) -> tuple[str, ...]:
    """Returns the keys of the tables that fit a call, the most special first."""
    if dtype == torch.float32:
        return ("float32",)
    kind = {None: "plain", "taylor2": "taylor2"}.get(feature_map, "state")
    return (f"{kind} float16", kind) if dtype == torch.float16 else (kind,)


def tuned_file(arch: str) -> Path:
    """Returns the path of the entries that `python -m bench tune --write` found on a class of GPUs with this triton
    version.

    They go before those of the tables, but not with a mask, rows or several centres.
    """
    return _TUNED / f"{arch}-triton-{'.'.join(map(str, _TRITON))}.json"


def tuned_key(kernel: str, kind: str, dim: int) -> str:
    """`dim` is the padded head dimension."""
    return f"{kernel}, {kind}, {dim}"


def tuned_tile(
    kernel: str, arch: str, blocks: Blocks, dtype: torch.dtype, feature_map: str | None
) -> TileConfig | None:
    """Returns the tuned entry for a call, None if absent."""
    return _read_tuned(arch).get(tuned_key(kernel, kinds_of(dtype, feature_map)[0], _padded_dim(blocks)))


def _padded_dim(blocks: Blocks) -> int:
    return max(64, blocks.block_d, blocks.block_dv)


def write_tuned(arch: str, found: dict[str, TileConfig]) -> None:
    """Adds to the file of that class, or replaces what is there."""
    entries = _read_tuned(arch) | found
    path = tuned_file(arch)
    path.parent.mkdir(exist_ok=True)
    text = json.dumps({key: asdict(entries[key]) for key in sorted(entries)}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    _read_tuned.cache_clear()
    candidates.cache_clear()
    replay.forget()


@functools.cache
def _read_tuned(arch: str) -> dict[str, TileConfig]:
    path = tuned_file(arch)
    if not path.exists():
        return {}
    return {key: TileConfig(**fields) for key, fields in json.loads(path.read_text(encoding="utf-8")).items()}


def has_tiles(kernel: str, arch: str, blocks: Blocks, dtype: torch.dtype, feature_map: str | None) -> bool:
    """Returns whether a kernel has tiles for a class of GPUs and such a call."""
    return bool(_entries_of(kernel, arch, blocks, dtype, feature_map))


def _entries_of(
    kernel: str, arch: str, blocks: Blocks, dtype: torch.dtype, feature_map: str | None
) -> tuple[TileConfig, ...]:
    """Returns the entries of a kernel's table, none if absent."""
    table = TABLES[kernel].get("sm80" if arch == "sm86" else arch, {})
    kind = next((name for name in (*kinds_of(dtype, feature_map), "plain") if name in table), None)
    return table[kind].get(_padded_dim(blocks), ()) if kind else ()


@functools.cache
def candidates(
    kernel: str, arch: str, blocks: Blocks, dtype: torch.dtype, feature_map: str | None, crowded: bool = False,
    mask_bytes: int = 0,
) -> tuple[TileConfig, ...]:  # fmt: skip
    """Returns the tiles that the autotuner may try for a kernel and such a call, the default first.

    `crowded`: a mask, rows or several centres need registers too. `mask_bytes`: of a number of the mask, if there is
    one; it needs shared memory.
    """
    if arch == "interpreter":
        return (TileConfig(32, 32, 4, 1),)
    entries = _entries_of(kernel, arch, blocks, dtype, feature_map)
    tuned = tuned_tile(kernel, arch, blocks, dtype, feature_map)
    if tuned is not None and not crowded:  # it may not fit beside them
        entries = tuple(dict.fromkeys((tuned, *entries)))
    if arch == "sm86":

        def shared_bytes(entry):
            return _shared_bytes(kernel, entry, blocks, dtype, feature_map, mask_bytes)

        fitting = (_with_less_in_flight(entry, shared_bytes) for entry in entries)
        entries = tuple(dict.fromkeys(entry for entry in fitting if entry is not None))
    would_spill = crowded or dtype == torch.float16 or feature_map == "taylor1" or _TRITON >= (3, 8)
    if would_spill and "second_order" not in kernel:
        entries = tuple(dict.fromkeys(replace(entry, max_registers=None) for entry in entries))
    if kernel == "forward" and arch in ("sm90", "sm100"):
        # Not the default before a GPU has said that they pay. Two stages: three can misalign them (triton issue 10474).
        entries += (replace(entries[0], use_descriptors=True, num_stages=min(entries[0].num_stages, 2)),)
    return entries
