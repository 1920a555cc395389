"""First pass of the backward: the numbers of each query row that the other passes need.

    Δ_i  = dO_i·out_i - dlse_i
    Δ'_i = Δ_i where the prefix has mass, else 0     of states with a linear-attention term
    u_ic = w_ic e^{-lse_i}                           likewise; cut off at e^40 where there is no mass

Grid: one program for each tile of BLOCK_M rows, head and batch row (or packed sequence).
"""

import torch
import triton
import triton.language as tl

from .host import configs
from .host.launch import Call, Launch, ceil_div, contiguous, strided
from .jit.features import elu_mass, taylor_mass
from .jit.prefix_term import MAX_WEIGHT, any_of, center_logit, is_massless, locate_state, weight_limit
from .jit.row_terms import RowTerms, load_lse, load_rows
from .jit.tiles import head_ptr, load_tile, running_max
from .jit.visibility import locate_rows


@triton.jit(do_not_specialize=["stride_rows", "seq_q", "num_tiles"])
def _ntk_bwd_delta_kernel(
    query, out, grad_out, dlse_ptr, state, sequences, row_terms, stride_rows, seq_q, num_tiles, num_heads, scales, dims
):
    start_m = tl.program_id(0) % num_tiles * dims.BLOCK_M
    batch_head = tl.program_id(0) // num_tiles
    head = (batch_head % num_heads).to(tl.int64)
    batch = (batch_head // num_heads).to(tl.int64)
    tensor_batch, first_q, seq_q = locate_rows(sequences, batch, seq_q)
    if start_m >= seq_q:
        return
    offs_m = start_m + tl.arange(0, dims.BLOCK_M)
    row_mask = offs_m < seq_q
    first_row = (tensor_batch * num_heads + head) * stride_rows + first_q

    out_ptr = head_ptr(out, tensor_batch, head, first_q)
    do_ptr = head_ptr(grad_out, tensor_batch, head, first_q)
    out_tile = load_tile(out_ptr, start_m, seq_q, out.stride[2], dims.BLOCK_M, dims.VALUE_DIM, dims.BLOCK_DV, True).to(
        tl.float32
    )
    do = load_tile(do_ptr, start_m, seq_q, grad_out.stride[2], dims.BLOCK_M, dims.VALUE_DIM, dims.BLOCK_DV, True).to(
        tl.float32
    )
    delta = tl.sum(out_tile * do, 1)
    if dlse_ptr is not None:
        delta -= load_rows(dlse_ptr + first_row, offs_m, seq_q)
    lse = load_lse(row_terms.lse + first_row, offs_m, seq_q)
    delta = tl.where(lse == float("inf"), 0.0, delta)  # of rows that see nothing, whatever the gradient of their lse
    tl.store(row_terms.delta + first_row + offs_m, delta, mask=row_mask)

    if dims.FEATURE_MAP is not None:
        state_head, num_centers, _ = locate_state(state, head, batch)
        q_rows = head_ptr(query, tensor_batch, head, first_q) + offs_m.to(tl.int64)[:, None] * query.stride[2]
        weights_ptr = row_terms.weights + (tensor_batch * num_heads + head) * state.num_centers * stride_rows
        weights_ptr += first_q + offs_m
        # Σ_c w_ic φ(x_i)·k_c as the forward has it: l_i, relative to the largest w_ic that has mass, m_i.
        m_i = tl.full([dims.BLOCK_M], -float("inf"), tl.float32)
        l_i = tl.zeros([dims.BLOCK_M], tl.float32)
        largest = tl.zeros([dims.BLOCK_M], tl.float32)
        for c in tl.range(0, num_centers, num_stages=1):
            center = state_head * state.num_centers + c
            k_ptr = state.k + center * dims.NUM_FEATURES
            logit = center_logit(q_rows, row_mask[:, None], state, center, scales.logit, dims)
            u = tl.exp2(logit - lse)
            if dims.FEATURE_MAP == "elu":
                l_i = elu_mass(q_rows, row_mask[:, None], k_ptr, scales.feature, dims)
                m_i = logit
            else:
                mass = taylor_mass(q_rows, row_mask[:, None], k_ptr, scales.feature, dims)
                u = tl.where(mass == 0, tl.minimum(u, MAX_WEIGHT, propagate_nan=tl.PropagateNan.ALL), u)
                logit = tl.where(mass == 0, -float("inf"), logit)
                m_new, shift = running_max(m_i, logit)
                l_i = l_i * tl.exp2(m_i - shift) + mass * tl.exp2(logit - shift)
                m_i = m_new
            largest = tl.maximum(largest, u)
            tl.store(weights_ptr + c * tl.cast(stride_rows, tl.int64), u, mask=row_mask)
        massless = is_massless(l_i, m_i)
        tl.store(row_terms.mass_delta + first_row + offs_m, tl.where(massless, 0.0, delta), mask=row_mask)
        limit = weight_limit(l_i, massless)
        if any_of(largest > limit, dims.BLOCK_M):
            tl.debug_barrier()  # what one thread stored another may load
            for c in tl.range(0, num_centers, num_stages=1):
                ptrs = weights_ptr + c * tl.cast(stride_rows, tl.int64)
                u = tl.load(ptrs, mask=row_mask, other=0.0)
                u = tl.minimum(u, limit, propagate_nan=tl.PropagateNan.ALL)
                tl.store(ptrs, u, mask=row_mask)


def delta_launch(call: Call, grad_out, grad_lse, out, row_terms: RowTerms, config: configs.TileConfig) -> Launch:
    """The launch that fills `delta`, and `mass_delta` and `weights` if there are any."""
    kind, sizes = call.kind, call.sizes
    tensors = (call.query, strided(out), strided(grad_out), grad_lse, call.state, call.sequences, row_terms)
    num_tiles = ceil_div(sizes.seq_q, config.block_m)
    return kind.launch(
        _ntk_bwd_delta_kernel, (num_tiles * kind.heads * sizes.batch,), tensors,
        (row_terms.lse.shape[2], sizes.seq_q, num_tiles, kind.heads, kind.scales), config, BLOCK_M=config.block_m,
        FEATURE_MAP=None if row_terms.weights is None else kind.feature_map,
    )  # fmt: skip


def run_delta(call: Call, grad_out, grad_lse, out, lse: torch.Tensor, needs_weights: bool) -> RowTerms:
    """The RowTerms of a call; those of the linear-attention term, if there is one, only if `needs_weights`."""
    lse = lse.contiguous()
    mass_delta = weights = None
    if call.kind.feature_map is not None and needs_weights:
        mass_delta = torch.empty_like(lse)
        weights = lse.new_empty(*lse.shape[:2], call.state.num_centers, lse.shape[2])
    terms = RowTerms(lse, torch.empty_like(lse), mass_delta, weights)
    delta_launch(call, grad_out, contiguous(grad_lse), out, terms, call.kind.candidates("delta")[0])()
    return terms
