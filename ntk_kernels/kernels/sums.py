"""Sums of features over the rows of a prefix that are nearest to each centre, forward and backward.

    z_c = Σ_j w_j φ(y_j) v_jᵀ    k_c = Σ_j w_j φ(y_j)    count_c = Σ_j w_j    y_j = key_scale · (k_j - μ_c)

    dv_j = w_j φ(y_j)ᵀ dz_c      dk_j = w_j key_scale · φ'(y_j)ᵀ (dz_c v_j + dk_c)      dμ_c = -Σ_j dk_j

With several centres the rows are gathered through `order`, in which those of a centre lie together.

A program of the forward owns a block of features of one centre and takes every n-th tile of its rows, n being the
number of splits; their partial sums are added up afterwards, in float64. Features come in sections, a launch each, as
in `backward_state.py`. Half precision values are multiplied by features in two parts of 8 bits. A program of the
backward takes every n-th tile of the rows of a centre. No atomics: the order of a sum depends on shapes and the number
of multiprocessors, never on timing.

Grid: forward (blocks of features · centres · heads, splits), backward (centres · heads, splits).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .host import configs
from .host.launch import Launch, Plan, ceil_div, contiguous, options_of
from .host.sections import SECTIONS, num_blocks, num_features
from .jit.dims import dims_for
from .jit.features import add_elu, add_taylor, feature_index, load_column, load_columns, section_of, section_start
from .jit.prefix_term_grad import features_grad
from .jit.tiles import Strided, dot, rounded_to, state_dot, store_tile

GRAD_SECTIONS = {"values": ("value",), "keys": ("key", "centers")}  # a launch each
_MAX_ROWS_OF_SPLIT = 2**15  # on average over the centres: more would lose digits in float32


class PrefixRows(NamedTuple):
    """The rows that the sums go over; all but keys and values contiguous."""

    key: object  # Strided [H, m, D], strides of H and m
    value: object  # Strided [H, m, Dv]
    weights: object  # [H, m]; None: 1
    centers: object  # [H, C, D]; None: one, the origin
    order: object  # [H, m], numbers of rows; None, as the offsets, with one centre
    offsets: object  # [H, C + 1], where the rows of each centre begin in it


class Sums(NamedTuple):
    """Partial sums [splits, H, C, ...] of a section's features, float32."""

    z: object
    k: object
    count: object  # None but in the first section


class SumGrads(NamedTuple):
    """Gradients; None for those that nobody wants."""

    key: object  # [H, m, D]
    value: object  # [H, m, Dv]
    centers: object  # [splits, H, C, D], float32


@triton.jit
def _range_of(rows, head, c, num_rows, num_centers):
    """First row of a centre, and the first that is no longer its own, counted in `order`."""
    start, stop = tl.cast(0, tl.int64), tl.cast(num_rows, tl.int64)
    if rows.order is not None:
        offsets = rows.offsets + head * (num_centers + 1) + c
        start, stop = tl.load(offsets), tl.load(offsets + 1)
    return start, stop


@triton.jit
def _load_rows(rows, head, first, stop, num_rows, BLOCK_M: tl.constexpr):
    """Numbers of a tile's rows [M], at least num_rows for what is beyond the last, and their weights [M], then 0."""
    at = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_M)
    exist = at < stop
    u = exist.to(tl.float32)
    if rows.order is not None:
        at = tl.load(rows.order + head * num_rows + at, mask=exist, other=num_rows)
    if rows.weights is not None:
        u = tl.load(rows.weights + head * num_rows + at, mask=exist, other=0.0).to(tl.float32)
    return at, u


@triton.jit
def _values_dot(v, phi, acc, PRECISION: tl.constexpr):
    """acc + vᵀ @ φ. The computed side on the right: transposed, on the left, Hopper reads it wrong (fla issue 640)."""
    if v.dtype == tl.bfloat16:
        part = rounded_to(phi, tl.bfloat16)
        acc = dot(v.T, part, acc, PRECISION)
        acc = dot(v.T, rounded_to(phi - part.to(tl.float32), tl.bfloat16), acc, PRECISION)
    else:
        acc = state_dot(v.T, phi, acc, v.dtype, 2, PRECISION)
    return acc


