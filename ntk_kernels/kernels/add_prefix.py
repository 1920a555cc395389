"""The prefix alone, added to the result of another attention over the keys: out and lse are read, merged and written.

Two kernels. The general one takes every state: a program owns BLOCK_M rows of one head, starts from the prefix as the
forward does (`forward.py`), and merges with what `out` and `lse` hold. The resident one is for the states that are
trained most: one centre at most, features of first order ("elu", "taylor1"), a full Z, no rows, under a bfloat16 model
with heads up to 128. There the pass is bound by memory: each program keeps its Z in shared memory and walks tiles of
query rows, of which the next are on their way. The formula is that of `reference/attention.py`. Prefixes of second
order have kernels of their own, where they are known to be faster (`add_second_order.py`).

Grid: general, one program for each tile of rows, head and batch row (or packed sequence); resident, (heads · batch
rows, splits), a split taking every n-th tile of BLOCK_M rows.
"""

import torch
import triton
import triton.language as tl

from .add_second_order import is_second_order, run_add_second_order
from .host import configs
from .host.launch import Call, Kernel, Launch, ceil_div, prepare_exactly, run_pass, strided, with_rounded_z
from .jit.features import elu_of
from .jit.prefix_term import (
    MAX_WEIGHT,
    add_left_out,
    attend_rows,
    is_massless,
    locate_state,
    start_from_prefix,
)
from .jit.tiles import (
    LOG2_E,
    dot,
    head_ptr,
    in_log2,
    load_tile,
    lse_of,
    results_of_rows,
    rounded_to,
    running_max,
    store_tile,
)
from .jit.visibility import locate_rows


