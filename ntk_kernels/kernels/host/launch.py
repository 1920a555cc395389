"""Shared by all launchers: turns the record of a call into kernel arguments and keeps a plan for each kind of call.

The arguments of a launch have two parts. The tensors come from the call (`Call`); the rest, grid, lengths, factors and
constants, is worked out once for a kind of call (`Kind`) and kept as a `Plan`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ... import replay
from ..jit.dims import dims_for
from ..jit.prefix_term import State
from ..jit.tiles import INTERPRETED, LOG2_E, Scales, Strided
from ..jit.visibility import Keys, Sequences
from . import autotune, configs

_MAX_KINDS = 1024
_kinds: dict[tuple, "Kind"] = {}
_NO_MASK = Strided(None, (0, 0, 0, 0))


class Plan:
    """The part of a launch that all calls of a kind share: all but the tensors."""

    def __init__(self, kernel, grid: tuple, scalars: tuple, options: dict):
        self.kernel, self.grid, self.scalars, self.options = kernel, grid, scalars, options
        self.compiled = None  # the kernel, for tensors at multiples of 16 bytes
        self.run = None


class Launch(NamedTuple):
    """A kernel with everything that it is called with: tensors (and records of them), then scalars and constants."""

    plan: Plan
    tensors: tuple

    kernel, grid = property(lambda self: self.plan.kernel), property(lambda self: self.plan.grid)
    args = property(lambda self: self.tensors + self.plan.scalars)
    options = property(lambda self: self.plan.options)

    def __call__(self) -> None:
        plan = self.plan
        if not all(plan.grid):
            return
        is_aligned = _addresses(self.tensors) % 16 == 0
        recording = replay.current_recording()
        if recording is None:
            self._run(is_aligned)
        else:
            with recording.paused():  # Triton's interpreter copies tensors
                self._run(is_aligned)
            self._record(recording, is_aligned)

    def _run(self, is_aligned: bool) -> None:
        plan = self.plan
        if plan.run is not None and is_aligned:
            plan.run(*self.tensors, *plan.scalars)
        else:
            self._compile_and_run(is_aligned)

    def _compile_and_run(self, is_aligned: bool) -> None:
        """Slow path: Triton's launcher, whose inspection of the arguments takes longer than most of these kernels."""
        plan = self.plan
        compiled = plan.kernel[plan.grid](*self.args, **plan.options)
        if isinstance(compiled, triton.compiler.CompiledKernel) and is_aligned:
            plan.compiled, plan.run = compiled, compiled[_in_three(plan.grid)]

    def _record(self, recording: "replay.Recording", is_aligned: bool) -> None:
        plan = self.plan
        if INTERPRETED:
            recording.launch(partial(plan.kernel[plan.grid], **plan.options), self.args)
        elif is_aligned:
            kernel = plan.compiled
            no_hooks = (None, None, None)
            recording.launch(
                kernel.run, self.args, _in_three(plan.grid), (kernel.function, kernel.packed_metadata, *no_hooks)
            )
        else:
            replay.refuse("addresses are no multiples of 16 bytes")


def _in_three(grid: tuple) -> tuple[int, int, int]:
    return (*grid, 1, 1)[:3]


def _has_hooks() -> bool:
    hooks = triton.knobs.runtime
    return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)


replay.watchers.append(_has_hooks)


def _addresses(tensors: tuple) -> int:
    """All addresses in one number, a multiple of 16 if each is."""
    bits = 0
    for item in tensors:
        if item is None:
            continue
        if isinstance(item, torch.Tensor):
            bits |= item.data_ptr()
        elif isinstance(item, Strided):
            if item.ptr is not None:
                bits |= item.ptr.data_ptr()
        elif isinstance(item, tuple):
            bits |= _addresses(item)
    return bits


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. On the host `triton.cdiv` takes microseconds, which a decoding step notices."""
    return -(-a // b)


def options_of(config: configs.TileConfig) -> dict:
    """Options of the compiler."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    if config.max_registers is not None:
        options["maxnreg"] = config.max_registers
    return options


def addressable(tensor: torch.Tensor) -> bool:
    """Whether the kernels take a [B, H, L, D] tensor as it is: D contiguous, and int32 offsets inside a tile."""
    return tensor.stride(3) == 1 and tensor.stride(2) < 2**24


def made_addressable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if addressable(tensor) else tensor.contiguous()


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def strided(tensor: torch.Tensor | None) -> Strided:
    """A [B, H, L, D] tensor as kernels take it."""
    return Strided(None, (0, 0, 0)) if tensor is None else Strided(tensor, tensor.stride()[:3])