@triton.jit(do_not_specialize=["num_rows", "num_heads", "num_centers", "splits"])
def _ntk_sum_features_kernel(rows, sums, num_rows, num_heads, num_centers, splits, key_scale, dims):
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    c = tl.program_id(0) // num_heads % num_centers
    block = tl.program_id(0) // num_heads // num_centers
    split = tl.program_id(1)
    num_chunks: tl.constexpr = (dims.HEAD_DIM + dims.CHUNK - 1) // dims.CHUNK
    first_column = block % num_chunks * dims.CHUNK
    a = block // num_chunks
    if dims.SECTION == "pairs":
        if first_column + dims.CHUNK <= a + 1:  # no pair has b <= a
            return
    center = head * num_centers + c
    mu_ptr = None
    if rows.centers is not None:
        mu_ptr = rows.centers + center * dims.HEAD_DIM
    start, stop = _range_of(rows, head, c, num_rows, num_centers)

    z = tl.zeros([dims.BLOCK_DV, dims.CHUNK], tl.float32)
    k = tl.zeros([dims.CHUNK], tl.float32)
    z_1 = tl.zeros([dims.BLOCK_DV], tl.float32)
    count = tl.zeros([dims.BLOCK_M], tl.float32)
    for first in tl.range(start + split * dims.BLOCK_M, stop, splits * dims.BLOCK_M, num_stages=dims.STAGES):
        at, u = _load_rows(rows, head, first, stop, num_rows, dims.BLOCK_M)
        exist = (at < num_rows)[:, None]
        k_rows = rows.key.ptr + head * rows.key.stride[0] + at[:, None] * rows.key.stride[1]
        v_rows = rows.value.ptr + head * rows.value.stride[0] + at[:, None] * rows.value.stride[1]
        v = load_columns(v_rows, exist, 0, dims.VALUE_DIM, dims.BLOCK_DV)
        y = load_columns(k_rows, exist, first_column, dims.HEAD_DIM, dims.CHUNK, mu_ptr).to(tl.float32)
        y, y_a = key_scale * y, None
        if dims.SECTION == "pairs":
            y_a = key_scale * load_column(k_rows, exist, a, mu_ptr)
        phi = u[:, None] * section_of(y, y_a, dims.SECTION)
        z = _values_dot(v, phi, z, dims.PREFIX_PRECISION)
        k += tl.sum(phi, 0)
        if dims.SECTION == "linear":
            z_1 += tl.sum(u[:, None] * v.to(tl.float32), 0)
        count += u

    center += split.to(tl.int64) * num_heads * num_centers
    columns = first_column + tl.arange(0, dims.CHUNK)
    features = feature_index(columns, a, dims.SECTION, dims.HEAD_DIM) - section_start(dims.SECTION, dims.HEAD_DIM)
    exist = columns < dims.HEAD_DIM
    if dims.SECTION == "pairs":
        exist = exist & (columns > a)
    values = tl.arange(0, dims.BLOCK_DV)
    z_ptr = sums.z + center * dims.NUM_FEATURES * dims.VALUE_DIM
    k_ptr = sums.k + center * dims.NUM_FEATURES
    ptrs = z_ptr + features[None, :] * dims.VALUE_DIM + values[:, None]
    tl.store(ptrs, z, mask=exist[None, :] & (values < dims.VALUE_DIM)[:, None])
    tl.store(k_ptr + features, k, mask=exist)
    if block == 0:
        if dims.SECTION == "linear":
            tl.store(z_ptr + values, z_1, mask=values < dims.VALUE_DIM)
            tl.store(k_ptr, tl.sum(count, 0))
        if sums.count is not None:
            tl.store(sums.count + center, tl.sum(count, 0))


