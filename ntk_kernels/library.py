"""The ops as `torch.library` knows them: schema, implementation, shapes for tracing, autograd, flops.

    torch.ops.ntk_kernels.attention              -> out, lse
    torch.ops.ntk_kernels.attention_backward     -> one gradient per differentiable input
    torch.ops.ntk_kernels.attention_decode       -> out, lse
    torch.ops.ntk_kernels.sum_features           -> z, k, count
    torch.ops.ntk_kernels.sum_features_backward  -> gradients of keys, values and centres

All are functional and of fixed arity: a gradient that nobody asked for comes back with no elements. The state comes
as `ntk_kernels.attention` prepares it: always a stack, always with a dimension for the centres.
"""

from contextlib import nullcontext
from functools import partial

import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from . import checks
from .backends import torch as torch_backend
from .backends.results import empty_grad, empty_out, empty_sum_grads, empty_sums, lse_dtype
from .feature_maps import feature_dim
from .inputs import DECODE_SCHEMA, NUM_DIFFERENTIABLE, SCHEMA, SUMS_SCHEMA, DecodeInputs, Inputs, SumInputs

NAMESPACE = "ntk_kernels"

_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(f"attention({SCHEMA}) -> (Tensor out, Tensor lse)")
_library.define(
    f"attention_backward(Tensor? grad_out, Tensor? grad_lse, {SCHEMA}, Tensor out, Tensor lse, "
    f"bool[{NUM_DIFFERENTIABLE}] needs_grad) -> ({', '.join(['Tensor'] * NUM_DIFFERENTIABLE)})"
)
_library.define(f"attention_decode({DECODE_SCHEMA}) -> (Tensor out, Tensor lse)")
_library.define(f"sum_features({SUMS_SCHEMA}) -> (Tensor z, Tensor k, Tensor count)")
_library.define(
    f"sum_features_backward(Tensor grad_z, Tensor grad_k, {SUMS_SCHEMA}, bool[3] needs_grad) -> "
    "(Tensor, Tensor, Tensor)"
)
_packets = getattr(torch.ops, NAMESPACE)
_attention = _packets.attention.default
_attention_backward = _packets.attention_backward.default
_attention_decode = _packets.attention_decode.default
_sum_features = _packets.sum_features.default
_sum_features_backward = _packets.sum_features_backward.default
_NUM_TENSORS = Inputs._fields.index("max_seqlen_q")


def attention(*inputs):
    """out [B, Hq, Lq, Dv] and lse [B, Hq, Lq] by torch.ops.ntk_kernels.attention."""
    return _call(_attention, _Attention, inputs)


def attention_decode(*inputs):
    """out [B, Hq, Lq, Dv] and lse [B, Hq, Lq] by torch.ops.ntk_kernels.attention_decode."""
    return _call(_attention_decode, _AttentionDecode, inputs)


def sum_features(*inputs):
    """z [H, C, r, Dv], k [H, C, r] and count [H, C], float32 or, for float64 keys, float64, by
    torch.ops.ntk_kernels.sum_features: sums of w φ(y) vᵀ, w φ(y) and w over the rows nearest to each centre,
    y = key_scale · (k - μ). Differentiable in keys, values and centres, not through which centre is nearest; weights
    have no gradient."""
    return _call(_sum_features, _SumFeatures, inputs)


def _call(op, function, inputs):
    if torch.compiler.is_compiling():
        return op(*inputs)
    # What the op's autograd kernel would do, without the way through the dispatcher. (torch.func wants to see the
    # autograd.Function itself, not an op with one behind it.)
    if torch._C._are_functorch_transforms_active() or _in_forward_mode():
        return function.apply(*inputs)
    if _needs_grad(inputs):
        return _WITH_CTX.get(function, function).apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs)


def _needs_grad(inputs) -> bool:
    if torch.is_grad_enabled():
        for x in inputs:
            if x is not None and isinstance(x, torch.Tensor) and x.requires_grad:
                return True
    return False


def _in_forward_mode() -> bool:
    """Whether inputs may have tangents, which only an autograd.Function sees."""
    return forward_ad._current_level >= 0


