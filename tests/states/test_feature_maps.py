import pytest
import torch

from ntk_kernels import FEATURE_MAPS, feature_dim, reference
from ntk_kernels.feature_maps import features, features_backward, head_dim_of

F64 = torch.float64


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("head_dim", [1, 2, 7, 64])
def test_features_are_the_reference_s(feature_map, head_dim):
    x = torch.randn(3, 5, head_dim, dtype=F64)
    x.view(-1)[0] = 0.0
    phi = features(x.clone(), feature_map)
    assert phi.shape == (3, 5, feature_dim(feature_map, head_dim))
    torch.testing.assert_close(phi, reference.feature_map(x, feature_map), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("head_dim", [1, 2, 7])
def test_backward_is_autograd_s(feature_map, head_dim):
    x = torch.randn(3, 5, head_dim, dtype=F64, requires_grad=True)
    phi = reference.feature_map(x, feature_map)
    grad_phi = torch.randn_like(phi)
    (expected,) = torch.autograd.grad(phi, x, grad_phi)
    torch.testing.assert_close(features_backward(grad_phi, x.detach(), phi.detach(), feature_map), expected)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_features_are_differentiable(feature_map):
    x = torch.randn(3, 5, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: features(x, feature_map), x)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_head_dim_of_inverts_feature_dim(feature_map):
    dims = {feature_dim(feature_map, head_dim): head_dim for head_dim in range(1, 300)}
    for r in range(max(dims) + 1 if feature_map == "taylor2" else 299):
        assert head_dim_of(feature_map, r) == dims.get(r)


def test_refuses():
    with pytest.raises(ValueError, match="`feature_map` must be one of 'elu', 'taylor1', 'taylor2', got 'taylor3'"):
        feature_dim("taylor3", 64)
    with pytest.raises(ValueError, match="`head_dim` must be at least 1, got 0"):
        feature_dim("elu", 0)
