"""What the launchers of all passes have in common: the arguments of a call, brought into the form that kernels take."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton.language as tl

from . import autotune, configs
from .prefix import State
from .tiles import LOG2_E
from .visibility import Sequences


class Launch(NamedTuple):
    """A kernel with everything that it is called with."""

    kernel: object
    grid: tuple
    args: tuple
    constants: dict
    options: dict

    def __call__(self) -> None:
        if all(self.grid):
            self.kernel[self.grid](*self.args, **self.constants, **self.options)


def options_of(config: configs.TileConfig) -> dict:
    """What a kernel is compiled with."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    if config.max_registers is not None:
        options["maxnreg"] = config.max_registers
    return options


def addressable(tensor: torch.Tensor) -> bool:
    """Whether the kernels take a [B, H, L, D] tensor as it is: D side by side, and int32 offsets inside a tile."""
    return tensor.stride(3) == 1 and tensor.stride(2) < 2**24


def made_addressable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if addressable(tensor) else tensor.contiguous()


def strides(tensor: torch.Tensor | None) -> tuple[int, int, int]:
    """Those that the kernels want of a [B, H, L, D] or [B, H, L] tensor, if there is one."""
    return (0, 0, 0) if tensor is None else tensor.stride()[:3]


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


@dataclass
class Call:
    """A call of the op."""

    arch: str
    blocks: configs.Blocks
    query: torch.Tensor
    key: torch.Tensor | None
    value: torch.Tensor | None
    state: State
    attn_mask: torch.Tensor | None
    mask_strides: tuple
    sequences: Sequences
    batch: int  # or number of packed sequences
    seq_q: int  # the longest
    seq_k: int
    lower: int  # row i sees key j if i + lower <= j <= i + upper
    upper: int
    scale: float
    softcap: float
    feature_scale: float
    feature_map: str | None
    crowded: bool  # a mask, rows or several centres need registers too
    flags: dict  # constants of the kernels that walk keys
    prefix: dict  # constants of the kernels that evaluate the linear-attention term
    sizes: dict  # constants of both: dimensions, padded and not

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return 1 if self.key is None else self.query.shape[1] // self.key.shape[1]

    def candidates(self, kernel: str) -> tuple[configs.TileConfig, ...]:
        """Tiles that a kernel may run with, the default first."""
        dtype = self.query.dtype
        return configs.candidates(kernel, self.arch, self.blocks, dtype, self.feature_map, self.crowded)

    def shape_class(self, kernel: str) -> str:
        """What the speed of a tile depends on: never a batch size, and of lengths only their order of magnitude."""
        bucket = next((bound for bound in (512, 2048, 8192) if self.seq_k <= bound), None)
        parts = [
            kernel, f"D={self.blocks.block_d}", f"Dv={self.blocks.block_dv}",
            str(self.query.dtype).removeprefix("torch."), self.feature_map or "plain",
            "long" if bucket is None else f"keys<={bucket}",
        ]  # fmt: skip
        traits = {
            "causal": self.flags["HAS_UPPER"],
            "window": self.flags["HAS_LOWER"],
            "centres": self.state.num_centers > 1,
            "low rank": self.state.z_b is not None,
            "rows": self.state.row_keys is not None,
            "mask": self.attn_mask is not None,
            "softcap": self.flags["SOFTCAP"],
            "no keys": self.key is None,
            "packed": self.sequences.cu_seqlens_q is not None,
        }
        return " ".join(parts + [name for name, present in traits.items() if present])


