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

from .backward_state import sections_of
from .host import configs
from .host.launch import Launch, Plan, ceil_div, contiguous, options_of
from .jit.features import add_elu, add_taylor, load_column, load_columns, pair_start, section_of
from .jit.prefix_term_grad import features_grad
from .jit.tiles import dot, rounded_to, state_dot, store_tile

GRAD_SECTIONS = {"values": ("v",), "keys": ("k", "centers")}  # a launch each
_MAX_ROWS_OF_SPLIT = 2**15  # on average over the centres: more would lose digits in float32


class Rows(NamedTuple):
    """What the sums go over, [H, m, ...]: D or Dv elements of a row lie side by side; the rest is contiguous."""

    k: object  # [H, m, D]
    v: object  # [H, m, Dv]
    weights: object  # [H, m]; None: 1
    centers: object  # [H, C, D]; None: one, the origin
    order: object  # [H, m], numbers of rows; None, as the offsets, with one centre
    offsets: object  # [H, C + 1], where the rows of each centre begin in it


class Sums(NamedTuple):
    """Partial sums [splits, H, C, ...] of a section's features, float32."""

    z: object
    k: object
    n: object  # count; None but in the first section


class SumGrads(NamedTuple):
    """None for those that nobody wants."""

    k: object  # [H, m, D]
    v: object  # [H, m, Dv]
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
def _ntk_sum_features_kernel(
    rows, sums, stride_k, stride_v, num_rows, num_heads, num_centers, splits, key_scale,
    SECTION: tl.constexpr, NUM_FEATURES: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    c = tl.program_id(0) // num_heads % num_centers
    block = tl.program_id(0) // num_heads // num_centers
    split = tl.program_id(1)
    num_chunks: tl.constexpr = (HEAD_DIM + CHUNK - 1) // CHUNK
    first_column = block % num_chunks * CHUNK
    a = block // num_chunks
    if SECTION == "pairs":
        if first_column + CHUNK <= a + 1:  # no pair has b <= a
            return
    center = head * num_centers + c
    mu_ptr = None
    if rows.centers is not None:
        mu_ptr = rows.centers + center * HEAD_DIM
    start, stop = _range_of(rows, head, c, num_rows, num_centers)

    z = tl.zeros([BLOCK_DV, CHUNK], tl.float32)
    k = tl.zeros([CHUNK], tl.float32)
    z_1 = tl.zeros([BLOCK_DV], tl.float32)
    count = tl.zeros([BLOCK_M], tl.float32)
    for first in tl.range(start + split * BLOCK_M, stop, splits * BLOCK_M, num_stages=STAGES):
        at, u = _load_rows(rows, head, first, stop, num_rows, BLOCK_M)
        exist = (at < num_rows)[:, None]
        k_rows = rows.k + head * stride_k[0] + at[:, None] * stride_k[1]
        v = load_columns(rows.v + head * stride_v[0] + at[:, None] * stride_v[1], exist, 0, VALUE_DIM, BLOCK_DV)
        y = key_scale * load_columns(k_rows, exist, first_column, HEAD_DIM, CHUNK, mu_ptr).to(tl.float32)
        y_a = None
        if SECTION == "pairs":
            y_a = key_scale * load_column(k_rows, exist, a, mu_ptr)
        phi = u[:, None] * section_of(y, y_a, SECTION)
        z = _values_dot(v, phi, z, PRECISION)
        k += tl.sum(phi, 0)
        if SECTION == "linear":
            z_1 += tl.sum(u[:, None] * v.to(tl.float32), 0)
        count += u

    center += split.to(tl.int64) * num_heads * num_centers
    columns = first_column + tl.arange(0, CHUNK)
    features, exist = columns, columns < HEAD_DIM
    if SECTION == "linear":
        features = 1 + columns
    elif SECTION == "pairs":
        features = pair_start(a, HEAD_DIM) - (1 + HEAD_DIM) + columns
        exist = exist & (columns > a)
    values = tl.arange(0, BLOCK_DV)
    z_ptr = sums.z + center * NUM_FEATURES * VALUE_DIM
    k_ptr = sums.k + center * NUM_FEATURES
    ptrs = z_ptr + features[None, :] * VALUE_DIM + values[:, None]
    tl.store(ptrs, z, mask=exist[None, :] & (values < VALUE_DIM)[:, None])
    tl.store(k_ptr + features, k, mask=exist)
    if block == 0:
        if SECTION == "linear":
            tl.store(z_ptr + values, z_1, mask=values < VALUE_DIM)
            tl.store(k_ptr, tl.sum(count, 0))
        if sums.n is not None:
            tl.store(sums.n + center, tl.sum(count, 0))


@triton.jit(do_not_specialize=["num_rows", "num_heads", "num_centers", "splits"])
def _ntk_sum_features_bwd_kernel(
    rows, z_ptr, k_ptr, grads, stride_k, stride_v, num_rows, num_heads, num_centers, splits, key_scale,
    FEATURE_MAP: tl.constexpr, NUM_FEATURES: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`z_ptr` and `k_ptr` are the gradients of z and k."""
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    c = tl.program_id(0) // num_heads
    split = tl.program_id(1)
    center = head * num_centers + c
    z_ptr += center * NUM_FEATURES * VALUE_DIM
    k_ptr += center * NUM_FEATURES
    mu_ptr = None
    if rows.centers is not None:
        mu_ptr = rows.centers + center * HEAD_DIM
    start, stop = _range_of(rows, head, c, num_rows, num_centers)

    dmu = tl.zeros([BLOCK_D], tl.float32)
    for first in tl.range(start + split * BLOCK_M, stop, splits * BLOCK_M, num_stages=1, disable_licm=True):
        at, u = _load_rows(rows, head, first, stop, num_rows, BLOCK_M)
        exist = (at < num_rows)[:, None]
        k_rows = rows.k + head * stride_k[0] + at[:, None] * stride_k[1]
        if grads.v is not None:
            dv = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
            if FEATURE_MAP == "elu":
                dv, _ = add_elu(
                    dv, tl.zeros([BLOCK_M], tl.float32), u, k_rows, exist, z_ptr, k_ptr, key_scale, HEAD_DIM, VALUE_DIM,
                    BLOCK_DV, CHUNK, PRECISION, OPERAND, mu_ptr,
                )  # fmt: skip
            else:
                dv = add_taylor(
                    dv, u, k_rows, exist, z_ptr, key_scale, FEATURE_MAP, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, CHUNK,
                    PRECISION, OPERAND, STAGES, mu_ptr,
                )  # fmt: skip
            store_tile(grads.v + head * num_rows * VALUE_DIM, dv, at, num_rows, VALUE_DIM, 0, VALUE_DIM, BLOCK_DV)
        if grads.k is not None or grads.centers is not None:
            # As those of a query whose dO is v, with Δ = -1.
            v_rows = rows.v + head * stride_v[0] + at[:, None] * stride_v[1]
            dk, _ = features_grad(
                None, k_rows, v_rows, exist, tl.full([BLOCK_M], -1.0, tl.float32), z_ptr, k_ptr, key_scale, FEATURE_MAP,
                HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_D, BLOCK_DV, CHUNK, PRECISION, OPERAND, STAGES, mu_ptr,
            )  # fmt: skip
            dk = (key_scale * u)[:, None] * dk
            dmu -= tl.sum(dk, 0)
            if grads.k is not None:
                store_tile(grads.k + head * num_rows * HEAD_DIM, dk, at, num_rows, HEAD_DIM, 0, HEAD_DIM, BLOCK_D)
    if grads.centers is not None:
        columns = tl.arange(0, BLOCK_D)
        ptrs = grads.centers + (split.to(tl.int64) * num_heads * num_centers + center) * HEAD_DIM + columns
        tl.store(ptrs, dmu, mask=columns < HEAD_DIM)


def prepare_rows(keys, values, weights, centers, order, offsets) -> Rows:
    """The tensors as the kernels take them; `order` and `offsets` are None with one centre."""
    keys, values = (tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in (keys, values))
    return Rows(keys, values, *map(contiguous, (weights, centers, order, offsets)))


def sums_launch(
    rows: Rows, sums: Sums, section: str, key_scale: float, config: configs.TileConfig, arch: str
) -> Launch:
    """The launch that fills the partial sums of a section."""
    blocks, constants = _describe(rows, arch)
    chunk = _chunk_of(config, blocks)
    splits, heads, centers, num_features = sums.k.shape
    constants |= {"SECTION": section, "NUM_FEATURES": num_features, "CHUNK": chunk}
    grid = (_blocks_of(section, rows.k.shape[2], chunk) * centers * heads, splits)
    return _launch(
        _ntk_sum_features_kernel, grid, (rows, sums), _scalars(rows, centers, splits, key_scale), constants, config
    )


def sums_backward_launch(
    rows: Rows, grad_z, grad_k, grads: SumGrads, section: str, feature_map: str, splits: int, key_scale: float,
    config: configs.TileConfig, arch: str,
) -> Launch:  # fmt: skip
    """The launch that fills those of `grads` that are the section's."""
    grads = grads._replace(**{name: None for name in grads._fields if name not in GRAD_SECTIONS[section]})
    blocks, constants = _describe(rows, arch)
    heads, centers, num_features = grad_k.shape
    operand = tl.bfloat16 if rows.k.dtype == torch.bfloat16 else tl.float32  # what comes in may exceed float16
    constants |= {"FEATURE_MAP": feature_map, "NUM_FEATURES": num_features, "OPERAND": operand}
    constants |= {"BLOCK_D": blocks.block_d, "CHUNK": _chunk_of(config, blocks)}
    grid, scalars = (centers * heads, splits), _scalars(rows, centers, splits, key_scale)
    return _launch(_ntk_sum_features_bwd_kernel, grid, (rows, grad_z, grad_k, grads), scalars, constants, config)


def _describe(rows: Rows, arch: str) -> tuple[configs.Blocks, dict]:
    """Padded sizes, and constants of both kernels."""
    head_dim, value_dim = rows.k.shape[2], rows.v.shape[2]
    blocks = configs.blocks(arch, head_dim, value_dim)
    constants = {
        "HEAD_DIM": head_dim, "VALUE_DIM": value_dim, "BLOCK_DV": blocks.block_dv,
        "PRECISION": configs.precisions(arch, rows.k.dtype).prefix,
    }  # fmt: skip
    return blocks, constants


def _scalars(rows: Rows, centers: int, splits: int, key_scale: float) -> tuple:
    heads, num_rows, _ = rows.k.shape
    return rows.k.stride()[:2], rows.v.stride()[:2], num_rows, heads, centers, splits, key_scale


def _launch(kernel, grid, tensors, scalars, constants, config: configs.TileConfig) -> Launch:
    constants |= {"BLOCK_M": config.block_m, "STAGES": config.num_stages}
    constants = {name: constants[name] for name in kernel.arg_names[len(tensors) + len(scalars) :]}
    return Launch(Plan(kernel, grid, scalars, constants, options_of(config)), tensors)


def num_features_of(section: str, head_dim: int) -> int:
    return {"linear": 1 + head_dim, "pairs": head_dim * (head_dim - 1) // 2}.get(section, head_dim)


def _blocks_of(section: str, head_dim: int, chunk: int) -> int:
    """Programs that share a section's features of one centre."""
    return ceil_div(head_dim, chunk) * (head_dim - 1 if section == "pairs" else 1)


def run_sum_features(rows: Rows, feature_map: str, key_scale: float) -> tuple[torch.Tensor, ...]:
    """z [H, C, r, Dv], k [H, C, r] and count [H, C], in float64."""
    arch, config = _configure("sums", rows, feature_map)
    heads, head_dim, device = rows.k.shape[0], rows.k.shape[2], rows.k.device
    centers = _num_centers(rows)
    parts = []
    for section in sections_of(feature_map):
        num_features = num_features_of(section, head_dim)
        if num_features == 0:  # pairs of a single column
            continue
        blocks = _blocks_of(section, head_dim, _chunk_of(config, configs.blocks(arch, head_dim, rows.v.shape[2])))
        shape = _splits(rows, blocks * centers * heads, 2, config), heads, centers
        shapes = (*shape, num_features, rows.v.shape[2]), (*shape, num_features), shape
        z, k, count = (torch.empty(size, dtype=torch.float32, device=device) for size in shapes)
        sums_launch(rows, Sums(z, k, None if parts else count), section, key_scale, config, arch)()
        parts.append([sums.sum(0, dtype=torch.float64) for sums in (z, k, count)])
    z, k, count = zip(*parts, strict=True)
    return torch.cat(z, 2), torch.cat(k, 2), count[0]


def run_sum_features_backward(rows: Rows, grad_z, grad_k, grads: SumGrads, feature_map: str, key_scale: float) -> None:
    """Fills `grads`, its `centers` [H, C, D] from partial sums."""
    arch, config = _configure("sums_backward", rows, feature_map)
    centers, (heads, _, head_dim) = _num_centers(rows), rows.k.shape
    splits = _splits(rows, centers * heads, 8, config)
    of_centers = None
    if grads.centers is not None:
        of_centers = torch.empty(splits, heads, centers, head_dim, dtype=torch.float32, device=rows.k.device)
    if rows.k.dtype == torch.bfloat16:
        grad_z = grad_z.to(torch.bfloat16)  # as keys and values are; here, as many programs will read it
    grad_z, grad_k = grad_z.contiguous(), grad_k.contiguous()
    wanted = grads._replace(centers=of_centers)
    for section, names in GRAD_SECTIONS.items():
        if any(getattr(wanted, name) is not None for name in names):
            sums_backward_launch(rows, grad_z, grad_k, wanted, section, feature_map, splits, key_scale, config, arch)()
    if of_centers is not None:
        grads.centers.copy_(of_centers.sum(0, dtype=torch.float64))


def _num_centers(rows: Rows) -> int:
    return 1 if rows.centers is None else rows.centers.shape[1]


def _configure(kernel: str, rows: Rows, feature_map: str) -> tuple[str, configs.TileConfig]:
    arch = configs.arch_of(rows.k.device)
    blocks = configs.blocks(arch, rows.k.shape[2], rows.v.shape[2])
    return arch, configs.candidates(kernel, arch, blocks, rows.k.dtype, feature_map, _num_centers(rows) > 1)[0]


def _chunk_of(config: configs.TileConfig, blocks: configs.Blocks) -> int:
    """Features of a program."""
    return min(config.block_n, blocks.block_d)


def _splits(rows: Rows, programs: int, per_multiprocessor: int, config: configs.TileConfig) -> int:
    """So many that no multiprocessor has more programs, unless the sums of a program became too long."""
    num_rows = rows.k.shape[1]
    splits = per_multiprocessor * configs.multiprocessors(rows.k.device) // programs
    splits = max(splits, ceil_div(num_rows, _MAX_ROWS_OF_SPLIT * _num_centers(rows)))
    return max(1, min(splits, ceil_div(num_rows, config.block_m)))
