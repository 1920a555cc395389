"""Which tiles a kernel runs with: one table per class of GPU, and the rules that make an entry valid."""

import functools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import triton

# Bytes of shared memory that a program may have, for each class of GPU that has a table.
SHARED_BYTES = {"sm80": 163 * 1024, "sm86": 99 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024, "gfx942": 64 * 1024}

_TUNED = Path(__file__).parent / "tuned"  # see `tuned_file`
_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])


@dataclass(frozen=True)
class TileConfig:
    """Rows of queries and keys a program works on at once, warps a program, tiles of keys in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # a thread, so that two programs fit on a multiprocessor
    use_descriptors: bool = False  # of K and V (TMA), where their memory allows it
    parts: int = 1  # programs that share the columns of dK and dV

    def __str__(self) -> str:
        text = f"{self.block_m}x{self.block_n} {self.num_warps}w {self.num_stages}s"
        text += f" r{self.max_registers}" if self.max_registers else ""
        return text + " tma" * self.use_descriptors + f" /{self.parts}" * (self.parts > 1)


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


def least_dimension(arch: str) -> int:
    """Of a product: over 16 or 32 they give wrong results on Hopper (triton issues 10486, 10573, 11366)."""
    return 64 if arch == "sm90" else 16


def least_rows(arch: str) -> int:
    """Of a tile of query rows: what the tensor cores take."""
    return 64 if arch in ("sm90", "sm100") else 16


@functools.cache
def blocks(arch: str, head_dim: int, value_dim: int, rank: int = 1) -> Blocks:
    least = least_dimension(arch)
    block_d, block_dv, block_rank = (max(least, triton.next_power_of_2(size)) for size in (head_dim, value_dim, rank))
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
    """Whether a tensor map can describe a [B, H, L, D] tensor: addresses in multiples of 16 bytes."""
    if tensor.device.type != "meta" and tensor.data_ptr() % 16:
        return False
    return tensor.numel() > 0 and all(
        stride > 0 and stride * tensor.element_size() % 16 == 0
        for stride in tensor.stride()[:3]
    )  # fmt: skip


_T = TileConfig
# Of each kernel, by class of GPU, by what is computed (half precision without a state, with one, with a taylor2 state,
# with one in float16; float32), by the padded head dimension: what may be fastest, the default first. A kernel to which
# the state makes no difference has the first and the last kind only. Defaults in half precision spill no registers, and
# on sm90 no product has a dimension below 64 (see `blocks`); bench/static.py checks both.
_FORWARD = {
    "sm90": {
        "plain": {
            64: (_T(128, 64, 8, 3, 128), _T(128, 128, 8, 2)),
            128: (_T(128, 64, 8, 3), _T(128, 128, 8, 2)),
            256: (_T(64, 64, 8, 2), _T(128, 64, 8, 2)),
        },
        "state": {
            64: (_T(128, 64, 8, 3, 128), _T(128, 64, 8, 3), _T(128, 128, 8, 2)),
            128: (_T(128, 64, 8, 3), _T(128, 128, 8, 2)),
            256: (_T(64, 64, 8, 2),),
        },
        "taylor2": {
            64: (_T(128, 64, 8, 3), _T(128, 128, 8, 2)),
            128: (_T(128, 64, 8, 3), _T(128, 128, 8, 2)),
            256: (_T(64, 64, 8, 2),),
        },
        "float32": {
            64: (_T(128, 64, 8, 2), _T(64, 64, 4, 2)),
            128: (_T(128, 64, 8, 1), _T(64, 64, 8, 1)),
        },
    },
    "sm80": {
        "plain": {
            64: (_T(128, 64, 8, 3), _T(128, 64, 4, 3)),
            128: (_T(128, 64, 8, 3), _T(64, 64, 4, 3)),
            256: (_T(64, 64, 8, 2), _T(64, 32, 8, 2)),
        },
        "state": {
            64: (_T(128, 64, 8, 3), _T(64, 64, 4, 3)),
            128: (_T(64, 64, 8, 2), _T(64, 64, 4, 3), _T(128, 64, 8, 3)),
            256: (_T(64, 32, 8, 2), _T(64, 64, 8, 2)),
        },
        "taylor2": {
            64: (_T(128, 64, 8, 3), _T(64, 64, 4, 3)),
            128: (_T(64, 64, 8, 2), _T(64, 64, 4, 3)),
            256: (_T(64, 32, 8, 1), _T(64, 32, 8, 2)),
        },
        "float32": {
            64: (_T(64, 32, 4, 2), _T(64, 32, 8, 2)),
            128: (_T(64, 32, 8, 2), _T(32, 32, 4, 2)),
        },
    },
    "sm100": {
        "plain": {
            64: (_T(128, 64, 8, 3), _T(128, 128, 8, 2)),
            128: (_T(128, 64, 8, 3), _T(128, 128, 8, 2)),
            256: (_T(64, 32, 8, 2), _T(128, 64, 8, 2)),
        },
        "state": {
            64: (_T(128, 64, 8, 2), _T(128, 64, 8, 3), _T(128, 128, 8, 2)),
            128: (_T(128, 64, 8, 3), _T(128, 128, 8, 2)),
            256: (_T(64, 32, 8, 2),),
        },
        "taylor2": {
            64: (_T(128, 64, 8, 3), _T(128, 128, 8, 2)),
            128: (_T(64, 64, 8, 3), _T(128, 64, 8, 2)),
            256: (_T(64, 32, 8, 1), _T(64, 64, 8, 1)),
        },
        "float32": {
            64: (_T(64, 32, 8, 2),),
            128: (_T(64, 32, 8, 2),),
        },
    },
    "gfx942": {
        "plain": {
            64: (_T(128, 64, 4, 1), _T(128, 32, 4, 1)),
            128: (_T(128, 32, 8, 1), _T(128, 64, 4, 1)),
            256: (_T(64, 32, 4, 1),),
        },
        "state": {
            64: (_T(128, 64, 4, 1), _T(128, 32, 4, 1)),
            128: (_T(128, 32, 8, 1), _T(128, 64, 4, 1)),
            256: (_T(64, 32, 4, 1),),
        },
        "taylor2": {
            64: (_T(64, 64, 4, 1), _T(128, 64, 4, 1)),
            128: (_T(128, 32, 8, 1), _T(128, 64, 4, 1)),
            256: (_T(64, 32, 4, 1),),
        },
        "float32": {
            64: (_T(64, 32, 4, 1),),
            128: (_T(64, 16, 4, 1),),
        },
    },
}


_DKDV = {
    "sm90": {
        "plain": {64: (_T(64, 128, 8, 2),), 128: (_T(64, 128, 8, 2), _T(64, 64, 8, 2))},
        "float32": {64: (_T(64, 64, 8, 1),), 128: (_T(64, 64, 8, 1),)},
    },
    "sm80": {
        "plain": {64: (_T(32, 128, 8, 2), _T(64, 128, 8, 2)), 128: (_T(32, 64, 8, 2), _T(64, 64, 8, 2))},
        "float32": {64: (_T(32, 32, 4, 1),), 128: (_T(32, 32, 8, 1),)},
    },
    "sm100": {
        "plain": {64: (_T(64, 64, 8, 2), _T(64, 128, 8, 2)), 128: (_T(64, 64, 8, 2), _T(64, 128, 8, 2))},
        "float32": {64: (_T(32, 64, 8, 1),), 128: (_T(32, 64, 8, 1),)},
    },
    "gfx942": {
        "plain": {64: (_T(32, 128, 4, 1),), 128: (_T(32, 64, 4, 1),)},
        "float32": {64: (_T(16, 64, 4, 1),), 128: (_T(16, 32, 4, 1),)},
    },
}
# For wide heads, where the two do not fit into the registers together, a launch each.
_DK = {
    "sm90": {"plain": {256: (_T(64, 64, 8, 2, parts=4), _T(64, 64, 8, 2))}},
    "sm80": {"plain": {256: (_T(64, 64, 8, 1), _T(32, 64, 8, 1))}},
    "sm100": {"plain": {256: (_T(32, 64, 8, 1),)}},
    "gfx942": {"plain": {256: (_T(16, 64, 4, 1),)}},
}
_DV = {
    "sm90": {"plain": {256: (_T(64, 64, 8, 2),)}},
    "sm80": {"plain": {256: (_T(64, 64, 8, 1), _T(32, 64, 8, 1))}},
    "sm100": {"plain": {256: (_T(64, 64, 8, 1),)}},
    "gfx942": {"plain": {256: (_T(32, 64, 4, 1),)}},
}
_DQ = {
    "sm90": {
        "plain": {64: (_T(128, 64, 8, 3),), 128: (_T(128, 64, 8, 3),), 256: (_T(64, 64, 8, 2),)},
        "taylor2": {64: (_T(128, 64, 8, 3),), 128: (_T(128, 64, 8, 2),), 256: (_T(64, 64, 8, 2),)},
        # Z may exceed float16: more tiles in shared memory
        "taylor2 float16": {64: (_T(128, 64, 8, 3),), 128: (_T(64, 64, 8, 2),), 256: (_T(64, 64, 8, 2),)},
        "float32": {64: (_T(64, 64, 8, 1),), 128: (_T(64, 64, 8, 1),)},
    },
    "sm80": {
        "plain": {64: (_T(128, 64, 8, 2),), 128: (_T(64, 64, 8, 2),), 256: (_T(64, 32, 8, 1),)},
        "state": {64: (_T(128, 64, 8, 2),), 128: (_T(64, 64, 8, 2),), 256: (_T(32, 32, 8, 1), _T(64, 32, 8, 1))},
        "taylor2": {
            64: (_T(128, 64, 8, 2), _T(64, 32, 8, 1)),
            128: (_T(64, 64, 8, 2), _T(32, 32, 8, 1)),
            256: (_T(32, 32, 8, 1), _T(16, 16, 8, 1)),
        },
        "float32": {64: (_T(64, 32, 8, 1),), 128: (_T(32, 32, 8, 1),)},
    },
    "sm100": {
        "plain": {64: (_T(128, 32, 8, 2), _T(128, 64, 8, 2)), 128: (_T(128, 64, 8, 2),), 256: (_T(64, 32, 8, 1),)},
        "taylor2": {64: (_T(128, 64, 8, 2),), 128: (_T(64, 64, 8, 2),), 256: (_T(64, 64, 8, 1),)},
        "float32": {64: (_T(64, 32, 8, 1),), 128: (_T(64, 32, 8, 1),)},
    },
    "gfx942": {
        "plain": {64: (_T(128, 32, 4, 1),), 128: (_T(64, 32, 4, 1),), 256: (_T(64, 32, 4, 1),)},
        "state": {64: (_T(128, 32, 4, 1),), 128: (_T(64, 32, 4, 1),), 256: (_T(32, 32, 4, 1),)},
        "taylor2": {64: (_T(128, 32, 4, 1),), 128: (_T(64, 32, 4, 1),), 256: (_T(32, 16, 4, 1),)},
        "float32": {64: (_T(64, 16, 4, 1),), 128: (_T(32, 16, 4, 1),)},
    },
}
_CLASSES = ("sm80", "sm90", "sm100", "gfx942")
_DELTA = {arch: {"plain": {dim: (_T(64, 64, 8, 1),) for dim in (64, 128, 256)}} for arch in _CLASSES}
_STATE = {
    arch: {
        "plain": {
            64: (_T(64, 64, 8 if arch == "sm100" else 4, 3),),
            128: (_T(64, 64, 8, 3),),
            256: (_T(64, 64, 8, 2), _T(64, 64, 8, 1)),
        },
        "float32": {dim: (_T(64 if arch == "sm90" else 32, 64, 8, 1),) for dim in (64, 128)},
    }
    for arch in ("sm80", "sm90", "sm100")
} | {
    "gfx942": {
        "plain": {64: (_T(64, 64, 4, 1),), 128: (_T(64, 64, 8, 1),), 256: (_T(64, 64, 8, 1),)},
        "float32": {dim: (_T(32, 64, 8, 1),) for dim in (64, 128)},
    }
}
_ROWS = {
    "sm90": {
        "plain": {dim: (_T(64, 64, 8, 1),) for dim in (64, 128, 256)},
        "float32": {dim: (_T(64, 64, 8, 1),) for dim in (64, 128)},
    },
    "sm80": {
        "plain": {64: (_T(64, 64, 8, 1),), 128: (_T(64, 32, 8, 1),), 256: (_T(64, 32, 8, 1),)},
        "float32": {dim: (_T(32, 32, 8, 1),) for dim in (64, 128)},
    },
    "sm100": {
        "plain": {64: (_T(64, 64, 4, 1),), 128: (_T(64, 64, 8, 1),), 256: (_T(64, 32, 8, 1),)},
        "float32": {dim: (_T(32, 32, 8, 1),) for dim in (64, 128)},
    },
    "gfx942": {
        "plain": {64: (_T(64, 32, 4, 1),), 128: (_T(64, 32, 4, 1),), 256: (_T(32, 32, 4, 1),)},
        "float32": {dim: (_T(32, 32, 4, 1),) for dim in (64, 128)},
    },
}
# Decode waits for memory: small tiles, several in flight. Fewer rows of queries get smaller ones.
_DECODE = {
    "sm90": {
        "plain": {
            64: (_T(64, 64, 4, 3), _T(64, 128, 4, 3), _T(64, 64, 4, 4)),
            128: (_T(64, 64, 4, 3), _T(64, 64, 4, 4), _T(64, 64, 8, 3)),
            256: (_T(64, 64, 8, 2),),
        },
        "taylor2": {64: (_T(64, 64, 8, 3),), 128: (_T(64, 64, 8, 3),), 256: (_T(64, 64, 8, 2),)},
        "float32": {64: (_T(64, 64, 4, 2),), 128: (_T(64, 64, 8, 1),)},
    },
    "sm80": {
        "plain": {
            64: (_T(64, 64, 4, 3), _T(64, 128, 4, 2)),
            128: (_T(64, 64, 4, 3), _T(64, 64, 8, 3), _T(64, 32, 4, 3)),
            256: (_T(64, 32, 8, 2),),
        },
        "float32": {64: (_T(64, 32, 4, 2),), 128: (_T(64, 32, 8, 1),)},
    },
    "sm100": {
        "plain": {
            64: (_T(64, 64, 4, 3), _T(64, 64, 4, 4)),
            128: (_T(64, 64, 8, 3), _T(64, 64, 8, 2)),
            256: (_T(64, 64, 8, 2),),
        },
        "state": {
            64: (_T(64, 64, 4, 3), _T(64, 64, 4, 4)),
            128: (_T(64, 64, 8, 3, 168), _T(64, 64, 8, 2)),  # left to itself, 3.6 spills to get below 128
            256: (_T(64, 64, 8, 2),),
        },
        "taylor2": {64: (_T(64, 64, 4, 3),), 128: (_T(64, 64, 8, 3),), 256: (_T(64, 32, 8, 1),)},
        "float32": {64: (_T(64, 32, 8, 2),), 128: (_T(64, 32, 8, 1),)},
    },
    "gfx942": {
        "plain": {64: (_T(64, 64, 4, 1),), 128: (_T(64, 32, 4, 1),), 256: (_T(64, 32, 4, 1),)},
        "float32": {64: (_T(64, 32, 4, 1),), 128: (_T(64, 16, 4, 1),)},
    },
}
# One row of queries, so many splits at once.
_MERGE = {arch: {"plain": {dim: (_T(1, 16, 4, 1),) for dim in (64, 128, 256)}} for arch in _CLASSES}
# Rows of a prefix and features that a program has at once: all up to 128, so that keys and values are read once, but in
# float16, whose values need twice the registers.
_SUMS_FLOAT16 = {64: (_T(64, 64, 4, 3),), 128: (_T(64, 64, 8, 3),), 256: (_T(64, 64, 8, 2),)}
_SUMS = {
    "sm90": {
        "plain": {64: (_T(64, 64, 4, 3),), 128: (_T(64, 128, 8, 3),), 256: (_T(64, 64, 8, 2),)},
        "state float16": _SUMS_FLOAT16,
        "taylor2 float16": _SUMS_FLOAT16,
        "float32": {dim: (_T(64, 64, 8, 1),) for dim in (64, 128)},
    },
    "sm80": {
        "plain": {64: (_T(32, 64, 4, 3),), 128: (_T(32, 128, 8, 2),), 256: (_T(32, 64, 8, 2),)},
        "taylor2": {64: (_T(32, 64, 4, 3),), 128: (_T(32, 128, 8, 3),), 256: (_T(32, 64, 8, 2),)},
        "float32": {dim: (_T(32, 64, 8, 1),) for dim in (64, 128)},
    },
    "sm100": {
        "plain": {64: (_T(64, 64, 8, 3),), 128: (_T(64, 128, 8, 3),), 256: (_T(64, 64, 8, 2),)},
        "float32": {64: (_T(32, 64, 8, 1),), 128: (_T(32, 128, 8, 1),)},
    },
    "gfx942": {
        "plain": {64: (_T(64, 64, 4, 1),), 128: (_T(64, 128, 8, 1),), 256: (_T(64, 64, 8, 1),)},
        "float32": {64: (_T(32, 64, 8, 1),), 128: (_T(32, 128, 8, 1),)},
    },
}
_SUMS_BACKWARD = {
    "sm90": {
        "plain": {64: (_T(64, 64, 8, 2),), 128: (_T(64, 64, 8, 2),), 256: (_T(64, 64, 8, 1),)},
        "taylor2": {64: (_T(64, 64, 8, 2),), 128: (_T(64, 64, 8, 1),), 256: (_T(64, 64, 8, 1),)},
        "float32": {dim: (_T(64, 64, 8, 1),) for dim in (64, 128)},
    },
    "sm80": {
        "plain": {64: (_T(64, 64, 8, 2),), 128: (_T(64, 64, 8, 2),), 256: (_T(32, 64, 16, 1),)},
        "float32": {dim: (_T(32, 64, 8, 1),) for dim in (64, 128)},
    },
    "sm100": {
        "plain": {64: (_T(64, 64, 8, 2),), 128: (_T(64, 64, 8, 2, 168),), 256: (_T(32, 64, 8, 1),)},
        "taylor2": {64: (_T(64, 64, 8, 2),), 128: (_T(32, 64, 8, 2),), 256: (_T(16, 64, 16, 1),)},
        "float32": {dim: (_T(32, 64, 8, 1),) for dim in (64, 128)},
    },
    "gfx942": {
        "plain": {64: (_T(64, 64, 4, 1),), 128: (_T(64, 64, 8, 1),), 256: (_T(32, 64, 8, 1),)},
        "taylor2": {64: (_T(64, 64, 4, 1),), 128: (_T(32, 64, 4, 1),), 256: (_T(32, 64, 8, 1),)},
        "float32": {dim: (_T(32, 64, 8, 1),) for dim in (64, 128)},
    },
}
_TABLES = {
    "forward": _FORWARD, "decode": _DECODE, "merge": _MERGE,
    "delta": _DELTA, "dkdv": _DKDV, "dk": _DK, "dv": _DV, "dq": _DQ, "state": _STATE,
    "rows": _ROWS, "sums": _SUMS, "sums_backward": _SUMS_BACKWARD,
}  # fmt: skip
KERNELS = tuple(_TABLES)


def _shared_bytes(kernel: str, config: TileConfig, blocks: Blocks, dtype: torch.dtype, kind: str) -> int:
    """What a program takes on sm80 and sm86: tiles that stay or are in flight; in float32 also parts of operands."""
    m, n, stages = config.block_m, config.block_n, config.num_stages
    rows = {
        "forward": stages * n, "decode": stages * n, "merge": 0,
        "delta": 0, "dq": m + stages * n, "dkdv": n + stages * m, "dk": n + stages * m,
        "dv": n + stages * m, "state": stages * m, "rows": m, "sums": stages * m, "sums_backward": m,
    }[kernel]  # fmt: skip
    numbers = rows * (blocks.block_d + blocks.block_dv)
    if dtype == torch.float32:
        numbers += (m + n) * blocks.block_d
    if kernel == "dq" and kind == "taylor2" and dtype == torch.float16:  # whose Z may exceed float16
        return 4 * numbers
    return numbers * dtype.itemsize


def kinds_of(dtype: torch.dtype, feature_map: str | None) -> tuple[str, ...]:
    """What is computed, as the tables call it, the most special first."""
    if dtype == torch.float32:
        return ("float32",)
    kind = {None: "plain", "taylor2": "taylor2"}.get(feature_map, "state")
    return (f"{kind} float16", kind) if dtype == torch.float16 else (kind,)


def tuned_file(arch: str) -> Path:
    """What `python -m bench tune --write` found on GPUs of a class with this version of triton, as versions differ.

    Its entries go before those of the tables, without a mask, rows or several centres.
    """
    return _TUNED / f"{arch}-triton-{'.'.join(map(str, _TRITON))}.json"


def tuned_key(kernel: str, kind: str, dim: int) -> str:
    """`dim` is the padded head dimension."""
    return f"{kernel}, {kind}, {dim}"


def write_tuned(arch: str, found: dict[str, TileConfig]) -> None:
    """Adds to the file of that class, or replaces what is there."""
    entries = _read_tuned(arch) | found
    path = tuned_file(arch)
    path.parent.mkdir(exist_ok=True)
    text = json.dumps({key: asdict(entries[key]) for key in sorted(entries)}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    _read_tuned.cache_clear()
    candidates.cache_clear()


@functools.cache
def _read_tuned(arch: str) -> dict[str, TileConfig]:
    path = tuned_file(arch)
    if not path.exists():
        return {}
    return {key: TileConfig(**fields) for key, fields in json.loads(path.read_text(encoding="utf-8")).items()}


@functools.cache
def candidates(
    kernel: str, arch: str, blocks: Blocks, dtype: torch.dtype, feature_map: str | None, crowded: bool = False
) -> tuple[TileConfig, ...]:
    """What the autotuner may try for one of KERNELS and such a call; the first is the default.

    `crowded`: a mask, rows or several centres need registers too.
    """
    if arch == "interpreter":
        return (TileConfig(32, 32, 4, 1),)
    kinds, dim = kinds_of(dtype, feature_map), max(64, blocks.block_d, blocks.block_dv)
    table = _TABLES[kernel]["sm80" if arch == "sm86" else arch]
    entries = next(table[name] for name in (*kinds, "plain") if name in table)[dim]
    tuned = _read_tuned(arch).get(tuned_key(kernel, kinds[0], dim))
    if tuned is not None and not crowded:  # it may not fit beside them
        entries = tuple(dict.fromkeys((tuned, *entries)))
    if arch == "sm86":
        limit = SHARED_BYTES[arch]
        entries = tuple(entry for entry in entries if _shared_bytes(kernel, entry, blocks, dtype, kinds[-1]) <= limit)
    if crowded or dtype == torch.float16 or feature_map == "taylor1" or _TRITON >= (3, 8):  # would spill
        entries = tuple(dict.fromkeys(replace(entry, max_registers=None) for entry in entries))
    if kernel == "forward" and arch in ("sm90", "sm100"):
        # Not the default before a GPU has said that they pay. Two stages: three can misalign them (triton issue 10474).
        entries += (replace(entries[0], use_descriptors=True, num_stages=min(entries[0].num_stages, 2)),)
    return entries
