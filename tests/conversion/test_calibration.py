"""Conversion fitted to calibration queries: `prefix_to_state(..., query=...)`."""

import math

import pytest
import torch
from fit_cases import DIM, F64, HEADS, STATES, VALUE_DIM, Sample, outshining

from ntk_kernels import PrefixState, ntk_attention, prefix_to_state, reference
from ntk_kernels.conversion import gradient, least_squares, targets
from ntk_kernels.conversion.targets import targets_of


def test_rows_by_gradient_are_the_default_and_the_best():
    sample = Sample()
    state, report = sample.convert(num_rows=20)
    assert (state.k, state.num_rows, report.method) == (None, 20, "gradient")
    _, same_keys = sample.convert(num_rows=20, method="least_squares")
    _, features = sample.convert("taylor1", centers=2)
    assert (report.error < 0.8 * same_keys.error).all()
    assert (report.error < 0.8 * features.error).all()
    with_centers, _ = sample.convert("taylor1", centers=2)
    assert not torch.equal(with_centers.centers, sample.convert("taylor1", centers=2, method="closed_form")[0].centers)
    assert sample.convert()[0].num_rows == 128


@pytest.mark.parametrize("args, options", STATES.values(), ids=STATES)
def test_least_squares_in_chunks(args, options, monkeypatch):
    """The systems are the same, however few queries are looked at together."""
    sample = Sample()
    whole, _ = sample.convert(*args, **options, method="least_squares")
    monkeypatch.setattr(least_squares, "_CHUNK_WEIGHTS", 700)
    state, _ = sample.convert(*args, **options, method="least_squares")
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(getattr(state, name), tensor, rtol=1e-6, atol=1e-8)


def test_a_descent_is_seeded():
    sample = Sample()
    first, same, other = (sample.convert(num_rows=8, seed=seed, return_report=False) for seed in (3, 3, 4))
    assert all(torch.equal(tensor, getattr(same, name)) for name, tensor in first.tensors().items())
    assert not torch.equal(first.values, other.values)


def test_a_descent_that_finds_nothing_better_leaves_the_closed_form(monkeypatch):
    """After steps that are far too long, each head has its start and not the end of the descent."""
    monkeypatch.setattr(gradient, "_RATE", 1e4)
    monkeypatch.setattr(gradient, "_STEPS", 100)
    sample = Sample()
    state, report = sample.convert("taylor1")
    closed, _ = sample.convert("taylor1", method="closed_form")
    assert torch.equal(report.error, report.closed_form_error)
    assert all(torch.equal(tensor, getattr(state, name)) for name, tensor in closed.tensors().items())


def test_a_head_of_nan_does_not_spoil_the_others():
    sample = Sample()
    expected, _ = sample.convert(num_rows=8)
    sample.prefix_value[1] *= 1e200  # its squares are infinite
    state, report = sample.convert(num_rows=8)
    assert report.error.isnan().tolist() == [False, True]
    torch.testing.assert_close(state.values[0], expected.values[0])
    assert report.incompressible_heads == [1]


def test_huge_logits():
    """With logits of ±1000 the fit stays finite and is no worse than the closed form."""
    sample = Sample()
    sample.query *= 300
    sample.attention = ntk_attention(sample.query, sample.key, sample.value, is_causal=True, return_lse=True)
    for method in ("gradient", "least_squares"):
        state, report = sample.convert(num_rows=12, method=method)
        assert all(tensor.isfinite().all() for tensor in state.tensors().values())
        assert (report.error <= report.closed_form_error).all()


def test_fitted_rows_beat_the_expansion():
    sample = Sample()
    _, closed = sample.convert("taylor1", method="closed_form")
    _, fitted = sample.convert("taylor1", num_rows=20, method="least_squares")
    assert (fitted.error < 0.4 * closed.error).all()


def test_what_a_state_can_hold_it_holds():
    """A prefix of few different rows, each many times, is fitted exactly."""
    sample = Sample()
    sample.prefix_key = sample.prefix_key[:, :7].repeat(1, 40, 1)
    sample.prefix_value = sample.prefix_value[:, :7].repeat(1, 40, 1)
    state, report = sample.convert(num_rows=7, method="least_squares")
    assert report.error.max() < 1e-6
    torch.testing.assert_close(state.bias.exp(), torch.full((HEADS, 7), 40.0, dtype=F64), rtol=1e-4, atol=0)


