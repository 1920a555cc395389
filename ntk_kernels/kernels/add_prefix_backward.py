"""Backward of the pass that adds the prefix (`add_prefix.py`): the gradients through the prefix.

    Δ_i  = dO_i·out_i - dlse_i                  Δ'_i = Δ_i where the prefix has mass, else 0
    dx_i = Z dO_i - Δ'_i k                      dQ_i += feature_scale · u_i φ'(x_i)ᵀ dx_i + scale · dβ_i μ
    dZ   = Σ_i u_i φ_i dO_iᵀ                    dk = -Σ_i u_i Δ'_i φ_i
    dβ_i = u_i φ_i·(Z dO_i - Δ'_i k)            dμ = scale · Σ_i dβ_i q_i,   dβ = Σ_i dβ_i

with u_i = w_i e^{-lse_i}, cut off at e^40 where there is no mass.

The resident kernel makes all of them in one pass, for prefixes that the forward's takes and calls in which all batch
rows use one state. Each program keeps Z and its sums, and walks tiles of the query rows that use one head of the state,
of which the next are on their way. Other calls take the passes of `backward.py`, with a kernel of its own for dQ.

Grid: resident, (heads of the state, splits), a split taking every n-th tile of BLOCK_M rows; the splits' sums are added
up afterwards, so that two runs agree bit for bit. dQ: one program for each tile of rows, head and batch row.
"""

import triton
import triton.language as tl

from .add_prefix import can_be_resident, features_and_mass, load_state
from .backward import empty_log_weights
from .backward_delta import run_delta
from .backward_state import FEATURE_TENSORS, StateGrads, added_up, run_state_backward
from .host import configs
from .host.launch import (
    Call,
    Kernel,
    Launch,
    ceil_div,
    contiguous,
    made_addressable,
    prepare,
    run_pass,
    strided,
)
from .jit.features import elu_slope, load_columns
from .jit.prefix_term import is_massless, locate_state, weight_limit
from .jit.prefix_term_grad import add_own_rows, linear_term_grad
from .jit.row_terms import RowTerms, load_lse, load_rows
from .jit.tiles import LN_2, dot, head_ptr, load_tile, rounded_to, store_tile
from .jit.visibility import locate_rows