def signature(tensor: torch.Tensor | None) -> tuple | None:
    """The facts of a tensor that a kernel is compiled for; its shape is known from the kind of call."""
    return None if tensor is None else (tensor.dtype, tensor.stride())


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of call: calls that share shapes, dtypes, strides and options, and with them grids and constants."""

    arch: str
    device: torch.device
    dtype: torch.dtype
    blocks: configs.Blocks
    batch: int  # or number of packed sequences
    heads: int
    kv_heads: int
    seq_q: int  # the longest
    seq_k: int
    lower: int  # row i sees key j if i + lower <= j <= i + upper
    upper: int
    scales: Scales
    feature_map: str | None
    state_sizes: tuple[int, int, int, int]  # the last four fields of State
    rounds_z: bool  # to bfloat16, as keys and values are
    mask_strides: tuple
    mask_bytes: int  # of a number of the mask; 0 without one
    crowded: bool  # a mask, rows or several centres need registers too
    traits: tuple[str, ...]  # that the speed of a tile depends on
    constants: dict  # of all kernels, but for those of their tiles
    plans: dict = field(default_factory=dict)

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.heads // self.kv_heads

    @property
    def z_chunk(self) -> int:
        """Features of a step of the forward passes."""
        narrow = self.blocks.block_dv <= self.blocks.block_d  # else it would not fit
        in_half = self.dtype != torch.float32
        if self.feature_map == "elu" and self.arch == "sm90" and in_half and narrow and not self.crowded:
            return min(self.blocks.block_d, 128)  # all of Z is fetched at once: programs wait for it less
        return self.blocks.chunk

    def launch(self, kernel, tensors: tuple, config: configs.TileConfig, describe: Callable, *details) -> Launch:
        """A launch of `kernel`. `describe()` gives grid, scalars and constants; they depend on the kind of call, the
        tiles, and `details`."""
        key = (kernel.__name__, config, *details)
        plan = self.plans.get(key)
        if plan is None:
            grid, scalars, constants = describe()
            scalars = (*scalars, dims_for(kernel, **constants))
            plan = self.plans[key] = Plan(kernel, grid, scalars, options_of(config))
        return Launch(plan, tensors)

    def candidates(self, kernel: str) -> tuple[configs.TileConfig, ...]:
        """Tiles that a kernel may run with, the default first."""
        return configs.candidates(
            kernel, self.arch, self.blocks, self.dtype, self.feature_map, self.crowded, self.mask_bytes
        )

    def shape_class(self, kernel: str) -> str:
        """The autotuning key. Batch size is left out and lengths are bucketed: they hardly change which tile is
        fastest."""
        bucket = next((bound for bound in (512, 2048, 8192) if self.seq_k <= bound), None)
        parts = [
            kernel, f"D={self.blocks.block_d}", f"Dv={self.blocks.block_dv}",
            str(self.dtype).removeprefix("torch."), self.feature_map or "plain",
            "long" if bucket is None else f"keys<={bucket}",
        ]  # fmt: skip
        return " ".join((*parts, *self.traits))


class Call(NamedTuple):
    """Arguments of the kernels for one call."""

    kind: Kind
    query: Strided
    keys: Keys | None  # None for the prefix alone
    state: State
    mask: Strided
    sequences: Sequences


def prepare(inputs, arch: str | None = None) -> Call:
    """The call of `inputs`, a record with the fields of Inputs or DecodeInputs in `ntk_kernels/inputs.py`. Without keys
    (`key` None; `value` gives its head dimension) the prefix alone. `arch` defaults to that of the device."""
    signatures = (_shape_and_signature(x) if isinstance(x, torch.Tensor) else x for x in inputs.flat())
    key = (inputs.query.device, arch, *signatures)
    kind = _kinds.get(key)
    if kind is None:
        if len(_kinds) >= _MAX_KINDS:
            _kinds.clear()
        kind = _kinds[key] = _kind_of(inputs, configs.arch_of(inputs.query.device) if arch is None else arch)
    state, mask, keys = inputs.state, inputs.attn_mask, None
    if kind.rounds_z:
        state = state._replace(z=state.z.to(torch.bfloat16))
    if inputs.key is not None:
        keys = Keys(strided(made_addressable(inputs.key)), strided(made_addressable(inputs.value)), None, None)
    sequences = (inputs.cu_seqlens_q, inputs.cu_seqlens_k, inputs.key_start, inputs.key_stop)
    return Call(
        kind,
        strided(made_addressable(inputs.query)),
        keys,
        State(*map(contiguous, state), *kind.state_sizes),
        _NO_MASK if mask is None else Strided(mask, kind.mask_strides),
        Sequences(*map(contiguous, sequences)),
    )


def _shape_and_signature(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tensor.shape, tensor.stride()


def _kind_of(inputs, arch: str) -> Kind:
    query, key, value, state, mask = inputs.query, inputs.key, inputs.value, inputs.state, inputs.attn_mask
    batch, heads, seq_q, head_dim = query.shape
    seq_k, value_dim = (0 if key is None else value.shape[2]), value.shape[3]
    packed = inputs.cu_seqlens_q is not None
    if packed:
        batch = inputs.cu_seqlens_q.shape[0] - 1
        seq_q, seq_k = min(inputs.max_seqlen_q, seq_q), min(inputs.max_seqlen_k, seq_k)
    if inputs.cache_size is not None:
        seq_k = inputs.cache_size
    # Bounds beyond any key or row are all the same.
    if packed or inputs.cache_size is not None:  # relative to each sequence's own lengths
        offset, min_bound, max_bound = 0, -(seq_q + seq_k), seq_q + seq_k
    else:
        offset, min_bound, max_bound = inputs.causal_offset, -seq_q, seq_k

    rank = 1 if state.z_b is None else state.z_b.shape[3]
    blocks = configs.blocks(arch, head_dim, value_dim, rank)
    precision = configs.precisions(arch, query.dtype)
    num_centers = 0 if state.k is None else state.k.shape[2]
    num_rows = 0 if state.row_keys is None else state.row_keys.shape[2]
    any_of_state = state.row_keys if state.k is None else state.k
    state_heads = 0 if any_of_state is None else any_of_state.shape[1]
    in_bfloat16 = query.dtype == torch.bfloat16
    mask_strides = (0, 0, 0, 0)
    if mask is not None:
        mask_strides = tuple(stride if size > 1 else 0 for size, stride in zip(mask.shape, mask.stride(), strict=True))
    traits = {
        "causal": inputs.window_right >= 0,
        "window": inputs.window_left >= 0,
        "centres": num_centers > 1,
        "low rank": state.z_b is not None,
        "rows": num_rows > 0,
        "mask": mask is not None,
        "softcap": inputs.softcap > 0,
        "packed": packed,
    }
    constants = {
        "HAS_LOWER": inputs.window_left >= 0,
        "HAS_UPPER": inputs.window_right >= 0,
        "SOFTCAP": inputs.softcap > 0,
        "HAS_SCALE": inputs.scale != 0,
        "POSITIVE_SCALE": inputs.scale > 0,
        "PRECISION": precision.keys,
        "LOGIT_PRECISION": precision.logits,
        "PREFIX_PRECISION": precision.prefix,
        "FEATURE_MAP": inputs.feature_map,
        "NUM_FEATURES": 0 if state.k is None else state.k.shape[3],
        "OPERAND": tl.bfloat16 if in_bfloat16 else tl.float32,  # Z may exceed float16
        "CHUNK": blocks.chunk,
        "RANK": rank,
        "BLOCK_RANK": blocks.block_rank,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": blocks.block_d,
        "BLOCK_DV": blocks.block_dv,
    }
    return Kind(
        arch=arch, device=query.device, dtype=query.dtype, blocks=blocks, batch=batch, heads=heads,
        kv_heads=heads if key is None else key.shape[1], seq_q=seq_q, seq_k=seq_k,
        lower=min(max(offset - inputs.window_left, min_bound), max_bound),
        upper=min(max(offset + inputs.window_right, min_bound), max_bound),
        scales=Scales(inputs.scale * LOG2_E.value, inputs.softcap * LOG2_E.value, inputs.feature_scale),
        feature_map=inputs.feature_map,
        state_sizes=(heads // state_heads if state_heads else 1, state_heads, num_centers, num_rows),
        # Many programs will read Z; see add_taylor for the exception.
        rounds_z=(
            state.z is not None and in_bfloat16 and inputs.cache_size is None
            and (inputs.feature_map != "taylor1" or blocks.block_d <= 128)
        ),
        mask_strides=mask_strides, mask_bytes=0 if mask is None else mask.dtype.itemsize,
        crowded=mask is not None or num_rows > 0 or num_centers > 1,
        traits=tuple(name for name, present in traits.items() if present), constants=constants,
    )  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """A kernel of a pass. A pass is a tuple of kernels, of which the first that serves a call runs."""

    name: str  # in the tables of tiles, the tuned files and the baselines
    launch: Callable  # launch(call, *tensors, config): the Launch
    serves: Callable[[Call], bool] = lambda call: True
    tiles: dict | None = None  # its table, as in `tile_tables.py`; None if it is there

    def __post_init__(self):
        if self.tiles is not None:
            configs.TABLES[self.name] = self.tiles


def run_pass(kernels: tuple[Kernel, ...], call: Call, *tensors, updated: tuple = ()) -> None:
    """Runs the first of the kernels that serves the call."""
    kernel = next(kernel for kernel in kernels if kernel.serves(call))
    run_with_best_tiles(call.kind, kernel.name, partial(kernel.launch, call, *tensors), updated)


def run_with_best_tiles(
    kind: Kind, kernel: str, launch_with: Callable[[configs.TileConfig], Launch], updated: tuple = ()
) -> None:
    """Runs a launch with the default tiles, or with NTK_KERNELS_AUTOTUNE=1 the fastest for its shape class.

    `updated`: the tensors that it adds to, restored after the launches that are only measured.
    """
    candidates = kind.candidates(kernel)
    config, kept = candidates[0], []

    def run(config: configs.TileConfig) -> None:
        if not kept:
            kept.extend((tensor, tensor.clone()) for tensor in updated if tensor is not None)
        launch_with(config)()

    if autotune.enabled():
        replay.refuse("launches are measured")
        config = autotune.fastest(kind.shape_class(kernel), candidates, run, configs.device_name(kind.device))
        for tensor, before in kept:
            tensor.copy_(before)
    launch_with(config)()
