"""Launches of every kernel on the meta device, for each kind of GPU, head dimension, feature map and option."""

from dataclasses import dataclass

import torch

from ntk_kernels import feature_dim
from ntk_kernels.inputs import DecodeInputs, Inputs, StateTensors
from ntk_kernels.kernels.add_prefix import ADD_PREFIX
from ntk_kernels.kernels.add_prefix_backward import ADD_PREFIX_DQ, ADD_RESIDENT_BWD
from ntk_kernels.kernels.add_second_order import (
    ADD_SECOND_ORDER,
    empty_packed,
    pack_k_launch,
    pack_z_launch,
    second_order_rows_launch,
)
from ntk_kernels.kernels.backward_delta import delta_launch
from ntk_kernels.kernels.backward_keys import DK, DKDV, DV
from ntk_kernels.kernels.backward_query import DQ
from ntk_kernels.kernels.backward_state import StateGrads, rows_launch, state_launch
from ntk_kernels.kernels.decode import DECODE, DecodeResults, decode_launch, merge_launch
from ntk_kernels.kernels.forward import FORWARD
from ntk_kernels.kernels.host import configs
from ntk_kernels.kernels.host.launch import prepare, prepare_exactly
from ntk_kernels.kernels.host.sections import SECTIONS, num_features
from ntk_kernels.kernels.jit.row_terms import RowTerms
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
    return _KERNELS[shape.kernel].launch(prepare(inputs, shape.arch), *_results(inputs), shape.config())


def _add_prefix(shape: Shape):
    inputs = shape.inputs()
    call = prepare(inputs.without_keys(), shape.arch)
    return _KERNELS[shape.kernel].launch(call, *_results(inputs), shape.config())


def _second_order(shape: Shape, section: str = ""):
    inputs = shape.inputs()
    out, lse = _results(inputs)
    call, config = prepare_exactly(inputs.without_keys(), shape.arch), shape.config()
    packed_z, packed_k = empty_packed(call)
    weights = _meta(*lse.shape[:2], 2, lse.shape[2])
    if section:
        return pack_z_launch(call, packed_z, config) if section == "z" else pack_k_launch(call, packed_k, config)
    if shape.kernel == "second_order_rows":
        return second_order_rows_launch(call, packed_k, lse, weights, config)
    return _KERNELS[shape.kernel].launch(call, packed_z, weights, out, config)


def _add_resident_bwd(shape: Shape):
    inputs = shape.inputs()
    out, lse = _results(inputs)
    sums, call = _sums_of_state(inputs.state), prepare(inputs.without_keys(), shape.arch)
    return _KERNELS[shape.kernel].launch(call, out, None, out, lse, inputs.query, sums, 2, shape.config())


def _add_prefix_dq(shape: Shape):
    inputs = shape.inputs()
    out, lse = _results(inputs)
    terms, dlogw = _terms(shape, lse)
    call = prepare(inputs.without_keys(), shape.arch)
    return _KERNELS[shape.kernel].launch(call, out, terms, inputs.query, dlogw, shape.config())


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
    return _KERNELS[shape.kernel].launch(prepare(inputs, shape.arch), out, terms, grad_key, grad_value, shape.config())


def _dq(shape: Shape):
    inputs = shape.inputs()
    out, lse = _results(inputs)
    terms, dlogw = _terms(shape, lse)
    call = prepare(inputs, shape.arch)
    return _KERNELS[shape.kernel].launch(call, out, terms, inputs.query, dlogw, shape.config())


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
    inputs = _decode_inputs(shape)
    call, table = prepare(inputs, shape.arch), inputs.block_table
    if section == "in splits":
        return decode_launch(call, _split_results(shape, inputs, 4), shape.config(), num_splits=4, block_table=table)
    out, lse, *_ = _split_results(shape, inputs, 1)
    return _KERNELS[shape.kernel].launch(call, table, 1, out[0], lse[0], shape.config())


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


_PASSES = [
    (FORWARD, _forward), (ADD_PREFIX, _add_prefix), (DKDV, _dkdv), (DK, _dkdv), (DV, _dkdv), (DQ, _dq),
    (ADD_PREFIX_DQ, _add_prefix_dq), (ADD_RESIDENT_BWD, _add_resident_bwd), (ADD_SECOND_ORDER, _second_order),
    (DECODE, _decode),
]  # fmt: skip
_KERNELS = {kernel.name: kernel for kernels, _ in _PASSES for kernel in kernels}
# The launch of each kernel; a section of features, or of gradients, follows its name behind a space.
CASES = {kernel.name: case for kernels, case in _PASSES for kernel in kernels} | {
    "delta": _delta,
    "state": _state,
    "rows": _rows,
    "merge": _merge,
    "sums": _sums,
    "sums_bwd": _sums_bwd,
    "second_order_rows": _second_order,
    "second_order_pack": _second_order,
}
SECOND_ORDER = ("add_second_order", "second_order_rows", "second_order_pack z", "second_order_pack k")
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
        listed += [Shape(arch, dim, "taylor2", kernel=kernel) for dim in (64, 128) for kernel in SECOND_ORDER]
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
    passes = [(FORWARD, FEATURE_MAPS), (DQ, FEATURE_MAPS), (DECODE, ("none", "elu", "taylor2"))]
    passes += [(kernels, ("none",)) for kernels in ((DKDV,) if head_dim <= 128 else (DK, DV))]
    maps = [
        (kernel.name, name)
        for kernels, names in passes
        for kernel in kernels
        for name in names
        if configs.has_tiles(kernel.name, arch, blocks, record.DTYPES[dtype], None if name == "none" else name)
    ]
    maps += [("delta", name) for name in ("elu", "taylor2")]
    maps += [(f"state {section}", name) for name in ("elu", "taylor2") for section in SECTIONS[name]]
    maps += [("merge", "taylor2")]
    maps += [(f"sums {section}", name) for name in ("elu", "taylor2") for section in SECTIONS[name]]
    maps += [(f"sums_bwd {section}", name) for section in GRAD_SECTIONS for name in FEATURE_MAPS[1:]]
    listed = [Shape(arch, head_dim, name, dtype=dtype, kernel=kernel) for kernel, name in maps]
    return listed + [Shape(arch, head_dim, "none", "rows", dtype, f"rows {section}") for section in ("keys", "values")]
