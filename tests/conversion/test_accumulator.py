"""`PrefixAccumulator`: a prefix in chunks gives the state of the whole."""

import math
from dataclasses import replace

import pytest
import torch
from torch import distributed, multiprocessing

from ntk_kernels import PrefixAccumulator, ntk_attention, prefix_to_state, reference

F64 = torch.float64
HEADS, DIM, VALUE_DIM, ROWS = 2, 6, 5, 90
KINDS = {
    "taylor1, mean": ("taylor1", "mean"),
    "taylor2, mean": ("taylor2", "mean"),
    "taylor1, origin": ("taylor1", None),
    "taylor1, centres": ("taylor1", "given"),
    "taylor2, centre": ("taylor2", "one"),
    "elu": ("elu", None),
}


def a_prefix(*lead, rows=ROWS, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys = 3 + torch.randn(*lead, rows, DIM, dtype=F64, generator=generator).cumsum(-2) / 10  # drifting
    return keys.to(dtype), torch.randn(*lead, rows, VALUE_DIM, dtype=F64, generator=generator).to(dtype)


def centers_of(kind, lead=(HEADS,)):
    if kind not in ("given", "one"):
        return kind
    count = 4 if kind == "given" else 1
    return 3 + torch.randn(*lead, count, DIM, generator=torch.Generator().manual_seed(9))


def accumulator(feature_map, centers, **options):
    return PrefixAccumulator(HEADS, DIM, VALUE_DIM, feature_map, centers=centers, **options)


def assert_same(state, expected, rtol=2e-5):
    for name, tensor in expected.tensors().items():
        ours = getattr(state, name).to(tensor.dtype)
        largest = tensor[tensor.isfinite()].abs().max().item()
        torch.testing.assert_close(ours, tensor, rtol=rtol, atol=rtol * largest, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("sizes", [[90], [1, 9, 0, 50, 30], [45, 45]], ids=str)
@pytest.mark.parametrize("feature_map, centers", KINDS.values(), ids=KINDS)
def test_chunks_of_any_size_give_the_whole(feature_map, centers, sizes):
    keys, values = a_prefix(HEADS, dtype=F64)
    centers = centers_of(centers)
    ours = accumulator(feature_map, centers)
    for chunk in zip(keys.split(sizes, 1), values.split(sizes, 1), strict=True):
        ours.update(*chunk)
    expected = prefix_to_state(keys, values, feature_map, centers=centers)
    assert_same(ours.state(F64), expected, rtol=1e-6)  # centres are rounded to float32 on the way
    assert ours.state().z.dtype == torch.float32
    assert ours.count.sum() == HEADS * ROWS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("feature_map, centers", KINDS.values(), ids=KINDS)
def test_half_precision_rows(feature_map, centers, dtype):
    """Weights and signs are applied in float32, not in the dtype of the rows."""
    keys, values = a_prefix(HEADS, dtype=dtype)
    centers = centers_of(centers)
    weights = torch.full((HEADS, ROWS), 1 / 3)
    ours = accumulator(feature_map, centers)
    for _ in range(3):
        ours.update(keys, values, weights)
    ours.update(keys[:, :9], values[:, :9]).subtract(keys[:, :9], values[:, :9])
    expected = prefix_to_state(keys.float(), values.float(), feature_map, centers=centers)
    assert_same(ours.state(), expected, rtol=1e-4)


def test_sums_move_to_a_mean_that_comes_later():
    """The sums are exact to float64, although the first chunk is far from the mean of all."""
    keys, values = a_prefix(HEADS, dtype=F64)
    keys[:, 40:] += 5
    for feature_map in ("taylor1", "taylor2"):
        ours = (
            accumulator(feature_map, "mean").update(keys[:, :40], values[:, :40]).update(keys[:, 40:], values[:, 40:])
        )
        assert_same(ours.state(F64), prefix_to_state(keys, values, feature_map), rtol=1e-12)


@pytest.mark.parametrize("feature_map, centers", KINDS.values(), ids=KINDS)
def test_what_is_subtracted_was_never_there(feature_map, centers):
    keys, values = a_prefix(HEADS)
    centers = centers_of(centers)
    ours = accumulator(feature_map, centers).update(keys, values).subtract(keys[:, 10:60], values[:, 10:60])
    left = [torch.cat([tensor[:, :10], tensor[:, 60:]], dim=1) for tensor in (keys, values)]
    assert_same(ours.state(), prefix_to_state(*left, feature_map, centers=centers), rtol=1e-4)
    ours.subtract(*left)
    key, value = torch.randn(2, 1, HEADS, 7, DIM)
    value = value[..., :VALUE_DIM]
    assert torch.equal(ntk_attention(key, key, value, ours.state()), ntk_attention(key, key, value))
    ours.subtract(keys[:, :1], values[:, :1])
    with pytest.raises(ValueError, match="`subtract` must take away what was added, got -1 rows of a centre"):
        ours.state()


@pytest.mark.parametrize("feature_map, centers", [("taylor1", "mean"), ("taylor1", "given"), ("elu", None)])
def test_weights_that_are_taken_away_in_other_pieces(feature_map, centers):
    """Sums of weights are exact enough to tell an empty prefix from one with a little weight left."""
    keys, values = a_prefix(HEADS, rows=4096)
    weights = torch.rand(HEADS, 4096, generator=torch.Generator().manual_seed(1))
    ours = accumulator(feature_map, centers_of(centers)).update(keys, values, weights)
    for chunk in zip(*(tensor.split(1000, dim=1) for tensor in (keys, values, weights)), strict=True):
        ours.subtract(*chunk)
    assert (ours.state().log_scale == -math.inf).all()
    # In float64 the sums are rounded: less than 1e-12 of all that came and went is nothing.
    keys, values, thirds = keys.double(), values.double(), weights.double() / 3
    ours = accumulator(feature_map, centers_of(centers)).update(keys, values, thirds)
    for chunk in zip(*(tensor.flip(1).split(1000, dim=1) for tensor in (keys, values, thirds)), strict=True):
        ours.subtract(*chunk)
    assert ours._count.any()
    assert (ours.state().log_scale == -math.inf).all()
    keys, values = keys.float(), values.float()
    few = accumulator(feature_map, centers_of(centers)).update(keys, values, torch.full_like(weights, 1e-8))
    torch.testing.assert_close(
        few.state().log_scale.exp().sum(-1), torch.full((HEADS,), 4096e-8) if centers else torch.tensor(HEADS * 4096e-8)
    )


@pytest.mark.parametrize("feature_map", ["taylor1", "taylor2"])
def test_rows_taken_away_before_they_come(feature_map):
    """The count is 0 in between, the sums are not: they move to the new mean."""
    (keys, values), (other_keys, other_values) = (a_prefix(HEADS, rows=10, dtype=F64, seed=seed) for seed in (0, 5))
    other_keys = other_keys + 4
    expected = prefix_to_state(keys, values, feature_map)

    def begun():
        return accumulator(feature_map, "mean").update(keys, values).subtract(other_keys, other_values)

    assert_same(begun().update(other_keys, other_values).state(F64), expected, rtol=1e-6)
    late = accumulator(feature_map, "mean").update(other_keys, other_values)
    assert_same(begun().merge(late).state(F64), expected, rtol=1e-6)


@pytest.mark.parametrize("feature_map, centers", KINDS.values(), ids=KINDS)
def test_merging(feature_map, centers):
    keys, values = a_prefix(HEADS)
    centers = centers_of(centers)
    first, second, none = (accumulator(feature_map, centers) for _ in range(3))
    first.update(keys[:, :30], values[:, :30])
    second.update(keys[:, 30:], values[:, 30:])
    expected = prefix_to_state(keys, values, feature_map, centers=centers)
    assert_same(none.merge(first).merge(second).merge(accumulator(feature_map, centers)).state(), expected, rtol=1e-4)


def test_weights_count_rows():
    keys, values = a_prefix(HEADS, rows=20)
    weights = torch.arange(20.0).expand(HEADS, -1) % 3
    times = weights[0].long()
    repeated = [tensor.repeat_interleave(times, dim=1) for tensor in (keys, values)]
    for feature_map, centers in KINDS.values():
        centers = centers_of(centers)
        ours = accumulator(feature_map, centers).update(keys, values, weights).state()
        assert_same(ours, prefix_to_state(*repeated, feature_map, centers=centers))
    less = accumulator("taylor1", "mean").update(keys, values, weights / 100).state()
    expected = prefix_to_state(*repeated)
    assert_same(less, replace(expected, log_scale=expected.log_scale - math.log(100)))


def test_a_stack():
    keys, values = a_prefix(3, HEADS)
    ours = accumulator("taylor1", "mean", num_states=3)
    for chunk in zip(keys.split(40, 2), values.split(40, 2), strict=True):
        ours.update(*chunk)
    assert_same(ours.state(), prefix_to_state(keys, values), rtol=1e-4)


def test_before_anything_is_added_it_adds_nothing():
    key, value = torch.randn(1, HEADS, 7, DIM), torch.randn(1, HEADS, 7, VALUE_DIM)
    for feature_map, centers in KINDS.values():
        state = accumulator(feature_map, centers_of(centers)).state()
        assert torch.equal(ntk_attention(key, key, value, state), ntk_attention(key, key, value))


def test_a_prefix_of_many_chunks_far_from_the_origin():
    """With float32 keys around 300 in 200 chunks, the error against float64 stays that of the keys' own rounding."""
    generator = torch.Generator().manual_seed(0)
    keys = 300 + torch.randn(1, 20_000, DIM, generator=generator)
    values = torch.randn(1, 20_000, VALUE_DIM, generator=generator)
    ours = PrefixAccumulator(1, DIM, VALUE_DIM)
    for chunk in zip(keys.split(100, 1), values.split(100, 1), strict=True):
        ours.update(*chunk)
    mean = keys.double().mean(1, keepdim=True)
    exact = reference.prefix_to_state(keys.double(), values.double(), "taylor1", centers=mean)
    state = ours.state(F64)
    assert (state.z - exact["z"]).abs().max() < 1e-5
    assert (state.centers - mean).abs().max() < 1e-5


def _process(rank, path, feature_map, centers, results):
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    keys, values = a_prefix(HEADS)
    ours = accumulator(feature_map, centers)
    part = slice(0, 25) if rank == 0 else slice(25, None)
    if feature_map == "elu":
        part = slice(0, None if rank == 0 else 0)  # a process without rows
    ours.update(keys[:, part], values[:, part]).all_reduce()
    torch.save(ours.state().tensors(), f"{results}/{rank}.pt")
    if centers is None:  # once for all: centres that differ
        wrong = accumulator(feature_map, torch.full((HEADS, 1, DIM), float(rank)))
        try:
            wrong.all_reduce()
        except ValueError as error:
            torch.save(str(error), f"{results}/error{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.parametrize("feature_map, centers", [("taylor2", "mean"), ("taylor1", "given"), ("elu", None)], ids=str)
def test_two_processes_give_the_state_of_one(feature_map, centers, tmp_path):
    centers = centers_of(centers)
    arguments = (str(tmp_path / "rendezvous"), feature_map, centers, str(tmp_path))
    multiprocessing.spawn(_process, arguments, nprocs=2)
    expected = prefix_to_state(*a_prefix(HEADS), feature_map, centers=centers)
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, tensor in expected.tensors().items():
        assert torch.equal(states[0][name], states[1][name])
        torch.testing.assert_close(states[0][name], tensor, rtol=1e-4, atol=1e-4 * tensor.abs().max().item())
    if centers is None:
        for rank in range(2):
            error = torch.load(tmp_path / f"error{rank}.pt")
            assert error == "`centers` must be the same in all processes of the group, got different ones"


keys, values = a_prefix(HEADS)
REFUSED = {
    "elu around a mean": (lambda: accumulator("elu", "mean"), ValueError, "`centers` must be a tensor or None with feature_map='elu'"),
    "word": (lambda: accumulator("taylor1", "median"), ValueError, "`centers` must be 'mean', a tensor or None, got 'median'"),
    "number": (lambda: accumulator("taylor1", 16), TypeError, "`centers` must be 'mean', a tensor or None, got int"),
    "centres": (lambda: accumulator("taylor2", torch.zeros(HEADS, 2, DIM)), ValueError, r"`centers` must hold one centre \(C=1\) with feature_map='taylor2', several go with 'taylor1' only, got C=2"),
    "centres' shape": (lambda: accumulator("taylor1", torch.zeros(HEADS, 2, 5)), ValueError, r"`centers` must have shape \[Hs=2, C, D=6\]"),
    "heads": (lambda: accumulator("taylor1", None).update(keys[:1], values[:1]), ValueError, r"`prefix_key` must have shape \[Hs=2, m, D=6\], got \[1, 90, 6\]"),
    "rows": (lambda: accumulator("taylor1", None).update(keys, values[:, 1:]), ValueError, r"`prefix_value` must have shape \[Hs=2, m=90, Dv=5\], got \[2, 89, 5\]"),
    "dtype": (lambda: accumulator("taylor1", None).update(keys, values.double()), ValueError, "`prefix_value` must have the dtype of `prefix_key`, torch.float32, got torch.float64"),
    "weights": (lambda: accumulator("taylor1", None).update(keys, values, torch.ones(3)), ValueError, r"`weights` must have shape \[Hs=2, m=90\], got \[3\]"),
    "device": (lambda: accumulator("taylor1", None).update(keys.to("meta"), values), ValueError, "`prefix_key` must be on the accumulator's device, cpu, got meta"),
    "other kind": (lambda: accumulator("taylor1", None).merge(accumulator("taylor2", None)), ValueError, "`other` must be made with the arguments of this accumulator, .*'taylor1'.*, got .*'taylor2'"),
    "other centres": (lambda: accumulator("taylor1", torch.zeros(HEADS, 1, DIM)).merge(accumulator("taylor1", torch.ones(HEADS, 1, DIM))), ValueError, "`other` must have the centers of this accumulator"),
    "no accumulator": (lambda: accumulator("taylor1", None).merge(keys), TypeError, "`other` must be a PrefixAccumulator, got Tensor"),
}  # fmt: skip


@pytest.mark.parametrize("call, error, message", REFUSED.values(), ids=REFUSED)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_row_that_is_not_finite_is_refused_and_nothing_added():
    ours = accumulator("taylor1", "mean").update(keys, values)
    before = ours.state()
    for name in ("prefix_key", "prefix_value"):
        chunk = {"prefix_key": keys.clone(), "prefix_value": values.clone()}
        chunk[name][1, 7, 2] = math.nan
        with pytest.raises(ValueError, match=rf"`{name}` must be finite, got \[.*\]... at index \[1, 7\]"):
            ours.update(**chunk)
    for name, tensor in before.tensors().items():
        assert torch.equal(tensor, getattr(ours.state(), name))


def test_centers_may_change_in_place_between_updates():
    """The accumulator keeps its own centres: chunks added before the change stay around the old ones."""
    keys, values = a_prefix(HEADS)
    centers = centers_of("given")
    sums = accumulator("taylor1", centers)
    sums.update(keys[:, :50], values[:, :50])
    before = centers.clone()
    centers.zero_()
    sums.update(keys[:, 50:], values[:, 50:])
    assert_same(sums.state(), accumulator("taylor1", before).update(keys, values).state())
