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

from .backward_delta import RowTerms, load_lse, load_rows
from .host import configs
from .host.launch import Call, Launch, ceil_div, layout, strides
from .jit.features import load_column, load_columns, pair_start, section_of, square_start
from .jit.prefix_term_grad import own_rows_grad
from .jit.tiles import LN_2, LOG2_E, dot, load_tile, rounded_to
from .jit.visibility import locate_rows

_LN_2 = tl.constexpr(LN_2)

ROW_SECTIONS = {"values": ("row_values",), "keys": ("row_keys", "row_bias")}  # a launch each


class StateGrads(NamedTuple):
    """Partial sums [splits, ...] in the shapes of the state's tensors, float32; None for those that nobody wants."""

    z: object
    k: object
    centers: object
    log_scale: object
    row_keys: object
    row_values: object
    row_bias: object


@triton.jit
def _uses(state, batch, number):
    """Whether a batch row uses the state `number`."""
    used = number == number
    if state.index is not None:
        used = tl.load(state.index + batch) == number
    return used


@triton.jit
def _locate_tile(
    state, tile, head_of_state, tensor_batch, first_q, length, num_heads, stride_rows, BLOCK_M: tl.constexpr
):
    """Of a tile of the query heads that share a head of a state: head, first row, rows, and where RowTerms begin."""
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
    q_ptr, do_ptr, state, sequences, row_terms, dlogw_ptr, grads, stride_q, stride_do, stride_rows,
    seq_q, batch, num_heads, num_state_heads, splits, scale, feature_scale,
    SECTION: tl.constexpr, NUM_FEATURES: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    OPERAND: tl.constexpr, PREFIX_PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
    CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    state_head = tl.program_id(0) % num_state_heads
    number, head_of_state = state_head // state.num_heads, state_head % state.num_heads
    split = tl.program_id(1)
    num_chunks: tl.constexpr = (HEAD_DIM + CHUNK - 1) // CHUNK
    c = tl.program_id(0) // num_state_heads % state.num_centers
    block = tl.program_id(0) // num_state_heads // state.num_centers
    columns = block % num_chunks * CHUNK + tl.arange(0, CHUNK)
    a = block // num_chunks
    if SECTION == "pairs":
        if block % num_chunks * CHUNK + CHUNK <= a + 1:  # no pair has b <= a
            return

    dz = tl.zeros([BLOCK_DV, CHUNK], tl.float32)
    dk = tl.zeros([CHUNK], tl.float32)
    dcenter = tl.zeros([CHUNK], tl.float32)
    dz_1 = tl.zeros([BLOCK_DV], tl.float32)
    dk_1 = tl.zeros([BLOCK_M], tl.float32)
    dlog_scale = tl.zeros([BLOCK_M], tl.float32)
    first = split
    for b in tl.range(0, batch, num_stages=1):
        if _uses(state, b, number):
            tensor_batch, first_q, length = locate_rows(sequences, tl.cast(b, tl.int64), seq_q)
            num_tiles = tl.cdiv(length, BLOCK_M) * state.query_heads_per_head
            for tile in tl.range(first, num_tiles, splits, num_stages=STAGES):
                head, start_m, rows, first_row = _locate_tile(
                    state, tile, head_of_state, tensor_batch, first_q, length, num_heads, stride_rows, BLOCK_M
                )
                row_mask = (rows < length)[:, None]
                q_rows = q_ptr + tensor_batch * stride_q[0] + head * stride_q[1]
                q_rows += (first_q + rows)[:, None] * stride_q[2]
                do_head = do_ptr + tensor_batch * stride_do[0] + head * stride_do[1] + first_q * stride_do[2]
                do = load_tile(do_head, start_m, length, stride_do[2], BLOCK_M, VALUE_DIM, BLOCK_DV, True)
                first_weight = first_row + (tensor_batch * num_heads + head) * (state.num_centers - 1) * stride_rows
                first_weight += c * tl.cast(stride_rows, tl.int64)
                u = load_rows(row_terms.weights + first_weight, rows, length)
                mass_delta = load_rows(row_terms.mass_delta + first_row, rows, length)
                q = load_columns(q_rows, row_mask, block % num_chunks * CHUNK, HEAD_DIM, CHUNK).to(tl.float32)
                x, x_a = q * feature_scale, None
                if SECTION == "pairs":
                    x_a = feature_scale * load_column(q_rows, row_mask, a)
                phi = u[:, None] * section_of(x, x_a, SECTION)
                if grads.z is not None:
                    # The computed side on the right: transposed, on the left, Hopper reads it wrong (fla issue 640).
                    dz = dot(do.to(OPERAND).T, rounded_to(phi, OPERAND), dz, PREFIX_PRECISION)
                    if SECTION == "linear":
                        dz_1 += tl.sum(u[:, None] * do.to(tl.float32), 0)
                if grads.k is not None:
                    dk -= tl.sum(phi * mass_delta[:, None], 0)
                    if SECTION == "linear":
                        dk_1 -= u * mass_delta
                if dlogw_ptr is not None:
                    dlogw = load_rows(dlogw_ptr + first_weight, rows, length)
                    dlog_scale += dlogw
                    dcenter += tl.sum(dlogw[:, None] * q, 0)
            first = _first_tile_of_next(first, num_tiles, splits)

    center = (split.to(tl.int64) * num_state_heads + state_head) * state.num_centers + c
    features, exists = columns, columns < HEAD_DIM
    if SECTION == "linear":
        features = 1 + columns
    elif SECTION == "squares":
        features = square_start(HEAD_DIM) + columns
    elif SECTION == "pairs":
        features = pair_start(a, HEAD_DIM) + columns
        exists = exists & (columns > a)
    values = tl.arange(0, BLOCK_DV)
    if grads.z is not None:
        dz_ptr = grads.z + center * NUM_FEATURES * VALUE_DIM
        ptrs = dz_ptr + features[None, :] * VALUE_DIM + values[:, None]
        tl.store(ptrs, dz, mask=exists[None, :] & (values < VALUE_DIM)[:, None])
    if grads.k is not None:
        tl.store(grads.k + center * NUM_FEATURES + features, dk, mask=exists)
    if grads.centers is not None:
        tl.store(grads.centers + center * HEAD_DIM + columns, dcenter * (scale * _LN_2), mask=exists)
    if block == 0:
        if SECTION == "linear":
            if grads.z is not None:
                tl.store(dz_ptr + values, dz_1, mask=values < VALUE_DIM)
            if grads.k is not None:
                tl.store(grads.k + center * NUM_FEATURES, tl.sum(dk_1, 0))
        if grads.log_scale is not None:
            tl.store(grads.log_scale + center, tl.sum(dlog_scale, 0))


