"""NaN, huge logits, empty rows and centres: they stay where they belong, and gradients stay finite."""

import math

import pytest
import torch
from backends import all_backends, fused_backends, triton_only
from oracle import NAN_STATES, check_nan, run
from small_cases import a_state, qkv, sdpa

from ntk_kernels import FEATURE_MAPS, PrefixState, feature_dim, ntk_attention


@all_backends
def test_nan_stays_in_its_row(backend):
    """A NaN is neither hidden nor spread."""
    query, key, value = qkv(backend)
    query[1, 2, 3, 0] = math.nan
    out, lse = ntk_attention(
        query, key, value, a_state(backend, rows=2, centers=2, feature_map="taylor1"), is_causal=True, return_lse=True,
        backend=backend,
    )  # fmt: skip
    bad = torch.zeros(2, 4, 21, dtype=torch.bool)
    bad[1, 2, 3] = True
    assert torch.equal(out.isnan().all(-1), bad)
    assert torch.equal(out.isnan().any(-1), bad)
    assert torch.equal(lse.isnan(), bad)


@all_backends
@pytest.mark.parametrize("seq_k", [0, 21])
@pytest.mark.parametrize("recipe", NAN_STATES.values(), ids=NAN_STATES)
def test_nan_is_not_hidden(recipe, seq_k, backend):
    check_nan(recipe, seq_k, backend)


@all_backends
def test_nan_in_a_padding_row_stays_there(backend):
    """With left padding row 0 sees nothing and is 0, and its content reaches no other row."""
    query, key, value = (tensor.float() for tensor in qkv(backend))
    visible = torch.ones(2, 1, 21, 21, dtype=torch.bool).tril()
    visible[:, :, :, 0] = False
    out = ntk_attention(query, key, value, attn_mask=visible, backend=backend)
    assert (out[:, :, 0] == 0).all()
    assert out.isfinite().all()


@all_backends
def test_switched_off_parts_add_nothing(backend):
    """A centre or row with log_scale or bias -inf adds nothing; its gradients are 0 and not NaN."""
    query, key, value = qkv(backend)
    full = a_state(backend, centers=3, log_scale=True, rows=3, feature_map="taylor1")
    tensors = full.tensors()
    less = {name: tensor[:, :2].clone() for name, tensor in tensors.items()}
    tensors["log_scale"][:, 2] = tensors["bias"][:, 2] = -math.inf

    def attention(*args, **kwargs):
        return ntk_attention(*args, **kwargs, backend=backend)

    grad_out = torch.randn(2, 4, 21, 8, dtype=query.dtype)
    off = run(attention, query, key, value, PrefixState(**tensors, feature_map="taylor1"), {}, grad_out=grad_out)
    gone = run(attention, query, key, value, PrefixState(**less, feature_map="taylor1"), {}, grad_out=grad_out)
    for name, expected in gone.items():
        ours = off[name]
        if name.startswith("grad state."):
            assert (ours[:, 2] == 0).all(), name
            ours = ours[:, :2]
        torch.testing.assert_close(ours, expected, msg=lambda text, name=name: f"{name}: {text}")


@all_backends
def test_a_centre_without_content_outshines_nobody(backend):
    """A centre with z_c = k_c = 0 at a logit of +480 adds nothing, yet has gradients, so that it can be trained."""
    query, key, value = (tensor.float() for tensor in qkv(backend))
    state = a_state(backend, feature_map="taylor1", centers=2, dtype=torch.float32)
    z, k, centers = state.z.clone(), state.k.clone(), state.centers.clone()
    z[:, 1] = k[:, 1] = 0
    query = query.abs() * 8
    centers[:, 1] = 60
    alone = PrefixState(z[:, :1], k[:, :1], "taylor1", centers=centers[:, :1])
    both = PrefixState(z, k, "taylor1", centers=centers)
    expected, expected_lse = ntk_attention(query, key, value, alone, return_lse=True, backend=backend)
    out, lse = ntk_attention(query, key, value, both, return_lse=True, backend=backend)
    torch.testing.assert_close(lse, expected_lse)
    torch.testing.assert_close(out, expected)


