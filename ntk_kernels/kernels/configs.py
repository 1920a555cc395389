"""Which tiles a kernel runs with: one table per class of GPU, and the rules that make an entry valid."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class TileConfig:
    """Rows of queries and keys a program works on at once, warps a program, tiles of keys in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    use_descriptors: bool = False  # of K and V (TMA), where their memory allows it


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
    """The class of GPU: "sm80", "sm90", "sm100", "gfx942", or "interpreter" under TRITON_INTERPRET=1."""
    if device.type != "cuda":
        return "interpreter"
    return _arch_of_gpu(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _arch_of_gpu(index: int) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major = torch.cuda.get_device_capability(index)[0]
    return {8: "sm80", 9: "sm90", 10: "sm100"}.get(major, f"sm{major}0")


def blocks(arch: str, head_dim: int, value_dim: int, rank: int = 1) -> Blocks:
    # Products of several dots over 16 or 32 give wrong results on Hopper (triton issues 10486, 10573, 11366).
    least = 64 if arch == "sm90" else 16
    block_d, block_dv, block_rank = (
        max(least, triton.next_power_of_2(size)) for size in (head_dim, value_dim, rank)
    )
    return Blocks(block_d, block_dv, block_rank, min(64, block_d))


def precisions(arch: str, dtype: torch.dtype) -> Precisions:
    if arch == "interpreter" or arch.startswith("gfx"):
        return Precisions("ieee", "ieee", "ieee")
    return Precisions("tf32x3", "tf32x3", "tf32x3" if dtype == torch.float32 else "tf32")


def can_describe(tensor: torch.Tensor) -> bool:
    """Whether a tensor map can describe a [B, H, L, D] tensor: addresses in multiples of 16 bytes."""
    return tensor.data_ptr() % 16 == 0 and all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:3])


def choose(arch, blocks, dtype, feature_map, seq_k) -> TileConfig:
    return TileConfig(32, 32, 4, 2)