def test_a_sink_is_kept():
    """A row with most of the attention and a small value is kept exactly, in every head its own."""
    sample = Sample()
    toward = sample.query.unflatten(1, (HEADS, -1)).mean((0, 2, 3))
    sinks = torch.tensor([17, 230])
    for head, sink in enumerate(sinks):
        sample.query.unflatten(1, (HEADS, -1))[:, head] += 3  # all queries look the same way
        sample.prefix_key[head, sink] = 4 + toward[head]
        sample.prefix_value[head, sink] = 0.01
    sample.attention = ntk_attention(sample.query, sample.key, sample.value, is_causal=True, return_lse=True)
    state, report = sample.convert("taylor1", keep=1, method="least_squares")
    for head, sink in enumerate(sinks):
        torch.testing.assert_close(state.keys[head, 0], sample.prefix_key[head, sink])
        torch.testing.assert_close(state.values[head, 0], sample.prefix_value[head, sink])
    assert state.bias is None or (state.bias == 0).all()
    _, without = sample.convert("taylor1", method="least_squares")
    assert (report.error < 0.5 * without.error).all()


@pytest.mark.parametrize("options", [{"keep": 9}, {"num_rows": 9}, {"num_rows": 5, "keep": 4}, {}], ids=str)
def test_keeping_everything(options):
    """A prefix with no more rows than the state may have keeps all of them as they are."""
    sample = Sample(rows=9)
    state, report = sample.convert(**options)
    assert state.num_rows == report.rows_per_head == report.kept_rows == 9
    assert (state.k, state.bias) == (None, None)
    assert report.error.max() < 1e-6
    in_closed_form = prefix_to_state(sample.prefix_key, sample.prefix_value, num_rows=9)
    torch.testing.assert_close(in_closed_form.keys, sample.prefix_key)
    _, report = sample.convert("taylor1", keep=9)
    assert report.rows_per_head == 9 + 9  # the features are there, but hold nothing
    assert report.error.max() < 1e-6


def test_an_infinite_lse_marks_a_query_that_saw_nothing():
    """Its output is ignored, in the conventions of FlashAttention and of math attention."""
    sample = Sample()
    out, lse = (tensor.clone() for tensor in sample.attention)
    out[:, :, :3], lse[:, :, :3] = 0, -math.inf
    expected, expected_report = sample.convert(num_rows=8, attention=(out, lse))
    for content, mark in ((math.nan, -math.inf), (0.0, math.inf), (math.inf, math.inf)):
        out[:, :, :3], lse[:, :, :3] = content, mark
        state, report = sample.convert(num_rows=8, attention=(out, lse))
        assert torch.equal(report.error, expected_report.error)
        assert torch.equal(state.values, expected.values)


def test_without_an_input():
    """The queries see the prefix and nothing else."""
    sample = Sample()
    state, report = sample.convert(num_rows=12, attention=None)
    query, none = sample.query[3:], sample.key[3:, :, :0]
    exact = reference.prefix_attention(query, none, none[..., :VALUE_DIM], sample.prefix_key, sample.prefix_value)
    out = reference.ntk_attention(query, none, none[..., :VALUE_DIM], state)
    errors = [(out - exact)[:, 2 * h : 2 * h + 2].norm() / exact[:, 2 * h : 2 * h + 2].norm() for h in range(HEADS)]
    torch.testing.assert_close(report.error.double(), torch.stack(errors), rtol=1e-4, atol=1e-6)
    assert (report.prefix_share == 1).all()


def test_one_sequence_holds_out_its_last_tokens():
    sample = Sample(batch=1, length=200)
    state, report = sample.convert(num_rows=8, method="least_squares")
    assert report.held_out_queries == 100  # 50 tokens of two heads
    changed = Sample(batch=1, length=200)
    changed.query[:, :, 150:] *= 1.5  # the held-out part
    changed.attention = ntk_attention(changed.query, changed.key, changed.value, is_causal=True, return_lse=True)
    other, other_report = changed.convert(num_rows=8, method="least_squares")
    assert not torch.equal(report.error, other_report.error)
    if report.ridge == other_report.ridge:
        assert torch.equal(state.values, other.values)