@all_backends
@pytest.mark.parametrize("above", [5.0, 120.0])  # e^120: more than float32 can hold
def test_a_centre_of_values_alone_hides_no_mass(above, backend):
    """With k_c = 0 and z_c not, the mass of the others stays, however much larger the weight of this centre."""
    query, key, value = (tensor.float() for tensor in qkv(backend))
    tensors = a_state(backend, feature_map="taylor1", centers=2, log_scale=True, dtype=torch.float32).tensors()
    tensors["k"][:, 1] = 0
    tensors["log_scale"][:, 1] += above
    state = PrefixState(**tensors, feature_map="taylor1")
    out, lse = ntk_attention(query, key, value, state, return_lse=True, backend=backend)
    double = PrefixState(**{name: tensor.double() for name, tensor in tensors.items()}, feature_map="taylor1")
    expected, expected_lse = ntk_attention(
        query.double(), key.double(), value.double(), double, return_lse=True, backend="reference"
    )  # fmt: skip
    torch.testing.assert_close(lse, expected_lse.float())
    if above < 40:
        torch.testing.assert_close(out, expected.float(), rtol=1e-4, atol=1e-4)
    assert out.isfinite().all()


@all_backends
@pytest.mark.parametrize("bounded_by", ["keys", "rows"])
def test_a_centre_of_values_alone_keeps_them(bounded_by, backend):
    """With k_c = 0, its weight e^-1 in the output is bounded by keys or rows, not by the other centres, 300 below."""
    query, key, value = (tensor.float() for tensor in qkv(backend))
    tensors = a_state(backend, feature_map="taylor1", centers=2, log_scale=True, dtype=torch.float32).tensors()
    tensors["k"][:, 0] = 0
    tensors["centers"][:, 0] = key[0, :, 0] = 0
    tensors["log_scale"][:] = torch.tensor([299.0, 0.0])
    options = {"attn_mask": torch.zeros(21, 21).index_fill(1, torch.tensor(0), 300.0)}  # the score of key 0 on all rows
    if bounded_by == "rows":
        options = {}
        tensors |= {"keys": torch.zeros(2, 1, 8), "values": value[0, :, :1], "bias": torch.full((2, 1), 300.0)}
    leaves = [query, key, value, *tensors.values()]
    grad_out, results = torch.randn(2, 4, 21, 8), []
    for leaves_, backend_ in ((leaves, backend), ([tensor.double() for tensor in leaves], "reference")):
        leaves_ = [tensor.clone().requires_grad_() for tensor in leaves_]
        state = PrefixState(**dict(zip(tensors, leaves_[3:], strict=True)), feature_map="taylor1")
        mask = {name: mask.to(leaves_[0].dtype) for name, mask in options.items()}
        out, lse = ntk_attention(*leaves_[:3], state, **mask, return_lse=True, backend=backend_)
        results.append([out, lse, *torch.autograd.grad(out, leaves_, grad_out.to(out))])
    only_keys = ntk_attention(query, key, value, **options, backend=backend)
    assert (results[1][0] - only_keys).abs().max() > 0.1, "the centre adds nothing that could be lost"
    for name, ours, expected in zip(["out", "lse", "query", "key", "value", *tensors], *results, strict=True):
        if name != "k":  # its gradient is cut off in the reference
            torch.testing.assert_close(ours, expected.float(), rtol=5e-4, atol=5e-4, msg=f"gradient of {name}")