# Autograd --------------------------------------------------------------------------------------------------------


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
    def forward(*inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return _attention(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tensors, ctx.options = inputs[:_NUM_TENSORS], inputs[_NUM_TENSORS:]
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        *tensors, out, lse = ctx.saved_tensors
        needs_grad = ctx.needs_input_grad[:NUM_DIFFERENTIABLE]
        no_grads = (None,) * (len(Inputs._fields) - NUM_DIFFERENTIABLE)
        if grad_out is None and grad_lse is None:
            return (None,) * NUM_DIFFERENTIABLE + no_grads
        inputs = (grad_out, grad_lse, *tensors, *ctx.options, out, lse, needs_grad)
        grads = _call(_attention_backward, _AttentionBackward, inputs)
        return tuple(grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True)) + no_grads

    jvp = _refusal(_NO_FORWARD_MODE)


class _AttentionWithCtx(torch.autograd.Function):
    """The same in the form that torch.func does not take, whose signature PyTorch does not look at in each call."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _Attention.forward(*inputs)
        _Attention.setup_context(ctx, inputs, output)
        return output

    backward = _Attention.backward
    jvp = _Attention.jvp


class _SumFeatures(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return _sum_features(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4])
        ctx.options = inputs[4:]
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx, grad_z, grad_k, grad_count):
        keys, values, _, centers = ctx.needs_input_grad[:4]
        needs_grad = (keys, values, centers)
        inputs = (grad_z, grad_k, *ctx.saved_tensors, *ctx.options, needs_grad)
        grads = _call(_sum_features_backward, _SumFeaturesBackward, inputs)
        keys, values, centers = (grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True))
        return keys, values, None, centers, None, None, None

    jvp = _refusal(_NO_FORWARD_MODE_OF_SUMS)


_WITH_CTX = {_Attention: _AttentionWithCtx}


def _without_backward(op, message: str):
    """An autograd.Function that computes what `op` does and refuses to be differentiated."""

    class WithoutBackward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs):
            with torch._C._AutoDispatchBelowAutograd():
                return op(*inputs)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        backward = jvp = _refusal(message)

    return WithoutBackward


_AttentionBackward = _without_backward(
    _attention_backward,
    "ntk_attention is differentiable once; for second derivatives use backend='reference', which is plain PyTorch",
)
_AttentionDecode = _without_backward(
    _attention_decode,
    "ntk_attention_decode has no backward; use ntk_attention, or backend='reference', which is plain PyTorch",
)
_SumFeaturesBackward = _without_backward(
    _sum_features_backward,
    "sums of features are differentiable once; for second derivatives of a conversion use "
    "ntk_kernels.reference.prefix_to_state, which is plain PyTorch",
)


def _autograd_kernel(op, function):
    def kernel(*inputs):
        if _needs_grad(inputs) or _in_forward_mode():
            return function.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    return kernel


_library.impl("attention", _autograd_kernel(_attention, _Attention), "Autograd")
_library.impl("attention_backward", _autograd_kernel(_attention_backward, _AttentionBackward), "Autograd")
_library.impl("attention_decode", _autograd_kernel(_attention_decode, _AttentionDecode), "Autograd")
_library.impl("sum_features", _autograd_kernel(_sum_features, _SumFeatures), "Autograd")
_library.impl("sum_features_backward", _autograd_kernel(_sum_features_backward, _SumFeaturesBackward), "Autograd")


# Implementations -------------------------------------------------------------------------------------------------


def _attention_impl(*args):
    inputs = Inputs(*args)
    checks.check_values(
        inputs.query, inputs.key, inputs.state_index, inputs.num_states, inputs.cu_seqlens_q, inputs.cu_seqlens_k,
        inputs.max_seqlen_q, inputs.max_seqlen_k,
    )  # fmt: skip
    with _no_autocast(inputs.query):
        return _module_of(inputs).forward(inputs)


def _backward_impl(grad_out, grad_lse, *args):
    *inputs, out, lse, needs_grad = args
    inputs = Inputs(*inputs)
    with _no_autocast(inputs.query):
        return _module_of(inputs).backward(grad_out, grad_lse, inputs, out, lse, needs_grad)


def _decode_impl(*args):
    inputs = DecodeInputs(*args)
    checks.check_cache_values(
        inputs.key_cache, inputs.cache_seqlens, inputs.block_table, inputs.state_index, inputs.num_states
    )
    with _no_autocast(inputs.query):
        return _module_of(inputs).decode(inputs)


def _sums_impl(*args):
    inputs = SumInputs(*args)
    with _no_autocast(inputs.keys):
        return _module_of(inputs).sum_features(inputs)


def _sums_backward_impl(grad_z, grad_k, *args):
    *inputs, needs_grad = args
    inputs = SumInputs(*inputs)
    with _no_autocast(inputs.keys):
        return _module_of(inputs).sum_features_backward(grad_z, grad_k, inputs, needs_grad)


def _module_of(inputs: Inputs | DecodeInputs | SumInputs):
    """The backend's module. `ntk_attention` asks for none that cannot do it; whoever calls an op himself may."""
    if inputs.backend == "triton":
        from .backends import triton as triton_backend  # not at import: the package works without triton

        return triton_backend
    if getattr(inputs, "softcap", 0):
        raise NotImplementedError("the 'torch' backend does not support softcap; use 'triton', or ntk_attention")
    return torch_backend


def _no_autocast(query):
    device_type = query.device.type
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _attention_fake(query, key, value, *rest):
    return empty_out(query, value), query.new_empty(query.shape[:3], dtype=lse_dtype(query))


def _backward_fake(grad_out, grad_lse, *args):
    inputs, needs_grad = args[:NUM_DIFFERENTIABLE], args[-1]
    make = [empty_grad] * 3
    make += [partial(torch.empty_like, memory_format=torch.contiguous_format)] * (NUM_DIFFERENTIABLE - 3)
    return tuple(
        make_grad(tensor) if needed else inputs[0].new_empty(0)
        for make_grad, tensor, needed in zip(make, inputs, needs_grad, strict=True)
    )


def _sums_fake(*args):
    return empty_sums(SumInputs(*args))


def _sums_backward_fake(grad_z, grad_k, *args):
    return empty_sum_grads(SumInputs(*args[:-1]), args[-1])


_library.impl("attention", _attention_impl, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward_impl, "CompositeExplicitAutograd")
_library.impl("attention_decode", _decode_impl, "CompositeExplicitAutograd")
_library.impl("sum_features", _sums_impl, "CompositeExplicitAutograd")
_library.impl("sum_features_backward", _sums_backward_impl, "CompositeExplicitAutograd")
torch.library.register_fake(_attention, _attention_fake, lib=_library)
torch.library.register_fake(_attention_backward, _backward_fake, lib=_library)
torch.library.register_fake(_attention_decode, _attention_fake, lib=_library)
torch.library.register_fake(_sum_features, _sums_fake, lib=_library)
torch.library.register_fake(_sum_features_backward, _sums_backward_fake, lib=_library)


# Work, for torch.utils.flop_counter ------------------------------------------------------------------------------


def _flops(inputs: Inputs | DecodeInputs, keys: int, value_dim: int, over_head_dim: int, over_value_dim: int) -> int:
    """Of matrix products, so many over D and over Dv; every row counts `keys` keys, hidden ones too, as in SDPA's
    formula. `inputs` has shapes for tensors."""
    batch, heads, seq_q, head_dim = inputs.query
    if inputs.row_keys is not None:
        keys += inputs.row_keys[2]
    per_row = keys * (over_head_dim * head_dim + over_value_dim * value_dim)
    if inputs.k is not None:
        columns = inputs.z[4] + 1
        if inputs.z_b is not None:
            per_row += over_value_dim * inputs.k[2] * inputs.z_b[3] * value_dim
        per_row += over_value_dim * inputs.k[2] * inputs.k[3] * columns
    if inputs.centers is not None:
        per_row += over_head_dim * inputs.centers[2] * head_dim
    return 2 * batch * heads * seq_q * per_row


def _flops_of_attention(args, over_head_dim: int, over_value_dim: int) -> int:
    """Packed sequences are counted as if each had the longest one's keys."""
    inputs = Inputs(*args)
    keys = inputs.key[2] if inputs.cu_seqlens_q is None else inputs.max_seqlen_k
    return _flops(inputs, keys, inputs.value[3], over_head_dim, over_value_dim)


@register_flop_formula(_packets.attention)
def _attention_flops(*args, **kwargs) -> int:
    return _flops_of_attention(args, 1, 1)


@register_flop_formula(_packets.attention_backward)
def _backward_flops(grad_out, grad_lse, *args, **kwargs) -> int:
    return _flops_of_attention(args[: len(Inputs._fields)], 3, 2)


@register_flop_formula(_packets.attention_decode)
def _decode_flops(*args, **kwargs) -> int:
    """As if every cache were full."""
    inputs = DecodeInputs(*args)
    pages = 1 if inputs.block_table is None else inputs.block_table[1]
    return _flops(inputs, inputs.key_cache[2] * pages, inputs.value_cache[3], 1, 1)


def _sums_flops(args, products: int) -> int:
    """Of matrix products: so many of the features, and one that finds the nearest centres."""
    keys, values, _, centers, feature_map, *_ = args
    per_row = products * feature_dim(feature_map, keys[2]) * (values[2] + 1)
    if centers is not None and centers[1] > 1:
        per_row += centers[1] * keys[2]
    return 2 * keys[0] * keys[1] * per_row


@register_flop_formula(_packets.sum_features)
def _sum_features_flops(*args, **kwargs) -> int:
    return _sums_flops(args, 1)


@register_flop_formula(_packets.sum_features_backward)
def _sum_features_backward_flops(grad_z, grad_k, *args, **kwargs) -> int:
    return _sums_flops(args[:-1], 2)