def test_ridge_regression_by_another_way(monkeypatch):
    """With one ridge and features only, QR of the two stacked least-squares systems gives the same solution."""
    monkeypatch.setattr(least_squares, "_RIDGES", (1e-3,))
    sample = Sample()
    closed, _ = sample.convert("taylor1", method="closed_form")
    state, report = sample.convert("taylor1", method="least_squares")
    assert report.ridge == [1e-3, 1e-3]
    exact = targets_of(
        sample.query, sample.prefix_key, sample.prefix_value, sample.attention, DIM**-0.5
    ).fitted  # fmt: skip
    for head in range(HEADS):
        center, x = closed.centers[head, 0], exact.query[head]
        weight = (DIM**-0.5 * x @ center + math.log(400) - exact.lse[head]).exp()
        psi = weight[:, None] * torch.cat([torch.ones(384, 1, dtype=F64), x * DIM**-0.25], dim=1)
        ridge = 1e-3**0.5 * torch.diag(psi.square().sum(0).sqrt())

        def solve(right, start, psi=psi, ridge=ridge):
            stacked = (
                torch.cat([psi, ridge]),
                torch.cat([right - psi @ start, torch.zeros(9, right.shape[1], dtype=F64)]),
            )
            return start + torch.linalg.lstsq(*stacked).solution

        share, out = exact.share[head][:, None], exact.out[head]
        k = solve(share, closed.k[head, 0][:, None])
        torch.testing.assert_close(state.k[head, 0], k[:, 0], rtol=1e-6, atol=1e-8)
        mass = (psi @ k).clamp(min=0)
        residual = exact.of_prefix[head] + out * (mass - share)
        factor = 1 / (1 - share + mass)
        weighted_ridge = 1e-3**0.5 * torch.diag((psi * factor).square().sum(0).sqrt())
        plain = solve(residual, closed.z[head, 0])
        weighted = solve(residual * factor, closed.z[head, 0], psi * factor, weighted_ridge)
        assert min((state.z[head, 0] - z).norm() / z.norm() for z in (plain, weighted)) < 1e-7
        assert (plain - weighted).norm() > 1e-3 * plain.norm()


def test_candidates_are_judged_where_they_are_worst():
    """The closed form competes with three candidates: one fails for a query of the fit, one is the best, one fails for
    held-out queries."""
    held_out, fitted = [0.4, 0.2, 0.3, 0.5], [0.5, 0.9, 0.3, 0.1]
    judged = least_squares._larger_errors(held_out, fitted, held_out[0])
    assert judged[:3] == [0.5, 0.9, 0.3]
    assert math.isnan(judged[3])
    assert least_squares._index_of_min(judged) == 2


def test_bounds_hold():
    generator = torch.Generator().manual_seed(0)
    root, right = torch.randn(40, 12, dtype=F64, generator=generator), torch.randn(12, dtype=F64, generator=generator)
    matrix = root.mT @ root
    free = torch.linalg.solve(matrix, right)
    assert torch.allclose(least_squares._solve_bounded(matrix, right, torch.full_like(right, -torch.inf)), free)
    x = least_squares._solve_bounded(matrix, right, torch.zeros_like(right))
    assert (free < 0).any()
    assert (x >= 0).all()
    slope = matrix @ x - right
    assert slope[x > 0].abs().max() < 1e-10
    assert x @ matrix @ x / 2 - right @ x < 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    """States of half-precision prefixes are in float32; a model in bfloat16 loses nothing but its own rounding."""
    state, report = Sample(dtype=dtype).convert(num_rows=12)
    assert {tensor.dtype for tensor in state.tensors().values()} == {torch.float32}
    _, exact = Sample().convert(num_rows=12)
    rounding = torch.finfo(dtype).eps
    assert (report.error < 1.2 * exact.error + 4 * rounding).all()
    sample = Sample()
    query, key, value = (tensor.bfloat16() for tensor in (sample.query, sample.key, sample.value))
    out = ntk_attention(query, key, value, state, is_causal=True).double()
    exact = reference.ntk_attention(
        query.double(), key.double(), value.double(), state.to(F64), is_causal=True
    )  # fmt: skip
    assert (out - exact).norm() / exact.norm() < 0.02


def test_an_empty_prefix_adds_nothing():
    sample = Sample()
    sample.prefix_key, sample.prefix_value = sample.prefix_key[:, :0], sample.prefix_value[:, :0]
    state = sample.convert(return_report=False)
    out = ntk_attention(sample.query, sample.key, sample.value, state, is_causal=True)
    assert torch.equal(out, sample.attention[0])