@all_backends
@pytest.mark.parametrize("scale", [1e-46, -1e-46, 1e-60])
def test_a_scale_that_float32_cannot_hold_is_zero(scale, backend):
    """PyTorch's ops hide keys by -inf and then multiply by it: 0 · -inf = NaN."""
    query, key, value = (tensor.float().requires_grad_() for tensor in qkv(backend))
    results = []
    for scale_ in (scale, 0.0):
        out = ntk_attention(query, key, value, is_causal=True, scale=scale_, backend=backend)
        results.append([out, *torch.autograd.grad(out.sum(), (query, key, value))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@triton_only
@pytest.mark.parametrize("softcap", [1e20, 3e38])
def test_a_softcap_beyond_all_scores_changes_nothing(softcap):
    query, key, value = (tensor.requires_grad_() for tensor in qkv("triton"))
    results = []
    for options in ({"softcap": softcap}, {}):
        out = ntk_attention(query, key, value, **options, backend="triton")
        results.append([out, *torch.autograd.grad(out.sum(), (query, key, value))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@all_backends
def test_a_zero_state_can_be_trained(backend):
    """z and k of several centres, all 0, get gradients; without them they would stay 0."""
    query, key, value = (tensor.float() for tensor in qkv(backend))
    z, k = torch.zeros(2, 3, 9, 8, requires_grad=True), torch.zeros(2, 3, 9, requires_grad=True)
    out = ntk_attention(query, key, value, PrefixState(z, k, "taylor1", centers=torch.randn(2, 3, 8)), backend=backend)
    assert (torch.autograd.grad(out.sum(), z)[0].abs().amax((0, 2, 3)) > 0).all()


@fused_backends
def test_a_centre_without_content_beside_others_can_be_trained(backend):
    """Its mass is 0 on every row; the gradients of its z and k are not, and are those of the reference."""
    query, key, value = qkv(backend)
    tensors = a_state(backend, feature_map="taylor1", centers=3, log_scale=True).tensors()
    tensors["z"][:, 1] = tensors["k"][:, 1] = 0
    results = []
    for backend_ in (backend, "reference"):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        out = ntk_attention(query, key, value, PrefixState(**leaves, feature_map="taylor1"), backend=backend_)
        results.append(torch.autograd.grad(out.square().sum(), list(leaves.values())))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)
    for name, grad in zip(tensors, results[0], strict=True):
        assert name in ("centers", "log_scale") or (grad[:, 1] != 0).any()


@all_backends
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_a_zero_state_at_logits_of_minus_1000_has_finite_gradients(feature_map, backend):
    """The state's weight e^1000 is cut off, also under the loss scale of mixed-precision training."""
    query = torch.full((1, 2, 64, 8), 30.0)
    key, value = torch.full((1, 2, 64, 8), -12.0), torch.randn(1, 2, 64, 8)
    r = feature_dim(feature_map, 8)
    state = PrefixState(torch.zeros(2, r, 8), torch.zeros(2, r), feature_map)

    def attention(*args, **kwargs):
        return ntk_attention(*args, **kwargs, backend=backend)

    for name, result in run(
        attention, query, key, value, state, {}, grad_out=65536 * torch.randn(1, 2, 64, 8)
    ).items():  # fmt: skip
        assert result.isfinite().all(), name


@all_backends
def test_states_do_not_reach_rows_that_use_none(backend):
    """Not even a NaN of state 0 does, which index -1 might pick by accident."""
    query, key, value = qkv(backend)
    stack = PrefixState.stack([a_state(backend, rows=1)] * 2)
    for tensor in stack.tensors().values():
        tensor[0] = math.nan
    out, lse = ntk_attention(
        query, key, value, stack, state_index=torch.tensor([-1, 1]), return_lse=True, backend=backend
    )  # fmt: skip
    expected, expected_lse = ntk_attention(query[:1], key[:1], value[:1], return_lse=True, backend=backend)
    torch.testing.assert_close(out[:1], expected)
    torch.testing.assert_close(lse[:1], expected_lse)
    assert out.isfinite().all()


@fused_backends  # the reference multiplies it by 0
@pytest.mark.parametrize("content", [math.nan, math.inf, 1e38])
@pytest.mark.parametrize("how", ["mask", "additive", "key_stop", "causal"])
def test_what_stands_in_padding_stays_there(content, how, backend):
    """Keys and values hidden from every row, as the unused end of a static cache is, reach neither results nor
    gradients."""
    query, key, value = (tensor.float() for tensor in qkv(backend, seq_k=30))
    options = {
        "mask": {"attn_mask": (torch.arange(30) < 22)[None]},
        "additive": {"attn_mask": torch.zeros(1, 30).masked_fill(torch.arange(30) >= 22, -math.inf)},
        "key_stop": {"key_stop": torch.tensor([22, 22])},
        "causal": {"is_causal": True, "causal_offset": 1},
    }[how]
    state, grad_out = a_state(backend, dtype=torch.float32), torch.randn(2, 4, 21, 8)

    def results(key, value, **options):
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value, state.z, state.k)]
        out = ntk_attention(*leaves[:3], PrefixState(*leaves[3:], "elu"), **options, backend=backend)
        return [out, *torch.autograd.grad(out, leaves, grad_out)]

    expected = results(key[:, :, :22], value[:, :, :22], is_causal=how == "causal")
    key[:, :, 22:] = value[:, :, 22:] = content
    out, grad_query, grad_key, grad_value, *grads = results(key, value, **options)
    assert (grad_key[:, :, 22:] == 0).all() and (grad_value[:, :, 22:] == 0).all()
    ours = [out, grad_query, grad_key[:, :, :22], grad_value[:, :, :22], *grads]
    for result, exact in zip(ours, expected, strict=True):
        torch.testing.assert_close(result, exact)


@all_backends
@pytest.mark.parametrize("content", [math.nan, math.inf])
@pytest.mark.parametrize("seq_k", [1, 5, 21])
def test_nan_query_over_few_keys(seq_k, content, backend):
    query, key, value = (tensor.float() for tensor in qkv(backend, seq_k=seq_k))
    query[0, 1, 3, 2] = content
    key[..., 2] = key[..., 2].abs()  # a score of inf, whose softmax is NaN
    out, lse = ntk_attention(query, key, value, return_lse=True, backend=backend)
    assert out[0, 1, 3].isnan().all()
    assert lse[0, 1, 3].isnan()
    assert out.isnan().sum() == 8


@all_backends
def test_elu_does_not_cancel(backend):
    """φ(-20) is e^-20, not 0."""
    state = PrefixState(torch.full((1, 1, 1), 2.0), torch.ones(1, 1), "elu")
    nothing = torch.zeros(1, 1, 0, 1)
    query = torch.full((1, 1, 1, 1), -20.0)
    out, lse = ntk_attention(query, nothing, nothing, state, return_lse=True, backend=backend)
    assert (out.item(), lse.item()) == (pytest.approx(2), pytest.approx(-20))


@all_backends
@pytest.mark.parametrize("how", ["no_keys", "mask"])
def test_a_state_that_is_switched_off_leaves_empty_rows_empty(how, backend):
    query, key, value = qkv(backend)
    log_scale = torch.tensor([-math.inf, 0.0], dtype=query.dtype)
    state = PrefixState(a_state(backend).z, a_state(backend).k, "elu", log_scale=log_scale)
    options = {"attn_mask": torch.zeros(21, 21, dtype=torch.bool)}
    if how == "no_keys":
        key, value, options = key[:, :, :0], value[:, :, :0], {}
    out, lse = ntk_attention(query, key, value, state, **options, return_lse=True, backend=backend)
    assert (out[:, :2] == 0).all() and (lse[:, :2] == -math.inf).all()
    assert (out[:, 2:] != 0).any() and lse[:, 2:].isfinite().all()


@all_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_finite_masks_for_hidden_keys(dtype, backend):
    """A row of finfo.min instead of -inf weighs its keys equally, as in PyTorch."""
    query, key, value = (tensor.float() for tensor in qkv(backend))
    mask = torch.zeros(21, 21).masked_fill(torch.rand(21, 21) < 0.5, torch.finfo(dtype).min).to(dtype)
    mask[3] = torch.finfo(dtype).min
    out = ntk_attention(query, key, value, attn_mask=mask, backend=backend)
    torch.testing.assert_close(out, sdpa(query, key, value, attn_mask=mask.float()))


BLIND = {  # rows 0 and 1 of every batch row, in three ways
    "offset": {"is_causal": True, "causal_offset": -2},
    "window": {"window": (1, 0), "causal_offset": -2},
    "mask": {"attn_mask": torch.ones(21, 21, dtype=torch.bool).tril(-2)},
    "key range": {"is_causal": True, "key_start": torch.tensor([2, 2]), "key_stop": torch.tensor([21, 20])},
}


@all_backends
@pytest.mark.parametrize("blind", BLIND.values(), ids=BLIND)
@pytest.mark.parametrize(
    "recipe",
    [{"mass": "none", "log_scale": True}, {"feature_map": None, "rows": 2}, None],
    ids=["mass", "rows", "none"],
)
def test_the_gradient_of_an_lse_of_nothing_goes_nowhere(recipe, blind, backend):
    """The lse of a row that sees nothing has no gradient; merging two such parts gives it NaN."""
    leaves, state = [tensor.requires_grad_() for tensor in qkv(backend)], None
    if recipe is not None:
        tensors = a_state(backend, **recipe).tensors()
        for name in tensors.keys() & {"log_scale", "bias"}:
            tensors[name].fill_(-math.inf)
        leaves += [tensor.clone().requires_grad_() for tensor in tensors.values()]
        state = PrefixState(**dict(zip(tensors, leaves[3:], strict=True)), feature_map=recipe.get("feature_map", "elu"))
    out, lse = ntk_attention(*leaves[:3], state, **blind, return_lse=True, backend=backend)
    assert (lse[:, :, :2] == -math.inf).all()
    grad_lse = torch.zeros_like(lse)
    grad_lse[:, :, :2] = math.nan
    for grad in torch.autograd.grad([out, lse], leaves, [torch.ones_like(out), grad_lse]):
        assert grad.isfinite().all()
