"""Shared by all launchers: turns the record of a call into kernel arguments and keeps a plan for each kind of call.

Tensors and sizes come from the call (`Call`). Factors and constants are worked out once for a kind of call (`Kind`),
whatever its lengths, and kept with the compiled code as a `Plan` of each kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ... import replay
from ..jit.dims import dims_for
from ..jit.prefix_term import State
from ..jit.tiles import INTERPRETED, LOG2_E, Scales, Strided
from ..jit.visibility import Keys, Sequences
from . import autotune, configs

_MAX_KINDS = 1024
_MAX_INT32 = 2**31 - 1
_MIN_SCALE = 2.0**-126  # GPUs take smaller float32 numbers for 0
_MAX_SOFTCAP = 2.0**100  # a larger one changes no score, and scale / softcap would underflow
_kinds: dict[tuple, "Kind"] = {}
_NO_MASK = Strided(None, (0, 0, 0, 0))


class Plan:
    """The part of a launch that calls of a kind share whatever their lengths: constants and compiled code."""

    def __init__(self, kernel, dims, options: dict):
        self.kernel, self.dims, self.options = kernel, dims, options
        self.compiled: dict[tuple, triton.compiler.CompiledKernel] = {}  # by the facts of the arguments


class Launch(NamedTuple):
    """A kernel with everything that it is called with: tensors (and records of them), then scalars and constants."""

    plan: Plan
    grid: tuple
    tensors: tuple
    scalars: tuple

    kernel, options = property(lambda self: self.plan.kernel), property(lambda self: self.plan.options)
    args = property(lambda self: self.tensors + self.scalars)

    def __call__(self) -> None:
        if not all(self.grid):
            return
        facts: list = []
        addresses = _collect_facts(self.tensors, facts) | _collect_facts(self.scalars[:-1], facts)  # without Dims
        key = tuple(facts) if addresses % 16 == 0 else None
        recording = replay.current_recording()
        if recording is None:
            self._run(key)
        else:
            with recording.paused():  # Triton's interpreter copies tensors
                self._run(key)
            self._record(recording, key)

    def _run(self, key: tuple | None) -> None:
        """Runs the kernel that is compiled for `key`. If there is none yet, if addresses are no multiples of 16 bytes
        (None), or with hooks, Triton's launcher does, whose look at the arguments takes longer than most kernels."""
        plan = self.plan
        compiled = plan.compiled.get(key)
        if compiled is not None and not _has_hooks():
            grid, stream = _in_three(self.grid), torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())
            compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *self.args)
            return
        compiled = plan.kernel[self.grid](*self.args, **plan.options)
        if key is not None and isinstance(compiled, triton.compiler.CompiledKernel):
            plan.compiled[key] = compiled

    def _record(self, recording: "replay.Recording", key: tuple | None) -> None:
        if INTERPRETED:
            recording.launch(partial(self.kernel[self.grid], **self.options), self.args)
        elif key is not None:
            compiled = self.plan.compiled[key]
            no_hooks = (None, None, None)
            recording.launch(
                compiled.run, self.args, _in_three(self.grid),
                (compiled.function, compiled.packed_metadata, *no_hooks),
            )  # fmt: skip
        else:
            replay.refuse("addresses are no multiples of 16 bytes")


def _collect_facts(items: tuple, facts: list) -> int:
    """Appends what a kernel is compiled for beside its constants: dtypes and classes of integers. Returns the addresses
    of tensors in one number, a multiple of 16 if each is."""
    addresses = 0
    for item in items:
        if item is None:
            facts.append(None)
            continue
        kind = item.__class__
        if kind is int or kind is bool:
            facts.append((item & 15 == 0) + 2 * (item == 1) + 4 * (item > _MAX_INT32))
        elif kind is torch.Tensor or isinstance(item, torch.Tensor):
            facts.append(item.dtype)
            addresses |= item.data_ptr()
        elif isinstance(item, tuple):
            addresses |= _collect_facts(item, facts)
        elif isinstance(item, TensorDescriptor):
            facts.append((item.base.dtype, *item.block_shape))
            addresses |= item.base.data_ptr()
    return addresses


def _in_three(grid: tuple) -> tuple[int, int, int]:
    return (*grid, 1, 1)[:3]


def _has_hooks() -> bool:
    hooks = triton.knobs.runtime
    return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)


replay.watchers.append(_has_hooks)


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
    """Returns whether the kernels take a [B, H, L, D] tensor as it is: D contiguous, int32 offsets inside a tile."""
    return tensor.stride(3) == 1 and tensor.stride(2) < 2**24


def made_addressable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if addressable(tensor) else tensor.contiguous()


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def strided(tensor: torch.Tensor | None) -> Strided:
    """A [B, H, L, D] tensor as kernels take it."""
    return Strided(None, (0, 0, 0)) if tensor is None else Strided(tensor, tensor.stride()[:3])


