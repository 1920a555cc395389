"""The prefix alone, added to the result of another attention over the keys: out and lse are read, merged and written.

For the states that are trained most: one centre at most, features of first order ("elu", "taylor1"), a full Z, no rows,
under a bfloat16 model with heads up to 128. There the pass is bound by memory: each program keeps its Z in shared
memory and walks tiles of query rows, of which the next are on their way. All other states take the forward without
keys (`forward.py`), which fetches Z again for each tile. The formula is that of `reference/attention.py`.

Grid: (heads · batch rows (or packed sequences), splits); a split takes every n-th tile of BLOCK_M rows.
"""

import torch
import triton
import triton.language as tl

from .host import configs
from .host.launch import Call, Launch, ceil_div, layout, strides
from .jit.features import elu_of
from .jit.prefix_term import MAX_WEIGHT, SMALLEST_MASS, locate_state
from .jit.tiles import LN_2, LOG2_E, dot, in_log2, load_tile, rounded_to, store_tile
from .jit.visibility import locate_rows

_LN_2, _LOG2_E = tl.constexpr(LN_2), tl.constexpr(LOG2_E)
_SMALLEST_MASS, _MAX_WEIGHT = tl.constexpr(SMALLEST_MASS), tl.constexpr(MAX_WEIGHT)


