"""What must hold whatever the implementation: the identities of the definition."""

import math

import pytest
import torch
from cases import CASES, make_inputs, make_state
from oracle import NAN_STATES, check_nan, run

from ntk_kernels import FEATURE_MAPS, PrefixState, feature_dim, ntk_attention, reference

BACKENDS = ["torch", "reference"] if torch.cuda.is_available() else ["torch", "triton", "reference"]
all_backends = pytest.mark.parametrize("backend", BACKENDS)
F64 = torch.float64


def dtype_of(backend):
    """The widest that a backend computes in."""
    return torch.float32 if backend == "triton" else F64


def qkv(backend, batch=2, heads=4, kv_heads=2, seq_q=21, seq_k=21, dim=8):
    query = torch.randn(batch, heads, seq_q, dim, dtype=dtype_of(backend))
    key, value = torch.randn(2, batch, kv_heads, seq_k, dim, dtype=dtype_of(backend))
    return query, key, value


def a_state(backend, **recipe):
    recipe = {"head_dim": 8, "value_dim": 8, "heads": 2, "dtype": dtype_of(backend)} | recipe
    return make_state(torch.Generator().manual_seed(0), **recipe)


def sdpa(query, key, value, **kwargs):
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True, **kwargs)


@all_backends
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("logits", [1, -1000, 1000])
def test_zero_state_is_sdpa(feature_map, logits, backend):
    query, key, value = qkv(backend)
    if logits != 1:
        query, key = torch.ones_like(query), key + logits / math.sqrt(8)
    r = feature_dim(feature_map, 8)
    zeros = query.new_zeros(2, r, 8)
    state = PrefixState(zeros, zeros[:, :, 0], feature_map)
    rounding = 4 * abs(logits) * torch.finfo(query.dtype).eps  # of logits, which exp takes as they are
    for state_ in (None, state):
        out, lse = ntk_attention(query, key, value, state_, is_causal=True, return_lse=True, backend=backend)
        torch.testing.assert_close(out, sdpa(query, key, value, is_causal=True), rtol=rounding, atol=rounding)
        assert ((lse - logits).abs() < 20).all()


@all_backends
@pytest.mark.parametrize("recipe", [{}, {"feature_map": "taylor1", "centers": 3}, {"feature_map": "taylor2"}])
def test_mixture(recipe, backend):
    """out = (1 - ρ)·softmax_out + ρ·N/M with ρ = M/(A + M)."""
    query, key, value = qkv(backend)
    state = a_state(backend, **recipe)
    none = (query.new_zeros(2, 2, 0, 8),) * 2
    plain, log_a = ntk_attention(query, key, value, is_causal=True, return_lse=True, backend=backend)
    prefix, log_m = ntk_attention(query, *none, state, return_lse=True, backend=backend)
    out = ntk_attention(query, key, value, state, is_causal=True, backend=backend)
    rho = torch.sigmoid(log_m - log_a)[..., None]
    torch.testing.assert_close(out, (1 - rho) * plain + rho * prefix)


@all_backends
def test_elu_is_r_virtual_tokens(backend):
    """Logit log φ_a(q) + log k_a and value Z_a / k_a."""
    query, key, value = qkv(backend, kv_heads=4)
    state = a_state(backend, heads=4)
    phi = reference.elu(query * 8**-0.25)
    scores = torch.cat([phi.log() + state.k.log()[None, :, None, :], query @ key.mT / math.sqrt(8)], dim=-1)
    values = torch.cat([(state.z / state.k[..., None]).expand(2, -1, -1, -1), value], dim=-2)
    out = ntk_attention(query, key, value, state, backend=backend)
    torch.testing.assert_close(out, torch.softmax(scores, -1) @ values)


@all_backends
def test_rows_are_a_prefix(backend):
    query, key, value = qkv(backend)
    state = a_state(backend, feature_map=None, rows=7, bias=False)
    expected = reference.prefix_attention(query, key, value, state.keys, state.values, is_causal=True)
    torch.testing.assert_close(ntk_attention(query, key, value, state, is_causal=True, backend=backend), expected)


@all_backends
def test_rows_without_key_are_sinks(backend):
    """κ = 0, v = 0 and bias b: one more e^b in the denominator."""
    query, key, value = qkv(backend)
    zeros, bias = query.new_zeros(2, 1, 8), torch.tensor([[0.3], [-2.0]], dtype=query.dtype)
    plain, lse = ntk_attention(query, key, value, return_lse=True, backend=backend)
    out = ntk_attention(query, key, value, PrefixState(keys=zeros, values=zeros, bias=bias), backend=backend)
    kept = 1 - torch.sigmoid(bias.repeat_interleave(2, 0)[None] - lse)
    torch.testing.assert_close(out, plain * kept[..., None])