class Sizes(NamedTuple):
    """The numbers in which calls of one kind differ, beside their tensors."""

    batch: int  # or number of packed sequences
    seq_q: int  # the longest
    seq_k: int
    lower: int  # row i sees key j if i + lower <= j <= i + upper
    upper: int


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of call: all that kernels are compiled for, but for what shows in their arguments."""

    arch: str
    device: torch.device
    dtype: torch.dtype
    blocks: configs.Blocks
    heads: int
    kv_heads: int
    scales: Scales
    feature_map: str | None
    state_sizes: tuple[int, int, int, int]  # the last four fields of State
    rounds_z: bool  # to bfloat16, as keys and values are
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

    def launch(
        self, kernel, grid: tuple, tensors: tuple, scalars: tuple, config: configs.TileConfig, **constants: Any
    ) -> Launch:
        """A launch of `kernel`. `constants` are those of this kernel, in place of the kind's or beside them."""
        key = (kernel.__name__, config, *constants.values())
        plan = self.plans.get(key)
        if plan is None:
            plan = Plan(kernel, dims_for(kernel, **self.constants | constants), options_of(config))
            self.plans[key] = plan
        return Launch(plan, grid, tensors, (*scalars, plan.dims))

    def candidates(self, kernel: str) -> tuple[configs.TileConfig, ...]:
        """Tiles that a kernel may run with, the default first."""
        return configs.candidates(
            kernel, self.arch, self.blocks, self.dtype, self.feature_map, self.crowded, self.mask_bytes
        )

    def tuned(self, kernel: str) -> configs.TileConfig | None:
        """The entry that was measured for a kernel, None if absent."""
        return configs.tuned_tile(kernel, self.arch, self.blocks, self.dtype, self.feature_map)

    def shape_class(self, kernel: str, seq_k: int) -> str:
        """The autotuning key. Batch size is left out and lengths are bucketed: they hardly change which tile is
        fastest."""
        bucket = next((bound for bound in (512, 2048, 8192) if seq_k <= bound), None)
        parts = [
            kernel, f"D={self.blocks.block_d}", f"Dv={self.blocks.block_dv}",
            str(self.dtype).removeprefix("torch."), self.feature_map or "plain",
            "long" if bucket is None else f"keys<={bucket}",
        ]  # fmt: skip
        return " ".join((*parts, *self.traits))


class Call(NamedTuple):
    """Arguments of the kernels for one call."""

    kind: Kind
    sizes: Sizes
    query: Strided
    keys: Keys | None  # None for the prefix alone
    state: State
    mask: Strided
    sequences: Sequences


def prepare(inputs, arch: str | None = None) -> Call:
    """The call of `inputs`, a record with the fields of Inputs or DecodeInputs in `ntk_kernels/inputs.py`. Without keys
    (`key` None; `value` gives its head dimension) the prefix alone. `arch` defaults to that of the device."""
    return with_rounded_z(prepare_exactly(inputs, arch))


def with_rounded_z(call: Call) -> Call:
    """The call with Z in bfloat16 where most kernels take it so."""
    if not call.kind.rounds_z:
        return call
    return call._replace(state=call.state._replace(z=call.state.z.to(torch.bfloat16)))


def prepare_exactly(inputs, arch: str | None = None) -> Call:
    """Returns the call as `prepare` does, but with Z as the state has it."""
    query, key, value, state, mask = inputs.query, inputs.key, inputs.value, inputs.state, inputs.attn_mask
    name = (
        query.device, arch, query.dtype, query.shape[1], query.shape[3], None if key is None else key.shape[1],
        value.shape[3], *[None if x is None else (x.dtype, x.shape) for x in state[:-1]], mask is None or mask.dtype,
        inputs.cu_seqlens_q is None, inputs.cache_size is None, inputs.feature_map, inputs.feature_scale, inputs.scale,
        inputs.softcap, inputs.window_left >= 0, inputs.window_right >= 0,
    )  # fmt: skip
    kind = _kinds.get(name)
    if kind is None:
        if len(_kinds) >= _MAX_KINDS:
            _kinds.clear()
        kind = _kinds[name] = _kind_of(inputs, configs.arch_of(query.device) if arch is None else arch)
    keys = None
    if key is not None:
        keys = Keys(strided(made_addressable(key)), strided(made_addressable(value)), None, None)
    if mask is not None:
        strides = zip(mask.shape, mask.stride(), strict=True)
        mask = Strided(mask, tuple(stride if size > 1 else 0 for size, stride in strides))
    sequences = (inputs.cu_seqlens_q, inputs.cu_seqlens_k, inputs.key_start, inputs.key_stop)
    return Call(
        kind,
        _sizes_of(inputs),
        strided(made_addressable(query)),
        keys,
        State(*[x if x is None or x.is_contiguous() else x.contiguous() for x in state], *kind.state_sizes),
        _NO_MASK if mask is None else mask,
        Sequences(*map(contiguous, sequences)),
    )


