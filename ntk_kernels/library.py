"""The ops of `torch.library`: schema, implementation, shapes for tracing, autograd, flops.

    torch.ops.ntk_kernels.attention              -> out, lse
    torch.ops.ntk_kernels.attention_backward     -> one gradient per differentiable input
    torch.ops.ntk_kernels.attention_decode       -> out, lse
    torch.ops.ntk_kernels.sum_features           -> z, k, count
    torch.ops.ntk_kernels.sum_features_backward  -> gradients of keys, values and centres

All are functional and of fixed arity: a gradient that nobody asked for comes back with no elements. An op takes the
fields of a record of `inputs.py`, one by one.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from . import checks, flops
from .backends import BACKENDS
from .backends.results import empty_grad, empty_out, empty_sum_grads, empty_sums, lse_dtype
from .inputs import NUM_DIFFERENTIABLE, DecodeInputs, Inputs, Leaves, SumInputs, as_batch_row, as_packed, schema
from .replay import Replayed

NAMESPACE = "ntk_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")


class _Op:
    """An op: registered when it is made, differentiable from `differentiate_by` on."""

    def __init__(self, name: str, arguments: str, returns: str, run: Callable, fake: Callable, count: Callable):
        _library.define(f"{name}({arguments}) -> ({returns})")
        packet = getattr(getattr(torch.ops, NAMESPACE), name)
        self.name, self.overload = name, packet.default
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(self.overload, fake, lib=_library)
        register_flop_formula(packet)(count)

    def differentiate_by(self, function: type, eager: type | None = None) -> None:
        """Takes `function`, an autograd.Function of the op's arguments; `eager` does the same outside torch.func."""
        self.function, self.eager = function, eager or function
        _library.impl(self.name, self._autograd, "Autograd")

    def _autograd(self, *inputs):
        if _needs_grad(inputs) or _in_forward_mode():
            return self.function.apply(*inputs)
        return self.below_autograd(*inputs)

    def below_autograd(self, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*inputs)

    def __call__(self, *inputs):
        if torch.compiler.is_compiling():
            return self.overload(*inputs)
        # Does the work of the op's autograd kernel, without the way through the dispatcher. (torch.func wants to see
        # the autograd.Function itself, not an op with one behind it.)
        if torch._C._are_functorch_transforms_active() or _in_forward_mode():
            if _is_functionalized():
                return self.overload(*inputs)
            return self.function.apply(*inputs)
        if _needs_grad(inputs):
            return self.eager.apply(*inputs)
        return self.below_autograd(*inputs)


def _needs_grad(inputs) -> bool:
    if torch.is_grad_enabled():
        for x in inputs:
            if x is not None and isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


def _is_functionalized() -> bool:
    """Returns whether torch.func.functionalize is the innermost transform; it takes ops, but no autograd.Function."""
    stack = torch._C._functorch.get_interpreter_stack()
    return bool(stack) and stack[-1].key() == torch._C._functorch.TransformType.Functionalize


def _in_forward_mode() -> bool:
    """Returns whether inputs may have tangents, which only an autograd.Function sees."""
    return forward_ad._current_level >= 0


# The ops ---------------------------------------------------------------------------------------------------------


