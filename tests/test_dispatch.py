import warnings

import pytest
import torch

from ntk_kernels import PrefixState, dispatch, ntk_attention, reference

query, key, value = (torch.randn(1, 2, 7, 8) for _ in range(3))
state = PrefixState(torch.rand(2, 8, 8), torch.rand(2, 8), "elu")


@pytest.fixture
def served_by(monkeypatch):
    """Names of the backends that served, in order."""
    names = []
    for name, module, function in (
        ("reference", reference, "ntk_attention"),
        ("torch", dispatch_target(), "forward"),
    ):
        original = getattr(module, function)

        def record(*args, _name=name, _original=original, **kwargs):
            names.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(module, function, record)
    return names


def dispatch_target():
    from ntk_kernels.backends import torch as torch_backend

    return torch_backend


def test_default_on_the_cpu_is_torch(served_by):
    ntk_attention(query, key, value, state)
    assert served_by == ["torch"]


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_by_name(served_by, backend):
    ntk_attention(query, key, value, state, backend=backend)
    assert served_by == [backend]


def test_environment_sets_the_default_and_no_more(served_by, monkeypatch):
    monkeypatch.setenv("NTK_KERNELS_BACKEND", "reference")
    ntk_attention(query, key, value, state)
    ntk_attention(query, key, value, state, backend="torch")
    monkeypatch.setenv("NTK_KERNELS_BACKEND", "")
    ntk_attention(query, key, value, state)
    assert served_by == ["reference", "torch", "torch"]


def test_environment_is_checked(monkeypatch):
    monkeypatch.setenv("NTK_KERNELS_BACKEND", "cudnn")
    with pytest.raises(ValueError, match="`NTK_KERNELS_BACKEND` must be one of 'torch', 'reference', got 'cudnn'"):
        ntk_attention(query, key, value, state)


def test_routing_warns_once_for_each_reason(served_by, monkeypatch):
    for setting in (None, "torch"):
        monkeypatch.setattr(dispatch, "_warned", set())
        if setting:
            monkeypatch.setenv("NTK_KERNELS_BACKEND", setting)
        with pytest.warns(
            UserWarning, match="'torch' backend does not support softcap; .* go to 'reference'"
        ) as record:
            for _ in range(3):
                ntk_attention(query, key, value, state, softcap=5.0)
        assert len(record) == 1
        assert record[0].filename == __file__  # points at the caller
    mask = torch.zeros(7, 7, requires_grad=True)
    with pytest.warns(UserWarning, match="gradient for `attn_mask`"):
        out = ntk_attention(query, key, value, state, attn_mask=mask)
    assert torch.autograd.grad(out.sum(), mask)[0].abs().sum() > 0
    assert set(served_by) == {"reference"}


def test_a_mask_that_needs_no_gradient_now_is_served(served_by):
    mask = torch.zeros(7, 7, requires_grad=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        ntk_attention(query, key, value, state, attn_mask=mask)
    assert served_by == ["torch"]


@pytest.mark.parametrize(
    "arguments, what",
    [({"softcap": 5.0}, "softcap"), ({"attn_mask": torch.zeros(7, 7, requires_grad=True)}, "gradient for `attn_mask`")],
    ids=["softcap", "mask_gradient"],
)
def test_a_named_backend_serves_or_raises(arguments, what):
    with pytest.raises(NotImplementedError, match=f"backend='torch' does not support .*{what}"):
        ntk_attention(query, key, value, state, **arguments, backend="torch")


def test_other_devices_go_to_the_reference():
    with pytest.warns(UserWarning, match="does not support the device 'meta'"):
        assert dispatch.choose_backend(None, query.to("meta")) == "reference"