def _sizes_of(inputs) -> Sizes:
    batch, _, seq_q, _ = inputs.query.shape
    seq_k = 0 if inputs.key is None else inputs.value.shape[2]
    is_packed, cache_size = inputs.cu_seqlens_q is not None, inputs.cache_size
    if is_packed:
        batch = inputs.cu_seqlens_q.shape[0] - 1
        seq_q, seq_k = min(inputs.max_seqlen_q, seq_q), min(inputs.max_seqlen_k, seq_k)
    if cache_size is not None:
        seq_k = cache_size
    # Bounds beyond any key or row are all the same.
    if is_packed or cache_size is not None:  # relative to each sequence's own lengths
        offset, min_bound, max_bound = 0, -(seq_q + seq_k), seq_q + seq_k
    else:
        offset, min_bound, max_bound = inputs.causal_offset, -seq_q, seq_k
    lower, upper = offset - inputs.window_left, offset + inputs.window_right
    return Sizes(batch, seq_q, seq_k, min(max(lower, min_bound), max_bound), min(max(upper, min_bound), max_bound))


def _kind_of(inputs, arch: str) -> Kind:
    query, key, value, state, mask = inputs.query, inputs.key, inputs.value, inputs.state, inputs.attn_mask
    heads, head_dim, value_dim = query.shape[1], query.shape[3], value.shape[3]
    rank = 1 if state.z_b is None else state.z_b.shape[3]
    blocks = configs.blocks(arch, head_dim, value_dim, rank)
    precision = configs.precisions(arch, query.dtype)
    num_centers = 0 if state.k is None else state.k.shape[2]
    num_rows = 0 if state.row_keys is None else state.row_keys.shape[2]
    scale = inputs.scale if abs(inputs.scale) >= _MIN_SCALE else 0.0
    any_of_state = state.row_keys if state.k is None else state.k
    state_heads = 0 if any_of_state is None else any_of_state.shape[1]
    in_bfloat16 = query.dtype == torch.bfloat16
    traits = {
        "causal": inputs.window_right >= 0,
        "window": inputs.window_left >= 0,
        "centres": num_centers > 1,
        "low rank": state.z_b is not None,
        "rows": num_rows > 0,
        "mask": mask is not None,
        "softcap": inputs.softcap > 0,
        "packed": inputs.cu_seqlens_q is not None,
    }
    constants = {
        "HAS_LOWER": inputs.window_left >= 0,
        "HAS_UPPER": inputs.window_right >= 0,
        "SOFTCAP": inputs.softcap > 0,
        "HAS_SCALE": scale != 0,
        "POSITIVE_SCALE": scale > 0,
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
        arch=arch, device=query.device, dtype=query.dtype, blocks=blocks, heads=heads,
        kv_heads=heads if key is None else key.shape[1],
        scales=Scales(
            scale * LOG2_E.value, min(inputs.softcap, _MAX_SOFTCAP) * LOG2_E.value, inputs.feature_scale
        ),
        feature_map=inputs.feature_map,
        state_sizes=(heads // state_heads if state_heads else 1, state_heads, num_centers, num_rows),
        # Many programs will read Z; see add_taylor for the exception.
        rounds_z=(
            state.z is not None and in_bfloat16 and inputs.cache_size is None
            and (inputs.feature_map != "taylor1" or blocks.block_d <= 128)
        ),
        mask_bytes=0 if mask is None else mask.dtype.itemsize,
        crowded=mask is not None or num_rows > 0 or num_centers > 1,
        traits=tuple(name for name, present in traits.items() if present), constants=constants,
    )  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """A kernel of a pass. A pass is a tuple of kernels, of which the first that serves a call runs."""

    name: str  # in the tables of tiles, the tuned files and the baselines
    launch: Callable  # launch(call, *tensors, config): the Launch, or a function that makes several
    serves: Callable[[Call], bool] = lambda call: True
    tiles: dict | None = None  # its table, as in `tile_tables.py`; None if it is there

    def __post_init__(self):
        if self.tiles is not None:
            configs.TABLES[self.name] = self.tiles


def is_chosen(call: Call, kernel: str) -> bool:
    """Returns whether a kernel that is no default may serve a call: where `bench tune --write` has found that it is
    right and faster, and with NTK_KERNELS_AUTOTUNE=1."""
    return autotune.enabled() or call.kind.tuned(kernel) is not None


def run_pass(kernels: tuple[Kernel, ...], call: Call, *arguments, updated: tuple = ()) -> None:
    """Runs the first of the kernels that serves the call, with the default tiles, or with NTK_KERNELS_AUTOTUNE=1 the
    fastest for the shape class of the call.

    `updated`: the tensors that it adds to, restored after the launches that are only measured.
    """
    kernel = next(kernel for kernel in kernels if kernel.serves(call))
    kind, candidates = call.kind, call.kind.candidates(kernel.name)
    config, kept = candidates[0], []

    def run(config: configs.TileConfig) -> None:
        if not kept:
            kept.extend((tensor, tensor.clone()) for tensor in updated if tensor is not None)
        kernel.launch(call, *arguments, config)()

    if autotune.enabled():
        replay.refuse("launches are measured")
        config = autotune.fastest(
            kind.shape_class(kernel.name, call.sizes.seq_k), candidates, run, configs.device_name(kind.device)
        )
        for tensor, before in kept:
            tensor.copy_(before)
    kernel.launch(call, *arguments, config)()