def attention(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Returns out [B, Hq, Lq, Dv] and lse [B, Hq, Lq] by torch.ops.ntk_kernels.attention."""
    return _attention(*inputs.flat())


def attention_backward(*arguments) -> tuple[Tensor, ...]:
    """Returns a gradient per differentiable input by torch.ops.ntk_kernels.attention_backward."""
    return _attention_backward(*arguments)


def attention_decode(inputs: DecodeInputs) -> tuple[Tensor, Tensor]:
    """Returns out [B, Hq, Lq, Dv] and lse [B, Hq, Lq] by torch.ops.ntk_kernels.attention_decode."""
    return _attention_decode(*inputs.flat())


def sum_features(inputs: SumInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Returns z [H, C, r, Dv], k [H, C, r] and count [H, C], float32 or, for float64 keys, float64, by
    torch.ops.ntk_kernels.sum_features: sums of w φ(y) vᵀ, w φ(y) and w over the rows nearest to each centre,
    y = key_scale · (k - μ). Differentiable in keys, values and centres, not through which centre is nearest; weights
    have no gradient."""
    return _sum_features(*inputs.flat())


@Replayed
def forward(*flat):
    """Returns out and lse, given the fields of Inputs."""
    inputs = Inputs.of(*flat)
    out, lse = BACKENDS[inputs.backend].load().forward(inputs.uniform())
    return (as_packed(out), lse[0]) if inputs.is_packed else (out, lse)


@Replayed
def backward(grad_out, grad_lse, *flat):
    """Returns the gradients of what is differentiable, in its shapes; None for those that are not needed."""
    *flat, out, lse, needs_grad = flat
    inputs = Inputs.of(*flat)
    if inputs.is_packed:
        grad_out, out = (None if x is None else as_batch_row(x) for x in (grad_out, out))
        grad_lse, lse = (None if x is None else x.unsqueeze(0) for x in (grad_lse, lse))
    backend = BACKENDS[inputs.backend].load()
    grads = backend.backward(grad_out, grad_lse, inputs.uniform(), out, lse, Leaves.of(needs_grad))
    of_input = [grad if grad is None or not inputs.is_packed else as_packed(grad) for grad in grads[:3]]
    of_state = [
        grad if grad is None else grad.view(x.shape)
        for grad, x in zip(grads.flat()[3:], flat[3:NUM_DIFFERENTIABLE], strict=True)
    ]
    return *of_input, *of_state


@Replayed
def decode(*flat):
    """Returns out and lse, given the fields of DecodeInputs."""
    inputs = DecodeInputs.of(*flat)
    return BACKENDS[inputs.backend].load().decode(inputs.uniform())


def check_attention(flat: Sequence) -> None:
    """Checks the numbers among the op's arguments."""
    checks.check_values(Inputs.of(*flat))


def check_decode(flat: Sequence) -> None:
    """Checks the numbers among the op's arguments."""
    checks.check_cache_values(DecodeInputs.of(*flat))


def _run_attention(*flat):
    check_attention(flat)
    with no_autocast(flat[0]):
        return forward(*flat)


def _run_attention_backward(grad_out, grad_lse, *flat):
    with no_autocast(flat[0]):
        grads = backward(grad_out, grad_lse, *flat)
    return tuple(flat[0].new_empty(0) if grad is None else grad for grad in grads)


def _run_decode(*flat):
    check_decode(flat)
    with no_autocast(flat[0]):
        return decode(*flat)


def _run_sums(*flat):
    inputs = SumInputs.of(*flat)
    with no_autocast(inputs.keys):
        return BACKENDS[inputs.backend].load().sum_features(inputs)


def _run_sums_backward(grad_z, grad_k, *flat):
    *flat, needs_grad = flat
    inputs = SumInputs.of(*flat)
    with no_autocast(inputs.keys):
        return BACKENDS[inputs.backend].load().sum_features_backward(grad_z, grad_k, inputs, needs_grad)


def no_autocast(tensor: Tensor):
    """A context without autocast on the device of a tensor."""
    device_type = tensor.device.type
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _attention_fake(query, key, value, *rest):
    if query.dim() == 3:
        out = as_packed(empty_out(as_batch_row(query), as_batch_row(value)))
        return out, query.new_empty((query.shape[1], query.shape[0]), dtype=lse_dtype(query))
    return empty_out(query, value), query.new_empty(query.shape[:3], dtype=lse_dtype(query))


def _attention_backward_fake(grad_out, grad_lse, *flat):
    leaves, needs_grad = flat[:NUM_DIFFERENTIABLE], flat[-1]
    make = [_empty_grad_of_input] * 3
    make += [partial(torch.empty_like, memory_format=torch.contiguous_format)] * (NUM_DIFFERENTIABLE - 3)
    return tuple(
        make_grad(tensor) if needed else leaves[0].new_empty(0)
        for make_grad, tensor, needed in zip(make, leaves, needs_grad, strict=True)
    )


def _empty_grad_of_input(tensor):
    return as_packed(empty_grad(as_batch_row(tensor))) if tensor.dim() == 3 else empty_grad(tensor)


_TENSORS = ", ".join(["Tensor"] * NUM_DIFFERENTIABLE)
_attention = _Op(
    "attention", schema(Inputs), "Tensor out, Tensor lse", _run_attention, _attention_fake,
    lambda *flat, **_: flops.of_attention(Inputs.of(*flat)),
)  # fmt: skip
_attention_backward = _Op(
    "attention_backward",
    f"Tensor? grad_out, Tensor? grad_lse, {schema(Inputs)}, Tensor out, Tensor lse, "
    f"bool[{NUM_DIFFERENTIABLE}] needs_grad",
    _TENSORS, _run_attention_backward, _attention_backward_fake,
    lambda grad_out, grad_lse, *flat, **_: flops.of_attention_backward(Inputs.of(*flat[:-3])),
)  # fmt: skip
_attention_decode = _Op(
    "attention_decode", schema(DecodeInputs), "Tensor out, Tensor lse", _run_decode, _attention_fake,
    lambda *flat, **_: flops.of_decode(DecodeInputs.of(*flat)),
)  # fmt: skip
_sum_features = _Op(
    "sum_features", schema(SumInputs), "Tensor z, Tensor k, Tensor count", _run_sums,
    lambda *flat: empty_sums(SumInputs.of(*flat)), lambda *flat, **_: flops.of_sums(SumInputs.of(*flat)),
)  # fmt: skip
_sum_features_backward = _Op(
    "sum_features_backward", f"Tensor grad_z, Tensor grad_k, {schema(SumInputs)}, bool[3] needs_grad",
    "Tensor, Tensor, Tensor", _run_sums_backward,
    lambda grad_z, grad_k, *flat: empty_sum_grads(SumInputs.of(*flat[:-1]), flat[-1]),
    lambda grad_z, grad_k, *flat, **_: flops.of_sums_backward(SumInputs.of(*flat[:-1])),
)  # fmt: skip


# Autograd --------------------------------------------------------------------------------------------------------

_ARGUMENTS = schema(Inputs).split(", ")
_NUM_TENSORS = sum(argument.startswith("Tensor") for argument in _ARGUMENTS)


def _refusal(message: str):
    """A derivative that does not exist, of an autograd.Function."""

    def refuse(ctx, *grads):
        raise NotImplementedError(message)

    return staticmethod(refuse)


_NO_FORWARD_MODE_OF_SUMS = (
    "sums of features have no forward-mode derivatives; use reverse mode, or ntk_kernels.reference.prefix_to_state, "
    "which is plain PyTorch"
)
_NO_FORWARD_MODE = (
    "ntk_attention has no forward-mode derivatives (dual numbers, torch.func.jvp, jacfwd, hessian); use reverse mode, "
    "or backend='reference', which is plain PyTorch"
)


class _Attention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*flat):
        return _attention.below_autograd(*flat)

    @staticmethod
    def setup_context(ctx, flat, output):
        tensors, ctx.options = flat[:_NUM_TENSORS], flat[_NUM_TENSORS:]
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        *tensors, out, lse = ctx.saved_tensors
        needs_grad = ctx.needs_input_grad[:NUM_DIFFERENTIABLE]
        no_grads = (None,) * (len(_ARGUMENTS) - NUM_DIFFERENTIABLE)
        if grad_out is None and grad_lse is None:
            return (None,) * NUM_DIFFERENTIABLE + no_grads
        grads = _attention_backward(grad_out, grad_lse, *tensors, *ctx.options, out, lse, needs_grad)
        return tuple(grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True)) + no_grads

    jvp = _refusal(_NO_FORWARD_MODE)