@triton.jit(do_not_specialize=["stride_rows", "seq_q", "num_tiles"])
def _ntk_add_prefix_bwd_dq_kernel(
    query, grad_out, state, sequences, row_terms, grad_query, dlogw_ptr, stride_rows, seq_q, num_tiles, num_heads,
    scales, dims,
):  # fmt: skip
    start_m = tl.program_id(0) % num_tiles * dims.BLOCK_M
    batch_head = tl.program_id(0) // num_tiles
    head = (batch_head % num_heads).to(tl.int64)
    batch = (batch_head // num_heads).to(tl.int64)
    tensor_batch, first_q, seq_q = locate_rows(sequences, batch, seq_q)
    if start_m >= seq_q:
        return
    offs_m = start_m + tl.arange(0, dims.BLOCK_M)
    row_mask = (offs_m < seq_q)[:, None]
    q_ptr = head_ptr(query, tensor_batch, head, first_q)
    q_rows = q_ptr + offs_m.to(tl.int64)[:, None] * query.stride[2]
    do_rows = head_ptr(grad_out, tensor_batch, head, first_q) + offs_m.to(tl.int64)[:, None] * grad_out.stride[2]
    q = load_tile(q_ptr, start_m, seq_q, query.stride[2], dims.BLOCK_M, dims.HEAD_DIM, dims.BLOCK_D, True)
    state_head, num_centers, num_rows = locate_state(state, head, batch)
    if dims.FEATURE_MAP is None:
        dq = tl.zeros([dims.BLOCK_M, dims.BLOCK_D], tl.float32)
    else:
        dq = linear_term_grad(
            q, q_rows, do_rows, row_mask, offs_m, seq_q, state, state_head, num_centers, row_terms, dlogw_ptr,
            tensor_batch * num_heads + head, first_q, stride_rows, scales, dims,
        )  # fmt: skip
    if grad_query.ptr is not None:
        if state.row_keys is not None:
            if dims.HAS_SCALE:
                factor = scales.logit * LN_2
                first_row = (tensor_batch * num_heads + head) * stride_rows + first_q
                lse = load_lse(row_terms.lse + first_row, offs_m, seq_q)
                delta = load_rows(row_terms.delta + first_row, offs_m, seq_q)
                dq = factor * add_own_rows(
                    dq / factor, q_rows, do_rows, row_mask, lse, delta, state, state_head, num_rows, scales.logit,
                    q.dtype, dims,
                )  # fmt: skip
        # 0, as the grid has one dimension, but opaque to the compiler: addresses and masks computed from it do not stay
        # in registers through the loops.
        start_m += tl.program_id(1)
        offs_m = start_m + tl.arange(0, dims.BLOCK_M)
        dq_ptr = head_ptr(grad_query, tensor_batch, head, first_q)
        dq += load_tile(
            dq_ptr, start_m, seq_q, grad_query.stride[2], dims.BLOCK_M, dims.HEAD_DIM, dims.BLOCK_D, True
        ).to(tl.float32)
        store_tile(dq_ptr, dq, offs_m, seq_q, grad_query.stride[2], 0, dims.HEAD_DIM, dims.BLOCK_D)


@triton.jit(do_not_specialize=["stride_rows", "seq_q", "batch", "num_tiles"])
def _ntk_add_resident_prefix_bwd_kernel(
    query, grad_out, out, lse_ptr, dlse_ptr, state, grad_query, grads, stride_rows, seq_q, batch, num_tiles, num_heads,
    scales, dims,
):  # fmt: skip
    head_of_state = tl.program_id(0)
    HAS_CENTER: tl.constexpr = state.centers is not None
    z, k, mu, z_0, k_0, beta = load_state(state, head_of_state.to(tl.int64), dims)
    dz = tl.zeros([dims.BLOCK_DV, dims.BLOCK_D], tl.float32)
    dk = tl.zeros([dims.BLOCK_D], tl.float32)
    dz_0 = tl.zeros([dims.BLOCK_DV], tl.float32)
    dk_0 = tl.zeros([dims.BLOCK_M], tl.float32)
    dcenter = tl.zeros([dims.BLOCK_D], tl.float32)
    dlog_scale = tl.zeros([dims.BLOCK_M], tl.float32)
    zero = tl.program_id(2)  # the grid has two dimensions, of which the compiler does not know
    tiles_of_state = batch * state.query_heads_per_head * num_tiles
    for tile in tl.range(tl.program_id(1), tiles_of_state, tl.num_programs(1), num_stages=dims.STAGES):
        start_m = tile % num_tiles * dims.BLOCK_M
        head = (tile // num_tiles % state.query_heads_per_head).to(tl.int64)
        head += head_of_state * state.query_heads_per_head
        row = (tile // num_tiles // state.query_heads_per_head).to(tl.int64)
        offs_m = start_m + tl.arange(0, dims.BLOCK_M)
        row_mask = (offs_m < seq_q)[:, None]
        # With the start of the tile in them: offsets inside a tile would stay in registers from tile to tile.
        rows = offs_m.to(tl.int64)[:, None]
        first_row = (row * num_heads + head) * stride_rows
        q_head = query.ptr + row * query.stride[0] + head * query.stride[1]
        do_head = grad_out.ptr + row * grad_out.stride[0] + head * grad_out.stride[1]
        out_head = out.ptr + row * out.stride[0] + head * out.stride[1]
        q = load_columns(q_head + rows * query.stride[2], row_mask, 0, dims.HEAD_DIM, dims.BLOCK_D).to(tl.float32)
        do = load_columns(do_head + rows * grad_out.stride[2], row_mask, 0, dims.VALUE_DIM, dims.BLOCK_DV)
        out_tile = load_columns(out_head + rows * out.stride[2], row_mask, 0, dims.VALUE_DIM, dims.BLOCK_DV)
        lse = load_lse(lse_ptr + first_row, offs_m, seq_q)
        delta = tl.sum(out_tile.to(tl.float32) * do.to(tl.float32), 1)
        if dlse_ptr is not None:
            delta -= tl.load(dlse_ptr + first_row + offs_m, mask=offs_m < seq_q, other=0.0)
        delta = tl.where(lse == float("inf"), 0.0, delta)

        phi, mass, logit = features_and_mass(q, k, mu, k_0, beta, scales, HAS_CENTER, dims)
        massless = is_massless(mass, logit)
        delta = tl.where(massless, 0.0, delta)
        u = tl.minimum(tl.exp2(logit - lse), weight_limit(mass, massless), propagate_nan=tl.PropagateNan.ALL)

        if grads.z is not None or grads.k is not None:
            weighted = u[:, None] * phi
            if grads.z is not None:
                # The computed side on the right: transposed, on the left, Hopper reads it wrong (fla issue 640).
                dz = dot(do.T, rounded_to(weighted, do.dtype), dz, dims.PREFIX_PRECISION)
                if dims.FEATURE_MAP == "taylor1":
                    dz_0 += tl.sum(u[:, None] * do.to(tl.float32), 0)
            if grads.k is not None:
                dk -= tl.sum(weighted * delta[:, None], 0)
                if dims.FEATURE_MAP == "taylor1":
                    dk_0 -= u * delta
        if grad_query.ptr is not None or grads.centers is not None or grads.log_scale is not None:
            dx = dot(do, z.T, None, dims.PREFIX_PRECISION) - delta[:, None] * k[None, :]
            dbeta = tl.sum(dx * phi, 1)
            if dims.FEATURE_MAP == "elu":
                dx = dx * elu_slope(phi)
            else:
                dbeta += tl.sum(do.to(tl.float32) * z_0[None, :], 1) - delta * k_0
            dbeta *= u
            if grad_query.ptr is not None:
                dq_head = grad_query.ptr + row * grad_query.stride[0] + head * grad_query.stride[1]
                dq_rows = dq_head + rows * grad_query.stride[2]
                dq = load_columns(dq_rows, row_mask, 0, dims.HEAD_DIM, dims.BLOCK_D).to(tl.float32)
                dq += (scales.feature * u)[:, None] * dx
                if HAS_CENTER:
                    dq += (dbeta * (scales.logit * LN_2))[:, None] * mu[None, :]
                # Again, as those of the tiles on their way would stay in registers.
                offs_m = start_m + zero + tl.arange(0, dims.BLOCK_M)
                store_tile(dq_head, dq, offs_m, seq_q, grad_query.stride[2], 0, dims.HEAD_DIM, dims.BLOCK_D)
            if grads.log_scale is not None:
                dlog_scale += dbeta
            if grads.centers is not None:
                dcenter += tl.sum(dbeta[:, None] * q, 0)

    center = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + head_of_state
    features, values = tl.arange(0, dims.BLOCK_D), tl.arange(0, dims.BLOCK_DV)
    CONSTANTS: tl.constexpr = dims.NUM_FEATURES - dims.HEAD_DIM
    if grads.z is not None:
        dz_ptr = grads.z + center * dims.NUM_FEATURES * dims.VALUE_DIM
        if CONSTANTS == 1:
            tl.store(dz_ptr + values, dz_0, mask=values < dims.VALUE_DIM)
        ptrs = dz_ptr + (features + CONSTANTS)[None, :] * dims.VALUE_DIM + values[:, None]
        tl.store(ptrs, dz, mask=(features < dims.HEAD_DIM)[None, :] & (values < dims.VALUE_DIM)[:, None])
    if grads.k is not None:
        if CONSTANTS == 1:
            tl.store(grads.k + center * dims.NUM_FEATURES, tl.sum(dk_0, 0))
        k_ptrs = grads.k + center * dims.NUM_FEATURES + features + CONSTANTS
        tl.store(k_ptrs, dk, mask=features < dims.HEAD_DIM)
    if grads.centers is not None:
        mu_ptrs = grads.centers + center * dims.HEAD_DIM + features
        tl.store(mu_ptrs, dcenter * (scales.logit * LN_2), mask=features < dims.HEAD_DIM)
    if grads.log_scale is not None:
        tl.store(grads.log_scale + center, tl.sum(dlog_scale, 0))


def can_be_resident_bwd(call: Call) -> bool:
    """Returns whether the resident kernel takes the gradients through the prefix of a call."""
    blocks = call.kind.blocks
    fits = call.state.centers is None or max(blocks.block_d, blocks.block_dv) <= 64  # into the registers
    return can_be_resident(call) and fits and call.state.index is None and call.sequences.cu_seqlens_q is None


def add_prefix_dq_launch(
    call: Call, grad_out, row_terms: RowTerms, grad_query, grad_log_weights, config: configs.TileConfig
) -> Launch:
    """The launch that adds the prefix's gradient to `grad_query` and fills `grad_log_weights` (each may be None)."""
    kind, sizes = call.kind, call.sizes
    tensors = (
        call.query, strided(grad_out), call.state, call.sequences, row_terms, strided(grad_query), grad_log_weights
    )  # fmt: skip
    num_tiles = ceil_div(sizes.seq_q, config.block_m)
    return kind.launch(
        _ntk_add_prefix_bwd_dq_kernel, (num_tiles * kind.heads * sizes.batch,), tensors,
        (row_terms.lse.shape[2], sizes.seq_q, num_tiles, kind.heads, kind.scales), config, BLOCK_M=config.block_m,
        STAGES=config.num_stages,
    )  # fmt: skip


def add_resident_bwd_launch(
    call: Call, grad_out, grad_lse, out, lse, grad_query, grads: StateGrads, splits: int, config: configs.TileConfig
) -> Launch:
    """The launch that adds the prefix's gradient to `grad_query` (may be None) and fills `grads` [splits, ...]."""
    kind, sizes = call.kind, call.sizes
    tensors = (call.query, strided(grad_out), strided(out), lse, grad_lse, call.state, strided(grad_query), grads)
    num_tiles = ceil_div(sizes.seq_q, config.block_m)
    return kind.launch(
        _ntk_add_resident_prefix_bwd_kernel, (call.state.num_heads, splits), tensors,
        (lse.shape[2], sizes.seq_q, sizes.batch, num_tiles, kind.heads, kind.scales), config, BLOCK_M=config.block_m,
        STAGES=config.num_stages,
    )  # fmt: skip


ADD_PREFIX_DQ = (Kernel("add_prefix_dq", add_prefix_dq_launch),)
ADD_RESIDENT_BWD = (Kernel("add_resident_bwd", add_resident_bwd_launch),)


def run_add_prefix_bwd(inputs, out, lse, grad_out, grad_lse, grad_query, wanted: StateGrads) -> StateGrads:
    """Adds the gradient through the prefix to `grad_query` (may be None); arguments as those of `backward.run_bwd`,
    `out` and `lse` being of keys and prefix.

    Returns:
        The gradients of the `wanted` tensors of the state, None for the others.
    """
    call = prepare(inputs.without_keys())
    grad_out, out = made_addressable(grad_out), made_addressable(out)
    if can_be_resident_bwd(call):
        return _run_resident(call, grad_out, contiguous(grad_lse), out, lse.contiguous(), grad_query, wanted)
    needs_weights = grad_query is not None or any(getattr(wanted, name) is not None for name in FEATURE_TENSORS)
    row_terms = run_delta(call, grad_out, grad_lse, out, lse, needs_weights)
    grad_log_weights = empty_log_weights(row_terms, wanted)
    if grad_query is not None or grad_log_weights is not None:
        run_pass(ADD_PREFIX_DQ, call, grad_out, row_terms, grad_query, grad_log_weights, updated=(grad_query,))
    return run_state_backward(call, grad_out, row_terms, grad_log_weights, wanted)


def _run_resident(call: Call, grad_out, grad_lse, out, lse, grad_query, wanted: StateGrads) -> StateGrads:
    # One program for each multiprocessor, if there are as many tiles.
    kind, state = call.kind, call.state
    tiles = call.sizes.batch * state.query_heads_per_head * ceil_div(call.sizes.seq_q, 64)
    splits = max(1, min(configs.multiprocessors(kind.device) // state.num_heads, tiles))
    sums = StateGrads(*(None if tensor is None else lse.new_empty(splits, *tensor.shape) for tensor in wanted))
    run_pass(ADD_RESIDENT_BWD, call, grad_out, grad_lse, out, lse, grad_query, sums, splits, updated=(grad_query,))
    return StateGrads(**added_up(sums, wanted))
