"""The ops by the fused kernels of `ntk_kernels/kernels/`: forward, backward, decode and sums of features."""

from contextlib import nullcontext

import torch
from torch import Tensor

from ...feature_maps import get_feature_map
from ...inputs import DecodeInputs, Inputs, Leaves, StateTensors, SumInputs
from ...kernels.add_prefix import run_add_prefix
from ...kernels.add_prefix_backward import run_add_prefix_bwd
from ...kernels.add_second_order import takes_second_order
from ...kernels.backward import run_bwd
from ...kernels.backward_state import StateGrads
from ...kernels.decode import run_decode
from ...kernels.forward import run_fwd
from ...kernels.host.launch import addressable, made_addressable
from ...kernels.sums import SumGrads, prepare_rows, run_sum_features, run_sum_features_bwd
from ..centers import rows_by_center
from ..low_rank import pair_grads, with_full_z
from ..results import empty_grad, empty_out, empty_sum_grads, empty_sums, lse_dtype

_MAX_RANK = 64  # largest rank whose tile still fits in registers beside the output tile


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Returns out [B, Hq, Lq, Dv] and lse [B, Hq, Lq]."""
    query = inputs.query
    if not _keeps_pair(inputs, few_rows=False):
        inputs = with_full_z(inputs)
    if takes_second_order(inputs):
        out, lse = forward(inputs._replace(state=StateTensors(), feature_map=None))
        add_prefix(inputs, out, lse)
        return out, lse
    out, kernel_out, lse = _empty_results(query, inputs.value)
    if inputs.cu_seqlens_q is not None:  # rows that belong to no sequence
        kernel_out.zero_()
        lse.fill_(-torch.inf)
    if lse.numel():
        with _device_of(query):
            run_fwd(inputs, kernel_out, lse)
    return _in_place(out, kernel_out), lse


def backward(grad_out, grad_lse, inputs: Inputs, out: Tensor, lse: Tensor, needs: Leaves) -> Leaves:
    """Returns the gradients of query, key, value and the state; None for those that `needs` does not ask for."""
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    # Rows of no packed sequence get no gradient from the kernels.
    empty = empty_grad if inputs.cu_seqlens_q is None else lambda tensor: empty_grad(tensor).zero_()
    grads = [empty(tensor) if needed else None for tensor, needed in zip(inputs[:3], needs[:3], strict=True)]
    full = with_full_z(inputs)
    with _device_of(inputs.query):
        of_state = run_bwd(full, out, lse, grad_out, grad_lse, *grads, _wanted(full.state, needs.state))
    return Leaves(*grads, _state_grads(inputs.state, of_state, needs.state))


def add_prefix(inputs: Inputs, out: Tensor, lse: Tensor) -> None:
    """Makes `out` and `lse`, attention over the keys alone, attention over keys and prefix."""
    kernel_out = made_addressable(out)
    with _device_of(out):
        run_add_prefix(inputs, kernel_out, lse)
    _in_place(out, kernel_out)


def add_prefix_backward(
    grad_out, grad_lse, inputs: Inputs, out: Tensor, lse: Tensor, grad_query: Tensor | None, needs: StateTensors
) -> StateTensors:
    """Adds the gradient through the prefix to `grad_query` (may be None); returns those of the state that are needed.

    `out` and `lse` are of keys and prefix.
    """
    full = with_full_z(inputs)
    with _device_of(inputs.query):
        of_state = run_add_prefix_bwd(full, out, lse, grad_out, grad_lse, grad_query, _wanted(full.state, needs))
    return _state_grads(inputs.state, of_state, needs)


def decode(inputs: DecodeInputs) -> tuple[Tensor, Tensor]:
    """Returns out [B, Hq, Lq, Dv] and lse [B, Hq, Lq]."""
    if not _keeps_pair(inputs, few_rows=True):
        inputs = with_full_z(inputs)
    out, kernel_out, lse = _empty_results(inputs.query, inputs.value_cache)
    if lse.numel():
        with _device_of(inputs.query):
            run_decode(inputs, kernel_out, lse)
    return _in_place(out, kernel_out), lse


def sum_features(inputs: SumInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Returns z [H, C, r, Dv], k [H, C, r] and count [H, C]."""
    results = empty_sums(inputs)
    if inputs.keys.numel() == 0:
        return tuple(result.zero_() for result in results)
    with _device_of(inputs.keys):
        sums = run_sum_features(_rows(inputs), inputs.feature_map, inputs.key_scale)
    return tuple(result.copy_(part) for result, part in zip(results, sums, strict=True))


def sum_features_backward(grad_z, grad_k, inputs: SumInputs, needs_grad) -> tuple[Tensor, ...]:
    """Returns gradients of keys, values and centres; those that `needs_grad` does not ask for have no elements."""
    grads = empty_sum_grads(inputs, needs_grad)
    if inputs.keys.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    wanted = SumGrads(*(grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True)))
    with _device_of(inputs.keys):
        run_sum_features_bwd(_rows(inputs), grad_z, grad_k, wanted, inputs.feature_map, inputs.key_scale)
    return grads


def _rows(inputs: SumInputs):
    order = offsets = None
    if inputs.num_centers > 1:
        order, offsets = rows_by_center(inputs.keys, inputs.centers)
    return prepare_rows(*inputs[:4], order, offsets)


def _keeps_pair(inputs: Inputs | DecodeInputs, few_rows: bool) -> bool:
    """Returns whether the pair saves work: for many rows and few features it costs less to multiply it out once."""
    state = inputs.state
    if state.z_b is None or not (few_rows or get_feature_map(inputs.feature_map).order > 1):
        return False
    rank, value_dim = state.z_b.shape[3:]
    return 0 < rank <= min(value_dim, _MAX_RANK)


def _wanted(state: StateTensors, needs: StateTensors) -> StateGrads:
    """The tensors of a state with a full Z whose gradients are needed."""
    needs = needs._replace(z=needs.z or needs.z_b)
    return StateGrads(*(getattr(state, name) if getattr(needs, name) else None for name in StateGrads._fields))


def _state_grads(state: StateTensors, grads: StateGrads, needs: StateTensors) -> StateTensors:
    grad_z, grad_z_b = pair_grads(state, grads.z)
    grads = StateTensors(**grads._asdict() | {"z": grad_z, "z_b": grad_z_b})
    return StateTensors(*(grad if needed else None for grad, needed in zip(grads, needs, strict=True)))


def _empty_results(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out, the tensor that the kernels write for it (itself, where its strides allow that), and lse."""
    out = empty_out(query, value)
    kernel_out = out if addressable(out) else torch.empty_like(out, memory_format=torch.contiguous_format)
    return out, kernel_out, torch.empty(query.shape[:3], dtype=lse_dtype(query), device=query.device)


def _in_place(out: Tensor, kernel_out: Tensor) -> Tensor:
    return out if kernel_out is out else out.copy_(kernel_out)


def _device_of(tensor: Tensor):
    """The device that Triton launches on."""
    if not tensor.is_cuda or tensor.get_device() == torch._C._cuda_getDevice():
        return nullcontext()
    return torch.cuda.device(tensor.device)
