"""Calibration that is refused: `prefix_to_state(..., query=...)` with bad input."""

import math

import pytest
import torch
from fit_cases import DIM, STATES, VALUE_DIM, Sample

from ntk_kernels import prefix_to_state
from ntk_kernels.conversion import gradient, targets
from ntk_kernels.conversion.recipe import Recipe


@pytest.mark.parametrize("args, options", STATES.values(), ids=STATES)
def test_numbers_of_queries(args, options, monkeypatch):
    """A descent needs as many queries as it has unknowns, divided by the number of values; least squares needs one for
    each term."""
    sample = Sample()
    monkeypatch.setattr(gradient, "_STEPS", 1)
    state = sample.convert(*args, **options | {"keep": 0}, return_report=False)
    recipe = Recipe(args[0], options.get("centers", "mean"), options.get("num_rows", 0), options.get("keep", 0))
    unknowns = sum(tensor[0].numel() for tensor in state.tensors().values())
    assert recipe.min_queries("gradient", DIM, VALUE_DIM) == math.ceil(unknowns / VALUE_DIM)
    terms = state.num_rows + (0 if state.k is None else state.k[0].numel())
    assert recipe.min_queries("least_squares", DIM, VALUE_DIM) == terms
    assert recipe.min_queries("closed_form", DIM, VALUE_DIM) == 0


def test_too_few_queries_are_refused_at_once(monkeypatch):
    """The error comes before the exact attention, which may take minutes; a budget needs as many as its most demanding
    candidate."""
    sample = Sample()
    monkeypatch.setattr(targets, "ntk_attention", lambda *_, **__: 1 / 0)
    for options in ({"num_rows": 300}, {"budget": 300}):
        with pytest.raises(
            ValueError, match=r"`query` must give each state head at least 1,000 queries to fit 300 feat"
        ):
            sample.convert(**options)
    with pytest.raises(ZeroDivisionError):
        sample.convert(num_rows=8)