@triton.jit(do_not_specialize=["num_rows", "num_heads", "num_centers", "splits"])
def _ntk_sum_features_bwd_kernel(rows, z_ptr, k_ptr, grads, num_rows, num_heads, num_centers, splits, key_scale, dims):
    """`z_ptr` and `k_ptr` are the gradients of z and k."""
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    c = tl.program_id(0) // num_heads
    split = tl.program_id(1)
    center = head * num_centers + c
    z_ptr += center * dims.NUM_FEATURES * dims.VALUE_DIM
    k_ptr += center * dims.NUM_FEATURES
    mu_ptr = None
    if rows.centers is not None:
        mu_ptr = rows.centers + center * dims.HEAD_DIM
    start, stop = _range_of(rows, head, c, num_rows, num_centers)

    dmu = tl.zeros([dims.BLOCK_D], tl.float32)
    stride_m = splits * dims.BLOCK_M
    for first in tl.range(start + split * dims.BLOCK_M, stop, stride_m, num_stages=1, disable_licm=True):
        at, u = _load_rows(rows, head, first, stop, num_rows, dims.BLOCK_M)
        exist = (at < num_rows)[:, None]
        k_rows = rows.key.ptr + head * rows.key.stride[0] + at[:, None] * rows.key.stride[1]
        if grads.value is not None:
            dv = tl.zeros([dims.BLOCK_M, dims.BLOCK_DV], tl.float32)
            if dims.FEATURE_MAP == "elu":
                dv, _ = add_elu(
                    dv, tl.zeros([dims.BLOCK_M], tl.float32), u, k_rows, exist, z_ptr, k_ptr, key_scale,
                    dims.VALUE_DIM, dims.BLOCK_DV, dims, mu_ptr,
                )  # fmt: skip
            else:
                dv = add_taylor(dv, u, k_rows, exist, z_ptr, key_scale, dims.VALUE_DIM, dims.BLOCK_DV, dims, mu_ptr)
            dv_ptr = grads.value + head * num_rows * dims.VALUE_DIM
            store_tile(dv_ptr, dv, at, num_rows, dims.VALUE_DIM, 0, dims.VALUE_DIM, dims.BLOCK_DV)
        if grads.key is not None or grads.centers is not None:
            # As those of a query whose dO is v, with Δ = -1.
            v_rows = rows.value.ptr + head * rows.value.stride[0] + at[:, None] * rows.value.stride[1]
            mass_delta = tl.full([dims.BLOCK_M], -1.0, tl.float32)
            dk, _ = features_grad(None, k_rows, v_rows, exist, mass_delta, z_ptr, k_ptr, key_scale, dims, mu_ptr)
            dk = (key_scale * u)[:, None] * dk
            dmu -= tl.sum(dk, 0)
            if grads.key is not None:
                dk_ptr = grads.key + head * num_rows * dims.HEAD_DIM
                store_tile(dk_ptr, dk, at, num_rows, dims.HEAD_DIM, 0, dims.HEAD_DIM, dims.BLOCK_D)
    if grads.centers is not None:
        columns = tl.arange(0, dims.BLOCK_D)
        ptrs = grads.centers + (split.to(tl.int64) * num_heads * num_centers + center) * dims.HEAD_DIM + columns
        tl.store(ptrs, dmu, mask=columns < dims.HEAD_DIM)


def prepare_rows(keys, values, weights, centers, order, offsets) -> PrefixRows:
    """The tensors as the kernels take them; `order` and `offsets` are None with one centre."""
    keys, values = (tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in (keys, values))
    strided = (Strided(tensor, tensor.stride()[:2]) for tensor in (keys, values))
    return PrefixRows(*strided, *map(contiguous, (weights, centers, order, offsets)))


def sums_launch(
    rows: PrefixRows, sums: Sums, section: str, key_scale: float, config: configs.TileConfig, arch: str
) -> Launch:
    """The launch that fills the partial sums of a section."""
    splits, heads, centers, r = sums.k.shape
    constants = _constants(rows, config, arch) | {"SECTION": section, "NUM_FEATURES": r}
    blocks = num_blocks(section, constants["HEAD_DIM"], constants["CHUNK"])
    return _launch(
        _ntk_sum_features_kernel, (blocks * centers * heads, splits), (rows, sums), centers, splits, key_scale,
        constants, config,
    )  # fmt: skip


def sums_bwd_launch(
    rows: PrefixRows, grad_z, grad_k, grads: SumGrads, section: str, feature_map: str, splits: int, key_scale: float,
    config: configs.TileConfig, arch: str,
) -> Launch:  # fmt: skip
    """The launch that fills those of `grads` that are the section's."""
    grads = grads._replace(**{name: None for name in grads._fields if name not in GRAD_SECTIONS[section]})
    heads, centers, r = grad_k.shape
    constants = _constants(rows, config, arch) | {
        "FEATURE_MAP": feature_map,
        "NUM_FEATURES": r,
        # What comes in may exceed float16.
        "OPERAND": tl.bfloat16 if rows.key.ptr.dtype == torch.bfloat16 else tl.float32,
    }
    return _launch(
        _ntk_sum_features_bwd_kernel, (centers * heads, splits), (rows, grad_z, grad_k, grads), centers, splits,
        key_scale, constants, config,
    )  # fmt: skip


def _constants(rows: PrefixRows, config: configs.TileConfig, arch: str) -> dict:
    """Constants of both kernels."""
    head_dim, value_dim = rows.key.ptr.shape[2], rows.value.ptr.shape[2]
    blocks = configs.blocks(arch, head_dim, value_dim)
    return {
        "HEAD_DIM": head_dim, "VALUE_DIM": value_dim, "BLOCK_D": blocks.block_d, "BLOCK_DV": blocks.block_dv,
        "PREFIX_PRECISION": configs.precisions(arch, rows.key.ptr.dtype).prefix, "CHUNK": _chunk_of(config, blocks),
        "BLOCK_M": config.block_m, "STAGES": config.num_stages,
    }  # fmt: skip


