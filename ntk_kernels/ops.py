"""The ops as `torch.library` knows them: schema, implementation, shapes for tracing, autograd, flops.

    torch.ops.ntk_kernels.attention           -> out, lse
    torch.ops.ntk_kernels.attention_backward  -> one gradient per differentiable input

Both are functional and of fixed arity: a gradient that nobody asked for comes back with no elements. The state comes
as `ntk_kernels.attention` prepares it: always a stack, always with a dimension for the centres.
"""

from contextlib import nullcontext

import torch
from torch.utils.flop_counter import register_flop_formula

from . import checks
from .backends import torch as torch_backend
from .backends.layout import empty_grad, empty_out, lse_dtype

NAMESPACE = "ntk_kernels"
_DIFFERENTIABLE = 10
_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? z, Tensor? k, Tensor? centers, Tensor? log_scale, "
    "Tensor? row_keys, Tensor? row_values, Tensor? row_bias, Tensor? state_index, Tensor? attn_mask, "
    "str? feature_map, float feature_scale, float scale, "
    "SymInt window_left, SymInt window_right, SymInt causal_offset"
)

_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(f"attention({_INPUTS}) -> (Tensor out, Tensor lse)")
_library.define(
    f"attention_backward(Tensor? grad_out, Tensor? grad_lse, {_INPUTS}, Tensor out, Tensor lse, "
    f"bool[{_DIFFERENTIABLE}] needs_grad) -> ({', '.join(['Tensor'] * _DIFFERENTIABLE)})"
)
_packets = getattr(torch.ops, NAMESPACE)
_attention = _packets.attention.default
_attention_backward = _packets.attention_backward.default


def attention(*inputs):
    """out [B, Hq, Lq, Dv] and lse [B, Hq, Lq] by torch.ops.ntk_kernels.attention."""
    return _call(_attention, _Attention, inputs)


def _call(op, function, inputs):
    if torch.compiler.is_compiling():
        return op(*inputs)
    # What the op's autograd kernel would do, without the way through the dispatcher. (torch.func wants to see the
    # autograd.Function itself, not an op with one behind it.)
    if torch._C._are_functorch_transforms_active() or _needs_grad(inputs):
        return function.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs)


def _needs_grad(inputs) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)


# Autograd --------------------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return _attention(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors, ctx.options = inputs[: _DIFFERENTIABLE + 2], inputs[_DIFFERENTIABLE + 2 :]
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        *tensors, out, lse = ctx.saved_tensors
        needs_grad = ctx.needs_input_grad[:_DIFFERENTIABLE]
        no_grads = (None,) * (2 + len(ctx.options))
        if grad_out is None and grad_lse is None:
            return (None,) * _DIFFERENTIABLE + no_grads
        inputs = (grad_out, grad_lse, *tensors, *ctx.options, out, lse, needs_grad)
        grads = _call(_attention_backward, _AttentionBackward, inputs)
        return tuple(grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True)) + no_grads


class _AttentionBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return _attention_backward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            "ntk_attention is differentiable once; for second derivatives use backend='reference', which is plain "
            "PyTorch"
        )


def _autograd_kernel(op, function):
    def kernel(*inputs):
        if _needs_grad(inputs):
            return function.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    return kernel


_library.impl("attention", _autograd_kernel(_attention, _Attention), "Autograd")
_library.impl("attention_backward", _autograd_kernel(_attention_backward, _AttentionBackward), "Autograd")


# Implementations -------------------------------------------------------------------------------------------------


def _attention_impl(query, *rest):
    z, row_keys, state_index = rest[2], rest[6], rest[9]
    if state_index is not None and state_index.device.type == "cpu":
        checks.check_index_range(state_index, (row_keys if z is None else z).shape[0])
    with _no_autocast(query):
        return torch_backend.forward(query, *rest)


def _backward_impl(grad_out, grad_lse, query, *rest):
    with _no_autocast(query):
        return torch_backend.backward(grad_out, grad_lse, query, *rest)


def _no_autocast(query):
    device_type = query.device.type
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _attention_fake(query, key, value, *rest):
    return empty_out(query, value), query.new_empty(query.shape[:3], dtype=lse_dtype(query))


def _backward_fake(grad_out, grad_lse, *args):
    inputs, needs_grad = args[:_DIFFERENTIABLE], args[-1]
    make = [empty_grad] * 3 + [lambda tensor: torch.empty_like(tensor, memory_format=torch.contiguous_format)] * 7
    return tuple(
        make_grad(tensor) if needed else inputs[0].new_empty(0)
        for make_grad, tensor, needed in zip(make, inputs, needs_grad, strict=True)
    )


_library.impl("attention", _attention_impl, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward_impl, "CompositeExplicitAutograd")
torch.library.register_fake(_attention, _attention_fake, lib=_library)
torch.library.register_fake(_attention_backward, _backward_fake, lib=_library)


# Work, for torch.utils.flop_counter ------------------------------------------------------------------------------


def _flops(query, key, value, k, centers, row_keys, products: tuple[int, int]) -> int:
    """Of matrix products: how many over D and over Dv (both passes count the hidden scores, as SDPA's formula does)."""
    batch, heads, seq_q, head_dim = query
    over_head_dim, over_value_dim = products
    keys = key[2] + (row_keys[2] if row_keys is not None else 0)
    per_row = keys * (over_head_dim * head_dim + over_value_dim * value[3])
    if k is not None:
        per_row += over_value_dim * k[2] * k[3] * (value[3] + 1)
    if centers is not None:
        per_row += over_head_dim * centers[2] * head_dim
    return 2 * batch * heads * seq_q * per_row


@register_flop_formula(_packets.attention)
def _attention_flops(query, key, value, z, k, centers, log_scale, row_keys, *rest, **kwargs) -> int:
    return _flops(query, key, value, k, centers, row_keys, (1, 1))


@register_flop_formula(_packets.attention_backward)
def _backward_flops(grad_out, grad_lse, query, key, value, z, k, centers, log_scale, row_keys, *rest, **kwargs) -> int:
    return _flops(query, key, value, k, centers, row_keys, (3, 2))