@all_backends
@pytest.mark.parametrize(
    "recipe",
    [{}, {"rank": 2, "rows": 2}, {"feature_map": "taylor1", "centers": 2, "log_scale": True, "rows": 1}],
    ids=["elu", "low_rank", "centres"],
)
def test_merged_state_is_the_sum(recipe, backend):
    """N and M of a merged state are the sums, whether the centres agree or not."""
    query, key, value = qkv(backend, seq_k=0)
    one, other = a_state(backend, **recipe), make_state(torch.Generator().manual_seed(1), head_dim=8, value_dim=8, heads=2,
                                               dtype=dtype_of(backend), **recipe)  # fmt: skip
    (out_1, lse_1), (out_2, lse_2), (out, lse) = (
        ntk_attention(query, key, value, state, return_lse=True, backend=backend)
        for state in (one, other, one.merge(other))
    )
    total = torch.logaddexp(lse_1, lse_2)
    torch.testing.assert_close(lse, total)
    torch.testing.assert_close(out, (lse_1 - total).exp()[..., None] * out_1 + (lse_2 - total).exp()[..., None] * out_2)


@all_backends
def test_one_query_at_a_time_is_the_whole_sequence(backend):
    query, key, value = qkv(backend)
    state = a_state(backend, rows=2)
    whole = ntk_attention(query, key, value, state, is_causal=True, backend=backend)
    for i in range(21):
        row = ntk_attention(
            query[:, :, i : i + 1], key[:, :, : i + 1], value[:, :, : i + 1], state, is_causal=True, backend=backend
        )
        torch.testing.assert_close(row, whole[:, :, i : i + 1])


@all_backends
def test_split_keys_merge_by_lse(backend):
    query, key, value = qkv(backend)
    state = a_state(backend)
    whole, lse = ntk_attention(query, key, value, state, return_lse=True, backend=backend)
    out_1, lse_1 = ntk_attention(query, key[:, :, :9], value[:, :, :9], state, return_lse=True, backend=backend)
    out_2, lse_2 = ntk_attention(query, key[:, :, 9:], value[:, :, 9:], return_lse=True, backend=backend)
    torch.testing.assert_close(torch.logaddexp(lse_1, lse_2), lse)
    torch.testing.assert_close((lse_1 - lse).exp()[..., None] * out_1 + (lse_2 - lse).exp()[..., None] * out_2, whole)


@all_backends
@pytest.mark.parametrize("name", ["index", "index_shared", "index_none"])
def test_mixed_batch_is_each_task_alone(name, backend):
    query, key, value, stack, options = make_inputs(next(case for case in CASES if case.id == name))
    index = options.pop("state_index")
    together = ntk_attention(query, key, value, stack, state_index=index, **options, backend=backend)
    for b, n in enumerate(index.tolist()):
        alone = None
        if n >= 0:
            tensors = {name: tensor[n] for name, tensor in stack.tensors().items()}
            alone = PrefixState(**tensors, feature_map=stack.feature_map)
        rows = slice(b, b + 1)
        out = ntk_attention(query[rows], key[rows], value[rows], alone, **options, backend=backend)
        torch.testing.assert_close(out, together[rows])


@all_backends
@pytest.mark.parametrize("options", [{"is_causal": True}, {"window": (5, 0)}], ids=["causal", "window"])
def test_future_keys_never_influence_a_row(options, backend):
    """Not even through the stabiliser: bit for bit, with logits of 1e8 and values of 1e30 to come."""
    query, key, value = qkv(backend)
    state = a_state(backend, rows=2)

    def attend(key, value):
        leaf = query.clone().requires_grad_()
        out, lse = ntk_attention(leaf, key, value, state, **options, return_lse=True, backend=backend)
        (grad,) = torch.autograd.grad(out[:, :, :11].square().sum(), leaf)
        return out[:, :, :11], lse[:, :, :11], grad[:, :, :11]

    before = attend(key, value)
    later = torch.arange(21)[:, None] > 10
    after = attend(torch.where(later, key * 1e8, key), torch.where(later, value * 1e30, value))
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


@all_backends
def test_the_prefix_is_never_masked(backend):
    query, key, value = qkv(backend)
    state = a_state(backend, rows=2)
    hidden = torch.zeros(21, 21, dtype=torch.bool)
    expected = ntk_attention(query, key[:, :, :0], value[:, :, :0], state, backend=backend)
    for options in ({"attn_mask": hidden}, {"is_causal": True, "causal_offset": -21}):
        torch.testing.assert_close(ntk_attention(query, key, value, state, **options, backend=backend), expected)


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
    """Left padding: row 0 sees nothing and is 0, and what stands in it reaches no other row."""
    query, key, value = (tensor.float() for tensor in qkv(backend))
    visible = torch.ones(2, 1, 21, 21, dtype=torch.bool).tril()
    visible[:, :, :, 0] = False
    out = ntk_attention(query, key, value, attn_mask=visible, backend=backend)
    assert (out[:, :, 0] == 0).all()
    assert out.isfinite().all()