class _AttentionWithCtx(torch.autograd.Function):
    """`_Attention` in the form that torch.func does not take, whose signature PyTorch does not inspect in each call."""

    @staticmethod
    def forward(ctx, *flat):
        output = _Attention.forward(*flat)
        _Attention.setup_context(ctx, flat, output)
        return output

    backward = _Attention.backward
    jvp = _Attention.jvp


class _SumFeatures(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*flat):
        return _sum_features.below_autograd(*flat)

    @staticmethod
    def setup_context(ctx, flat, output):
        ctx.save_for_backward(*flat[:4])
        ctx.options = flat[4:]
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx, grad_z, grad_k, grad_count):
        keys, values, _, centers = ctx.needs_input_grad[:4]
        needs_grad = (keys, values, centers)
        grads = _sum_features_backward(grad_z, grad_k, *ctx.saved_tensors, *ctx.options, needs_grad)
        keys, values, centers = (grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True))
        return keys, values, None, centers, None, None, None

    jvp = _refusal(_NO_FORWARD_MODE_OF_SUMS)


def _without_backward(op: _Op, message: str) -> type:
    """An autograd.Function that computes what `op` does and refuses to be differentiated."""

    class WithoutBackward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*flat):
            return op.below_autograd(*flat)

        @staticmethod
        def setup_context(ctx, flat, output):
            pass

        backward = jvp = _refusal(message)

    return WithoutBackward


_attention.differentiate_by(_Attention, eager=_AttentionWithCtx)
_sum_features.differentiate_by(_SumFeatures)
for _op, _message in (
    (
        _attention_backward,
        "ntk_attention is differentiable once; for second derivatives use backend='reference', which is plain PyTorch",
    ),
    (
        _attention_decode,
        "ntk_attention_decode has no backward; use ntk_attention, or backend='reference', which is plain PyTorch",
    ),
    (
        _sum_features_backward,
        "sums of features are differentiable once; for second derivatives of a conversion use "
        "ntk_kernels.reference.prefix_to_state, which is plain PyTorch",
    ),
):
    _op.differentiate_by(_without_backward(_op, _message))
