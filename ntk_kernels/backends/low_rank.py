"""Low-rank pairs for backends without support for them: multiplies Z = z·z_b and splits the gradient of the product."""

import torch
from torch import Tensor

from ..inputs import DecodeInputs, Inputs, StateTensors


def with_full_z(inputs: Inputs | DecodeInputs) -> Inputs | DecodeInputs:
    """The call with the product of the pair, if there is one, as `z` and no `z_b`."""
    state = inputs.state
    if state.z_b is None:
        return inputs
    dtype = torch.promote_types(torch.promote_types(state.z.dtype, state.z_b.dtype), torch.float32)
    dtype = torch.promote_types(dtype, inputs.query.dtype)
    return inputs._replace(state=state._replace(z=state.z.to(dtype) @ state.z_b.to(dtype), z_b=None))


def pair_grads(state: StateTensors, grad_z: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `z` and `z_b` from that of their product (or of `z` itself)."""
    if state.z_b is None or grad_z is None:
        return grad_z, None
    z_a, z_b = (tensor.to(grad_z.dtype) for tensor in (state.z, state.z_b))
    return (grad_z @ z_b.mT).to(state.z.dtype), (z_a.mT @ grad_z).to(state.z_b.dtype)
