"""The identities of the definition, which hold for every implementation."""

import math

import pytest
import torch
from backends import all_backends
from cases import CASES, make_inputs, make_state
from small_cases import a_state, dtype_of, qkv, sdpa

from ntk_kernels import FEATURE_MAPS, PrefixState, feature_dim, ntk_attention, reference


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
    largest = abs(logits) + 4  # scores scatter by 4 around them; exp takes the rounding of each as it is
    rounding = 4 * largest * torch.finfo(query.dtype).eps
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
    """Token a has the logit log φ_a(q) + log k_a and the value Z_a / k_a."""
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
    """A row with κ = 0, v = 0 and bias b adds e^b to the denominator."""
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
    """Logits of 1e8 and values of 1e30 to come change no bit, not even through the stabiliser."""
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
@pytest.mark.parametrize("shift", [45.0, -45.0, 70.0])
def test_log_scale_is_a_factor_of_z_and_k(shift, backend):
    """If there is mass, e^β (Z, k) is the same state for any β, forward and backward."""
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
def test_index_tensors_of_any_strides(backend):
    query, key, value = qkv(backend)
    bounds = torch.tensor([[0, 5], [2, 17]])
    stack = PrefixState.stack([a_state(backend), a_state(backend, mass="mixed")])
    index = torch.tensor([[1, 9], [0, 9]])[:, 0]
    strided = {"key_start": bounds[:, 0], "key_stop": torch.tensor([15]).expand(2), "state_index": index}
    plain = {name: tensor.contiguous() for name, tensor in strided.items()}
    out = ntk_attention(query, key, value, stack, **strided, backend=backend)
    torch.testing.assert_close(out, ntk_attention(query, key, value, stack, **plain, backend=backend), rtol=0, atol=0)
