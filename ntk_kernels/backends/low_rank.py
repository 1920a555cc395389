"""Low-rank pairs Z = z·z_b for backends that do not know them: multiplied out, and the gradients of the two."""

import torch
from torch import Tensor

from ..inputs import DecodeInputs, Inputs


def full_state(inputs: Inputs | DecodeInputs) -> list[Tensor | None]:
    """The tensors of the state, but without `z_b`, which is multiplied into `z`; None in its place."""
    z, z_b, *rest = inputs.state
    if z_b is not None:
        dtype = _product_dtype(z, z_b)
        z = z.to(dtype) @ z_b.to(dtype)
    return [z, None, *rest]


def _product_dtype(z_a: Tensor, z_b: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(z_a.dtype, z_b.dtype), torch.float32)


def low_rank_grads(inputs: Inputs, grad_z: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Of `z` and `z_b`, from that of their product."""
    if inputs.z_b is None or grad_z is None:
        return grad_z, None
    z_a, z_b = (tensor.to(grad_z.dtype) for tensor in (inputs.z, inputs.z_b))
    return (grad_z @ z_b.mT).to(inputs.z.dtype), (z_a.mT @ grad_z).to(inputs.z_b.dtype)