def _launch(kernel, grid, tensors: tuple, centers: int, splits: int, key_scale: float, constants: dict, config):
    heads, num_rows, _ = tensors[0].key.ptr.shape
    plan = Plan(kernel, dims_for(kernel, **constants), options_of(config))
    return Launch(plan, grid, tensors, (num_rows, heads, centers, splits, key_scale, plan.dims))


def run_sum_features(rows: PrefixRows, feature_map: str, key_scale: float) -> tuple[torch.Tensor, ...]:
    """z [H, C, r, Dv], k [H, C, r] and count [H, C], in float64."""
    keys = rows.key.ptr
    heads, _, head_dim = keys.shape
    value_dim, centers = rows.value.ptr.shape[2], _num_centers(rows)
    arch, blocks, config = _configure("sums", rows, feature_map)
    parts = []
    for section in SECTIONS[feature_map]:
        r = num_features(section, head_dim)
        if r == 0:  # pairs of a single column
            continue
        programs = num_blocks(section, head_dim, _chunk_of(config, blocks)) * centers * heads
        shape = _splits(rows, programs, 2, config), heads, centers
        shapes = (*shape, r, value_dim), (*shape, r), shape
        z, k, count = (torch.empty(size, dtype=torch.float32, device=keys.device) for size in shapes)
        sums_launch(rows, Sums(z, k, None if parts else count), section, key_scale, config, arch)()
        parts.append([sums.sum(0, dtype=torch.float64) for sums in (z, k, count)])
    z, k, count = zip(*parts, strict=True)
    return torch.cat(z, 2), torch.cat(k, 2), count[0]


def run_sum_features_bwd(rows: PrefixRows, grad_z, grad_k, grads: SumGrads, feature_map: str, key_scale: float) -> None:
    """Fills `grads`, its `centers` [H, C, D] from partial sums."""
    keys = rows.key.ptr
    heads, _, head_dim = keys.shape
    centers = _num_centers(rows)
    arch, _, config = _configure("sums_bwd", rows, feature_map)
    splits = _splits(rows, centers * heads, 8, config)
    of_centers = None
    if grads.centers is not None:
        of_centers = torch.empty(splits, heads, centers, head_dim, dtype=torch.float32, device=keys.device)
    if keys.dtype == torch.bfloat16:
        grad_z = grad_z.to(torch.bfloat16)  # as keys and values are; here, as many programs will read it
    grad_z, grad_k = grad_z.contiguous(), grad_k.contiguous()
    wanted = grads._replace(centers=of_centers)
    for section, names in GRAD_SECTIONS.items():
        if any(getattr(wanted, name) is not None for name in names):
            sums_bwd_launch(rows, grad_z, grad_k, wanted, section, feature_map, splits, key_scale, config, arch)()
    if of_centers is not None:
        grads.centers.copy_(of_centers.sum(0, dtype=torch.float64))


def _num_centers(rows: PrefixRows) -> int:
    return 1 if rows.centers is None else rows.centers.shape[1]


def _configure(kernel: str, rows: PrefixRows, feature_map: str) -> tuple[str, configs.Blocks, configs.TileConfig]:
    keys, value_dim = rows.key.ptr, rows.value.ptr.shape[2]
    arch = configs.arch_of(keys.device)
    blocks = configs.blocks(arch, keys.shape[2], value_dim)
    return arch, blocks, configs.candidates(kernel, arch, blocks, keys.dtype, feature_map, _num_centers(rows) > 1)[0]


def _chunk_of(config: configs.TileConfig, blocks: configs.Blocks) -> int:
    """Features of a program."""
    return min(config.block_n, blocks.block_d)


def _splits(rows: PrefixRows, programs: int, per_multiprocessor: int, config: configs.TileConfig) -> int:
    """Returns the number of splits: as many as keep the multiprocessors busy, or more if sums became too long."""
    _, num_rows, _ = rows.key.ptr.shape
    splits = per_multiprocessor * configs.multiprocessors(rows.key.ptr.device) // programs
    splits = max(splits, ceil_div(num_rows, _MAX_ROWS_OF_SPLIT * _num_centers(rows)))
    return max(1, min(splits, ceil_div(num_rows, config.block_m)))
