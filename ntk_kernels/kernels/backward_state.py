"""Backward into a prefix state: its linear-attention term (Z, k, centres, log_scale) and its own rows.

    dZ_c = Σ_i u_ic φ_i dO_iᵀ       dk_c = -Σ_i u_ic Δ'_i φ_i
    dμ_c = scale · Σ_i dlogw_ic q_i    dβ_c = Σ_i dlogw_ic
    dv_j = Σ_i P_ij dO_i            dκ_j = scale · Σ_i dS_ij q_i    dbias_j = Σ_i dS_ij

The sums go over all rows of all batch rows (or packed sequences) and query heads that use this head of this state. Each
program owns a block of features (of one centre) or of rows of the state, and takes every n-th tile of those query rows,
n being the number of splits; their partial sums are added up afterwards. No atomics: the order of a sum depends on
shapes, `state_index` and the number of multiprocessors, never on timing.

Features of "taylor1" and "taylor2" come in sections, a launch each: "linear" (1 and x), "squares", and "pairs", of
which a program has x_a·x_b for one a and CHUNK values of b.

Grid: (blocks of features or rows · states · their heads, splits).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .host import configs
from .host.launch import Call, Kind, Launch, ceil_div, strided
from .host.sections import SECTIONS, num_blocks
from .jit.features import feature_index, load_column, load_columns, section_of
from .jit.prefix_term_grad import own_rows_grad
from .jit.row_terms import RowTerms, load_lse, load_rows
from .jit.tiles import LN_2, dot, head_ptr, load_tile, rounded_to
from .jit.visibility import locate_rows

FEATURE_TENSORS = ("z", "k", "centers", "log_scale")
ROW_TENSORS = ("row_keys", "row_values", "row_bias")
ROW_SECTIONS = {"values": ("row_values",), "keys": ("row_keys", "row_bias")}  # a launch each


class StateGrads(NamedTuple):
    """Partial sums [splits, ...] in the shapes of the state's tensors, float32; None for those that nobody wants."""

    z: object = None
    k: object = None
    centers: object = None
    log_scale: object = None
    row_keys: object = None
    row_values: object = None
    row_bias: object = None


@triton.jit
def _uses(state, batch, number):
    """Returns whether a batch row uses the state `number`."""
    used = number == number
    if state.index is not None:
        used = tl.load(state.index + batch) == number
    return used