@triton.jit
def load_state(
    state, center, FEATURE_MAP: tl.constexpr, NUM_FEATURES: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Of a head's only centre: Z [BLOCK_D, BLOCK_DV], k, μ [BLOCK_D], the constant feature's Z [BLOCK_DV] and k, β.

    What the state lacks is 0; β is in units of log 2.
    """
    z_ptr = state.z + center * NUM_FEATURES * VALUE_DIM
    k_ptr = state.k + center * NUM_FEATURES
    rows, columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    z_0, k_0 = tl.zeros([BLOCK_DV], tl.float32), 0.0
    if FEATURE_MAP == "taylor1":
        z_0 = tl.load(z_ptr + columns, mask=columns < VALUE_DIM, other=0.0).to(tl.float32)
        k_0 = tl.load(k_ptr).to(tl.float32)
        z_ptr += VALUE_DIM
        k_ptr += 1
    z = load_tile(z_ptr, 0, HEAD_DIM, VALUE_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, True)
    k = tl.load(k_ptr + rows, mask=rows < HEAD_DIM, other=0.0).to(tl.float32)
    mu, beta = tl.zeros([BLOCK_D], tl.float32), 0.0
    if state.centers is not None:
        mu = tl.load(state.centers + center * HEAD_DIM + rows, mask=rows < HEAD_DIM, other=0.0).to(tl.float32)
    if state.log_scale is not None:
        beta = tl.load(state.log_scale + center).to(tl.float32) * _LOG2_E
    return z, k, mu, z_0, k_0, beta


@triton.jit
def features_and_mass(q, k, mu, k_0, beta, scale, feature_scale, FEATURE_MAP: tl.constexpr, HAS_CENTER: tl.constexpr):
    """φ(x) without the constant feature [M, D], φ(x)·k [M], and log w [M] in units of log 2, of q [M, D] in float32."""
    phi = q * feature_scale
    if FEATURE_MAP == "elu":
        phi = elu_of(phi)
    mass = tl.sum(phi * k[None, :], 1) + k_0
    logit = tl.zeros_like(mass) + beta
    if HAS_CENTER:
        logit += scale * tl.sum(q * mu[None, :], 1)
    return phi, mass, logit


@triton.jit(do_not_specialize=["stride_rows", "seq_q"])
def _prefix_pass_kernel(
    q_ptr, state, sequences, out_ptr, lse_ptr, stride_q, stride_out, stride_rows, seq_q, num_heads, scale,
    feature_scale,
    FEATURE_MAP: tl.constexpr, NUM_FEATURES: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PREFIX_PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    batch = (tl.program_id(0) // num_heads).to(tl.int64)
    tensor_batch, first_q, seq_q = locate_rows(sequences, batch, seq_q)
    state_head, num_centers, _ = locate_state(state, head, batch)
    if num_centers == 0:
        return
    z, k, mu, z_0, k_0, beta = load_state(
        state, state_head, FEATURE_MAP, NUM_FEATURES, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_DV
    )
    q_ptr += tensor_batch * stride_q[0] + head * stride_q[1] + first_q * stride_q[2]
    out_ptr += tensor_batch * stride_out[0] + head * stride_out[1] + first_q * stride_out[2]
    lse_ptr += (tensor_batch * num_heads + head) * stride_rows + first_q
    for start_m in tl.range(tl.program_id(1) * BLOCK_M, seq_q, tl.num_programs(1) * BLOCK_M, num_stages=STAGES):
        rows = start_m + tl.arange(0, BLOCK_M)
        q = load_tile(q_ptr, start_m, seq_q, stride_q[2], BLOCK_M, HEAD_DIM, BLOCK_D, True)
        out = load_tile(out_ptr, start_m, seq_q, stride_out[2], BLOCK_M, VALUE_DIM, BLOCK_DV, True)
        lse = in_log2(tl.load(lse_ptr + rows, mask=rows < seq_q, other=-float("inf")))
        phi, mass, logit = features_and_mass(
            q.to(tl.float32), k, mu, k_0, beta, scale, feature_scale, FEATURE_MAP, state.centers is not None
        )
        numerator = dot(rounded_to(phi, z.dtype), z, None, PREFIX_PRECISION) + z_0[None, :]

        massless = ((mass < _SMALLEST_MASS) & (logit == logit)) | (logit == -float("inf"))  # NaN stays
        m_i = tl.where(massless, -float("inf"), logit)
        m_new = tl.maximum(m_i, lse, propagate_nan=tl.PropagateNan.ALL)
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        alpha, weight = tl.exp2(m_i - shift), tl.exp2(lse - shift)
        total = tl.where(massless, 0.0, mass * alpha) + weight
        inverse = tl.where(total == 0, 0.0, 1.0 / total)
        # Without mass nothing but the lse of the keys bounds the weight of Z.
        free = tl.minimum(tl.exp2(logit - shift) * inverse, _MAX_WEIGHT, propagate_nan=tl.PropagateNan.ALL)
        alpha = tl.where(massless, tl.where(inverse > 0, free, 0.0), alpha * inverse)
        merged = numerator * alpha[:, None] + out.to(tl.float32) * (weight * inverse)[:, None]
        lse = tl.where(total == 0, -float("inf"), (m_new + tl.log2(total)) * _LN_2)
        tl.store(lse_ptr + rows, lse, mask=rows < seq_q)
        store_tile(out_ptr, merged, rows, seq_q, stride_out[2], 0, VALUE_DIM, BLOCK_DV)


def takes(call: Call) -> bool:
    """Whether a call without keys is one for this pass."""
    state, interpreted = call.state, call.arch == "interpreter"
    return (
        call.key is None
        and (interpreted or (call.arch in configs.TABLES["prefix_pass"] and call.query.dtype == torch.bfloat16))
        and call.feature_map in ("elu", "taylor1")
        and state.num_centers == 1
        and state.z_b is None
        and state.row_keys is None
        and max(call.blocks.block_d, call.blocks.block_dv) <= 128
    )


def _splits_of(call: Call, config: configs.TileConfig) -> int:
    """Into how many parts the rows of a head are cut, so that the last program to finish does so early."""
    tiles, heads = ceil_div(call.seq_q, config.block_m), call.heads * call.batch
    slots = max(1, 8 // config.num_warps) * configs.multiprocessors(call.query.device)
    # The time, in tiles: rounds of programs, each of so many tiles and of what it takes to fetch Z.
    return min(range(1, tiles + 1), key=lambda n: ceil_div(n * heads, slots) * (ceil_div(tiles, n) + 1))


def prefix_pass_launch(call: Call, out, lse, config: configs.TileConfig) -> Launch:
    """The launch that adds the prefix to `out` [B, Hq, Lq, Dv] and `lse` [B, Hq, Lq]."""
    tensors = (call.query, call.state, call.sequences, out, lse)

    def describe():
        scalars = (
            strides(call.query), strides(out), lse.shape[2], call.seq_q, call.heads, call.scale * LOG2_E,
            call.feature_scale,
        )  # fmt: skip
        constants = {name: call.prefix[name] for name in ("FEATURE_MAP", "NUM_FEATURES", "PREFIX_PRECISION")}
        constants |= call.sizes | {"BLOCK_M": config.block_m, "STAGES": config.num_stages}
        return (call.heads * call.batch, _splits_of(call, config)), scalars, constants

    return call.launch(_prefix_pass_kernel, tensors, config, describe, layout(out))
