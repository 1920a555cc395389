"""A small training fits a state to the effect of a real prefix; all backends have the same losses on the way."""

import math

import pytest
import torch
from backends import fused_backends

from ntk_kernels import PrefixState, feature_dim, ntk_attention, reference

HEADS, DIM, STEPS = 2, 16, 10


def trained(backend, feature_map, num_centers, dtype=torch.float32, device="cpu"):
    """Returns the losses of a training with Adam, and the state it ends with."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, HEADS, 24, DIM, generator=generator).to(device, dtype).unbind()
    prefix_key, prefix_value = torch.randn(2, HEADS, 100, DIM, generator=generator).to(device, dtype).unbind()
    target = reference.prefix_attention(
        *(tensor.float() for tensor in (query, key, value, prefix_key, prefix_value)), is_causal=True
    )
    r, centers = feature_dim(feature_map, DIM), num_centers or 1
    parameters = {
        "z": torch.zeros(HEADS, centers, r, DIM),
        "k": torch.full((HEADS, centers, r), 0.01),
        "log_scale": torch.full((HEADS, centers), math.log(10)),
        "centers": prefix_key[:, :centers].float(),
        "keys": prefix_key[:, -2:].float(),
        "values": prefix_value[:, -2:].float(),
        "bias": torch.zeros(HEADS, 2),
    }
    if num_centers is None:
        del parameters["centers"]
        parameters |= {name: parameters[name][:, 0] for name in ("z", "k", "log_scale")}
    parameters = {name: tensor.to(device, copy=True).requires_grad_() for name, tensor in parameters.items()}
    optimizer = torch.optim.Adam(parameters.values(), lr=0.02)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        state = PrefixState(**parameters, feature_map=feature_map)
        out = ntk_attention(query, key, value, state, is_causal=True, backend=backend)
        loss = (out.float() - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses), parameters


@pytest.mark.parametrize("feature_map, num_centers", [("elu", None), ("taylor1", 3), ("taylor2", 1)])
@fused_backends
def test_the_loss_curve_is_that_of_the_reference(backend, feature_map, num_centers):
    losses, parameters = trained(backend, feature_map, num_centers)
    expected, expected_parameters = trained("reference", feature_map, num_centers)
    assert losses[-1] < 0.9 * losses[0]
    rounding = torch.finfo(torch.float32).eps
    torch.testing.assert_close(losses, expected, rtol=STEPS * rounding, atol=0)
    for name, parameter in parameters.items():
        moved = (expected_parameters[name] - parameter).norm() / expected_parameters[name].norm()
        assert moved < rounding**0.5, name  # Adam divides by the size of a gradient, which may be as small as its error


@fused_backends
def test_a_float32_state_trains_under_a_bfloat16_model(backend):
    losses, _ = trained(backend, "elu", None, torch.bfloat16)
    expected, _ = trained("reference", "elu", None, torch.bfloat16)
    torch.testing.assert_close(losses, expected, rtol=torch.finfo(torch.bfloat16).eps, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("feature_map, num_centers", [("elu", None), ("taylor1", 3), ("taylor2", 1)])
def test_the_same_under_bfloat16_on_a_gpu(backend, feature_map, num_centers):
    losses, _ = trained(backend, feature_map, num_centers, torch.bfloat16, "cuda")
    expected, _ = trained("reference", feature_map, num_centers, torch.bfloat16, "cuda")
    torch.testing.assert_close(losses, expected, rtol=torch.finfo(torch.bfloat16).eps, atol=0)
