import pytest
import torch

from ntk_kernels import FEATURE_MAPS, feature_dim, reference
from ntk_kernels.feature_maps import ELU, LINEAR, SQUARES, FeatureMap, get_feature_map

F64 = torch.float64


@pytest.mark.parametrize("name", FEATURE_MAPS)
@pytest.mark.parametrize("head_dim", [1, 2, 7, 64])
def test_features_are_the_reference_s(name, head_dim):
    x = torch.randn(3, 5, head_dim, dtype=F64)
    x.view(-1)[0] = 0.0
    phi = get_feature_map(name)(x.clone())
    assert phi.shape == (3, 5, feature_dim(name, head_dim))
    torch.testing.assert_close(phi, reference.feature_map(x, name), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("name", FEATURE_MAPS)
@pytest.mark.parametrize("head_dim", [1, 2, 7])
def test_backward_is_autograd_s(name, head_dim):
    x = torch.randn(3, 5, head_dim, dtype=F64, requires_grad=True)
    phi = reference.feature_map(x, name)
    grad_phi = torch.randn_like(phi)
    (expected,) = torch.autograd.grad(phi, x, grad_phi)
    torch.testing.assert_close(get_feature_map(name).backward(grad_phi, x.detach(), phi.detach()), expected)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_features_are_differentiable(name):
    x = torch.randn(3, 5, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(get_feature_map(name), x)


@pytest.mark.parametrize("name", FEATURE_MAPS)
@pytest.mark.parametrize("head_dim", [1, 2, 7])
def test_sums_of_polynomials_can_be_moved(name, head_dim):
    feature_map = get_feature_map(name)
    y, c = torch.randn(20, head_dim, dtype=F64), torch.randn(20, 3, dtype=F64)
    move = torch.randn(head_dim, 1, dtype=F64)
    sums = reference.feature_map(y, name).mT @ c
    if feature_map.is_polynomial:
        torch.testing.assert_close(
            feature_map.moved(sums, move), reference.feature_map(y - move.mT, name).mT @ c
        )  # fmt: skip
    else:
        with pytest.raises(NotImplementedError, match=f"sums of the features '{name}' cannot be moved"):
            feature_map.moved(sums, move)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_the_order_is_that_of_the_expansion(name):
    """φ(t·x)·φ(y) is a polynomial in t of that degree: differences of one order more vanish, of the order do not."""
    feature_map = get_feature_map(name)
    x, y = torch.rand(2, 7, dtype=F64) + 0.5
    values = torch.stack([reference.feature_map(t * x, name) @ reference.feature_map(y, name) for t in range(-4, 5)])
    if feature_map.is_polynomial:
        assert values.diff(n=feature_map.order).abs().min() > 0.1
    assert (values.diff(n=feature_map.order + 1).abs().max() < 1e-9) == feature_map.is_polynomial


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_head_dim_inverts_dim(name):
    feature_map = get_feature_map(name)
    dims = {feature_dim(name, head_dim): head_dim for head_dim in range(1, 300)}
    for r in range(max(dims) + 1 if feature_map.order > 1 else 299):
        assert feature_map.head_dim(r) == dims.get(r)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_sections_make_up_the_features(name):
    """What kernels take as plain data, a section at a time."""
    x = torch.randn(5, 7, dtype=F64)
    feature_map = get_feature_map(name)
    dims = feature_map.section_dims(7)
    assert list(dims) == [section.name for section in feature_map.sections]
    parts = reference.feature_map(x, name).split(list(dims.values()), dim=-1)
    for section, part in zip(feature_map.sections, parts, strict=True):
        torch.testing.assert_close(torch.cat(section.features(x.clone()), dim=-1), part, rtol=1e-15, atol=1e-15)


def test_refuses():
    with pytest.raises(ValueError, match="`feature_map` must be one of 'elu', 'taylor1', 'taylor2', got 'taylor3'"):
        feature_dim("taylor3", 64)
    with pytest.raises(ValueError, match="`feature_map` must be one of 'elu', 'taylor1', 'taylor2', got NoneType"):
        get_feature_map(None)
    with pytest.raises(ValueError, match="`head_dim` must be at least 1, got 0"):
        feature_dim("elu", 0)
    with pytest.raises(ValueError, match="`centers` must hold one centre .* with feature_map='elu', several go with"):
        get_feature_map("elu").check_num_centers(2)
    with pytest.raises(ValueError, match="`centers` must hold at least one centre, got C=0"):
        get_feature_map("taylor1").check_num_centers(0)
    with pytest.raises(ValueError, match="`sections` must begin with LINEAR at order=2, got 'squares'"):
        FeatureMap("squares", (SQUARES, LINEAR), order=2)
    assert FeatureMap("other", (ELU,)).sections == get_feature_map("elu").sections
