"""The `triton` backend: the fused kernels of `ntk_kernels.kernels`, forward, backward, decode and conversion."""

from contextlib import nullcontext

import torch
from torch import Tensor

from ..inputs import NUM_DIFFERENTIABLE, DecodeInputs, Inputs, SumInputs
from ..kernels.backward import run_ntk_bwd
from ..kernels.decode import run_ntk_decode
from ..kernels.forward import run_ntk_fwd
from ..kernels.host.launch import addressable, made_addressable
from ..kernels.sums import SumGrads, prepare_rows, run_sum_features, run_sum_features_backward
from .low_rank import full_state, low_rank_grads
from .results import empty_grad, empty_out, empty_sum_grads, empty_sums, lse_dtype
from .torch.sums import rows_by_center


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Lq, Dv] and lse [B, Hq, Lq]."""
    query = inputs.query
    out, kernel_out, lse = _empty_results(query, inputs.value)
    if inputs.cu_seqlens_q is not None:  # rows that belong to no sequence
        kernel_out.zero_()
        lse.fill_(-torch.inf)
    if lse.numel():
        with _device_of(query):
            run_ntk_fwd(query, inputs.key, inputs.value, kernel_out, lse, **_arguments(inputs))
    return _in_place(out, kernel_out), lse


def decode(inputs: DecodeInputs) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Lq, Dv] and lse [B, Hq, Lq]."""
    query = inputs.query
    out, kernel_out, lse = _empty_results(query, inputs.value_cache)
    if lse.numel():
        arguments = {name: x for name, x in inputs._asdict().items() if name not in ("query", "backend")}
        with _device_of(query):
            run_ntk_decode(query, out=kernel_out, lse=lse, cache_size=inputs.cache_size, **arguments)
    return _in_place(out, kernel_out), lse


def sum_features(inputs: SumInputs) -> tuple[Tensor, Tensor, Tensor]:
    """z [H, C, r, Dv], k [H, C, r] and count [H, C]."""
    results = empty_sums(inputs)
    if inputs.keys.numel() == 0:
        return tuple(result.zero_() for result in results)
    with _device_of(inputs.keys):
        sums = run_sum_features(_rows(inputs), inputs.feature_map, inputs.key_scale)
    return tuple(result.copy_(part) for result, part in zip(results, sums, strict=True))


def sum_features_backward(grad_z, grad_k, inputs: SumInputs, needs_grad) -> tuple[Tensor, ...]:
    """Gradients of keys, values and centres; those that `needs_grad` does not ask for have no elements."""
    grads = empty_sum_grads(inputs, needs_grad)
    if inputs.keys.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    wanted = SumGrads(*(grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True)))
    with _device_of(inputs.keys):
        run_sum_features_backward(_rows(inputs), grad_z, grad_k, wanted, inputs.feature_map, inputs.key_scale)
    return grads


def _rows(inputs: SumInputs):
    order = offsets = None
    if inputs.num_centers > 1:
        order, offsets = rows_by_center(inputs.keys, inputs.centers)
    return prepare_rows(*inputs[:4], order, offsets)


def _empty_results(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """out, what the kernels write for it (itself, where its strides allow that), and lse."""
    out = empty_out(query, value)
    kernel_out = out if addressable(out) else torch.empty_like(out, memory_format=torch.contiguous_format)
    return out, kernel_out, torch.empty(query.shape[:3], dtype=lse_dtype(query), device=query.device)


def _in_place(out: Tensor, kernel_out: Tensor) -> Tensor:
    return out if kernel_out is out else out.copy_(kernel_out)


def backward(grad_out, grad_lse, inputs: Inputs, out, lse, needs_grad) -> tuple[Tensor, ...]:
    """Gradients of query, key, value and the eight tensors of the state; those that `needs_grad` does not ask for
    have no elements."""
    query = inputs.query
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    # Rows of no packed sequence get no gradient from the kernels.
    empty = empty_grad if inputs.cu_seqlens_q is None else lambda tensor: empty_grad(tensor).zero_()
    grads = [empty(tensor) if needed else None for tensor, needed in zip(inputs[:3], needs_grad, strict=False)]
    state_grads = _run_backward(grad_out, grad_lse, inputs, out, lse, grads, needs_grad)
    grads = zip([*grads, *state_grads], needs_grad, strict=True)
    return tuple(grad if needed else query.new_empty(0) for grad, needed in grads)


def add_prefix(inputs: Inputs, out: Tensor, lse: Tensor) -> None:
    """Makes `out` and `lse`, attention over the keys alone, attention over keys and prefix."""
    inputs = _without_keys(inputs)
    kernel_out = made_addressable(out)
    with _device_of(out):
        run_ntk_fwd(*inputs[:3], kernel_out, lse, **_arguments(inputs))
    _in_place(out, kernel_out)


def add_prefix_backward(grad_out, grad_lse, inputs: Inputs, out, lse, grad_query, needs_grad) -> list[Tensor | None]:
    """Adds the gradient through the prefix to `grad_query` (may be None); gives those of the state's eight tensors.

    `out` and `lse` are of keys and prefix.
    """
    return _run_backward(grad_out, grad_lse, _without_keys(inputs), out, lse, [grad_query, None, None], needs_grad)


def _run_backward(grad_out, grad_lse, inputs: Inputs, out, lse, grads, needs_grad) -> list[Tensor | None]:
    """Fills `grads` of query, key and value; gives those of the state's eight tensors."""
    z, z_b, *rest = full_state(inputs)
    state = dict(zip(Inputs._fields[3:NUM_DIFFERENTIABLE], (z, z_b, *rest), strict=True))
    wanted = {name: tensor for (name, tensor), needed in zip(state.items(), needs_grad[3:], strict=True) if needed}
    if needs_grad[3] or needs_grad[4]:
        wanted["z"] = z
        wanted.pop("z_b", None)
    with _device_of(inputs.query):
        state_grads = run_ntk_bwd(
            *inputs[:3], out, lse, grad_out, grad_lse, *grads, wanted, **_arguments(inputs._replace(**state))
        )
    grad_z, grad_z_b = low_rank_grads(inputs, state_grads.pop("z", None))
    state_grads |= {"z": grad_z, "z_b": grad_z_b}
    return [state_grads.get(name) for name in state]


def _without_keys(inputs: Inputs) -> Inputs:
    """The prefix alone; the value tells its head dimension."""
    return inputs._replace(
        key=None, attn_mask=None, key_start=None, key_stop=None, softcap=0.0, window_left=-1, window_right=-1,
        causal_offset=0,
    )  # fmt: skip


def _arguments(inputs: Inputs) -> dict:
    """What the kernels' launchers take by name."""
    return {name: x for name, x in inputs._asdict().items() if name not in ("query", "key", "value", "backend")}


def _device_of(tensor: Tensor):
    """Where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