@triton.jit(do_not_specialize=["stride_lse_b", "stride_lse_h", "seq_q", "num_tiles"])
def _ntk_add_prefix_kernel(
    query, state, sequences, out, lse_ptr, stride_lse_b, stride_lse_h, seq_q, num_tiles, num_heads, scales, dims
):
    start_m = tl.program_id(0) % num_tiles * dims.BLOCK_M
    batch_head = tl.program_id(0) // num_tiles
    head = batch_head % num_heads
    batch = (batch_head // num_heads).to(tl.int64)
    tensor_batch, first_q, seq_q = locate_rows(sequences, batch, seq_q)
    if start_m >= seq_q:
        return
    q_ptr = head_ptr(query, tensor_batch, head, first_q)
    offs_m = start_m + tl.arange(0, dims.BLOCK_M)
    row_mask = (offs_m < seq_q)[:, None]
    out_ptrs, out_mask, lse_ptrs = results_of_rows(
        out, lse_ptr, tensor_batch, head, first_q, start_m, offs_m, seq_q, stride_lse_b, stride_lse_h, dims.VALUE_DIM,
        dims.BLOCK_M, dims.BLOCK_DV,
    )  # fmt: skip
    # At once, so that it arrives while the prefix is added; a wide taylor2 leaves no registers for it meanwhile.
    LATE: tl.constexpr = dims.FEATURE_MAP == "taylor2" and dims.BLOCK_DV > 64
    if not LATE:
        of_keys = tl.load(out_ptrs, mask=out_mask, other=0.0)
    lse = tl.load(lse_ptrs, mask=offs_m < seq_q, other=-float("inf"))

    state_head, num_centers, num_rows = locate_state(state, head, batch)
    q_rows = q_ptr + offs_m.to(tl.int64)[:, None] * query.stride[2]
    if dims.FEATURE_MAP is None:
        acc = tl.zeros([dims.BLOCK_M, dims.BLOCK_DV], tl.float32)
        m_i = tl.full([dims.BLOCK_M], -float("inf"), tl.float32)
        l_i = tl.zeros([dims.BLOCK_M], tl.float32)
    else:
        acc, m_i, l_i, massless, any_left_out = start_from_prefix(
            q_rows, row_mask, state, state_head, num_centers, scales, dims
        )
    if state.row_keys is not None:
        q = load_tile(q_ptr, start_m, seq_q, query.stride[2], dims.BLOCK_M, dims.HEAD_DIM, dims.BLOCK_D, True)
        acc, m_i, l_i = attend_rows(acc, m_i, l_i, q, state, state_head, num_rows, scales.logit, dims)

    # 0, as the grid has one dimension, but opaque to the compiler: addresses and masks computed from it do not stay in
    # registers while the prefix is added.
    zero = tl.program_id(1)
    offs_m = start_m + zero + tl.arange(0, dims.BLOCK_M)
    row_mask = (offs_m < seq_q)[:, None]
    if LATE:
        of_keys = tl.load(out_ptrs, mask=out_mask, other=0.0)
    lse = in_log2(lse)
    m_new, shift = running_max(m_i, lse)
    weight, alpha = tl.exp2(lse - shift), tl.exp2(m_i - shift)
    acc = acc * alpha[:, None] + of_keys.to(tl.float32) * weight[:, None]
    l_i = l_i * alpha + weight
    inverse = tl.where(l_i == 0, 0.0, 1.0 / l_i)
    acc = acc * inverse[:, None]
    if dims.FEATURE_MAP is not None:
        if any_left_out:
            q_rows = q_ptr + offs_m.to(tl.int64)[:, None] * query.stride[2]
            shift = tl.where(l_i == 0, 0.0, m_new)
            acc = add_left_out(
                acc, shift, inverse, massless, q_rows, row_mask, state, state_head + zero, num_centers, scales, dims
            )
    out_ptrs, out_mask, lse_ptrs = results_of_rows(
        out, lse_ptr, tensor_batch, head, first_q + zero, start_m, offs_m, seq_q, stride_lse_b, stride_lse_h,
        dims.VALUE_DIM, dims.BLOCK_M, dims.BLOCK_DV,
    )  # fmt: skip
    tl.store(lse_ptrs, lse_of(m_new, l_i), mask=offs_m < seq_q)
    tl.store(out_ptrs, rounded_to(acc, out.ptr.dtype.element_ty), mask=out_mask)


@triton.jit
def load_state(state, center, dims):
    """The tensors of a head's only centre: Z [BLOCK_D, BLOCK_DV], k and μ [BLOCK_D], the constant feature's row of Z
    [BLOCK_DV] and entry of k, β in units of log 2. Tensors that the state lacks are 0.
    """
    z_ptr = state.z + center * dims.NUM_FEATURES * dims.VALUE_DIM
    k_ptr = state.k + center * dims.NUM_FEATURES
    rows, columns = tl.arange(0, dims.BLOCK_D), tl.arange(0, dims.BLOCK_DV)
    z_0, k_0 = tl.zeros([dims.BLOCK_DV], tl.float32), 0.0
    if dims.FEATURE_MAP == "taylor1":
        z_0 = tl.load(z_ptr + columns, mask=columns < dims.VALUE_DIM, other=0.0).to(tl.float32)
        k_0 = tl.load(k_ptr).to(tl.float32)
        z_ptr += dims.VALUE_DIM
        k_ptr += 1
    z = load_tile(z_ptr, 0, dims.HEAD_DIM, dims.VALUE_DIM, dims.BLOCK_D, dims.VALUE_DIM, dims.BLOCK_DV, True)
    k = tl.load(k_ptr + rows, mask=rows < dims.HEAD_DIM, other=0.0).to(tl.float32)
    mu, beta = tl.zeros([dims.BLOCK_D], tl.float32), 0.0
    if state.centers is not None:
        mu_ptrs = state.centers + center * dims.HEAD_DIM + rows
        mu = tl.load(mu_ptrs, mask=rows < dims.HEAD_DIM, other=0.0).to(tl.float32)
    if state.log_scale is not None:
        beta = tl.load(state.log_scale + center).to(tl.float32) * LOG2_E
    return z, k, mu, z_0, k_0, beta


@triton.jit
def features_and_mass(q, k, mu, k_0, beta, scales, HAS_CENTER: tl.constexpr, dims):
    """φ(x) without the constant feature [M, D], φ(x)·k [M], and log w [M] in units of log 2, of q [M, D] in float32."""
    phi = q * scales.feature
    if dims.FEATURE_MAP == "elu":
        phi = elu_of(phi)
    mass = tl.sum(phi * k[None, :], 1) + k_0
    logit = tl.zeros_like(mass) + beta
    if HAS_CENTER:
        logit += scales.logit * tl.sum(q * mu[None, :], 1)
    return phi, mass, logit


@triton.jit(do_not_specialize=["stride_rows", "seq_q"])
def _ntk_add_resident_prefix_kernel(query, state, sequences, out, lse_ptr, stride_rows, seq_q, num_heads, scales, dims):
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    batch = (tl.program_id(0) // num_heads).to(tl.int64)
    tensor_batch, first_q, seq_q = locate_rows(sequences, batch, seq_q)
    state_head, num_centers, _ = locate_state(state, head, batch)
    if num_centers == 0:
        return
    z, k, mu, z_0, k_0, beta = load_state(state, state_head, dims)
    q_ptr = head_ptr(query, tensor_batch, head, first_q)
    out_ptr = head_ptr(out, tensor_batch, head, first_q)
    lse_ptr += (tensor_batch * num_heads + head) * stride_rows + first_q
    stride_m = tl.num_programs(1) * dims.BLOCK_M
    for start_m in tl.range(tl.program_id(1) * dims.BLOCK_M, seq_q, stride_m, num_stages=dims.STAGES):
        offs_m = start_m + tl.arange(0, dims.BLOCK_M)
        q = load_tile(q_ptr, start_m, seq_q, query.stride[2], dims.BLOCK_M, dims.HEAD_DIM, dims.BLOCK_D, True)
        of_keys = load_tile(out_ptr, start_m, seq_q, out.stride[2], dims.BLOCK_M, dims.VALUE_DIM, dims.BLOCK_DV, True)
        lse = in_log2(tl.load(lse_ptr + offs_m, mask=offs_m < seq_q, other=-float("inf")))
        phi, mass, logit = features_and_mass(
            q.to(tl.float32), k, mu, k_0, beta, scales, state.centers is not None, dims
        )
        numerator = dot(rounded_to(phi, z.dtype), z, None, dims.PREFIX_PRECISION) + z_0[None, :]

        massless = is_massless(mass, logit)
        m_i = tl.where(massless, -float("inf"), logit)
        m_new, shift = running_max(m_i, lse)
        alpha, weight = tl.exp2(m_i - shift), tl.exp2(lse - shift)
        l_i = tl.where(massless, 0.0, mass * alpha) + weight
        inverse = tl.where(l_i == 0, 0.0, 1.0 / l_i)
        # Without mass nothing but the lse of the keys bounds the weight of Z.
        free = tl.minimum(tl.exp2(logit - shift) * inverse, MAX_WEIGHT, propagate_nan=tl.PropagateNan.ALL)
        alpha = tl.where(massless, tl.where(inverse > 0, free, 0.0), alpha * inverse)
        merged = numerator * alpha[:, None] + of_keys.to(tl.float32) * (weight * inverse)[:, None]
        tl.store(lse_ptr + offs_m, lse_of(m_new, l_i), mask=offs_m < seq_q)
        store_tile(out_ptr, merged, offs_m, seq_q, out.stride[2], 0, dims.VALUE_DIM, dims.BLOCK_DV)


def can_be_resident(call: Call) -> bool:
    """Returns whether the resident kernel takes the prefix of a call."""
    kind, state = call.kind, call.state
    served = kind.arch in configs.TABLES["add_resident"] and kind.dtype == torch.bfloat16
    return (
        (kind.arch == "interpreter" or served)
        and kind.feature_map in ("elu", "taylor1")
        and state.num_centers == 1
        and state.z_b is None
        and state.row_keys is None
        and max(kind.blocks.block_d, kind.blocks.block_dv) <= 128
    )


def _splits_of(call: Call, config: configs.TileConfig) -> int:
    """Returns the number of splits of a head's rows with which the last program finishes earliest."""
    kind = call.kind
    tiles, heads = ceil_div(call.sizes.seq_q, config.block_m), kind.heads * call.sizes.batch
    slots = max(1, 8 // config.num_warps) * configs.multiprocessors(kind.device)
    # The time, in tiles: rounds of programs, each of so many tiles and of what it takes to fetch Z.
    return min(range(1, tiles + 1), key=lambda n: ceil_div(n * heads, slots) * (ceil_div(tiles, n) + 1))


def add_prefix_launch(call: Call, out, lse, config: configs.TileConfig) -> Launch:
    """The launch of the general kernel, which adds the prefix to `out` [B, Hq, Lq, Dv] and `lse` [B, Hq, Lq]."""
    kind, sizes = call.kind, call.sizes
    tensors = (call.query, call.state, call.sequences, strided(out), lse)
    num_tiles = ceil_div(sizes.seq_q, config.block_m)
    scalars = lse.stride(0), lse.stride(1), sizes.seq_q, num_tiles, kind.heads, kind.scales
    return kind.launch(
        _ntk_add_prefix_kernel, (num_tiles * kind.heads * sizes.batch,), tensors, scalars, config,
        BLOCK_M=config.block_m, STAGES=config.num_stages, CHUNK=kind.z_chunk,
    )  # fmt: skip


def add_resident_launch(call: Call, out, lse, config: configs.TileConfig) -> Launch:
    """The launch of the resident kernel, which adds the prefix to `out` [B, Hq, Lq, Dv] and `lse` [B, Hq, Lq]."""
    kind, sizes = call.kind, call.sizes
    tensors = (call.query, call.state, call.sequences, strided(out), lse)
    return kind.launch(
        _ntk_add_resident_prefix_kernel, (kind.heads * sizes.batch, _splits_of(call, config)), tensors,
        (lse.shape[2], sizes.seq_q, kind.heads, kind.scales), config, BLOCK_M=config.block_m, STAGES=config.num_stages,
    )  # fmt: skip


ADD_PREFIX = (
    Kernel("add_resident", add_resident_launch, can_be_resident),
    Kernel("add_prefix", add_prefix_launch),
)


def run_add_prefix(inputs, out, lse) -> None:
    """Adds the prefix to `out` and `lse`, attention over the keys alone."""
    call = prepare_exactly(inputs.without_keys())
    if is_second_order(call):
        run_add_second_order(call, out, lse)
    else:
        run_pass(ADD_PREFIX, with_rounded_z(call), out, lse, updated=(out, lse))
