"""The ops as `torch.library` knows them: schema, implementation, shapes for tracing, autograd, flops.

    torch.ops.ntk_kernels.attention           -> out, lse
    torch.ops.ntk_kernels.attention_backward  -> one gradient per differentiable input

Both are functional and of fixed arity: a gradient that nobody asked for comes back with no elements. The state comes
as `ntk_kernels.attention` prepares it: always a stack, always with a dimension for the centres.
"""

import torch

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
attention = getattr(torch.ops, NAMESPACE).attention.default
attention_backward = getattr(torch.ops, NAMESPACE).attention_backward.default


def _attention(query, key, value, z, k, centers, log_scale, row_keys, row_values, row_bias, state_index, *rest):
    if state_index is not None and state_index.device.type == "cpu":
        checks.check_index_range(state_index, (row_keys if z is None else z).shape[0])
    return torch_backend.forward(
        query, key, value, z, k, centers, log_scale, row_keys, row_values, row_bias, state_index, *rest
    )


def _attention_fake(query, key, value, *rest):
    return empty_out(query, value), query.new_empty(query.shape[:3], dtype=lse_dtype(query))


def _attention_backward_fake(grad_out, grad_lse, *args):
    inputs, needs_grad = args[:_DIFFERENTIABLE], args[-1]
    make = [empty_grad] * 3 + [lambda tensor: torch.empty_like(tensor, memory_format=torch.contiguous_format)] * 7
    return tuple(
        make_grad(tensor) if needed else inputs[0].new_empty(0)
        for make_grad, tensor, needed in zip(make, inputs, needs_grad, strict=True)
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[: _DIFFERENTIABLE + 2], *output)
    ctx.options = inputs[_DIFFERENTIABLE + 2 :]
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, grad_out, grad_lse):
    *inputs, out, lse = ctx.saved_tensors
    needs_grad = ctx.needs_input_grad[:_DIFFERENTIABLE]
    none = (None,) * (2 + len(ctx.options))
    if grad_out is None and grad_lse is None:
        return (None,) * _DIFFERENTIABLE + none
    grads = attention_backward(grad_out, grad_lse, *inputs, *ctx.options, out, lse, needs_grad)
    return tuple(grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True)) + none


def _no_double_backward(ctx, *grads):
    raise NotImplementedError(
        "ntk_attention is differentiable once; for second derivatives use backend='reference', which is plain PyTorch"
    )


_library.impl("attention", _attention, "CompositeExplicitAutograd")
_library.impl("attention_backward", torch_backend.backward, "CompositeExplicitAutograd")
torch.library.register_fake(attention, _attention_fake, lib=_library)
torch.library.register_fake(attention_backward, _attention_backward_fake, lib=_library)
torch.library.register_autograd(attention, _autograd_backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd(attention_backward, _no_double_backward, lib=_library)
