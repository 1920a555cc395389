"""`error=` and `budget=` of prefix_to_state: the candidates and the choice among them."""

import math

import pytest
import torch
from fit_cases import Sample

from ntk_kernels import ntk_attention
from ntk_kernels.conversion import fit, gradient


def test_the_smallest_state_with_an_error(monkeypatch):
    monkeypatch.setattr(gradient, "_STEPS", 150)
    sample = Sample()
    errors = {rows: sample.convert(num_rows=rows)[1].error.mean().item() for rows in (8, 16, 32)}
    assert errors[8] > errors[16] > errors[32]
    state, report = sample.convert(error=(errors[8] + errors[16]) / 2)
    assert report.rows_per_head == 16
    assert report.error.mean().item() == pytest.approx(errors[16])
    state, report = sample.convert(error=(errors[8] + errors[16]) / 2, keep=2)
    assert report.kept_rows == 2
    assert report.error.mean() <= (errors[8] + errors[16]) / 2
    small = Sample(rows=20)
    state, report = small.convert(error=1e-9)  # no fit reaches it: the prefix itself
    assert report.rows_per_head == state.num_rows == report.kept_rows == 20
    assert report.error.max() < 1e-9


def test_a_budget(monkeypatch):
    """All candidates have the size of the budget, and the state is the best of them."""
    monkeypatch.setattr(gradient, "_STEPS", 100)
    sample = Sample()
    state, report = sample.convert(budget=20)
    same_size = {
        "20 rows": sample.convert(num_rows=20),
        "15 rows + 5 kept": sample.convert(num_rows=15, keep=5),
        "taylor1 + 11 rows": sample.convert("taylor1", num_rows=11),
        "taylor1 around 2 centres + 2 rows": sample.convert("taylor1", centers=2, num_rows=2),
        "elu + 12 rows": sample.convert("elu", centers=None, num_rows=12),
    }
    assert report.tried == {name: each.error.mean().item() for name, (_, each) in same_size.items()}
    assert {each.rows_per_head for _, each in same_size.values()} == {20}
    assert all(list(each.tried.values()) == [each.error.mean().item()] for _, each in same_size.values())
    best, expected = same_size[min(report.tried, key=report.tried.get)]
    assert all(torch.equal(tensor, getattr(state, name)) for name, tensor in best.tensors().items())
    assert torch.equal(report.error, expected.error)
    assert f"tried: 20 rows: {report.tried['20 rows']:.3f}, 15 rows + 5 kept: " in str(report)
    assert "tried" not in str(expected)


def test_a_budget_goes_to_what_the_prefix_is_like():
    """Clusters get rows, logits so small that exp is linear get features, and a budget large enough tries every map."""
    sample = Sample()
    state, report = sample.convert(budget=20, method="least_squares")
    assert (state.k, state.num_rows) == (None, 20)
    sample.query /= 100
    sample.attention = ntk_attention(sample.query, sample.key, sample.value, is_causal=True, return_lse=True)
    state, report = sample.convert(budget=9, method="least_squares")
    assert (state.feature_map, state.num_rows) == ("taylor1", 0)
    _, report = sample.convert(budget=45, method="least_squares")
    assert list(report.tried) == [
        "45 rows", "34 rows + 11 kept", "taylor1 + 36 rows", "taylor1 around 2 centres + 27 rows",
        "taylor1 around 5 centres", "elu + 37 rows", "taylor2",
    ]  # fmt: skip


def test_searches_go_by_the_heads_that_are_numbers(monkeypatch):
    monkeypatch.setattr(gradient, "_STEPS", 50)
    sample = Sample(rows=40)
    sample.prefix_value[1] *= 1e200  # the squares of its errors are infinite
    state, report = sample.convert(error=1e-9)
    assert state.num_rows == report.kept_rows == 40
    _, report = sample.convert(budget=20)
    assert report.error[1].isnan()
    assert report.error[0] == pytest.approx(min(report.tried.values()))
    assert len(set(report.tried.values())) == 5


@pytest.mark.parametrize("failing", ["features", "rows"])
def test_a_candidate_without_an_error_replaces_nothing(monkeypatch, failing):
    """Candidates whose error is NaN in every head lose to the best of the others, in any order."""
    sample = Sample()
    judge = fit.held_out_errors

    def fails(state):
        return state is not None and (state.k is None) == (failing == "rows")

    monkeypatch.setattr(
        fit, "held_out_errors", lambda state, *rest: judge(state, *rest) * (float("nan") if fails(state) else 1)
    )
    state, report = sample.convert(budget=20, method="least_squares")
    assert not fails(state)
    numbers = [error for error in report.tried.values() if not math.isnan(error)]
    assert 0 < len(numbers) < len(report.tried)
    assert report.error.mean().item() == pytest.approx(min(numbers))


def test_a_budget_for_all_rows():
    sample = Sample(rows=20)
    for options in ({"budget": 20}, {"keep": 20, "query": sample.query[:1, :, :2], "attention": None}):
        state, report = sample.convert(**options)
        assert (state.num_rows, report.kept_rows, list(report.tried)) == (20, 20, ["20 kept"])
        assert report.error.max() < 1e-6
        assert torch.equal(state.keys, sample.prefix_key)
    _, report = sample.convert("taylor1", num_rows=5, keep=15, method="least_squares")
    assert (report.rows_per_head, report.kept_rows) == (9 + 20, 15)


def test_an_error_is_found_in_short_prefixes_too(monkeypatch):
    monkeypatch.setattr(gradient, "_STEPS", 50)
    sample = Sample(rows=100)
    state, report = sample.convert(error=0.9)
    assert (state.num_rows, report.kept_rows) == (8, 0)
    state, report = sample.convert(error=1e-9)
    assert (state.num_rows, report.kept_rows) == (100, 100)


@pytest.mark.filterwarnings("ignore:prefix_to_state")
def test_an_error_that_more_queries_would_reach(monkeypatch):
    """Sizes that cannot be fitted to so few queries are left out; the prefix itself is taken instead."""
    monkeypatch.setattr(gradient, "_STEPS", 50)
    sample = Sample(batch=1, length=60)
    state, report = sample.convert(error=1e-9)
    assert state.num_rows == report.kept_rows == 400
    with pytest.raises(ValueError, match="`query` must give each state head at least"):
        sample.convert(num_rows=64)
    # 60 tokens of two heads, 90 of the queries fitted: 8 * 15 / 6 = 20 are enough for 8 rows, as are 80 for 32.
    with pytest.warns(
        UserWarning, match=r"120 queries of a state head are too few to fit 64: the state is the prefix its"
    ):
        _, report = sample.convert(error=1e-9)
    assert list(report.tried) == ["8 rows", "16 rows", "32 rows", "400 kept"]
    _, report = Sample(batch=1, length=53).convert(error=1e-9)  # 106, 80 of them fitted
    assert list(report.tried) == ["8 rows", "16 rows", "32 rows", "400 kept"]
    _, report = Sample(batch=1, length=52).convert(error=1e-9)  # 104 and 78
    assert list(report.tried) == ["8 rows", "16 rows", "400 kept"]


def test_a_prefix_that_no_fit_reaches_is_no_view_either(monkeypatch):
    monkeypatch.setattr(gradient, "_STEPS", 2)
    sample = Sample(rows=20, dtype=torch.float32)
    state = sample.convert(error=1e-9, return_report=False)
    assert torch.equal(state.keys, sample.prefix_key)
    assert state.keys.data_ptr() != sample.prefix_key.data_ptr()
