"""The pass that adds the prefix to PyTorch's attention: which calls it takes, with whatever tiles and splits."""

from dataclasses import replace

import pytest
import torch
from cases import BF16, CAUSAL, F32, HALF, TAYLOR1, TAYLOR2, Case, make_inputs
from oracle import NAN_STATES, check_case, check_nan, op_inputs

from ntk_kernels import PrefixState, ntk_attention
from ntk_kernels.backends.torch import implementation as torch_backend
from ntk_kernels.backends.triton import implementation as triton_backend
from ntk_kernels.kernels.add_prefix import can_be_resident
from ntk_kernels.kernels.add_prefix_backward import can_be_resident_bwd
from ntk_kernels.kernels.host import configs, launch
from ntk_kernels.kernels.host.configs import TileConfig


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that run."""
    monkeypatch.setattr(torch_backend, "_kernels_for", lambda inputs: triton_backend)
    names, original = [], launch.Launch.__call__
    monkeypatch.setattr(launch.Launch, "__call__", lambda self: (names.append(self.kernel.__name__), original(self))[1])
    return names


TAKEN = [
    Case("elu", "both passes", options=CAUSAL),
    Case("taylor1_wide", "several tiles of several heads that share a state", seq_q=130, seq_k=130, heads=6,
         state={"log_scale": True} | TAYLOR1, head_dim=40, value_dim=24),
    Case("centre", "a centre has gradients too", state={"centers": 1, "log_scale": True, "mass": "mixed"} | TAYLOR1),
    Case("centre_elu", "a mass of 0 at a weight that moves with the query", state={"centers": 1, "mass": "none"}),
    Case("bf16", "rounded once", dtype=BF16, seq_q=70, seq_k=70, options=CAUSAL),
    Case("huge", "logits of ±1000", magnitude=20.0, state={"centers": 1, "log_scale": True} | TAYLOR1),
    Case("nothing", "neither a key nor mass: 0 and no gradient, whatever the weight", magnitude=20.0,
         options=CAUSAL | {"causal_offset": -40}, state={"mass": "none", "centers": 1, "center_magnitude": 20.0}),
    Case("no_key", "the prefix alone on some rows", options=CAUSAL | {"causal_offset": -9},
         state={"centers": 1, "log_scale": True} | TAYLOR1),
    Case("state_for_none", "a batch row without a state", batch=3, state={"stack": 2}, state_index=(1, -1, 0)),
]  # fmt: skip


@pytest.mark.parametrize("tile", [TileConfig(16, 16, 4, 1), TileConfig(64, 64, 4, 1)], ids=str)
@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.id)
def test_against_the_reference(case, tile, launched, monkeypatch):
    """Tiles are full and not; small ones make several splits."""
    original = configs.candidates
    monkeypatch.setattr(
        configs, "candidates", lambda kernel, *args: (tile,) if "resident" in kernel else original(kernel, *args)
    )
    check_case(make_inputs(case), case.dtype, backend="torch", backward=True, grad_lse=True)
    one_state = case.state_index is None
    assert "_ntk_add_resident_prefix_kernel" in launched
    assert ("_ntk_add_resident_prefix_bwd_kernel" in launched) == one_state
    assert ("_ntk_add_prefix_bwd_dq_kernel" in launched) != one_state


@pytest.mark.parametrize("mass", ["positive", "none", "mixed"])
def test_wide_values(mass, launched):
    """The general kernel, which then reads what the keys gave after it has added the prefix."""
    case = Case("", "", head_dim=8, value_dim=72, state={"mass": mass} | TAYLOR2, options=CAUSAL)
    check_case(make_inputs(case), case.dtype, backend="torch", backward=True)
    assert "_ntk_add_prefix_kernel" in launched


@pytest.mark.parametrize("seq_k", [0, 21])
@pytest.mark.parametrize("recipe", [NAN_STATES["elu"], NAN_STATES["taylor1, one centre"]], ids=["elu", "taylor1"])
def test_nan_is_not_hidden(recipe, seq_k, launched):
    check_nan(recipe, seq_k, "torch")
    assert "_ntk_add_resident_prefix_kernel" in launched


@pytest.mark.parametrize("centers", [None, 2], ids=["resident", "general"])
def test_a_row_of_finite_masks_beside_a_prefix_without_mass(centers, launched):
    """Its lse, about finfo.min, times log2(e) would be -inf, as of a row that sees nothing."""
    query, key, value, state, _ = make_inputs(Case("", "", state={"centers": centers, "mass": "none"} | TAYLOR1))
    mask = torch.zeros(37, 37)
    mask[3] = torch.finfo(torch.float32).min
    nothing = replace(state, z=torch.zeros_like(state.z))
    out, lse = ntk_attention(query, key, value, nothing, attn_mask=mask, return_lse=True, backend="torch")
    expected, expected_lse = ntk_attention(query, key, value, attn_mask=mask, return_lse=True, backend="reference")
    torch.testing.assert_close(out, expected)
    seen = torch.arange(37) != 3
    torch.testing.assert_close(lse[:, :, seen], expected_lse[:, :, seen])
    assert (lse[:, :, 3] < -1e38).all() and lse.isfinite().all()
    assert launched == ["_ntk_add_resident_prefix_kernel" if centers is None else "_ntk_add_prefix_kernel"]


def test_each_gradient_alone_is_what_it_is_among_all(launched):
    """A frozen state needs that of the query, a frozen model those of the state."""
    query, key, value, state, options = make_inputs(TAKEN[2])
    inputs = {"query": query} | state.tensors()

    def gradients(*names):
        leaves = {name: tensor.detach().requires_grad_(name in names) for name, tensor in inputs.items()}
        of_state = {name: leaf for name, leaf in leaves.items() if name != "query"}
        other = PrefixState(**of_state, feature_map=state.feature_map)
        out = ntk_attention(leaves["query"], key, value, other, **options, backend="torch")
        return torch.autograd.grad(out.square().sum(), [leaves[name] for name in names])

    everything = gradients(*inputs)
    for name, expected in zip(inputs, everything, strict=True):
        assert expected.any(), name
        assert torch.equal(gradients(name)[0], expected), name
    assert launched.count("_ntk_add_resident_prefix_bwd_kernel") == 1 + len(inputs)


def prepared(arch="sm90", **fields):
    case = Case("", "", **{"state": {}, "head_dim": 64, "dtype": BF16} | fields)
    query, key, value, state, options = make_inputs(case)
    return launch.prepare(op_inputs(query, key, value, state, options, "torch").uniform().without_keys(), arch)


@pytest.mark.parametrize(
    "fields, forward_too, backward_too",
    [
        ({}, True, True),
        ({"state": TAYLOR1, "head_dim": 128}, True, True),
        ({"state": {"centers": 1}}, True, True),
        ({"state": {"centers": 1}, "head_dim": 128}, True, False),
        ({"state": {"stack": 2}, "state_index": (1, 0)}, True, False),
        ({"arch": "sm80"}, False, False),
        ({"dtype": HALF}, False, False),
        ({"dtype": F32}, False, False),
        ({"head_dim": 256}, False, False),
        ({"state": TAYLOR2}, False, False),
        ({"state": {"centers": 2} | TAYLOR1}, False, False),
        ({"state": {"rank": 2}}, False, False),
        ({"state": {"rows": 2}}, False, False),
    ],
)
def test_which_calls_it_takes(fields, forward_too, backward_too):
    call = prepared(**fields)
    assert (can_be_resident(call), can_be_resident_bwd(call)) == (forward_too, backward_too)


def test_calls_with_keys_take_the_fused_kernels(launched):
    query, key, value, state, options = make_inputs(TAKEN[0])
    out = ntk_attention(query.requires_grad_(), key, value, state, **options, backend="triton")
    out.sum().backward()
    assert launched and not any("add" in name for name in launched)
