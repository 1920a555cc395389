"""A prefix of second order ("taylor2") added to the result of another attention, at the rate of the tensor cores.

    out_i = α_i φ(x_i)ᵀ Z + γ_i out_i    lse_i = log(e^{lse_i} + M_i)    M_i = w_i φ(x_i)·k
    α_i = w_i e^{-lse_i}                 γ_i = e^{lse before - lse_i}

The features are made block by block in registers (`jit/pairs.py`). Three passes:

    pack         Z and k as the tensor cores take them: blocks in the order of the products, with the factors of the
                 features (feature_scale, √½) in them, k in two parts of which each has the dtype of the queries
    row weights  lse, α and γ of every row: the mass is xᵀ K x, K being symmetric in effect and in two parts in fact
    add          the products, and out

The constant feature's row of Z stays as it is in the state. It takes half precision states with one centre at most, a
full Z and no rows of their own, and queries whose rows are multiples of 16 bytes.

Grid: pack, a program for each block of 64 x 64; row weights, one for each tile of rows, head and batch row (or packed
sequence); add, as many for each 64 columns of values.
"""

import torch
import triton
import triton.language as tl

from .host import configs
from .host.launch import Call, Kernel, Kind, Launch, ceil_div, is_chosen, prepare_exactly, run_pass, strided
from .jit.features import pair_start, square_start
from .jit.pairs import add_blocks, block_of_triangle
from .jit.prefix_term import MAX_WEIGHT, center_logit, is_massless, locate_state
from .jit.tiles import dot, head_ptr, in_log2, lse_of, rounded_to, running_max
from .jit.visibility import locate_rows

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_WIDTH = 64  # of a block, and columns of values of a program


@triton.jit
def _feature_of_pair(a, b, feature_scale, HEAD_DIM: tl.constexpr):
    """Row of z for the pair a < b or the square a = b, and the factor that makes q_a·q_b that feature; 0 for a > b."""
    feature = tl.where(a == b, square_start(HEAD_DIM) + a, pair_start(a, HEAD_DIM) + b)
    factor = feature_scale * feature_scale * tl.where(a == b, _SQRT_HALF, 1.0)
    exists = (a <= b) & (b < HEAD_DIM)
    return tl.where(exists, feature, 0), tl.where(exists, factor, 0.0), exists