def prepare(
    query, key, value, *, z=None, z_b=None, k=None, centers=None, log_scale=None, row_keys=None,
    row_values=None, row_bias=None, state_index=None, attn_mask=None, key_start=None, key_stop=None,
    cu_seqlens_q=None, cu_seqlens_k=None, feature_map=None, feature_scale=1.0, scale=1.0, softcap=0.0,
    window_left=-1, window_right=-1, causal_offset=0, max_seqlen_q=None, max_seqlen_k=None, cache_size=None,
    arch=None,
) -> Call:  # fmt: skip
    """Arguments as in `ops.py`. `arch` defaults to that of the device (`configs.py`). Without keys (`key` None, `value`
    for its head dimension) only the prefix is looked at.

    `key` and `value` may be a cache for up to `cache_size` keys a batch row, of which `key_stop` are there.
    """
    arch = configs.arch_of(query.device) if arch is None else arch
    batch, num_heads, seq_q, head_dim = query.shape
    seq_k, value_dim = (0 if key is None else value.shape[2]), value.shape[3]
    packed = cu_seqlens_q is not None
    if packed:
        batch, seq_q, seq_k = cu_seqlens_q.shape[0] - 1, min(max_seqlen_q, seq_q), min(max_seqlen_k, seq_k)
    if cache_size is not None:
        seq_k = cache_size
    query = made_addressable(query)
    key, value = (None, None) if key is None else map(made_addressable, (key, value))

    rank = 1 if z_b is None else z_b.shape[3]
    blocks = configs.blocks(arch, head_dim, value_dim, rank)
    precision = configs.precisions(arch, query.dtype)
    if feature_map == "taylor2" and query.dtype == torch.bfloat16 and cache_size is None:
        z = z.to(torch.bfloat16)  # many programs will read it, and it is so large that its traffic counts
    tensors = (z, z_b, k, centers, log_scale, row_keys, row_values, row_bias, state_index)
    state = State(*map(contiguous, tensors), query_heads_per_head=1, num_heads=0, num_centers=0, num_rows=0)
    any_of_state = k if row_keys is None else row_keys
    if any_of_state is not None:
        state = state._replace(
            query_heads_per_head=num_heads // any_of_state.shape[1],
            num_heads=any_of_state.shape[1],
            num_centers=0 if k is None else k.shape[2],
            num_rows=0 if row_keys is None else row_keys.shape[2],
        )

    # Bounds beyond any key or row are all the same.
    if packed or cache_size is not None:  # relative to each sequence's own lengths
        offset, nearest, farthest = 0, -(seq_q + seq_k), seq_q + seq_k
    else:
        offset, nearest, farthest = causal_offset, -seq_q, seq_k
    mask_strides = (0, 0, 0, 0)
    if attn_mask is not None:
        mask_strides = tuple(
            stride if size > 1 else 0 for size, stride in zip(attn_mask.shape, attn_mask.stride(), strict=True)
        )
    return Call(
        arch, blocks, query, key, value, state, attn_mask, mask_strides,
        Sequences(*map(contiguous, (cu_seqlens_q, cu_seqlens_k, key_start, key_stop))),
        batch, seq_q, seq_k,
        lower=min(max(offset - window_left, nearest), farthest),
        upper=min(max(offset + window_right, nearest), farthest),
        scale=scale, softcap=softcap * LOG2_E, feature_scale=feature_scale, feature_map=feature_map,
        crowded=attn_mask is not None or row_keys is not None or (k is not None and k.shape[2] > 1),
        flags={
            "HAS_LOWER": window_left >= 0,
            "HAS_UPPER": window_right >= 0,
            "SOFTCAP": softcap > 0,
            "PRECISION": precision.keys,
        },
        prefix={
            "FEATURE_MAP": feature_map,
            "NUM_FEATURES": 0 if k is None else k.shape[3],
            "LOGIT_PRECISION": precision.logits,
            "PREFIX_PRECISION": precision.prefix,
            "OPERAND": tl.bfloat16 if query.dtype == torch.bfloat16 else tl.float32,  # Z may exceed float16
            "CHUNK": blocks.chunk,
        },
        sizes={
            "HEAD_DIM": head_dim,
            "VALUE_DIM": value_dim,
            "BLOCK_D": blocks.block_d,
            "BLOCK_DV": blocks.block_dv,
        },
    )  # fmt: skip


def run_with_best_tiles(call: Call, kernel: str, launch_with: Callable[[configs.TileConfig], Launch]) -> None:
    """Runs a launch with the default tiles, or with NTK_KERNELS_AUTOTUNE=1 the fastest for its shape class."""
    candidates = call.candidates(kernel)
    config = candidates[0]
    if autotune.enabled():
        config = autotune.fastest(
            call.shape_class(kernel), candidates, lambda config: launch_with(config)(),
            configs.device_name(call.query.device),
        )  # fmt: skip
    launch_with(config)()
