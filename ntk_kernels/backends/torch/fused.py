"""PyTorch's own fused attention behind one signature: softmax(Q·Kᵀ·scale + bias)·V with its lse, and the backward.

The backward is a flash backward: given *any* (out, lse) it computes P = e^{s - lse}, Δ = rowsum(dO∘out) and from them
dQ, dK, dV. Called with the out and lse of a larger softmax of which these keys are a part, its gradients are exactly
this part's.

What differs between the devices' ops and is evened out here: head dimensions (one D for Q, K and V, sometimes of a
certain multiple), grouped heads, the layout of lse, rows without a visible key.
"""

import math

import torch
from torch import Tensor

aten = torch.ops.aten
_MIN_SCALE = 2.0**-149  # the smallest float32


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool, bias: Tensor | None):
    """`q` [B, Hq, Lq, D], `k` [B, Hkv, Lk, D], `v` [B, Hkv, Lk, Dv], Lk > 0; causal only with Lq == Lk; `bias`
    broadcastable to [B, Hq, Lq, Lk] in the dtype of `q`, -inf = hidden.

    Returns out [B, Hq, Lq, Dv] and lse [B, Hq, Lq], -inf where no key is visible.
    """
    value_dim, scale = v.shape[3], _as_accumulated(scale, q)
    q, k, v = _pad(q, k, v)
    q, scale = _positive_scale(q, scale)
    out, lse, *_ = _op(q, k, v, is_causal, bias).forward(q, k, v, scale, is_causal, bias)
    out, lse = out[..., :value_dim], lse[..., : q.shape[2]]
    if bias is not None:  # the ops say nothing useful of such rows: lse = 0 on the CPU
        empty = (bias == -math.inf).all(-1)
        lse = lse.masked_fill(empty, -math.inf)
        out = out.masked_fill(empty.unsqueeze(-1), 0)
    if not q.is_cuda and k.shape[2] % 16 and (zero := lse == 0).any():
        # Where the last keys don't fill a vector, the CPU op takes a row of NaN scores for one that sees nothing.
        lost = zero & ~q.isfinite().all(-1)
        lse, out = lse.masked_fill(lost, math.nan), out.masked_fill(lost.unsqueeze(-1), math.nan)
    return out, lse


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, is_causal: bool,
    bias: Tensor | None,
):  # fmt: skip
    """Gradients of `q`, `k`, `v` through these keys, where `out` and `lse` are those of the whole softmax."""
    scale = _as_accumulated(scale, q)
    head_dim, value_dim, sign = q.shape[3], v.shape[3], (scale > 0) - (scale < 0)
    q, k, v = _pad(q, k, v)
    q, scale = _positive_scale(q, scale)
    if v.shape[3] != value_dim:
        out, grad_out = (torch.nn.functional.pad(t, (0, v.shape[3] - value_dim)) for t in (out, grad_out))
    out, grad_out = (_unit_stride(t) for t in (out, grad_out))
    lse = lse.masked_fill(lse == -math.inf, math.inf)  # rows that see nothing: P = 0
    grad_q, grad_k, grad_v = _op(q, k, v, is_causal, bias).backward(grad_out, q, k, v, out, lse, scale, is_causal, bias)
    if sign != 1:
        grad_q = grad_q * sign
    return grad_q[..., :head_dim], grad_k[..., :head_dim], grad_v[..., :value_dim]


