"""Forward of NTK-Attention in one pass: a FlashAttention-style online softmax that starts from the prefix.

Each program owns BLOCK_M rows of queries of one head. It starts with the prefix's linear-attention term as accumulator,
mass and maximum (`prefix.py`), walks the state's own rows, then the keys that some of its rows see, and normalises.
The formula is that of `reference/attention.py`, the conventions are those of `tiles.py`.

Grid: one program for each tile of BLOCK_M queries, head and batch row (or packed sequence), those of a head side by
side, so that they share K and V in the L2 cache; with causality the tiles with the most keys come first.

Memory beyond inputs and outputs: `lse`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import autotune, configs
from .prefix import State, add_left_out, attend_rows, start_from_prefix
from .tiles import (
    LN_2,
    LOG2_E,
    dot,
    load_descriptor_tile,
    load_tile,
    online_softmax,
    rounded_to,
    soft_capped,
    visible_in_band,
)

_LARGEST_BIAS = tl.constexpr(2.3e38)
_LN_2, _LOG2_E = tl.constexpr(LN_2), tl.constexpr(LOG2_E)


class Sequences(NamedTuple):
    """Where packed sequences begin, and the visible keys of each batch row, contiguous; None for what there is not."""

    cu_seqlens_q: object
    cu_seqlens_k: object
    key_start: object
    key_stop: object


@triton.jit
def _attend_keys(
    acc, m_i, l_i, q, k_ptr, v_ptr, k_desc, v_desc, desc_batch, desc_head, desc_start, stride_k, stride_v,
    mask_ptr, stride_mask, offs_m, seq_q, start, stop, visible_stop, lower, upper, scale, softcap,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr,
    SOFTCAP: tl.constexpr, POSITIVE_SCALE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The keys from `start` to `stop` in tiles; only if MASKED may there be some that a row does not see."""
    for start_n in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        if MASKED or k_desc is None:
            k = load_tile(k_ptr, start_n, visible_stop, stride_k, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
            v = load_tile(v_ptr, start_n, visible_stop, stride_v, BLOCK_N, VALUE_DIM, BLOCK_DV, MASKED)
        else:
            k = load_descriptor_tile(k_desc, desc_batch, desc_head, desc_start + start_n, BLOCK_N, BLOCK_D)
            v = load_descriptor_tile(v_desc, desc_batch, desc_head, desc_start + start_n, BLOCK_N, BLOCK_DV)
        s = dot(q, k.T, None, PRECISION)
        if SOFTCAP:
            s = soft_capped(s, scale, softcap)
        elif MASKED or not POSITIVE_SCALE:
            s = s * scale
        if MASKED:
            offs_n = start_n + tl.arange(0, BLOCK_N)
            visible = visible_in_band(offs_m, offs_n, visible_stop, lower, upper, HAS_LOWER, HAS_UPPER)
            if mask_ptr is not None:
                ptrs = mask_ptr + start_n * tl.cast(stride_mask[3], tl.int64)
                ptrs += tl.arange(0, BLOCK_M).to(tl.int64)[:, None] * stride_mask[2]
                ptrs += tl.arange(0, BLOCK_N).to(tl.int64)[None, :] * stride_mask[3]
                bias = tl.load(ptrs, mask=(offs_m < seq_q)[:, None] & (offs_n < visible_stop)[None, :], other=0)
                if bias.dtype == tl.int1:
                    visible = visible & bias
                else:
                    bias = bias.to(tl.float32)
                    visible = visible & (bias != -float("inf"))
                    # finfo.min, which some use for -inf, times log2(e) would be -inf
                    s += tl.minimum(tl.maximum(bias, -_LARGEST_BIAS), _LARGEST_BIAS) * _LOG2_E
                # 0 · NaN = NaN: what no row sees must not be there at all
                seen = tl.max((visible & (offs_m < seq_q)[:, None]).to(tl.int32), 0) > 0
                v = tl.where(seen[:, None], v, 0.0)
            s = tl.where(visible, s, -float("inf"))
        if MASKED or SOFTCAP or not POSITIVE_SCALE:
            p, alpha, m_i, l_i = online_softmax(m_i, l_i, s, 1.0, MASKED)
        else:
            p, alpha, m_i, l_i = online_softmax(m_i, l_i, s, scale, MASKED)
        acc = dot(rounded_to(p, v.dtype), v, acc * alpha[:, None], PRECISION)
    return acc, m_i, l_i


# Integers that change from call to call; specialised on their values they would recompile the kernel.
_VARYING = ["stride_lse_b", "stride_lse_h", "seq_q", "seq_k", "num_tiles", "lower", "upper"]


@triton.jit(do_not_specialize=_VARYING)
def _ntk_fwd_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, state, mask_ptr, sequences, out_ptr, lse_ptr,
    stride_q, stride_k, stride_v, stride_mask, stride_out, stride_lse_b, stride_lse_h,
    seq_q, seq_k, num_tiles, num_heads, group, lower, upper, scale, softcap, feature_scale,
    FEATURE_MAP: tl.constexpr, NUM_FEATURES: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    RANK: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, SOFTCAP: tl.constexpr,
    POSITIVE_SCALE: tl.constexpr, PRECISION: tl.constexpr, LOGIT_PRECISION: tl.constexpr,
    PREFIX_PRECISION: tl.constexpr, OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_RANK: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % num_tiles
    batch_head = tl.program_id(0) // num_tiles
    if HAS_UPPER:
        tile = num_tiles - 1 - tile
    head = batch_head % num_heads
    batch = (batch_head // num_heads).to(tl.int64)
    start_m = tile * BLOCK_M

    # This sequence, and the keys that its rows may see.
    first_q = tl.cast(0, tl.int64)
    first_k = tl.cast(0, tl.int64)
    tensor_batch = batch
    if sequences.cu_seqlens_q is not None:
        first_q = tl.load(sequences.cu_seqlens_q + batch).to(tl.int64)
        first_k = tl.load(sequences.cu_seqlens_k + batch).to(tl.int64)
        seq_q = (tl.load(sequences.cu_seqlens_q + batch + 1) - first_q).to(tl.int32)
        seq_k = (tl.load(sequences.cu_seqlens_k + batch + 1) - first_k).to(tl.int32)
        tensor_batch = tl.cast(0, tl.int64)
        lower += seq_k - seq_q
        upper += seq_k - seq_q
    if start_m >= seq_q:
        return
    start_n = 0
    stop_n = seq_k
    if sequences.key_start is not None:
        start_n = tl.minimum(tl.maximum(tl.load(sequences.key_start + batch), 0), seq_k).to(tl.int32)
    if sequences.key_stop is not None:
        stop_n = tl.minimum(tl.maximum(tl.load(sequences.key_stop + batch), 0), seq_k).to(tl.int32)
    unmasked_start, unmasked_stop = start_n, stop_n
    last_m = tl.minimum(start_m + BLOCK_M, seq_q) - 1
    if HAS_LOWER:
        unmasked_start = tl.maximum(start_n, last_m + lower)
        start_n = tl.maximum(start_n, start_m + lower)
    if HAS_UPPER:
        unmasked_stop = tl.minimum(stop_n, start_m + upper + 1)
        stop_n = tl.minimum(stop_n, last_m + upper + 1)

    q_ptr += tensor_batch * stride_q[0] + tl.cast(head, tl.int64) * stride_q[1] + first_q * stride_q[2]
    head_k = head // group
    k_ptr += tensor_batch * stride_k[0] + tl.cast(head_k, tl.int64) * stride_k[1] + first_k * stride_k[2]
    v_ptr += tensor_batch * stride_v[0] + tl.cast(head_k, tl.int64) * stride_v[1] + first_k * stride_v[2]
    offs_m = start_m + tl.arange(0, BLOCK_M)
    row_mask = (offs_m < seq_q)[:, None]

    num_centers, num_rows = state.num_centers, state.num_rows
    state_head = tl.cast(head // state.query_heads_per_head, tl.int64)
    if state.index is not None:
        index = tl.load(state.index + batch).to(tl.int64)
        num_centers = tl.where(index < 0, 0, num_centers)
        num_rows = tl.where(index < 0, 0, num_rows)
        state_head += index * state.num_heads

    q_rows = q_ptr + start_m * tl.cast(stride_q[2], tl.int64) + tl.arange(0, BLOCK_M)[:, None] * stride_q[2]
    if FEATURE_MAP is None:
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
        l_i = tl.zeros([BLOCK_M], tl.float32)
    else:
        acc, m_i, l_i, massless, any_left_out = start_from_prefix(
            q_rows, row_mask, state, state_head, num_centers, scale, feature_scale, FEATURE_MAP, NUM_FEATURES,
            HEAD_DIM, VALUE_DIM, RANK, BLOCK_M, BLOCK_D, BLOCK_DV, BLOCK_RANK, CHUNK, PREFIX_PRECISION, OPERAND,
            LOGIT_PRECISION, STAGES,
        )  # fmt: skip
    q = load_tile(q_ptr, start_m, seq_q, stride_q[2], BLOCK_M, HEAD_DIM, BLOCK_D, True)
    if state.row_keys is not None:
        acc, m_i, l_i = attend_rows(
            acc, m_i, l_i, q, state, state_head, num_rows, scale, HEAD_DIM, VALUE_DIM, CHUNK, BLOCK_D, BLOCK_DV,
            PREFIX_PRECISION, LOGIT_PRECISION,
        )  # fmt: skip

    if mask_ptr is not None:  # then every tile is masked
        mask_ptr += batch * stride_mask[0] + tl.cast(head, tl.int64) * stride_mask[1]
        mask_ptr += start_m * tl.cast(stride_mask[2], tl.int64)
        unmasked_start = stop_n
    # Tiles that need masks (at the lower edge; with a mask all), tiles that need none, tiles at the upper edge.
    middle_start = start_n
    if HAS_LOWER or mask_ptr is not None:
        middle_start += tl.cdiv(tl.maximum(unmasked_start - start_n, 0), BLOCK_N) * BLOCK_N
    middle_stop = middle_start + tl.maximum(unmasked_stop - middle_start, 0) // BLOCK_N * BLOCK_N
    for part in tl.static_range(3):
        if part == 0:
            part_start, part_stop = start_n, tl.minimum(middle_start, stop_n)
        elif part == 1:
            part_start, part_stop = middle_start, middle_stop
        else:
            part_start, part_stop = middle_stop, stop_n
        if (part == 0 and (HAS_LOWER or mask_ptr is not None)) or (part > 0 and mask_ptr is None):
            acc, m_i, l_i = _attend_keys(
                acc, m_i, l_i, q, k_ptr, v_ptr, k_desc, v_desc, tensor_batch, head_k, first_k, stride_k[2],
                stride_v[2], mask_ptr, stride_mask, offs_m, seq_q, part_start, part_stop, stop_n, lower, upper, scale,
                softcap, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, HAS_LOWER, HAS_UPPER, SOFTCAP,
                POSITIVE_SCALE, part != 1, PRECISION, STAGES,
            )  # fmt: skip

    # 0, as the grid has one dimension, which the compiler does not know: addresses and masks that it took for those of
    # the start would stay in registers through the loop over the keys.
    zero = tl.program_id(1)
    offs_m = start_m + zero + tl.arange(0, BLOCK_M)
    row_mask = (offs_m < seq_q)[:, None]
    first_q += zero
    inverse = tl.where(l_i == 0, 0.0, 1.0 / l_i)
    acc = acc * inverse[:, None]
    if FEATURE_MAP is not None:
        if any_left_out:
            q_rows = q_ptr + offs_m.to(tl.int64)[:, None] * stride_q[2]
            shift = tl.where(l_i == 0, 0.0, m_i)
            acc = add_left_out(
                acc, shift, inverse, massless, q_rows, row_mask, state, state_head + zero, num_centers, scale,
                feature_scale, FEATURE_MAP, NUM_FEATURES, HEAD_DIM, VALUE_DIM, RANK, BLOCK_M, BLOCK_D, BLOCK_DV,
                BLOCK_RANK, CHUNK, PREFIX_PRECISION, OPERAND, LOGIT_PRECISION, STAGES,
            )  # fmt: skip

    lse = tl.where(l_i == 0, -float("inf"), (m_i + tl.log2(l_i)) * _LN_2)
    lse_ptr += tensor_batch * stride_lse_b + tl.cast(head, tl.int64) * stride_lse_h + first_q
    tl.store(lse_ptr + offs_m, lse, mask=offs_m < seq_q)
    columns = tl.arange(0, BLOCK_DV)[None, :]
    out_ptr += tensor_batch * stride_out[0] + tl.cast(head, tl.int64) * stride_out[1]
    out_ptr += (first_q + start_m) * stride_out[2]
    out_ptrs = out_ptr + tl.arange(0, BLOCK_M)[:, None] * stride_out[2] + columns
    tl.store(out_ptrs, rounded_to(acc, out_ptr.dtype.element_ty), mask=row_mask & (columns < VALUE_DIM))


class Launch(NamedTuple):
    """A kernel with everything that it is called with."""

    kernel: object
    grid: tuple
    args: tuple
    constants: dict
    options: dict

    def __call__(self) -> None:
        if self.grid[0] > 0:
            self.kernel[self.grid](*self.args, **self.constants, **self.options)


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def addressable(tensor: torch.Tensor) -> bool:
    """Whether the kernels take a [B, H, L, D] tensor as it is: D side by side, and int32 offsets inside a tile."""
    return tensor.stride(3) == 1 and tensor.stride(2) < 2**24


def ntk_fwd_launch(
    query, key, value, out, lse, *, z=None, z_b=None, k=None, centers=None, log_scale=None, row_keys=None,
    row_values=None, row_bias=None, state_index=None, attn_mask=None, key_start=None, key_stop=None,
    cu_seqlens_q=None, cu_seqlens_k=None, feature_map=None, feature_scale=1.0, scale=1.0, softcap=0.0,
    window_left=-1, window_right=-1, causal_offset=None, max_seqlen_q=None, max_seqlen_k=None, arch=None, config=None,
) -> Launch:  # fmt: skip
    """The launch that fills `out` [B, Hq, Lq, Dv] and `lse` [B, Hq, Lq]; arguments as in `ops.py`.

    `arch` and `config` default to those of the device (`configs.py`). Works on meta tensors, to compile without a GPU.
    """
    arch = configs.arch_of(query.device) if arch is None else arch
    batch, num_heads, seq_q, head_dim = query.shape
    seq_k, value_dim = value.shape[2:]
    packed = cu_seqlens_q is not None
    if packed:
        batch, seq_q, seq_k = cu_seqlens_q.shape[0] - 1, min(max_seqlen_q, seq_q), min(max_seqlen_k, seq_k)
    query, key, value = (tensor if addressable(tensor) else tensor.contiguous() for tensor in (query, key, value))

    rank = 1 if z_b is None else z_b.shape[3]
    blocks = configs.blocks(arch, head_dim, value_dim, rank)
    if config is None:
        config = _candidates(arch, blocks, query.dtype, feature_map, k, row_keys, attn_mask)[0]
    precision = configs.precisions(arch, query.dtype)
    if feature_map == "taylor2" and query.dtype == torch.bfloat16:
        z = z.to(torch.bfloat16)  # it is so large that its traffic counts
    tensors = (z, z_b, k, centers, log_scale, row_keys, row_values, row_bias, state_index)
    state = State(
        *map(_contiguous, tensors),
        query_heads_per_head=1, num_heads=0, num_centers=0, num_rows=0,
    )  # fmt: skip
    any_of_state = k if row_keys is None else row_keys
    if any_of_state is not None:
        state = state._replace(
            query_heads_per_head=num_heads // any_of_state.shape[1],
            num_heads=any_of_state.shape[1],
            num_centers=0 if k is None else k.shape[2],
            num_rows=0 if row_keys is None else row_keys.shape[2],
        )

    # Row i sees key j if i + lower <= j <= i + upper. Bounds beyond any key or row are all the same.
    if packed:
        offset, nearest, farthest = 0, -(seq_q + seq_k), seq_q + seq_k
    else:
        offset, nearest, farthest = causal_offset, -seq_q, seq_k
    lower = min(max(offset - window_left, nearest), farthest)
    upper = min(max(offset + window_right, nearest), farthest)
    num_tiles = triton.cdiv(seq_q, config.block_m)
    descriptors = (None, None)
    if config.use_descriptors and configs.can_describe(key) and configs.can_describe(value):
        descriptors = tuple(
            TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 1, config.block_n, block])
            for tensor, block in ((key, blocks.block_d), (value, blocks.block_dv))
        )
    mask_strides = (0, 0, 0, 0)
    if attn_mask is not None:
        mask_strides = tuple(
            stride if size > 1 else 0 for size, stride in zip(attn_mask.shape, attn_mask.stride(), strict=True)
        )
    args = (
        query, key, value, *descriptors, state, attn_mask,
        Sequences(*map(_contiguous, (cu_seqlens_q, cu_seqlens_k, key_start, key_stop))), out, lse,
        query.stride()[:3], key.stride()[:3], value.stride()[:3], mask_strides, out.stride()[:3], lse.stride(0),
        lse.stride(1), seq_q, seq_k, num_tiles, num_heads, num_heads // key.shape[1], lower, upper, scale * LOG2_E,
        softcap * LOG2_E, feature_scale,
    )  # fmt: skip
    constants = {
        "FEATURE_MAP": feature_map,
        "NUM_FEATURES": 0 if k is None else k.shape[3],
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "RANK": rank,
        "HAS_LOWER": window_left >= 0,
        "HAS_UPPER": window_right >= 0,
        "SOFTCAP": softcap > 0,
        "POSITIVE_SCALE": scale > 0,
        "PRECISION": precision.keys,
        "LOGIT_PRECISION": precision.logits,
        "PREFIX_PRECISION": precision.prefix,
        "OPERAND": tl.bfloat16 if query.dtype == torch.bfloat16 else tl.float32,  # Z may exceed float16
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": blocks.block_d,
        "BLOCK_DV": blocks.block_dv,
        "BLOCK_RANK": blocks.block_rank,
        "CHUNK": blocks.chunk,
        "STAGES": config.num_stages,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    if config.max_registers is not None:
        options["maxnreg"] = config.max_registers
    return Launch(_ntk_fwd_kernel, (num_tiles * num_heads * batch,), args, constants, options)


def run_ntk_fwd(query, key, value, out, lse, **arguments) -> None:
    """Fills `out` and `lse` with the default tiles, or with NTK_KERNELS_AUTOTUNE=1 the fastest for this shape class."""
    config = None
    if autotune.enabled():
        arch = configs.arch_of(query.device)
        blocks = configs.blocks(arch, query.shape[3], value.shape[3])
        config = autotune.fastest(
            _shape_class(query, key, blocks, **arguments),
            _candidates(
                arch, blocks, query.dtype, *(arguments[name] for name in ("feature_map", "k", "row_keys", "attn_mask"))
            ),
            lambda config: ntk_fwd_launch(query, key, value, out, lse, **arguments, config=config)(),
            configs.device_name(query.device),
        )
    ntk_fwd_launch(query, key, value, out, lse, **arguments, config=config)()


def _candidates(arch, blocks, dtype, feature_map, k, row_keys, attn_mask) -> tuple[configs.TileConfig, ...]:
    crowded = attn_mask is not None or row_keys is not None or (k is not None and k.shape[2] > 1)
    return configs.candidates(arch, blocks, dtype, feature_map, crowded)


def _shape_class(query, key, blocks, **arguments) -> str:
    """What the speed of a tile depends on: never a batch size, and of lengths only their order of magnitude."""
    longest = arguments["max_seqlen_k"] if arguments["cu_seqlens_k"] is not None else key.shape[2]
    bucket = next((bound for bound in (512, 2048, 8192) if longest <= bound), None)
    parts = [
        "forward", f"D={blocks.block_d}", f"Dv={blocks.block_dv}", str(query.dtype).removeprefix("torch."),
        arguments["feature_map"] or "plain", "long" if bucket is None else f"keys<={bucket}",
    ]  # fmt: skip
    k = arguments["k"]
    flags = {
        "causal": arguments["window_right"] >= 0,
        "window": arguments["window_left"] >= 0,
        "centres": k is not None and k.shape[2] > 1,
        "low rank": arguments["z_b"] is not None,
        "rows": arguments["row_keys"] is not None,
        "mask": arguments["attn_mask"] is not None,
        "softcap": arguments["softcap"] > 0,
        "packed": arguments["cu_seqlens_q"] is not None,
    }
    return " ".join(parts + [name for name, present in flags.items() if present])