@triton.jit
def _ntk_pack_pairs_kernel(z_ptr, packed_ptr, num_blocks, feature_scale, dims):
    """z [heads, r, Dv] as [heads, Dv / 64, blocks, 64, 64]: x first, in blocks of 64 columns, then the pairs."""
    LINEAR_BLOCKS: tl.constexpr = (dims.HEAD_DIM + 63) // 64
    block = tl.program_id(0) % num_blocks
    part = tl.program_id(0) // num_blocks
    num_parts: tl.constexpr = dims.BLOCK_DV // 64
    head = (part // num_parts).to(tl.int64)
    row = tl.arange(0, 64)
    columns = part % num_parts * 64 + tl.arange(0, 64)[None, :]
    if block < LINEAR_BLOCKS:
        column = block * 64 + row
        exists = column < dims.HEAD_DIM
        feature, factor = 1 + column, tl.where(exists, feature_scale, 0.0)
    else:
        i, j = block_of_triangle(block - LINEAR_BLOCKS)
        feature, factor, exists = _feature_of_pair(i * 8 + row // 8, j * 8 + row % 8, feature_scale, dims.HEAD_DIM)
    ptrs = z_ptr + (head * dims.NUM_FEATURES + feature)[:, None] * dims.VALUE_DIM + columns
    z = tl.load(ptrs, mask=exists[:, None] & (columns < dims.VALUE_DIM), other=0.0).to(tl.float32)
    packed_ptr += tl.program_id(0).to(tl.int64) * 4096
    packed = rounded_to(z * factor[:, None], packed_ptr.dtype.element_ty)
    tl.store(packed_ptr + row[:, None] * 64 + tl.arange(0, 64)[None, :], packed)


@triton.jit
def _ntk_pack_mass_kernel(k_ptr, packed_ptr, feature_scale, dims):
    """The pairs and squares of k [heads, r] as an upper triangle [heads, 2, D, D] in two parts, D padded."""
    NUM: tl.constexpr = dims.BLOCK_D // 64
    head = (tl.program_id(0) // (NUM * NUM)).to(tl.int64)
    block = tl.program_id(0) % (NUM * NUM)
    a = block // NUM * 64 + tl.arange(0, 64)[:, None]
    b = block % NUM * 64 + tl.arange(0, 64)[None, :]
    feature, factor, exists = _feature_of_pair(a, b, feature_scale, dims.HEAD_DIM)
    k = factor * tl.load(k_ptr + head * dims.NUM_FEATURES + feature, mask=exists, other=0.0).to(tl.float32)
    ptrs = packed_ptr + head * (2 * dims.BLOCK_D * dims.BLOCK_D) + a * dims.BLOCK_D + b
    high = rounded_to(k, packed_ptr.dtype.element_ty)
    tl.store(ptrs, high)
    tl.store(ptrs + dims.BLOCK_D * dims.BLOCK_D, rounded_to(k - high.to(tl.float32), packed_ptr.dtype.element_ty))


@triton.jit
def mass_of_rows(q_rows, row_mask, k_ptr, packed_ptr, feature_scale, dims):
    """φ(x)·k [M] of a head: k as in the state, and its pairs packed."""
    x = tl.load(
        q_rows + tl.arange(0, dims.BLOCK_D)[None, :],
        mask=row_mask & (tl.arange(0, dims.BLOCK_D) < dims.HEAD_DIM)[None, :], other=0.0,
    )  # fmt: skip
    mass = tl.zeros([dims.BLOCK_M], tl.float32) + tl.load(k_ptr).to(tl.float32)
    a = tl.arange(0, dims.BLOCK_D)[:, None]
    for start in tl.static_range(0, dims.BLOCK_D, 64):
        b = start + tl.arange(0, 64)
        ptrs = packed_ptr + a * dims.BLOCK_D + b[None, :]
        y = dot(x, tl.load(ptrs), None, dims.PREFIX_PRECISION)
        y = dot(x, tl.load(ptrs + dims.BLOCK_D * dims.BLOCK_D), y, dims.PREFIX_PRECISION)
        linear = tl.load(k_ptr + 1 + b, mask=b < dims.HEAD_DIM, other=0.0).to(tl.float32)
        y += (feature_scale * linear)[None, :]
        x_b = tl.load(q_rows + b[None, :], mask=row_mask & (b < dims.HEAD_DIM)[None, :], other=0.0)
        mass += tl.sum(y * x_b.to(tl.float32), 1)
    return mass


@triton.jit(do_not_specialize=["stride_lse_b", "stride_lse_h", "stride_rows", "seq_q", "num_tiles"])
def _ntk_second_order_rows_kernel(
    query, state, packed_ptr, sequences, lse_ptr, weights_ptr, stride_lse_b, stride_lse_h, stride_rows, seq_q,
    num_tiles, num_heads, scales, dims,
):  # fmt: skip
    """Makes `lse` that of keys and prefix, and fills the weights [B, Hq, 2, Lq] of the prefix and of `out`."""
    start_m = tl.program_id(0) % num_tiles * dims.BLOCK_M
    batch_head = tl.program_id(0) // num_tiles
    head = (batch_head % num_heads).to(tl.int64)
    batch = (batch_head // num_heads).to(tl.int64)
    tensor_batch, first_q, seq_q = locate_rows(sequences, batch, seq_q)
    if start_m >= seq_q:
        return
    state_head, num_centers, _ = locate_state(state, head, batch)
    if num_centers == 0:
        return
    offs_m = start_m + tl.arange(0, dims.BLOCK_M)
    row_mask = offs_m < seq_q
    q_rows = head_ptr(query, tensor_batch, head, first_q) + offs_m.to(tl.int64)[:, None] * query.stride[2]
    mass = mass_of_rows(
        q_rows, row_mask[:, None], state.k + state_head * dims.NUM_FEATURES,
        packed_ptr + state_head * (2 * dims.BLOCK_D * dims.BLOCK_D), scales.feature, dims,
    )  # fmt: skip
    logit = center_logit(q_rows, row_mask[:, None], state, state_head, scales.logit, dims)
    lse_ptrs = lse_ptr + tensor_batch * stride_lse_b + head * stride_lse_h + first_q + offs_m
    lse = in_log2(tl.load(lse_ptrs, mask=row_mask, other=-float("inf")))
    massless = is_massless(mass, logit)
    m_new, shift = running_max(tl.where(massless, -float("inf"), logit), lse)
    of_prefix, of_keys = tl.exp2(logit - shift), tl.exp2(lse - shift)
    l_i = tl.where(massless, 0.0, mass * of_prefix) + of_keys
    inverse = tl.where(l_i == 0, 0.0, 1.0 / l_i)
    of_prefix *= inverse
    # Without mass nothing but the lse of the keys bounds the weight of Z.
    free = tl.minimum(of_prefix, MAX_WEIGHT, propagate_nan=tl.PropagateNan.ALL)
    of_prefix = tl.where(massless, tl.where(inverse > 0, free, 0.0), of_prefix)
    tl.store(lse_ptrs, lse_of(m_new, l_i), mask=row_mask)
    weights_ptr += (tensor_batch * num_heads + head) * 2 * stride_rows + first_q + offs_m
    tl.store(weights_ptr, of_prefix, mask=row_mask)
    tl.store(weights_ptr + stride_rows, of_keys * inverse, mask=row_mask)


@triton.jit(do_not_specialize=["stride_rows", "seq_q", "num_tiles"])
def _ntk_add_second_order_kernel(
    query, state, packed_ptr, sequences, out, weights_ptr, stride_rows, seq_q, num_tiles, num_heads, dims
):
    LINEAR_BLOCKS: tl.constexpr = (dims.HEAD_DIM + 63) // 64
    NUM: tl.constexpr = dims.HEAD_DIM // 8
    NUM_BLOCKS: tl.constexpr = LINEAR_BLOCKS + NUM * (NUM + 1) // 2
    start_m = tl.program_id(0) % num_tiles * dims.BLOCK_M
    batch_head = tl.program_id(0) // num_tiles
    head = (batch_head % num_heads).to(tl.int64)
    batch = (batch_head // num_heads).to(tl.int64)
    tensor_batch, first_q, seq_q = locate_rows(sequences, batch, seq_q)
    if start_m >= seq_q:
        return
    state_head, num_centers, _ = locate_state(state, head, batch)
    if num_centers == 0:
        return
    part = tl.program_id(1)
    z_ptr = packed_ptr + (state_head * (dims.BLOCK_DV // 64) + part) * (NUM_BLOCKS * 4096)
    # The last row again in the place of those that do not exist: no masks in the loop.
    rows = tl.minimum(tl.arange(0, dims.BLOCK_M), seq_q - 1 - start_m)[:, None]
    q_rows = head_ptr(query, tensor_batch, head, first_q + start_m) + rows * query.stride[2]

    acc = tl.zeros([dims.BLOCK_M, 64], tl.float32)
    for block in tl.range(0, LINEAR_BLOCKS, num_stages=1):
        columns = block * 64 + tl.arange(0, 64)[None, :]
        x = tl.load(q_rows + columns, mask=columns < dims.HEAD_DIM, other=0.0)
        z = tl.load(z_ptr + block * 4096 + tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :])
        acc = dot(x, z, acc, dims.PREFIX_PRECISION)
    acc = add_blocks(acc, q_rows, q_rows, z_ptr + LINEAR_BLOCKS * 4096, NUM, NUM, True, dims)

    # Each 0, as the grid has two dimensions, but opaque to the compiler: addresses computed from the first do not stay
    # in registers through the loop, nor those computed from the second while the results are put together.
    zero, another_zero = tl.program_id(2), tl.num_programs(2) - 1
    offs_m = start_m + zero + tl.arange(0, dims.BLOCK_M)
    columns = part * 64 + tl.arange(0, 64)[None, :]
    z_0_ptr = state.z + (state_head + zero) * (dims.NUM_FEATURES * dims.VALUE_DIM)
    acc += tl.load(z_0_ptr + columns, mask=columns < dims.VALUE_DIM, other=0.0).to(tl.float32)
    weights_ptr += (tensor_batch * num_heads + head) * 2 * stride_rows + first_q + offs_m
    acc *= tl.load(weights_ptr, mask=offs_m < seq_q, other=0.0)[:, None]
    tl.debug_barrier()  # else `out` arrives when there are no registers for it yet
    of_keys = tl.load(weights_ptr + stride_rows, mask=offs_m < seq_q, other=0.0)
    out_ptrs, mask = _out_ptrs(out, tensor_batch, head, first_q, start_m + zero, seq_q, columns, dims)
    acc += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32) * of_keys[:, None]
    out_ptrs, mask = _out_ptrs(out, tensor_batch, head, first_q, start_m + another_zero, seq_q, columns, dims)
    tl.store(out_ptrs, rounded_to(acc, out.ptr.dtype.element_ty), mask=mask)


@triton.jit
def _out_ptrs(out, batch, head, first_q, start_m, seq_q, columns, dims):
    """Pointers to 64 columns of a tile's rows of `out`, and which of them exist."""
    rows = tl.arange(0, dims.BLOCK_M)[:, None]
    ptrs = head_ptr(out, batch, head, first_q + start_m) + rows * out.stride[2] + columns
    return ptrs, (rows < seq_q - start_m) & (columns < dims.VALUE_DIM)


def can_be_second_order(call: Call) -> bool:
    """Returns whether these kernels can take the prefix of a call."""
    kind, state, query = call.kind, call.state, call.query.ptr
    return (
        kind.feature_map == "taylor2"
        and (kind.arch == "interpreter" or kind.dtype == torch.bfloat16)
        and state.z_b is None
        and state.row_keys is None
        and max(kind.blocks.block_d, kind.blocks.block_dv) <= 128
        and kind.constants["HEAD_DIM"] % 8 == 0
        and configs.can_describe(query)
        and query.stride(2) < 2**23  # offsets inside a tile of 256 rows
    )


def is_second_order(call: Call) -> bool:
    """Returns whether these kernels serve a call: not before a GPU has shown that they are right and faster there."""
    return call.kind.feature_map == "taylor2" and is_chosen(call, "add_second_order") and can_be_second_order(call)


def takes_second_order(inputs) -> bool:
    """Returns whether these kernels are to add the prefix of a call to attention without it."""
    return inputs.feature_map == "taylor2" and is_second_order(prepare_exactly(inputs.without_keys()))


def empty_packed(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for Z, [N · Hs, Dv / 64, blocks, 64, 64], and the pairs of k, [N · Hs, 2, D, D], with D and Dv padded."""
    query, (states, heads, *_) = call.query.ptr, call.state.k.shape
    head_dim, block_d, block_dv = _dims_of(call.kind)
    blocks = ceil_div(head_dim, _WIDTH) + head_dim // 8 * (head_dim // 8 + 1) // 2
    z = query.new_empty(states * heads, block_dv // _WIDTH, blocks, _WIDTH, _WIDTH)
    return z, query.new_empty(states * heads, 2, block_d, block_d)


def pack_z_launch(call: Call, packed_z, config: configs.TileConfig) -> Launch:
    """The launch that fills `packed_z`."""
    return _launch(
        call.kind, _ntk_pack_pairs_kernel, packed_z.numel() // _WIDTH**2, (call.state.z, packed_z),
        (packed_z.shape[2], call.kind.scales.feature), config,
    )  # fmt: skip


def pack_k_launch(call: Call, packed_k, config: configs.TileConfig) -> Launch:
    """The launch that fills `packed_k`."""
    return _launch(
        call.kind, _ntk_pack_mass_kernel, packed_k.numel() // (2 * _WIDTH**2), (call.state.k, packed_k),
        (call.kind.scales.feature,), config,
    )  # fmt: skip


def second_order_rows_launch(call: Call, packed_k, lse, weights, config: configs.TileConfig) -> Launch:
    """The launch that makes `lse` [B, Hq, Lq] that of keys and prefix, and fills `weights` [B, Hq, 2, Lq]."""
    kind, sizes = call.kind, call.sizes
    num_tiles = ceil_div(sizes.seq_q, config.block_m)
    return _launch(
        kind, _ntk_second_order_rows_kernel, num_tiles * kind.heads * sizes.batch,
        (call.query, call.state, packed_k, call.sequences, lse, weights),
        (lse.stride(0), lse.stride(1), weights.shape[3], sizes.seq_q, num_tiles, kind.heads, kind.scales), config,
    )  # fmt: skip


def add_second_order_launch(call: Call, packed_z, weights, out, config: configs.TileConfig) -> Launch:
    """The launch that adds the prefix to `out` [B, Hq, Lq, Dv]."""
    kind, sizes = call.kind, call.sizes
    num_tiles = ceil_div(sizes.seq_q, config.block_m)
    return _launch(
        kind, _ntk_add_second_order_kernel, (num_tiles * kind.heads * sizes.batch, packed_z.shape[1]),
        (call.query, call.state, packed_z, call.sequences, strided(out), weights),
        (weights.shape[3], sizes.seq_q, num_tiles, kind.heads), config,
    )  # fmt: skip


def _launch(kind: Kind, kernel, grid: int | tuple, tensors: tuple, scalars: tuple, config) -> Launch:
    _, block_d, block_dv = _dims_of(kind)
    return kind.launch(
        kernel, grid if isinstance(grid, tuple) else (grid,), tensors, scalars, config, BLOCK_M=config.block_m,
        BLOCK_D=block_d, BLOCK_DV=block_dv, STAGES=config.num_stages, HOPPER=kind.arch == "sm90",
    )  # fmt: skip


def _dims_of(kind: Kind) -> tuple[int, int, int]:
    """D, and D and Dv in multiples of a block."""
    return kind.constants["HEAD_DIM"], max(kind.blocks.block_d, _WIDTH), max(kind.blocks.block_dv, _WIDTH)


ADD_SECOND_ORDER = (Kernel("add_second_order", add_second_order_launch),)


def run_add_second_order(call: Call, out, lse) -> None:
    """Adds the prefix to `out` and `lse`, attention over the keys alone. `call.state.z` is as the state has it."""
    packed_z, packed_k = empty_packed(call)
    pack = call.kind.candidates("second_order_pack")[0]
    pack_z_launch(call, packed_z, pack)()
    pack_k_launch(call, packed_k, pack)()
    weights = torch.empty(*lse.shape[:2], 2, lse.shape[2], dtype=lse.dtype, device=lse.device)
    second_order_rows_launch(call, packed_k, lse, weights, call.kind.candidates("second_order_rows")[0])()
    run_pass(ADD_SECOND_ORDER, call, packed_z, weights, out, updated=(out,))
