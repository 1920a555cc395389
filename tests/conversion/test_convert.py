import math

import pytest
import torch
from oracle import assert_as_accurate

from ntk_kernels import FEATURE_MAPS, PrefixState, ntk_attention, prefix_to_state, reference
from ntk_kernels.backends import centers as backend_centers

F64 = torch.float64


def a_prefix(*lead, rows=50, head_dim=6, value_dim=5, dtype=torch.float32, magnitude=1.0):
    return magnitude * torch.randn(*lead, rows, head_dim, dtype=dtype), torch.randn(*lead, rows, value_dim, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
@pytest.mark.parametrize("lead", [(3,), (2, 3)], ids=["single", "stack"])
@pytest.mark.parametrize(
    "feature_map, centers", [*((name, None) for name in FEATURE_MAPS), *((name, 1) for name in FEATURE_MAPS),
                             ("taylor1", 4)]
)  # fmt: skip
def test_is_the_reference_s(feature_map, centers, lead, dtype):
    keys, values = a_prefix(*lead, dtype=dtype)
    centers = None if centers is None else torch.randn(*lead, centers, 6).to(dtype)
    state = prefix_to_state(keys, values, feature_map, centers=centers, scale=0.3, feature_scale=0.7)
    accumulation = F64 if dtype == F64 else torch.float32

    def by_reference(dtype):
        tensors = [None if tensor is None else tensor.to(dtype) for tensor in (keys, values, centers)]
        return reference.prefix_to_state(
            *tensors[:2], feature_map, centers=tensors[2], scale=0.3, feature_scale=0.7
        )  # fmt: skip

    assert state.feature_scale == 0.7
    exact, eager = by_reference(F64), by_reference(torch.float32)
    for name, expected in exact.items():
        ours = getattr(state, name)
        assert ours.dtype == accumulation
        assert_as_accurate(name, ours, eager[name], expected, accumulation)


def test_mean_is_one_centre_at_the_mean():
    keys, values = a_prefix(3, dtype=F64)
    given = prefix_to_state(keys, values, centers=keys.mean(-2, keepdim=True))
    for name, tensor in prefix_to_state(keys, values).tensors().items():
        torch.testing.assert_close(tensor, given.tensors()[name])


def error_of(state, keys, values):
    """Returns the relative error against exact prefix attention, and that of leaving the prefix out."""
    generator = torch.Generator().manual_seed(5)
    query = torch.randn(1, 4, 7, 6, dtype=F64, generator=generator)
    key, value = (torch.randn(1, 2, 9, dim, dtype=F64, generator=generator) for dim in (6, 5))
    exact = reference.prefix_attention(query, key, value, keys, values, is_causal=True)
    ours, without = (ntk_attention(query, key, value, s, is_causal=True) for s in (state, None))
    return (ours - exact).norm() / exact.norm(), (without - exact).norm() / exact.norm()


@pytest.mark.parametrize("feature_map, order", [("taylor1", 1), ("taylor2", 2)])
@pytest.mark.parametrize("centers", [None, "mean"])
def test_error_has_the_order_of_the_expansion(feature_map, order, centers):
    """With keys half as far from the centre, the error is 2^(order + 1) times smaller."""
    keys, values = a_prefix(2, rows=320, dtype=F64)
    errors = [
        error_of(prefix_to_state(size * keys, values, feature_map, centers=centers), size * keys, values)
        for size in (0.1, 0.05)
    ]
    (coarse, without), (fine, _) = errors
    assert coarse < 0.02 * without
    assert coarse / fine == pytest.approx(2 ** (order + 1), rel=0.1)


def test_centres_make_large_keys_accurate():
    keys, values = a_prefix(2, rows=320, dtype=F64, magnitude=0.1)
    keys = keys + 2 * torch.randn(2, 16, 6, dtype=F64).repeat(1, 20, 1)
    error, without = error_of(prefix_to_state(keys, values, centers=16), keys, values)
    around_mean, _ = error_of(prefix_to_state(keys, values), keys, values)
    assert error < 0.02 < 0.2 < around_mean
    assert without > 0.5


def test_feature_scale_cancels_in_the_taylor_maps():
    """φ(a·q)·φ(scale/a·k) does not depend on a, so OPT's pre-scaled queries (scale 1) give the same state's effect."""
    keys, values = a_prefix(2, dtype=F64)
    query, key, value = torch.randn(3, 1, 2, 7, 6, dtype=F64)
    value = value[..., :5]
    for feature_map in ("taylor1", "taylor2"):
        a = prefix_to_state(keys, values, feature_map, scale=0.2)
        b = prefix_to_state(keys, values, feature_map, scale=0.2, feature_scale=1.7)
        out = [ntk_attention(query, key, value, state, scale=0.2) for state in (a, b)]
        torch.testing.assert_close(*out)


def test_pieces_merge_to_the_whole():
    keys, values = a_prefix(2, dtype=F64)
    centers = torch.randn(2, 4, 6, dtype=F64)
    whole = prefix_to_state(keys, values, centers=centers)
    parts = [prefix_to_state(keys[:, rows], values[:, rows], centers=centers) for rows in (slice(0, 9), slice(9, None))]
    for name, tensor in parts[0].merge(parts[1]).tensors().items():
        torch.testing.assert_close(tensor, whole.tensors()[name])


def test_chunks_give_the_same(monkeypatch):
    keys, values = a_prefix(2, dtype=F64)
    whole = prefix_to_state(keys, values, "taylor2")
    monkeypatch.setattr(backend_centers, "_CHUNK_ELEMENTS", {"cpu": 17 * 28})
    for name, tensor in prefix_to_state(keys, values, "taylor2").tensors().items():
        torch.testing.assert_close(tensor, whole.tensors()[name])


@pytest.mark.parametrize(
    "feature_map, centers",
    [("taylor1", None), ("taylor1", "mean"), ("taylor1", "given"), ("taylor2", None), ("taylor2", "mean"),
     ("elu", None), ("elu", "mean")],
)  # fmt: skip
def test_gradients(feature_map, centers):
    keys, values = (tensor.requires_grad_() for tensor in a_prefix(2, rows=5, head_dim=3, value_dim=2, dtype=F64))
    given = torch.randn(2, 3, 3, dtype=F64) if centers == "given" else centers

    def convert(keys, values):
        state = prefix_to_state(keys, values, feature_map, centers=given)
        return (state.z, state.k) if centers is None else (state.z, state.k, state.centers)

    assert torch.autograd.gradcheck(convert, (keys, values))


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_inference_mode_leaves_nothing_behind(feature_map):
    keys, values = a_prefix(2)
    with torch.inference_mode():
        prefix_to_state(keys, values, feature_map)
    keys.requires_grad_()
    state = prefix_to_state(keys, values, feature_map)
    assert torch.autograd.grad(state.z.square().sum(), keys)[0].abs().sum() > 0


@pytest.mark.parametrize("centers", [None, "mean"])
def test_an_empty_prefix_adds_nothing(centers):
    state = prefix_to_state(*a_prefix(2, rows=0), centers=centers)
    query, key = torch.randn(2, 1, 2, 7, 6)
    value = torch.randn(1, 2, 7, 5)
    assert torch.equal(ntk_attention(query, key, value, state), ntk_attention(query, key, value))
    merged = state.merge(state)
    assert torch.equal(ntk_attention(query, key, value, merged), ntk_attention(query, key, value))


def test_a_million_rows_in_float16():
    """Ten rows, each 100,000 times, give the state of the ten rows counted once with their weight."""
    keys, values = (tensor.to(torch.float16) for tensor in a_prefix(1, rows=10, magnitude=0.2))
    state = prefix_to_state(keys.repeat(1, 100_000, 1), values.repeat(1, 100_000, 1))
    assert state.log_scale.item() == pytest.approx(math.log(1e6))
    few = prefix_to_state(keys, values)
    # float32 sums of a million terms of about 1
    torch.testing.assert_close(state.z, few.z, rtol=0, atol=1e6**0.5 * torch.finfo(torch.float32).eps)
    assert all(tensor.isfinite().all() for tensor in state.to(torch.float16).tensors().values())


def test_k_means_finds_clusters_and_is_seeded():
    spots = torch.randn(8, 6) * 10
    keys = (spots.repeat(40, 1) + 0.01 * torch.randn(320, 6))[None]
    values = torch.randn(1, 320, 5)
    one, same = (prefix_to_state(keys, values, centers=8, seed=3) for _ in range(2))
    assert torch.equal(one.centers, same.centers)
    assert torch.cdist(one.centers[0], spots).amin(-1).max() < 0.1
    torch.testing.assert_close(one.log_scale, torch.full((1, 8), math.log(40)))


def test_k_means_uses_the_seed_and_all_of_the_rows():
    keys, values = a_prefix(1, rows=3 * 256 * 2)
    keys[:, keys.shape[1] // 2 :] += 100
    states = [prefix_to_state(keys, values, centers=2, seed=seed) for seed in range(2)]
    for state in states:
        assert sorted((state.centers[0].mean(-1) > 50).tolist()) == [False, True]
    assert not torch.equal(states[0].centers, states[1].centers)  # other rows were sampled


def test_mean_of_half_precision_keys_is_taken_in_float32():
    keys = (10 + torch.randn(1, 5000, 6)).bfloat16()
    state = prefix_to_state(keys, torch.ones(1, 5000, 1).bfloat16())
    torch.testing.assert_close(state.centers[:, 0].double(), keys.double().mean(1), rtol=1e-6, atol=0)


def test_more_centres_than_clusters():
    keys = torch.ones(1, 20, 6)
    with pytest.warns(Warning, match="distinct clusters"):  # scikit-learn's
        state = prefix_to_state(keys, torch.randn(1, 20, 5), centers=4)
    assert state.log_scale.exp().tolist() == [[pytest.approx(20), 0, 0, 0]]


keys, values = a_prefix(2)
REFUSED = {
    "rank": ((keys[0], values[0]), {}, ValueError, r"`prefix_key` must have shape \[Hs, m, D\] or"),
    "rows": ((keys, values[:, :7]), {}, ValueError, r"`prefix_value` must have shape \[Hs=2, m=50, Dv\], got \[2, 7, 5"),
    "dtype": ((keys, values.double()), {}, ValueError, "`prefix_value` must have the dtype of `prefix_key`"),
    "integers": ((keys.long(), values), {}, TypeError, "`prefix_key` must be float16, bfloat16, float32 or float64, got torch.int64"),
    "map": ((keys, values, "relu"), {}, ValueError, "`feature_map` must be one of"),
    "centers_word": ((keys, values), {"centers": "median"}, ValueError, "`centers` must be 'mean', an int, a tensor or None, got 'median'"),
    "centers_zero": ((keys, values), {"centers": 0}, ValueError, "`centers` must be at least 1, got 0"),
    "centers_many": ((keys, values), {"centers": 51}, ValueError, "at most the number of prefix rows, m=50, got 51"),
    "centers_elu": ((keys, values, "elu"), {"centers": 2}, ValueError, "with feature_map='elu', several go with 'taylor1' only, got C=2"),
    "centers_float": ((keys, values), {"centers": 2.5}, TypeError, "`centers` must be 'mean', an int, a tensor or None"),
    "centers_shape": ((keys, values), {"centers": torch.rand(2, 3, 5)}, ValueError,
                      r"`centers` must have shape \[Hs=2, C, D=6\], got \[2, 3, 5\]"),
    "no_heads": ((keys[:0], values[:0]), {}, ValueError, r"`prefix_key` must have shape \[Hs, m, D\] or .* got \[0, 50, 6\]"),
    "nan": ((keys * math.nan, values), {"centers": 2}, ValueError, "`prefix_key` must be finite"),
    "seed": ((keys, values), {"centers": 2, "seed": -1}, ValueError, "`seed` must be at least 0, got -1"),
    "scale": ((keys, values), {"scale": math.inf}, ValueError, "`scale` must be finite, got inf"),
    "scale_sign": ((keys, values), {"scale": -1.0}, ValueError, "`scale` must be positive, got -1.0"),
    "feature_scale": ((keys, values), {"feature_scale": 0.0}, ValueError, "`feature_scale` must be positive, got 0.0"),
}  # fmt: skip


@pytest.mark.parametrize("arguments, options, error, message", REFUSED.values(), ids=REFUSED)
def test_refuses(arguments, options, error, message):
    with pytest.raises(error, match=message):
        prefix_to_state(*arguments, **options)


def test_autocast_changes_nothing():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = prefix_to_state(keys, values)
    for name, tensor in prefix_to_state(keys, values).tensors().items():
        assert torch.equal(tensor, inside.tensors()[name])


def test_nearest_centre_under_a_large_mean():
    """The mean that all keys share must not cost the digits that tell the centres apart."""
    keys = 300 + torch.randn(1, 2000, 64, dtype=F64)
    centers, values = keys[:, :16].float(), torch.ones(1, 2000, 1)
    expected = torch.cdist(keys[0].float().double(), centers[0].double()).argmin(-1).bincount(minlength=16)
    counts = prefix_to_state(keys.float(), values, centers=centers).log_scale.exp().round()
    assert counts[0].tolist() == expected.tolist()


def test_result_is_a_state():
    assert isinstance(prefix_to_state(keys, values), PrefixState)


def test_centers_are_finer_than_the_keys():
    """Around a large mean, centres in bfloat16 would be off by as much as the keys are apart."""
    generator = torch.Generator().manual_seed(0)
    clusters = 150 + 10 * torch.randn(2, 1, 8, 16, generator=generator)
    keys = (clusters + torch.randn(2, 50, 8, 16, generator=generator)).flatten(1, 2).bfloat16()
    state = prefix_to_state(keys, torch.randn(2, 400, 16, generator=generator).bfloat16(), centers=8)
    assert state.centers.dtype == torch.float32
    assert not torch.equal(state.centers, state.centers.bfloat16().float())


def test_clusters_around_a_large_mean():
    """The nearest centre is found although distances are small compared with the keys' common mean."""
    generator = torch.Generator().manual_seed(0)
    clusters = torch.randn(2, 16, 1, 8, generator=generator)
    keys = 4096 + (clusters + 0.01 * torch.randn(2, 16, 25, 8, generator=generator)).flatten(1, 2)
    state = prefix_to_state(keys, torch.arange(16.0).repeat_interleave(25).expand(2, -1)[..., None], None, num_rows=16)
    assert sorted(state.values[0].flatten().tolist()) == sorted(state.values[1].flatten().tolist()) == list(range(16))
    torch.testing.assert_close(state.bias, torch.full((2, 16), math.log(25)))


def test_centers_that_are_not_finite_are_refused():
    keys, values = torch.randn(2, 2, 20, 8)
    with pytest.raises(ValueError, match=r"`centers` must be finite, got \[nan, .*\]... at index \[1, 0\]"):
        prefix_to_state(keys, values, "taylor1", centers=torch.tensor([0, math.nan]).view(2, 1, 1).expand(2, 1, 8))