def refused():
    sample = Sample(rows=20)
    query, attention = sample.query, sample.attention
    return {
        "few queries": ({"feature_map": "taylor1", "method": "least_squares", "query": query[:1, :, :5], "attention": None}, "`query` must give each state head at least 12 queries to fit 9 features and rows, a quarter of them to be held out, got 10"),
        "few for a descent": ({"num_rows": 8, "query": query[:1, :, :5], "attention": None}, "`query` must give each state head at least 27 queries to fit 8 features and rows by gradient descent, a quarter of them to be held out, got 10"),
        "method": ({"method": "magic"}, "`method` must be one of"),
        "no query": ({"query": None, "attention": None, "return_report": False, "method": "least_squares"}, "`query` must be given with method='least_squares', got None"),
        "report": ({"query": None, "attention": None}, "`return_report` needs calibration queries: `query` must be given, got None"),
        "keep": ({"query": None, "attention": None, "return_report": False, "keep": 1}, "`keep` needs calibration queries"),
        "rows": ({"feature_map": "taylor1", "num_rows": 15, "keep": 6}, "`num_rows` and `keep` must be at most the number of prefix rows together, m=20, got 15 and 6"),
        "no terms": ({"num_rows": 0}, "`num_rows` must be at least 1 with feature_map=None, unless all rows are kept, got 0"),
        "centres of rows": ({"centers": 4}, "`centers` must come with `feature_map`, got 4 and feature_map=None"),
        "rows in closed form": ({"feature_map": "taylor1", "num_rows": 3, "method": "closed_form"}, "`num_rows` must be 0 in closed form with a feature map"),
        "one query": ({"feature_map": "taylor1", "method": "closed_form", "query": query[:1, :2, :1], "attention": None}, "`query` must give each state head at least 2 queries, of which one is held out, got shape [1, 2, 1, 8]"),
        "out elsewhere": ({"attention": (attention[0].to("meta"), attention[1])}, "`attention[0]` must be on the device of `query`, cpu, got meta"),
        "centres beside kept rows": ({"feature_map": "taylor1", "centers": 4, "keep": 18}, "`centers` must be at most the number of prefix rows that are not kept, m=20 less 18, got 4"),
        "heads": ({"query": query[:, :3], "attention": None}, "`query` must have a multiple of Hs=2 heads, got 3"),
        "head dimension": ({"query": query[..., :5], "attention": None}, "`query` must have shape [B, Hq, L, D=8], got [4, 4, 64, 5]"),
        "out": ({"attention": (attention[0][:, :2], attention[1])}, "`attention[0]` must have shape [B=4, Hq=4, L=64, Dv=6], got [4, 2, 64, 6]"),
        "lse": ({"attention": (attention[0], attention[1][..., :3])}, "`attention[1]` must have shape [B=4, Hq=4, L=64], got [4, 4, 3]"),
        "error": ({"error": 0.0}, "`error` must be positive, got 0.0"),
        "error in percent": ({"error": 5.0}, "`error` must be less than 1, the error of giving 0, got 5.0"),
        "error without queries": ({"error": 0.1, "query": None, "attention": None, "return_report": False}, "`error` must come with `query`, got None"),
        "error of a method": ({"error": 0.1, "method": "least_squares"}, "`error` must come with method='gradient', got 'least_squares'"),
        "NaN of the input": ({"attention": (attention[0].clone().index_fill_(2, torch.tensor(5), math.nan), attention[1])}, "`attention[0]` must be finite, got [nan, nan, nan, nan]... at index [0, 0, 5]"),
        "lse of NaN": ({"attention": (attention[0], attention[1].clone().index_fill_(2, torch.tensor(5), math.nan))}, "`attention[1]` must be finite, got [nan]... at index [0, 0, 5]"),
        "error and centres": ({"error": 0.1, "centers": 3}, "`centers` must be 'mean' with `error`, which finds the number of rows, got 3"),
        "error and rows": ({"error": 0.1, "num_rows": 3}, "`num_rows` must be None with `error`, which finds the number of rows, got 3"),
        "error of features": ({"error": 0.1, "feature_map": "elu"}, "`feature_map` must be None with `error`, which finds the number of rows, got 'elu'"),
        "budget": ({"budget": 0}, "`budget` must be at least 1, got 0"),
        "budget without queries": ({"budget": 9, "query": None, "attention": None, "return_report": False}, "`budget` must come with `query`, got None"),
        "budget in closed form": ({"budget": 9, "method": "closed_form"}, "`method` must be 'gradient' or 'least_squares' with `budget`, got 'closed_form'"),
        "budget and map": ({"budget": 9, "feature_map": "elu"}, "`feature_map` must be None with `budget`, which finds what the state is made of, got 'elu'"),
        "budget and centres": ({"budget": 9, "centers": torch.zeros(2, 1, 8)}, "`centers` must be 'mean' with `budget`, which finds what the state is made of, got tensor"),
        "budget and rows": ({"budget": 9, "num_rows": 9}, "`num_rows` must be None with `budget`, which finds what the state is made of, got 9"),
        "budget and no kept rows": ({"budget": 9, "keep": False}, "`keep` must be 0 with `budget`, which finds what the state is made of, got False"),
        "centres on a line": ({"feature_map": "taylor1", "centers": torch.zeros(8)}, "`centers` must have shape [Hs=2, C, D=8], got [8]"),
        "many centres": ({"feature_map": "taylor1", "centers": 1000}, "`centers` must be at most the number of prefix rows, m=20, got 1000"),
        "centres of taylor2": ({"feature_map": "taylor2", "centers": 2}, "`centers` must hold one centre (C=1) with feature_map='taylor2', several go with 'taylor1' only, got C=2"),
        "given centres of elu": ({"feature_map": "elu", "centers": torch.zeros(2, 3, 8)}, "`centers` must hold one centre (C=1) with feature_map='elu', several go with 'taylor1' only, got C=3"),
        "budget and kept rows": ({"budget": 9, "keep": 2}, "`keep` must be 0 with `budget`, which finds what the state is made of, got 2"),
        "budget and error": ({"budget": 9, "error": 0.1}, "`error` must be None with `budget`, which finds what the state is made of, got 0.1"),
        "NaN": ({"query": query.clone().index_fill_(2, torch.tensor(5), math.nan)}, "`query` must be finite, got [nan, nan, nan, nan]... at index [0, 0, 5]"),
    }  # fmt: skip


@pytest.mark.parametrize("case", refused())
def test_refuses(case):
    options, message = refused()[case]
    with pytest.raises(ValueError) as caught:
        Sample(rows=20).convert(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{}, {"feature_map": "taylor1", "centers": 2}, {"centers": None, "feature_map": "elu"}, {"num_rows": 4}],
    ids=str,
)
def test_rows_that_are_not_finite_are_named(options):
    for name in ("prefix_key", "prefix_value"):
        sample = Sample(rows=30)
        getattr(sample, name)[1, 7, 2] = math.inf
        with pytest.raises(ValueError, match=rf"`{name}` must be finite, got \[.*\]... at index \[1, 7\]"):
            prefix_to_state(sample.prefix_key, sample.prefix_value, **options)
        with pytest.raises(ValueError, match=rf"`{name}` must be finite, got \[.*\]... at index \[1, 7\]"):
            sample.convert(**options)


def test_a_pair_is_asked_for():
    sample = Sample(rows=20)
    with pytest.raises(TypeError, match=r"`attention` must be a pair \(out, lse\), got Tensor"):
        sample.convert(attention=sample.attention[0])