@triton.jit(do_not_specialize=["stride_rows", "seq_q", "batch", "num_state_heads", "splits"])
def _ntk_bwd_rows_kernel(
    q_ptr, do_ptr, state, sequences, row_terms, grads, stride_q, stride_do, stride_rows,
    seq_q, batch, num_heads, num_state_heads, splits, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PREFIX_PRECISION: tl.constexpr, LOGIT_PRECISION: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    state_head = tl.program_id(0) % num_state_heads
    number, head_of_state = state_head // state.num_heads, state_head % state.num_heads
    split = tl.program_id(1)
    start_n = tl.program_id(0) // num_state_heads * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    MODEL: tl.constexpr = q_ptr.dtype.element_ty
    dk = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    dv = tl.zeros([BLOCK_DV, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_N], tl.float32)
    first = split
    for b in tl.range(0, batch, num_stages=1):
        if _uses(state, b, number):
            tensor_batch, first_q, length = locate_rows(sequences, tl.cast(b, tl.int64), seq_q)
            num_tiles = tl.cdiv(length, BLOCK_M) * state.query_heads_per_head
            for tile in tl.range(first, num_tiles, splits, num_stages=1):
                head, start_m, rows, first_row = _locate_tile(
                    state, tile, head_of_state, tensor_batch, first_q, length, num_heads, stride_rows, BLOCK_M
                )
                q_head = q_ptr + tensor_batch * stride_q[0] + head * stride_q[1] + first_q * stride_q[2]
                do_head = do_ptr + tensor_batch * stride_do[0] + head * stride_do[1] + first_q * stride_do[2]
                p, ds = own_rows_grad(
                    q_head + rows.to(tl.int64)[:, None] * stride_q[2],
                    do_head + rows.to(tl.int64)[:, None] * stride_do[2], (rows < length)[:, None],
                    load_lse(row_terms.lse + first_row, rows, length),
                    load_rows(row_terms.delta + first_row, rows, length), state, state_head.to(tl.int64), start_n,
                    scale, grads.row_values is None, MODEL, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, CHUNK,
                    PREFIX_PRECISION, LOGIT_PRECISION,
                )  # fmt: skip
                if grads.row_values is not None:
                    do = load_tile(do_head, start_m, length, stride_do[2], BLOCK_M, VALUE_DIM, BLOCK_DV, True)
                    dv = dot(do.T, rounded_to(p, MODEL), dv, PRECISION)
                if grads.row_keys is not None:
                    q = load_tile(q_head, start_m, length, stride_q[2], BLOCK_M, HEAD_DIM, BLOCK_D, True)
                    dk = dot(q.T, rounded_to(ds, MODEL), dk, PRECISION)
                if grads.row_bias is not None:
                    dbias += tl.sum(ds, 0)
            first = _first_tile_of_next(first, num_tiles, splits)

    first_row = (split.to(tl.int64) * num_state_heads + state_head) * state.num_rows
    exists = offs_n < state.num_rows
    if grads.row_keys is not None:
        columns = tl.arange(0, BLOCK_D)[:, None]
        ptrs = grads.row_keys + (first_row + offs_n)[None, :] * HEAD_DIM + columns
        tl.store(ptrs, dk * (scale * _LN_2), mask=exists[None, :] & (columns < HEAD_DIM))
    if grads.row_values is not None:
        columns = tl.arange(0, BLOCK_DV)[:, None]
        ptrs = grads.row_values + (first_row + offs_n)[None, :] * VALUE_DIM + columns
        tl.store(ptrs, dv, mask=exists[None, :] & (columns < VALUE_DIM))
    if grads.row_bias is not None:
        tl.store(grads.row_bias + first_row + offs_n, dbias, mask=exists)


def sections_of(feature_map: str) -> tuple[str, ...]:
    """In the order in which the features are packed."""
    return {"elu": ("elu",), "taylor1": ("linear",), "taylor2": ("linear", "pairs", "squares")}[feature_map]


def blocks_of(call: Call, section: str) -> int:
    """Programs that share a section's features of one centre."""
    num_chunks = ceil_div(call.query.shape[3], call.blocks.chunk)
    return num_chunks * (max(call.query.shape[3] - 1, 0) if section == "pairs" else 1)


def state_launch(
    call: Call, grad_out, row_terms: RowTerms, grad_log_weights, grads: StateGrads, splits: int, section: str,
    config: configs.TileConfig,
) -> Launch:  # fmt: skip
    """The launch that fills a section of `grads.z` and `.k`; the first section also `.centers` and `.log_scale`."""
    if section not in ("elu", "linear"):
        grad_log_weights, grads = None, grads._replace(centers=None, log_scale=None)
    tensors = (call.query, grad_out, call.state, call.sequences, row_terms, grad_log_weights, grads)

    def describe():
        num_state_heads = call.state.k.shape[0] * call.state.num_heads
        scalars = (
            strides(call.query), strides(grad_out), row_terms.lse.shape[2], call.seq_q, call.batch, call.heads,
            num_state_heads, splits, call.scale * LOG2_E, call.feature_scale,
        )  # fmt: skip
        constants = {name: call.prefix[name] for name in ("NUM_FEATURES", "OPERAND", "PREFIX_PRECISION", "CHUNK")}
        constants |= {name: call.sizes[name] for name in ("HEAD_DIM", "VALUE_DIM", "BLOCK_DV")}
        constants |= {"SECTION": section, "BLOCK_M": config.block_m, "STAGES": config.num_stages}
        grid = (blocks_of(call, section) * call.state.num_centers * num_state_heads, splits)
        return grid, scalars, constants

    details = section, splits, layout(grad_out), grad_log_weights is None, _present(grads)
    return call.launch(_ntk_bwd_state_kernel, tensors, config, describe, *details)


def rows_launch(
    call: Call, grad_out, row_terms: RowTerms, grads: StateGrads, splits: int, section: str,
    config: configs.TileConfig,
) -> Launch:  # fmt: skip
    """The launch that fills `grads.row_values`, or `.row_keys` and `.row_bias`."""
    grads = grads._replace(**{name: None for name in grads._fields if name not in ROW_SECTIONS[section]})
    tensors = (call.query, grad_out, call.state, call.sequences, row_terms, grads)

    def describe():
        num_state_heads = call.state.row_keys.shape[0] * call.state.num_heads
        scalars = (
            strides(call.query), strides(grad_out), row_terms.lse.shape[2], call.seq_q, call.batch, call.heads,
            num_state_heads, splits, call.scale * LOG2_E,
        )  # fmt: skip
        constants = {name: call.prefix[name] for name in ("PREFIX_PRECISION", "LOGIT_PRECISION", "CHUNK")}
        constants |= call.sizes | {"PRECISION": call.flags["PRECISION"]}
        constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        grid = (ceil_div(call.state.num_rows, config.block_n) * num_state_heads, splits)
        return grid, scalars, constants

    details = section, splits, layout(grad_out), row_terms.weights is None, _present(grads)
    return call.launch(_ntk_bwd_rows_kernel, tensors, config, describe, *details)


def _present(tensors: tuple) -> tuple[bool, ...]:
    return tuple(tensor is not None for tensor in tensors)


def run_state_backward(
    call: Call, grad_out, row_terms: RowTerms, grad_log_weights, wanted: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Gradients of the state's tensors `wanted`, by their names in StateGrads, in their shapes and dtypes."""
    of_features = {name: tensor for name, tensor in wanted.items() if not name.startswith("row_")}
    of_rows = {name: tensor for name, tensor in wanted.items() if name.startswith("row_")}
    gradients = {}
    if of_features:
        sections = sections_of(call.feature_map)
        if of_features.keys().isdisjoint(("z", "k")):
            sections = sections[:1]  # the one with centres and log_scale
        blocks = max(blocks_of(call, section) for section in sections) * call.state.num_centers
        config = call.candidates("state")[0]
        sums = _partial_sums(call, of_features, blocks, config)
        for section in sections:
            state_launch(call, grad_out, row_terms, grad_log_weights, *sums, section, config)()
        gradients |= added_up(sums[0], wanted)
    if of_rows:
        config = call.candidates("rows")[0]
        sums = _partial_sums(call, of_rows, ceil_div(call.state.num_rows, config.block_n), config)
        for section, names in ROW_SECTIONS.items():
            if wanted.keys() & set(names):
                rows_launch(call, grad_out, row_terms, *sums, section, config)()
        gradients |= added_up(sums[0], wanted)
    return gradients


def _partial_sums(call: Call, tensors: dict, blocks: int, config: configs.TileConfig) -> tuple[StateGrads, int]:
    """Uninitialised sums, and their number: so many splits that no multiprocessor has more than two programs."""
    num_states = next(iter(tensors.values())).shape[0]  # used or not: their sums take memory
    programs = max(1, blocks * num_states * call.state.num_heads)
    tiles = call.batch * call.state.query_heads_per_head * ceil_div(call.seq_q, config.block_m)
    splits = max(1, min(2 * configs.multiprocessors(call.query.device) // programs, tiles))
    sums = {
        name: torch.empty(splits, *tensor.shape, dtype=torch.float32, device=tensor.device)
        for name, tensor in tensors.items()
    }
    return StateGrads(**dict.fromkeys(StateGrads._fields) | sums), splits


def added_up(grads: StateGrads, wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sums of the partial sums, in the dtypes of the tensors."""
    return {
        name: (sums[0] if sums.shape[0] == 1 else sums.sum(0)).to(wanted[name].dtype)
        for name, sums in grads._asdict().items()
        if sums is not None
    }