def _pad(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Zero-pads to one head dimension, on a GPU a multiple of 8; last stride 1."""
    if q.shape[3] == v.shape[3] and not q.is_cuda and q.stride(3) == k.stride(3) == v.stride(3) == 1:
        return [q, k, v]
    dim = max(q.shape[3], v.shape[3])
    if q.is_cuda:
        dim = -(-dim // 8) * 8
    tensors = [torch.nn.functional.pad(t, (0, dim - t.shape[3])) if t.shape[3] != dim else t for t in (q, k, v)]
    return [_unit_stride(t) for t in tensors]


def _positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The ops hide keys by -inf and then multiply by the scale, which must not be 0 or negative."""
    if scale < 0:
        return -q, -scale  # q · scale would be rounded
    return (q, scale) if scale else (q * 0.0, 1.0)


def _as_accumulated(scale: float, q: Tensor) -> float:
    """The scale as the ops know it: 0 if float32 has nothing smaller."""
    return 0.0 if q.dtype != torch.float64 and abs(scale) < _MIN_SCALE else scale


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _op(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, bias: Tensor | None):
    """The op for these tensors: on a GPU by PyTorch's own predicates, the fastest first."""
    if not q.is_cuda:
        return _Cpu
    cuda = torch.backends.cuda
    params = cuda.SDPAParams(q, k, v, bias, 0.0, is_causal, q.shape[1] != k.shape[1])
    if bias is None and torch.cuda.get_device_capability(q.device) >= (9, 0) and cuda.can_use_cudnn_attention(params):
        return _Cudnn
    if bias is None and cuda.can_use_flash_attention(params):
        return _Flash
    return _Efficient


class _Cpu:
    @staticmethod
    def forward(q, k, v, scale, is_causal, bias):
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale)

    @staticmethod
    def backward(grad_out, q, k, v, out, lse, scale, is_causal, bias):
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, is_causal, attn_mask=bias, scale=scale
        )


def _no_dropout(q: Tensor) -> tuple[Tensor, Tensor]:
    """The random state that the GPU backwards ask for; without dropout nothing reads it."""
    nothing = torch.empty((), dtype=torch.int64, device=q.device)
    return nothing, nothing


class _Flash:
    @staticmethod
    def forward(q, k, v, scale, is_causal, bias):
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)

    @staticmethod
    def backward(grad_out, q, k, v, out, lse, scale, is_causal, bias):
        return aten._scaled_dot_product_flash_attention_backward(
            grad_out, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, is_causal,
            *_no_dropout(q), scale=scale,
        )  # fmt: skip


class _Cudnn:
    @staticmethod
    def forward(q, k, v, scale, is_causal, bias):
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, is_causal, scale=scale)
        return out, lse.view(q.shape[:3])

    @staticmethod
    def backward(grad_out, q, k, v, out, lse, scale, is_causal, bias):
        return aten._scaled_dot_product_cudnn_attention_backward(
            grad_out, q, k, v, out, lse.contiguous().unsqueeze(-1), *_no_dropout(q), None, None, None, q.shape[2],
            k.shape[2], 0.0, is_causal, scale=scale,
        )  # fmt: skip


class _Efficient:
    """Knows neither grouped heads nor broadcast biases, and wants the rows of bias and lse aligned."""

    @staticmethod
    def forward(q, k, v, scale, is_causal, bias):
        k, v, bias = _Efficient._expand(q, k, v, bias)
        return aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, is_causal, scale=scale)

    @staticmethod
    def backward(grad_out, q, k, v, out, lse, scale, is_causal, bias):
        num_kv_heads = k.shape[1]
        # Gradients of bfloat16 came out wrong beside rows that see no key (torch 2.11, H200; bf16_mask in the tests).
        if bias is not None and q.dtype.itemsize < 4:
            grad_out, q, k, v, out, bias = (tensor.float() for tensor in (grad_out, q, k, v, out, bias))
        k, v, bias = _Efficient._expand(q, k, v, bias)
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=math.inf)
        grad_q, grad_k, grad_v, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad_out, q, k, v, bias, out, lse, *_no_dropout(q), 0.0, [True, True, True, False], is_causal,
            scale=scale,
        )  # fmt: skip
        return grad_q, *(grad.unflatten(1, (num_kv_heads, -1)).sum(2) for grad in (grad_k, grad_v))

    @staticmethod
    def _expand(q, k, v, bias):
        group = q.shape[1] // k.shape[1]
        if group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        if bias is not None:
            seq_k = k.shape[2]
            aligned = bias.new_empty(*q.shape[:3], -(-seq_k // 16) * 16)
            bias = aligned[..., :seq_k].copy_(bias)
        return k, v, bias