@all_backends
def test_switched_off_parts_add_nothing(backend):
    """log_scale = -inf and bias = -inf: as if the centre or row were not there, with gradients of 0 and no NaN."""
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
    """z_c = k_c = 0 at a logit of +480: as if it were not there. Its gradient is there, though: it may be trained."""
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
    """k_c = 0, z_c not: the mass of the others stays, however much larger the weight of this centre."""
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
def test_a_zero_state_can_be_trained(backend):
    """Zeros everywhere, several centres: z and k must get a gradient, or they stay zeros."""
    query, key, value = (tensor.float() for tensor in qkv(backend))
    z, k = torch.zeros(2, 3, 9, 8, requires_grad=True), torch.zeros(2, 3, 9, requires_grad=True)
    out = ntk_attention(query, key, value, PrefixState(z, k, "taylor1", centers=torch.randn(2, 3, 8)), backend=backend)
    assert (torch.autograd.grad(out.sum(), z)[0].abs().amax((0, 2, 3)) > 0).all()


@pytest.mark.parametrize("backend", BACKENDS[:-1])
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
    """Not even a NaN of state 0, which index -1 might pick by accident."""
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


@pytest.mark.parametrize("backend", BACKENDS[:-1])  # the reference multiplies it by 0
@pytest.mark.parametrize("content", [math.nan, math.inf, 1e38])
@pytest.mark.parametrize("how", ["mask", "additive", "key_stop", "causal"])
def test_what_stands_in_padding_stays_there(content, how, backend):
    """Keys and values that a mask hides from every row, as the unused end of a static cache; gradients too."""
    query, key, value = (tensor.float() for tensor in qkv(backend, seq_k=30))
    options = {
        "mask": {"attn_mask": (torch.arange(30) < 22)[None]},
        "additive": {"attn_mask": torch.zeros(1, 30).masked_fill(torch.arange(30) >= 22, -math.inf)},
        "key_stop": {"key_stop": torch.tensor([22, 22])},
        "causal": {"is_causal": True, "causal_offset": 1},
    }[how]
    state, grad_out = a_state(backend), torch.randn(2, 4, 21, 8)

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
@pytest.mark.parametrize("seq_k", [1, 5, 21])
def test_nan_query_over_few_keys(seq_k, backend):
    query, key, value = (tensor.float() for tensor in qkv(backend, seq_k=seq_k))
    query[0, 1, 3, 2] = math.nan
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
@pytest.mark.parametrize("shift", [45.0, -45.0, 70.0])
def test_log_scale_is_a_factor_of_z_and_k(shift, backend):
    """Where there is mass, e^β (Z, k) is the same state whatever β, forward and backward."""
    query, key, value = qkv(backend)
    state = a_state(backend)
    results = []
    for log_scale in (0.0, shift):
        factor = math.exp(-log_scale)
        inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        scaled = PrefixState(
            state.z * factor, state.k * factor, "elu", log_scale=torch.full((2,), log_scale, dtype=query.dtype)
        )
        out, lse = ntk_attention(*inputs, scaled, return_lse=True, backend=backend)
        results.append((out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), inputs)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3 if query.dtype == torch.float32 else 1e-7, atol=1e-4)


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
    """finfo.min instead of -inf: a row of it weighs its keys equally, as in PyTorch."""
    query, key, value = (tensor.float() for tensor in qkv(backend))
    mask = torch.zeros(21, 21).masked_fill(torch.rand(21, 21) < 0.5, torch.finfo(dtype).min).to(dtype)
    mask[3] = torch.finfo(dtype).min
    out = ntk_attention(query, key, value, attn_mask=mask, backend=backend)
    torch.testing.assert_close(out, sdpa(query, key, value, attn_mask=mask.float()))


@all_backends
def test_index_tensors_of_any_strides(backend):
    query, key, value = qkv(backend)
    bounds = torch.tensor([[0, 5], [2, 17]])
    stack = PrefixState.stack([a_state(backend), a_state(backend, mass="mixed")])
    index = torch.tensor([[1, 9], [0, 9]])[:, 0]
    strided = {"key_start": bounds[:, 0], "key_stop": torch.tensor([15]).expand(2), "state_index": index}
    plain = {name: tensor.contiguous() for name, tensor in strided.items()}
    out = ntk_attention(query, key, value, stack, **strided, backend=backend)
    torch.testing.assert_close(out, ntk_attention(query, key, value, stack, **plain, backend=backend), rtol=0, atol=0)


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
    """Of a row that sees nothing; merging two such parts gives NaN for it."""
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