@triton.jit
def _locate_tile(
    state, tile, head_of_state, tensor_batch, first_q, length, num_heads, stride_rows, BLOCK_M: tl.constexpr
):
    """Head, first row, rows, and start in RowTerms of a tile of the query heads that share a head of a state."""
    tiles_per_head = tl.cdiv(length, BLOCK_M)
    head = (head_of_state * state.query_heads_per_head + tile // tiles_per_head).to(tl.int64)
    start_m = tile % tiles_per_head * BLOCK_M
    first_row = (tensor_batch * num_heads + head) * stride_rows + first_q
    return head, start_m, start_m + tl.arange(0, BLOCK_M), first_row


@triton.jit
def _first_tile_of_next(first, num_tiles, splits):
    """A split takes the tiles first, first + splits, ... of a batch row's `num_tiles`: where it goes on in the next."""
    return first + tl.cdiv(tl.maximum(num_tiles - first, 0), splits) * splits - num_tiles


@triton.jit(do_not_specialize=["stride_rows", "seq_q", "batch", "num_state_heads", "splits"])
def _ntk_bwd_state_kernel(
    query, grad_out, state, sequences, row_terms, dlogw_ptr, grads, stride_rows, seq_q, batch, num_heads,
    num_state_heads, splits, scales, dims,
):  # fmt: skip
    state_head = tl.program_id(0) % num_state_heads
    number, head_of_state = state_head // state.num_heads, state_head % state.num_heads
    split = tl.program_id(1)
    num_chunks: tl.constexpr = (dims.HEAD_DIM + dims.CHUNK - 1) // dims.CHUNK
    c = tl.program_id(0) // num_state_heads % state.num_centers
    block = tl.program_id(0) // num_state_heads // state.num_centers
    columns = block % num_chunks * dims.CHUNK + tl.arange(0, dims.CHUNK)
    a = block // num_chunks
    if dims.SECTION == "pairs":
        if block % num_chunks * dims.CHUNK + dims.CHUNK <= a + 1:  # no pair has b <= a
            return

    dz = tl.zeros([dims.BLOCK_DV, dims.CHUNK], tl.float32)
    dk = tl.zeros([dims.CHUNK], tl.float32)
    dcenter = tl.zeros([dims.CHUNK], tl.float32)
    dz_1 = tl.zeros([dims.BLOCK_DV], tl.float32)
    dk_1 = tl.zeros([dims.BLOCK_M], tl.float32)
    dlog_scale = tl.zeros([dims.BLOCK_M], tl.float32)
    first = split
    for b in tl.range(0, batch, num_stages=1):
        if _uses(state, b, number):
            tensor_batch, first_q, length = locate_rows(sequences, tl.cast(b, tl.int64), seq_q)
            num_tiles = tl.cdiv(length, dims.BLOCK_M) * state.query_heads_per_head
            for tile in tl.range(first, num_tiles, splits, num_stages=dims.STAGES):
                head, start_m, offs_m, first_row = _locate_tile(
                    state, tile, head_of_state, tensor_batch, first_q, length, num_heads, stride_rows, dims.BLOCK_M
                )
                row_mask = (offs_m < length)[:, None]
                q_rows = query.ptr + tensor_batch * query.stride[0] + head * query.stride[1]
                q_rows += (first_q + offs_m)[:, None] * query.stride[2]
                do_head = head_ptr(grad_out, tensor_batch, head, first_q)
                do = load_tile(
                    do_head, start_m, length, grad_out.stride[2], dims.BLOCK_M, dims.VALUE_DIM, dims.BLOCK_DV, True
                )
                first_weight = first_row + (tensor_batch * num_heads + head) * (state.num_centers - 1) * stride_rows
                first_weight += c * tl.cast(stride_rows, tl.int64)
                u = load_rows(row_terms.weights + first_weight, offs_m, length)
                mass_delta = load_rows(row_terms.mass_delta + first_row, offs_m, length)
                first_column = block % num_chunks * dims.CHUNK
                q = load_columns(q_rows, row_mask, first_column, dims.HEAD_DIM, dims.CHUNK).to(tl.float32)
                x, x_a = q * scales.feature, None
                if dims.SECTION == "pairs":
                    x_a = scales.feature * load_column(q_rows, row_mask, a)
                phi = u[:, None] * section_of(x, x_a, dims.SECTION)
                if grads.z is not None:
                    # The computed side on the right: transposed, on the left, Hopper reads it wrong (fla issue 640).
                    dz = dot(do.to(dims.OPERAND).T, rounded_to(phi, dims.OPERAND), dz, dims.PREFIX_PRECISION)
                    if dims.SECTION == "linear":
                        dz_1 += tl.sum(u[:, None] * do.to(tl.float32), 0)
                if grads.k is not None:
                    dk -= tl.sum(phi * mass_delta[:, None], 0)
                    if dims.SECTION == "linear":
                        dk_1 -= u * mass_delta
                if dlogw_ptr is not None:
                    dlogw = load_rows(dlogw_ptr + first_weight, offs_m, length)
                    dlog_scale += dlogw
                    dcenter += tl.sum(dlogw[:, None] * q, 0)
            first = _first_tile_of_next(first, num_tiles, splits)

    center = (split.to(tl.int64) * num_state_heads + state_head) * state.num_centers + c
    features = feature_index(columns, a, dims.SECTION, dims.HEAD_DIM)
    exists = columns < dims.HEAD_DIM
    if dims.SECTION == "pairs":
        exists = exists & (columns > a)
    values = tl.arange(0, dims.BLOCK_DV)
    if grads.z is not None:
        dz_ptr = grads.z + center * dims.NUM_FEATURES * dims.VALUE_DIM
        ptrs = dz_ptr + features[None, :] * dims.VALUE_DIM + values[:, None]
        tl.store(ptrs, dz, mask=exists[None, :] & (values < dims.VALUE_DIM)[:, None])
    if grads.k is not None:
        tl.store(grads.k + center * dims.NUM_FEATURES + features, dk, mask=exists)
    if grads.centers is not None:
        tl.store(grads.centers + center * dims.HEAD_DIM + columns, dcenter * (scales.logit * LN_2), mask=exists)
    if block == 0:
        if dims.SECTION == "linear":
            if grads.z is not None:
                tl.store(dz_ptr + values, dz_1, mask=values < dims.VALUE_DIM)
            if grads.k is not None:
                tl.store(grads.k + center * dims.NUM_FEATURES, tl.sum(dk_1, 0))
        if grads.log_scale is not None:
            tl.store(grads.log_scale + center, tl.sum(dlog_scale, 0))


@triton.jit(do_not_specialize=["stride_rows", "seq_q", "batch", "num_state_heads", "splits"])
def _ntk_bwd_rows_kernel(
    query, grad_out, state, sequences, row_terms, grads, stride_rows, seq_q, batch, num_heads, num_state_heads, splits,
    scales, dims,
):  # fmt: skip
    state_head = tl.program_id(0) % num_state_heads
    number, head_of_state = state_head // state.num_heads, state_head % state.num_heads
    split = tl.program_id(1)
    start_n = tl.program_id(0) // num_state_heads * dims.BLOCK_N
    offs_n = start_n + tl.arange(0, dims.BLOCK_N)
    MODEL: tl.constexpr = query.ptr.dtype.element_ty
    dk = tl.zeros([dims.BLOCK_D, dims.BLOCK_N], tl.float32)
    dv = tl.zeros([dims.BLOCK_DV, dims.BLOCK_N], tl.float32)
    dbias = tl.zeros([dims.BLOCK_N], tl.float32)
    first = split
    for b in tl.range(0, batch, num_stages=1):
        if _uses(state, b, number):
            tensor_batch, first_q, length = locate_rows(sequences, tl.cast(b, tl.int64), seq_q)
            num_tiles = tl.cdiv(length, dims.BLOCK_M) * state.query_heads_per_head
            for tile in tl.range(first, num_tiles, splits, num_stages=1):
                head, start_m, offs_m, first_row = _locate_tile(
                    state, tile, head_of_state, tensor_batch, first_q, length, num_heads, stride_rows, dims.BLOCK_M
                )
                q_head = head_ptr(query, tensor_batch, head, first_q)
                do_head = head_ptr(grad_out, tensor_batch, head, first_q)
                p, ds = own_rows_grad(
                    q_head + offs_m.to(tl.int64)[:, None] * query.stride[2],
                    do_head + offs_m.to(tl.int64)[:, None] * grad_out.stride[2], (offs_m < length)[:, None],
                    load_lse(row_terms.lse + first_row, offs_m, length),
                    load_rows(row_terms.delta + first_row, offs_m, length), state, state_head.to(tl.int64), start_n,
                    scales.logit, grads.row_values is None, MODEL, dims.BLOCK_N, dims,
                )  # fmt: skip
                if grads.row_values is not None:
                    do = load_tile(
                        do_head, start_m, length, grad_out.stride[2], dims.BLOCK_M, dims.VALUE_DIM, dims.BLOCK_DV, True
                    )
                    dv = dot(do.T, rounded_to(p, MODEL), dv, dims.PRECISION)
                if grads.row_keys is not None:
                    q = load_tile(
                        q_head, start_m, length, query.stride[2], dims.BLOCK_M, dims.HEAD_DIM, dims.BLOCK_D, True
                    )
                    dk = dot(q.T, rounded_to(ds, MODEL), dk, dims.PRECISION)
                if grads.row_bias is not None:
                    dbias += tl.sum(ds, 0)
            first = _first_tile_of_next(first, num_tiles, splits)

    first_row = (split.to(tl.int64) * num_state_heads + state_head) * state.num_rows
    exists = offs_n < state.num_rows
    if grads.row_keys is not None:
        columns = tl.arange(0, dims.BLOCK_D)[:, None]
        ptrs = grads.row_keys + (first_row + offs_n)[None, :] * dims.HEAD_DIM + columns
        tl.store(ptrs, dk * (scales.logit * LN_2), mask=exists[None, :] & (columns < dims.HEAD_DIM))
    if grads.row_values is not None:
        columns = tl.arange(0, dims.BLOCK_DV)[:, None]
        ptrs = grads.row_values + (first_row + offs_n)[None, :] * dims.VALUE_DIM + columns
        tl.store(ptrs, dv, mask=exists[None, :] & (columns < dims.VALUE_DIM))
    if grads.row_bias is not None:
        tl.store(grads.row_bias + first_row + offs_n, dbias, mask=exists)


def state_launch(
    call: Call, grad_out, row_terms: RowTerms, grad_log_weights, grads: StateGrads, splits: int, section: str,
    config: configs.TileConfig,
) -> Launch:  # fmt: skip
    """The launch that fills a section of `grads.z` and `.k`; the first section also `.centers` and `.log_scale`."""
    kind, sizes, state = call.kind, call.sizes, call.state
    if section != SECTIONS[kind.feature_map][0]:
        grad_log_weights, grads = None, grads._replace(centers=None, log_scale=None)
    tensors = (call.query, strided(grad_out), state, call.sequences, row_terms, grad_log_weights, grads)

    num_state_heads = state.k.shape[0] * state.num_heads
    return kind.launch(
        _ntk_bwd_state_kernel, (_num_blocks(kind, section) * state.num_centers * num_state_heads, splits), tensors,
        (row_terms.lse.shape[2], sizes.seq_q, sizes.batch, kind.heads, num_state_heads, splits, kind.scales), config,
        SECTION=section, BLOCK_M=config.block_m, STAGES=config.num_stages,
    )  # fmt: skip


def rows_launch(
    call: Call, grad_out, row_terms: RowTerms, grads: StateGrads, splits: int, section: str,
    config: configs.TileConfig,
) -> Launch:  # fmt: skip
    """The launch that fills `grads.row_values`, or `.row_keys` and `.row_bias`."""
    kind, sizes, state = call.kind, call.sizes, call.state
    grads = grads._replace(**{name: None for name in grads._fields if name not in ROW_SECTIONS[section]})
    tensors = (call.query, strided(grad_out), state, call.sequences, row_terms, grads)

    num_state_heads = state.row_keys.shape[0] * state.num_heads
    return kind.launch(
        _ntk_bwd_rows_kernel, (ceil_div(state.num_rows, config.block_n) * num_state_heads, splits), tensors,
        (row_terms.lse.shape[2], sizes.seq_q, sizes.batch, kind.heads, num_state_heads, splits, kind.scales), config,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n,
    )  # fmt: skip


def _num_blocks(kind: Kind, section: str) -> int:
    return num_blocks(section, kind.constants["HEAD_DIM"], kind.blocks.chunk)


def run_state_backward(call: Call, grad_out, row_terms: RowTerms, grad_log_weights, wanted: StateGrads) -> StateGrads:
    """Gradients of the state's tensors `wanted`, in their shapes and dtypes; None for the others."""
    kind, gradients = call.kind, {}
    of_features = {name: getattr(wanted, name) for name in FEATURE_TENSORS if getattr(wanted, name) is not None}
    of_rows = {name: getattr(wanted, name) for name in ROW_TENSORS if getattr(wanted, name) is not None}
    if of_features:
        sections = SECTIONS[kind.feature_map]
        if of_features.keys().isdisjoint(("z", "k")):
            sections = sections[:1]  # the one with centres and log_scale
        blocks = max(_num_blocks(kind, section) for section in sections) * call.state.num_centers
        config = kind.candidates("state")[0]
        sums = _partial_sums(call, of_features, blocks, config)
        for section in sections:
            state_launch(call, grad_out, row_terms, grad_log_weights, *sums, section, config)()
        gradients |= added_up(sums[0], wanted)
    if of_rows:
        config = kind.candidates("rows")[0]
        sums = _partial_sums(call, of_rows, ceil_div(call.state.num_rows, config.block_n), config)
        for section, names in ROW_SECTIONS.items():
            if of_rows.keys() & set(names):
                rows_launch(call, grad_out, row_terms, *sums, section, config)()
        gradients |= added_up(sums[0], wanted)
    return StateGrads(**gradients)


def _partial_sums(call: Call, tensors: dict, blocks: int, config: configs.TileConfig) -> tuple[StateGrads, int]:
    """Uninitialised sums, and their number: so many splits that no multiprocessor has more than two programs."""
    kind, state = call.kind, call.state
    num_states = next(iter(tensors.values())).shape[0]  # used or not: their sums take memory
    programs = max(1, blocks * num_states * state.num_heads)
    tiles = call.sizes.batch * state.query_heads_per_head * ceil_div(call.sizes.seq_q, config.block_m)
    splits = max(1, min(2 * configs.multiprocessors(kind.device) // programs, tiles))
    sums = {
        name: torch.empty(splits, *tensor.shape, dtype=torch.float32, device=tensor.device)
        for name, tensor in tensors.items()
    }
    return StateGrads(**sums), splits


def added_up(grads: StateGrads, wanted: StateGrads) -> dict[str, torch.Tensor]:
    """The sums of the partial sums by name, in the dtypes of the tensors."""
    return {
        name: (sums[0] if sums.shape[0] == 1 else sums.sum(0)).to(getattr(wanted, name).dtype)
        for name, sums in grads._asdict().items()
        if sums is not None
    }