def test_nothing_is_recorded_for_autograd():
    sample = Sample()
    sample.prefix_key.requires_grad_()
    state, _ = sample.convert(num_rows=4)
    assert not any(tensor.requires_grad for tensor in state.tensors().values())
    closed = prefix_to_state(sample.prefix_key, sample.prefix_value, None, num_rows=4)
    closed.keys.sum().backward()
    torch.testing.assert_close(sample.prefix_key.grad.sum(1), torch.full((HEADS, DIM), 4.0, dtype=F64))


def test_result_is_a_state():
    assert isinstance(Sample().convert(num_rows=3, return_report=False), PrefixState)


@pytest.mark.parametrize("options", [{"num_rows": 8}, {"feature_map": "taylor1", "centers": 2}], ids=str)
@pytest.mark.parametrize("spread", [6.0, 16.0, 100.0])
def test_terms_that_no_query_sees_stay_finite(spread, options):
    """Any value of such a row suits the queries, but it must fit into the dtype of the state."""
    sample = outshining(spread)
    state, report = sample.convert(**options, method="least_squares")
    values = [tensor for name, tensor in state.tensors().items() if name in ("z", "k", "values")]
    assert all(tensor.abs().max() < 1e10 for tensor in values)
    assert (report.error <= report.closed_form_error + 1e-6).all()
    torch.testing.assert_close(report.error, sample.errors(state, slice(3, None)).float(), rtol=0.02, atol=1e-4)


def test_in_inference_mode():
    sample = Sample()
    expected, _ = sample.convert(num_rows=8)
    with torch.inference_mode():
        sample.prefix_key, sample.query = sample.prefix_key.clone(), sample.query.clone()
        state, _ = sample.convert(num_rows=8)
        sample.convert("taylor1", method="closed_form")
    assert all(torch.equal(tensor, getattr(state, name)) for name, tensor in expected.tensors().items())


def test_a_state_is_no_view_of_a_cache():
    sample = Sample(dtype=torch.float32)
    for options in ({"query": None, "attention": None, "return_report": False}, {"return_report": False}):
        sample.prefix_key = torch.randn(HEADS, 50, DIM)[:, :20]
        sample.prefix_value = torch.randn(HEADS, 50, VALUE_DIM)[:, :20]
        state = sample.convert(num_rows=20, **options)
        keys = state.keys.clone()
        sample.prefix_key.zero_()
        assert torch.equal(state.keys, keys)
        assert state.keys.untyped_storage().nbytes() == state.keys.nbytes


def test_targets_do_not_copy_the_prefix_for_every_row():
    sample = Sample(dtype=torch.bfloat16)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "ntk_attention", lambda query, key, value, **_: seen.extend([key, value]) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sample.convert(num_rows=8)
    assert [tensor.untyped_storage().nbytes() for tensor in seen] == [4 * HEADS * 400 * dim for dim in (DIM, VALUE_DIM)]


@pytest.mark.parametrize("hidden", [None, 3])
def test_rows_and_input_in_one_softmax(hidden):
    """The short way for a state of rows gives what the general one does, also for an input or a row of no weight."""
    torch.manual_seed(0)
    keys, values, bias = torch.randn(HEADS, 6, DIM), torch.randn(HEADS, 6, VALUE_DIM), torch.randn(HEADS, 6)
    query, of_input = torch.randn(HEADS, 20, DIM), torch.randn(HEADS, 20, VALUE_DIM)
    lse, log_rest = 50 * torch.randn(HEADS, 20), -torch.rand(HEADS, 20)
    if hidden is not None:
        log_rest[:, hidden], bias[:, hidden], lse[:, hidden] = -torch.inf, -torch.inf, 0.0
    state = PrefixState(keys=keys.double(), values=values.double(), bias=bias.double())
    tensors = [tensor.double() for tensor in (query, lse, of_input, log_rest)]
    expected = gradient._attend(state, *tensors, 0.3)
    torch.testing.assert_close(gradient._attend_rows(state, *tensors, 0.3), expected, rtol=1e-12, atol=1e-12)


def test_a_quarter_is_held_out():
    """To the nearest number, and at least one."""
    assert [targets.num_fitted(number) for number in (2, 4, 6, 27, 100)] == [1, 3, 4, 20, 75]
