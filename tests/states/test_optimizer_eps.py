"""A warning, once, for optimizers whose eps keeps them from training a prefix."""

import copy
import gc
import warnings

import pytest
import torch

from ntk_kernels import NTKPrefix, ntk_attention, optimizer_eps


@pytest.fixture(autouse=True)
def nothing_watched():
    optimizer_eps._new.clear()


def steps(prefix, optimizer, count=2):
    """Takes steps, and returns how far the parameters moved and the warnings."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 16, 8)
    before = copy.deepcopy(prefix.state_dict())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(count):
            optimizer.zero_grad()
            ntk_attention(query, key, value, prefix()).square().mean().backward()
            optimizer.step()
    moved = max((tensor - before[name]).abs().max().item() for name, tensor in prefix.state_dict().items())
    return moved, [str(warning.message) for warning in seen if "eps" in str(warning.message)]


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_the_default_of_adam(optimizer):
    prefix = NTKPrefix(2, 8, init_mass=1e-9)
    moved, (warning,) = steps(prefix, optimizer(prefix.parameters(), lr=0.02, weight_decay=0.0))
    assert moved < 0.02  # of the two steps of 0.02 that were asked for
    assert "hardly moves 1 of its NTKPrefix: eps=1e-08" in warning and "eps=1e-15" in warning
    assert optimizer_eps._hook is None  # no step pays for it any more


def test_an_eps_that_trains():
    prefix = NTKPrefix(2, 8, init_mass=1e-9)
    moved, seen = steps(prefix, torch.optim.AdamW(prefix.parameters(), lr=0.02, eps=1e-15, weight_decay=0.0))
    assert moved > 0.03 and not seen


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=1.0),
        lambda p: torch.optim.AdamW([{"params": p, "eps": 1e-15}, {"params": [torch.nn.Parameter(torch.ones(1))]}]),
    ],
    ids=["no eps", "of a group"],
)
def test_optimizers_that_are_right(make):
    prefix = NTKPrefix(2, 8, init_mass=1e-9)
    assert not steps(prefix, make(list(prefix.parameters())))[1]


def test_large_gradients():
    """A prefix that weighs something trains with any eps."""
    prefix = NTKPrefix(2, 8, init_mass=1.0)
    assert not steps(prefix, torch.optim.AdamW(prefix.parameters()))[1]


def test_many_prefixes_one_warning():
    prefixes = torch.nn.ModuleList(NTKPrefix(2, 8, init_mass=1e-9) for _ in range(3))
    query, key, value = torch.randn(3, 2, 2, 16, 8)
    optimizer = torch.optim.AdamW(prefixes.parameters())
    for prefix in prefixes:
        query = ntk_attention(query, key, value, prefix())
    query.square().mean().backward()
    with pytest.warns(UserWarning, match="3 of its NTKPrefix"):
        optimizer.step()


def test_others_are_let_alone():
    """Optimizers of other parameters, frozen prefixes, prefixes that are gone."""
    frozen, gone = NTKPrefix(2, 8).requires_grad_(False), NTKPrefix(2, 8)
    del gone
    gc.collect()
    assert list(optimizer_eps._new) == [frozen]
    other = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([other])
    (1e-12 * other).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert list(optimizer_eps._new) == [frozen]
