"""What the launchers of all passes have in common: the arguments of a call, brought into the form that kernels take."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..jit.prefix_term import State
from ..jit.tiles import LOG2_E
from ..jit.visibility import Sequences
from . import autotune, configs

_MAX_REMEMBERED = 1024  # kinds of calls
_remembered: dict[tuple, "Call"] = {}


class Plan:
    """What launches of a kernel for one kind of call have in common: all but the tensors."""

    def __init__(self, kernel, grid: tuple, scalars: tuple, constants: dict, options: dict):
        self.kernel, self.grid, self.scalars = kernel, grid, scalars
        self.constants, self.options = constants, options
        self.run = None  # the compiled kernel, for tensors at multiples of 16 bytes


class Launch(NamedTuple):
    """A kernel with everything that it is called with: first tensors (and tuples of them), then scalars."""

    plan: Plan
    tensors: tuple

    kernel, grid = property(lambda self: self.plan.kernel), property(lambda self: self.plan.grid)
    args = property(lambda self: self.tensors + self.plan.scalars)
    constants, options = property(lambda self: self.plan.constants), property(lambda self: self.plan.options)

    def __call__(self) -> None:
        plan = self.plan
        if plan.run is not None and _addresses(self.tensors) % 16 == 0:
            plan.run(*self.tensors, *plan.scalars, *plan.constants.values())
        elif all(plan.grid):
            self._compile_and_run()

    def _compile_and_run(self) -> None:
        """Through Triton's own launcher, which takes longer to look at the arguments than most kernels run."""
        plan = self.plan
        compiled = plan.kernel[plan.grid](*self.args, **plan.constants, **plan.options)
        if isinstance(compiled, triton.compiler.CompiledKernel) and _addresses(self.tensors) % 16 == 0:
            plan.run = compiled[(*plan.grid, 1, 1)[:3]]


def _addresses(tensors: tuple) -> int:
    """All addresses in one number, a multiple of 16 if each is."""
    bits = 0
    for item in tensors:
        if item is None:
            continue
        if isinstance(item, torch.Tensor):
            bits |= item.data_ptr()
        elif isinstance(item, tuple):
            bits |= _addresses(item)
    return bits


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. On the host `triton.cdiv` takes microseconds, which a decoding step notices."""
    return -(-a // b)


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
    plans: dict = field(default_factory=dict)  # of the launches of such calls

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return 1 if self.key is None else self.query.shape[1] // self.key.shape[1]

    def copy(self) -> "Call":
        call = object.__new__(Call)
        call.__dict__.update(self.__dict__)
        return call

    def launch(self, kernel, tensors: tuple, config: configs.TileConfig, describe: Callable, *details) -> Launch:
        """A launch of `kernel`. `describe()` gives grid, scalars and constants; they depend on the kind of call, the
        tiles, and `details`."""
        key = (kernel.__name__, config, *details)
        if key not in self.plans:
            grid, scalars, constants = describe()
            names = kernel.arg_names[len(tensors) + len(scalars) :]
            constants = {name: constants[name] for name in names}  # in the order of the arguments
            self.plans[key] = Plan(kernel, grid, scalars, constants, options_of(config))
        return Launch(self.plans[key], tensors)

    def candidates(self, kernel: str) -> tuple[configs.TileConfig, ...]:
        """Tiles that a kernel may run with, the default first."""
        dtype = self.query.dtype
        mask_bytes = 0 if self.attn_mask is None else self.attn_mask.dtype.itemsize
        return configs.candidates(kernel, self.arch, self.blocks, dtype, self.feature_map, self.crowded, mask_bytes)

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
    """Arguments as in `library.py`. `arch` defaults to that of the device (`configs.py`). Without keys (`key` None,
    `value` for its head dimension) only the prefix is looked at.

    `key` and `value` may be a cache for up to `cache_size` keys a batch row, of which `key_stop` are there.
    """
    arch = configs.arch_of(query.device) if arch is None else arch
    of_state = (z, z_b, k, centers, log_scale, row_keys, row_values, row_bias, state_index)
    of_sequences = (cu_seqlens_q, cu_seqlens_k, key_start, key_stop)
    options = (
        feature_map, feature_scale, scale, softcap, window_left, window_right, causal_offset, max_seqlen_q,
        max_seqlen_k, cache_size, arch,
    )  # fmt: skip
    kind = (query.device, *map(_look, (query, key, value, attn_mask, *of_state, *of_sequences)), options)
    if kind not in _remembered:
        if len(_remembered) >= _MAX_REMEMBERED:
            _remembered.clear()
        _remembered[kind] = _describe(query, key, value, of_state, attn_mask, of_sequences, *options)
    call = _remembered[kind].copy()
    if z is not None and query.dtype == torch.bfloat16 and cache_size is None:
        if feature_map != "taylor1" or call.blocks.block_d <= 128:  # see add_taylor
            z = z.to(torch.bfloat16)  # as keys and values are; here, as many programs will read it
    call.query = made_addressable(query)
    call.key, call.value = (None, None) if key is None else map(made_addressable, (key, value))
    call.attn_mask = attn_mask
    call.state = State(*map(contiguous, (z, *of_state[1:])), *call.state[len(of_state) :])
    call.sequences = Sequences(*map(contiguous, of_sequences))
    return call


def _look(tensor: torch.Tensor | None) -> tuple | None:
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride())


def layout(tensor: torch.Tensor | None) -> tuple | None:
    """What a kernel is compiled for, of a tensor whose shape the kind of call tells."""
    return None if tensor is None else (tensor.dtype, tensor.stride())


def _describe(
    query, key, value, of_state, attn_mask, of_sequences, feature_map, feature_scale, scale, softcap, window_left,
    window_right, causal_offset, max_seqlen_q, max_seqlen_k, cache_size, arch,
) -> Call:  # fmt: skip
    """A kind of call, without its tensors."""
    z_b, k, row_keys = of_state[1], of_state[2], of_state[5]
    batch, num_heads, seq_q, head_dim = query.shape
    seq_k, value_dim = (0 if key is None else value.shape[2]), value.shape[3]
    packed = of_sequences[0] is not None
    if packed:
        batch, seq_q, seq_k = of_sequences[0].shape[0] - 1, min(max_seqlen_q, seq_q), min(max_seqlen_k, seq_k)
    if cache_size is not None:
        seq_k = cache_size
    rank = 1 if z_b is None else z_b.shape[3]
    blocks = configs.blocks(arch, head_dim, value_dim, rank)
    precision = configs.precisions(arch, query.dtype)
    state = State(*[None] * len(of_state), query_heads_per_head=1, num_heads=0, num_centers=0, num_rows=0)
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
        arch, blocks, None, None, None, state, None, mask_strides, None, batch, seq_q, seq_k,
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


def run_with_best_tiles(
    call: Call, kernel: str, launch_with: Callable[[configs.TileConfig], Launch], updated: tuple = ()
) -> None:
    """Runs a launch with the default tiles, or with NTK_KERNELS_AUTOTUNE=1 the fastest for its shape class.

    `updated`: the tensors that it adds to, which are as they were after the launches that are only measured.
    """
    candidates = call.candidates(kernel)
    config, kept = candidates[0], []

    def run(config: configs.TileConfig) -> None:
        if not kept:
            kept.extend((tensor, tensor.clone()) for tensor in updated if tensor is not None)
        launch_with(config)()

    if autotune.enabled():
        config = autotune.fastest(call.shape_class(kernel), candidates, run, configs.device_name(call.query.device))
        for tensor, before in kept:
            tensor.copy_(before)
    launch_with(config)()
