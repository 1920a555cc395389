"""The blocks in which the torch backend makes features of second order."""

import pytest
import torch
from cases import CAUSAL, F64, TAYLOR2, Case, make_inputs
from oracle import check_case
from sums_cases import a_prefix, check

from ntk_kernels import feature_dim, reference
from ntk_kernels.backends.torch import second_order
from ntk_kernels.backends.torch.second_order import MIN_ROWS, Blocks, SecondOrder, is_second_order
from ntk_kernels.feature_maps import REGISTRY

DIMS = [1, 2, 7, 8, 9, 24, 64]  # fewer columns than a block, blocks that are full and not


@pytest.mark.parametrize("head_dim", DIMS)
def test_products_are_those_of_the_map(head_dim):
    r = feature_dim("taylor2", head_dim)
    z, k, x = torch.randn(r, 3, dtype=F64), torch.randn(r, dtype=F64), torch.randn(5, head_dim, dtype=F64)
    phi = reference.feature_map(x, "taylor2")
    blocks = Blocks(head_dim, F64, x.device)
    features = blocks.features(x.mT.contiguous())
    torch.testing.assert_close(features.mT @ blocks.pack(z), phi @ z)
    values = torch.randn(5, 3, dtype=F64)
    torch.testing.assert_close(blocks.unpack(features @ values), phi.mT @ values)
    x_kx = (x @ blocks.square_of(k) * x).sum(-1)
    torch.testing.assert_close(k[0] + x @ k[1 : 1 + head_dim] + x_kx, phi @ k)
    torch.testing.assert_close(blocks.of_square(x.mT @ x), phi[:, 1 + head_dim :].sum(0))


@pytest.mark.parametrize("head_dim", DIMS)
def test_gradients_are_autograd_s(head_dim):
    r = feature_dim("taylor2", head_dim)
    z, k = torch.randn(1, 2, r, 3, dtype=F64), torch.randn(1, 2, r, dtype=F64)
    x = torch.randn(3, 2, 5, head_dim, dtype=F64, requires_grad=True)
    grad, grad_mass = torch.randn(3, 2, 5, 3, dtype=F64), torch.randn(3, 2, 5, dtype=F64)
    phi = reference.feature_map(x, "taylor2")
    grad_phi = grad @ z.mT + grad_mass[..., None] * k.unsqueeze(-2)
    (expected,) = torch.autograd.grad(phi, x, grad_phi)
    features, x = SecondOrder(z, k, head_dim), x.detach()
    grad_x, along_phi = features.grad_of_rows(x, grad, grad_mass, features.mass(x))
    torch.testing.assert_close(grad_x, expected)
    torch.testing.assert_close(along_phi, (phi.detach() * grad_phi).sum(-1))
    torch.testing.assert_close(features.grad_of_k(x, grad_mass), (phi.detach() * grad_mass[..., None]).sum(2))


def test_which_maps_have_these_features():
    assert [name for name, feature_map in REGISTRY.items() if is_second_order(feature_map)] == ["taylor2"]


@pytest.mark.parametrize("rows", [MIN_ROWS // 2 - 1, MIN_ROWS // 2, 70])
@pytest.mark.parametrize("max_rows", [7, 1000])
@pytest.mark.parametrize(
    "state",
    [{"centers": 1, "log_scale": True}, {"stack": 2, "mass": "mixed", "rows": 2}, {"rank": 2, "mass": "none"}],
    ids=["centre", "stack", "low rank"],
)
def test_attention(rows, max_rows, state, monkeypatch):
    """Two query heads share a head of the state: fewer rows than it takes, just as many, and several chunks."""
    made = []
    original = Blocks.__init__

    def init(self, *args):
        made.append(args)
        original(self, *args)
        self.max_rows = max_rows

    monkeypatch.setattr(Blocks, "__init__", init)
    index = (1, -1, 0) if "stack" in state else None
    case = Case("", "", batch=3, seq_q=rows, seq_k=rows, head_dim=10, value_dim=3, state=state | TAYLOR2,
                state_index=index, options=CAUSAL)  # fmt: skip
    check_case(make_inputs(case), case.dtype, backend="torch", backward=True, grad_lse=True)
    assert bool(made) == (rows >= MIN_ROWS // 2)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("max_features", [1, 10**9])
def test_sums(weighted, max_features, monkeypatch):
    monkeypatch.setattr(second_order, "_MAX_FEATURES", {"cpu": max_features})
    check(a_prefix(rows=600, head_dim=9, value_dim=4, centers=1, weighted=weighted), "taylor2", "torch")
