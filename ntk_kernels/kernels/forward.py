"""Forward of NTK-Attention in one pass: a FlashAttention-style online softmax that starts from the prefix.

Each program owns BLOCK_M rows of queries of one head. It starts with the prefix's linear-attention term as
accumulator, mass and maximum (`jit/prefix_term.py`), walks the state's own rows, then the keys that some of its rows
see, and normalises. The formula is that of `reference/attention.py`, the conventions are those of `jit/tiles.py`.

Grid: one program for each tile of BLOCK_M queries, head and batch row (or packed sequence), those of a head side by
side, so that they share K and V in the L2 cache; with causality the tiles with the most keys come first.

Memory beyond inputs and outputs: `lse`.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import replay
from .host import configs
from .host.launch import Call, Kernel, Launch, ceil_div, prepare, run_pass, strided
from .jit.prefix_term import add_left_out, attend_rows, locate_state, start_from_prefix
from .jit.tiles import (
    dot,
    head_ptr,
    load_descriptor_tile,
    load_tile,
    lse_of,
    online_softmax,
    results_of_rows,
    rounded_to,
)
from .jit.visibility import (
    Band,
    HeadKeys,
    bounds_of_zone,
    keys_of_rows,
    locate_keys,
    locate_rows,
    mask_offset,
    masked,
    soft_capped,
)


@triton.jit
def _attend_keys(acc, m_i, l_i, q, keys, offs_m, start, stop, band, scales, MASKED: tl.constexpr, dims):
    """Walks the keys from `start` to `stop`; only if MASKED may there be some that a row does not see."""
    for start_n in tl.range(start, stop, dims.BLOCK_N, num_stages=dims.STAGES):
        if MASKED or keys.keys.k_desc is None:
            k = load_tile(
                keys.k_ptr, start_n, band.stop, keys.keys.k.stride[2], dims.BLOCK_N, dims.HEAD_DIM, dims.BLOCK_D, MASKED
            )
            v = load_tile(
                keys.v_ptr,
                start_n,
                band.stop,
                keys.keys.v.stride[2],
                dims.BLOCK_N,
                dims.VALUE_DIM,
                dims.BLOCK_DV,
                MASKED,
            )
        else:
            row = keys.first + start_n
            k = load_descriptor_tile(keys.keys.k_desc, keys.batch, keys.head, row, dims.BLOCK_N, dims.BLOCK_D)
            v = load_descriptor_tile(keys.keys.v_desc, keys.batch, keys.head, row, dims.BLOCK_N, dims.BLOCK_DV)
        s = dot(q, k.T, None, dims.PRECISION)
        if dims.SOFTCAP:
            s = soft_capped(s, scales.logit, scales.softcap)
        elif MASKED or not dims.POSITIVE_SCALE:
            s = s * scales.logit
        if MASKED:
            offs_n = start_n + tl.arange(0, dims.BLOCK_N)[None, :]
            s, visible = masked(s, offs_m[:, None], offs_n, start, band, dims)
            if band.mask.ptr is not None:
                # 0 · NaN = NaN: what no row sees must not be there at all
                seen = tl.max((visible & (offs_m < band.seq_q)[:, None]).to(tl.int32), 0) > 0
                v = tl.where(seen[:, None], v, 0.0)
            s = tl.where(visible, s, -float("inf"))
        if MASKED or dims.SOFTCAP or not dims.POSITIVE_SCALE:
            p, alpha, m_i, l_i = online_softmax(m_i, l_i, s, 1.0, MASKED)
        else:
            p, alpha, m_i, l_i = online_softmax(m_i, l_i, s, scales.logit, MASKED)
        acc = dot(rounded_to(p, v.dtype), v, acc * alpha[:, None], dims.PRECISION)
    return acc, m_i, l_i


# Integers that change from call to call; specialised on their values they would recompile the kernel.
_VARYING = ["stride_lse_b", "stride_lse_h", "seq_q", "seq_k", "num_tiles", "lower", "upper"]


@triton.jit(do_not_specialize=_VARYING)
def _ntk_fwd_kernel(
    query, keys, state, mask, sequences, out, lse_ptr, stride_lse_b, stride_lse_h, seq_q, seq_k, num_tiles, num_heads,
    group, lower, upper, scales, dims,
):  # fmt: skip
    tile = tl.program_id(0) % num_tiles
    batch_head = tl.program_id(0) // num_tiles
    if dims.HAS_UPPER:
        tile = num_tiles - 1 - tile
    head = batch_head % num_heads
    batch = (batch_head // num_heads).to(tl.int64)
    start_m = tile * dims.BLOCK_M

    tensor_batch, first_q, seq_q = locate_rows(sequences, batch, seq_q)
    first_k, seq_k, start_n, stop_n, lower, upper = locate_keys(sequences, batch, seq_q, seq_k, lower, upper)
    if start_m >= seq_q:
        return
    zones = keys_of_rows(
        start_m, tl.minimum(start_m + dims.BLOCK_M, seq_q), start_n, stop_n, lower, upper, mask.ptr is not None, dims
    )
    q_ptr = head_ptr(query, tensor_batch, head, first_q)
    head_k = head // group
    k_ptr, v_ptr = head_ptr(keys.k, tensor_batch, head_k, first_k), head_ptr(keys.v, tensor_batch, head_k, first_k)
    keys = HeadKeys(k_ptr, v_ptr, keys, tensor_batch, head_k, first_k)
    offs_m = start_m + tl.arange(0, dims.BLOCK_M)
    row_mask = (offs_m < seq_q)[:, None]

    state_head, num_centers, num_rows = locate_state(state, head, batch)
    q_rows = q_ptr + start_m * tl.cast(query.stride[2], tl.int64)
    q_rows += tl.arange(0, dims.BLOCK_M)[:, None] * query.stride[2]
    if dims.FEATURE_MAP is None:
        acc = tl.zeros([dims.BLOCK_M, dims.BLOCK_DV], tl.float32)
        m_i = tl.full([dims.BLOCK_M], -float("inf"), tl.float32)
        l_i = tl.zeros([dims.BLOCK_M], tl.float32)
    else:
        acc, m_i, l_i, massless, any_left_out = start_from_prefix(
            q_rows, row_mask, state, state_head, num_centers, scales, dims
        )
    q = load_tile(q_ptr, start_m, seq_q, query.stride[2], dims.BLOCK_M, dims.HEAD_DIM, dims.BLOCK_D, True)
    if state.row_keys is not None:
        acc, m_i, l_i = attend_rows(acc, m_i, l_i, q, state, state_head, num_rows, scales.logit, dims)

    band = Band(mask, mask_offset(mask, batch, head), seq_q, zones.stop, lower, upper)
    for zone in tl.static_range(3):
        if zone == 2 or (mask.ptr is None and (zone == 1 or dims.HAS_LOWER)):
            start, stop = bounds_of_zone(zones, zone)
            acc, m_i, l_i = _attend_keys(acc, m_i, l_i, q, keys, offs_m, start, stop, band, scales, zone != 1, dims)

    # 0, as the grid has one dimension, but opaque to the compiler: addresses and masks computed from it do not stay in
    # registers through the loop over the keys.
    zero = tl.program_id(1)
    offs_m = start_m + zero + tl.arange(0, dims.BLOCK_M)
    row_mask = (offs_m < seq_q)[:, None]
    first_q += zero
    inverse = tl.where(l_i == 0, 0.0, 1.0 / l_i)
    acc = acc * inverse[:, None]
    if dims.FEATURE_MAP is not None:
        if any_left_out:
            q_rows = q_ptr + offs_m.to(tl.int64)[:, None] * query.stride[2]
            shift = tl.where(l_i == 0, 0.0, m_i)
            acc = add_left_out(
                acc, shift, inverse, massless, q_rows, row_mask, state, state_head + zero, num_centers, scales, dims
            )
    out_ptrs, out_mask, lse_ptrs = results_of_rows(
        out, lse_ptr, tensor_batch, head, first_q, start_m, offs_m, seq_q, stride_lse_b, stride_lse_h, dims.VALUE_DIM,
        dims.BLOCK_M, dims.BLOCK_DV,
    )  # fmt: skip
    tl.store(lse_ptrs, lse_of(m_i, l_i), mask=offs_m < seq_q)
    tl.store(out_ptrs, rounded_to(acc, out.ptr.dtype.element_ty), mask=out_mask)


def fwd_launch(call: Call, out, lse, config: configs.TileConfig) -> Launch:
    """The launch that fills `out` [B, Hq, Lq, Dv] and `lse` [B, Hq, Lq]."""
    kind, sizes, keys = call.kind, call.sizes, call.keys
    if config.use_descriptors and configs.can_describe(keys.k.ptr) and configs.can_describe(keys.v.ptr):
        replay.refuse("tensor descriptors hold addresses")
        keys = keys._replace(
            k_desc=_descriptor(keys.k.ptr, config.block_n, kind.blocks.block_d),
            v_desc=_descriptor(keys.v.ptr, config.block_n, kind.blocks.block_dv),
        )
    tensors = (call.query, keys, call.state, call.mask, call.sequences, strided(out), lse)
    num_tiles = ceil_div(sizes.seq_q, config.block_m)
    scalars = (
        lse.stride(0), lse.stride(1), sizes.seq_q, sizes.seq_k, num_tiles, kind.heads, kind.group, sizes.lower,
        sizes.upper, kind.scales,
    )  # fmt: skip
    return kind.launch(
        _ntk_fwd_kernel, (num_tiles * kind.heads * sizes.batch,), tensors, scalars, config, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, STAGES=config.num_stages, CHUNK=kind.z_chunk,
    )  # fmt: skip


def _descriptor(tensor: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 1, rows, columns])


FORWARD = (Kernel("forward", fwd_launch),)


def run_fwd(inputs, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Fills `out` [B, Hq, Lq, Dv] and `lse` [B, Hq, Lq]; `inputs` as in `ntk_kernels/inputs.py`."""
    run_pass(FORWARD, prepare(inputs), out, lse)
