"""Conversion fitted to calibration queries: `prefix_to_state(..., query=...)` and its report."""

import math

import pytest
import torch
from fit_cases import DIM, F64, HEADS, STATES, VALUE_DIM, Sample, outshining

from ntk_kernels import PrefixState, ntk_attention, prefix_to_state, reference
from ntk_kernels.conversion import gradient, least_squares, targets
from ntk_kernels.conversion.layout import Layout
from ntk_kernels.conversion.targets import targets_of


@pytest.mark.parametrize("method", ["least_squares", "gradient"])
@pytest.mark.parametrize("args, options", STATES.values(), ids=STATES)
def test_the_report_is_true(args, options, method):
    """Its errors are those that the reference finds on the held-out inputs, and the fit is the better one."""
    sample = Sample()
    state, report = sample.convert(*args, **options, method=method)
    held_out = slice(3, None)  # the last quarter
    torch.testing.assert_close(report.error.double(), sample.errors(state, held_out), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(report.no_prefix_error.double(), sample.errors(None, held_out), rtol=1e-4, atol=1e-6)
    if "num_rows" not in options:
        before, again = sample.convert(*args, **options, method="closed_form")
        errors = sample.errors(before, held_out)
        torch.testing.assert_close(report.closed_form_error.double(), errors, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(again.error, report.closed_form_error)
    assert (report.error < report.closed_form_error).all()
    assert report.method == method
    assert report.held_out_queries == 64 * 2
    features = {None: 0, "elu": 8, "taylor1": 9 * (options.get("centers") or 1), "taylor2": 45}[args[0]]
    rows = options.get("num_rows", 0) + options.get("keep", 0)
    assert report.rows_per_head == features + rows
    assert report.break_even == features / 2 + rows
    assert report.kept_rows == options.get("keep", 0)
    assert report.state_bytes == state.nbytes
    assert report.prefix_bytes == 400 * 14 * 8 * HEADS


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
    """However few queries are looked at together, the systems are the same."""
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
    """Steps far too long: head by head what it started from, not what it ended with."""
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
    """Logits of ±1000: the fit stays finite and is no worse than the closed form."""
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
    """A prefix of few different rows, each many times."""
    sample = Sample()
    sample.prefix_key = sample.prefix_key[:, :7].repeat(1, 40, 1)
    sample.prefix_value = sample.prefix_value[:, :7].repeat(1, 40, 1)
    state, report = sample.convert(num_rows=7, method="least_squares")
    assert report.error.max() < 1e-6
    torch.testing.assert_close(state.bias.exp(), torch.full((HEADS, 7), 40.0, dtype=F64), rtol=1e-4, atol=0)


def test_a_sink_is_kept():
    """One row with most of the attention, whose value is small: kept exactly, in every head its own."""
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
    """No more rows in the prefix than the state may have: they stay as they are."""
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
    """Whatever stands beside it, in the conventions of FlashAttention and of math attention."""
    sample = Sample()
    out, lse = (tensor.clone() for tensor in sample.attention)
    out[:, :, :3], lse[:, :, :3] = 0, -math.inf
    expected, expected_report = sample.convert(num_rows=8, attention=(out, lse))
    for content, mark in ((math.nan, -math.inf), (0.0, math.inf), (math.inf, math.inf)):
        out[:, :, :3], lse[:, :, :3] = content, mark
        state, report = sample.convert(num_rows=8, attention=(out, lse))
        assert torch.equal(report.error, expected_report.error)
        assert torch.equal(state.values, expected.values)


@pytest.mark.parametrize("args, options", STATES.values(), ids=STATES)
def test_numbers_of_queries(args, options, monkeypatch):
    """A descent needs one for each of its unknowns, over the number of values; least squares one for each term."""
    sample = Sample()
    monkeypatch.setattr(gradient, "_STEPS", 1)
    state = sample.convert(*args, **options | {"keep": 0}, return_report=False)
    layout = Layout(args[0], options.get("centers", "mean"), options.get("num_rows", 0), options.get("keep", 0))
    unknowns = sum(tensor[0].numel() for tensor in state.tensors().values())
    assert layout.needed_queries("gradient", DIM, VALUE_DIM) == math.ceil(unknowns / VALUE_DIM)
    terms = state.num_rows + (0 if state.k is None else state.k[0].numel())
    assert layout.needed_queries("least_squares", DIM, VALUE_DIM) == terms
    assert layout.needed_queries("closed_form", DIM, VALUE_DIM) == 0


def test_too_few_queries_are_refused_at_once(monkeypatch):
    """Before the exact attention, which may take minutes; for a budget by what needs most."""
    sample = Sample()
    monkeypatch.setattr(targets, "ntk_attention", lambda *_, **__: 1 / 0)
    for options in ({"num_rows": 300}, {"budget": 300}):
        with pytest.raises(
            ValueError, match=r"`query` must give each state head at least 1,000 queries to fit 300 feat"
        ):
            sample.convert(**options)
    with pytest.raises(ZeroDivisionError):
        sample.convert(num_rows=8)


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
    changed.query[:, :, 150:] *= 1.5  # held out: not fitted to
    changed.attention = ntk_attention(changed.query, changed.key, changed.value, is_causal=True, return_lse=True)
    other, other_report = changed.convert(num_rows=8, method="least_squares")
    assert not torch.equal(report.error, other_report.error)
    if report.ridge == other_report.ridge:
        assert torch.equal(state.values, other.values)


def test_ridge_regression_by_another_way(monkeypatch):
    """One ridge, features only: the solution of the two stacked least-squares systems by QR."""
    monkeypatch.setattr(least_squares, "_RIDGES", (1e-3,))
    sample = Sample()
    closed, _ = sample.convert("taylor1", method="closed_form")
    state, report = sample.convert("taylor1", method="least_squares")
    assert report.ridge == [1e-3, 1e-3]
    exact = targets_of(
        sample.query, sample.prefix_key, sample.prefix_value, sample.attention, DIM**-0.5
    ).first(384)  # fmt: skip
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
    """Of the closed form and three more: one that fails for a query of the fit, the best, one for queries held out."""
    held_out, fitted = [0.4, 0.2, 0.3, 0.5], [0.5, 0.9, 0.3, 0.1]
    judged = least_squares._judged(held_out, fitted, held_out[0])
    assert judged[:3] == [0.5, 0.9, 0.3]
    assert math.isnan(judged[3])
    assert least_squares._least(judged) == 2


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


def test_the_report_as_text():
    _, report = Sample().convert("taylor1", num_rows=12, keep=2)
    text = str(report)
    assert "relative error on 128 held-out queries a head: median 0." in text
    assert "23 rows a head (2 of the prefix kept exactly)" in text
    assert "do not compress" not in text
    bad = type(report)(**{**vars(report), "error": torch.tensor([0.02, 0.91])})
    assert bad.incompressible_heads == [1]
    assert "heads that do not compress: 1 (0.91)" in str(bad)


def test_nothing_is_recorded_for_autograd():
    sample = Sample()
    sample.prefix_key.requires_grad_()
    state, _ = sample.convert(num_rows=4)
    assert not any(tensor.requires_grad for tensor in state.tensors().values())
    closed = prefix_to_state(sample.prefix_key, sample.prefix_value, None, num_rows=4)
    closed.keys.sum().backward()
    torch.testing.assert_close(sample.prefix_key.grad.sum(1), torch.full((HEADS, DIM), 4.0, dtype=F64))


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
        "centres of taylor2": ({"feature_map": "taylor2", "centers": 2}, "`centers` must be at most 1 with feature_map='taylor2', got 2"),
        "given centres of elu": ({"feature_map": "elu", "centers": torch.zeros(2, 3, 8)}, "`centers` must hold one centre, or several with 'taylor1', got 3 with 'elu'"),
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


def test_result_is_a_state():
    assert isinstance(Sample().convert(num_rows=3, return_report=False), PrefixState)


@pytest.mark.parametrize("options", [{"num_rows": 8}, {"feature_map": "taylor1", "centers": 2}], ids=str)
@pytest.mark.parametrize("spread", [6.0, 16.0, 100.0])
def test_terms_that_no_query_sees_stay_finite(spread, options):
    """Any value of such a row would do for the queries; it must fit into the dtype of the state all the same."""
    sample = outshining(spread)
    state, report = sample.convert(**options, method="least_squares")
    values = [tensor for name, tensor in state.tensors().items() if name in ("z", "k", "values")]
    assert all(tensor.abs().max() < 1e10 for tensor in values)
    assert (report.error <= report.closed_form_error + 1e-6).all()
    torch.testing.assert_close(report.error, sample.errors(state, slice(3, None)).float(), rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("method", ["closed_form", "least_squares", "gradient"])
def test_the_report_is_true_where_the_mass_is_cut_off(method):
    """Features around 0 give many of these queries a mass below 0: the op then keeps their numerator."""
    torch.manual_seed(0)
    sample = Sample(rows=1)
    sample.prefix_key = 1.5 * torch.randn(HEADS, 100, DIM, dtype=F64) + 0.5
    sample.prefix_value = torch.randn(HEADS, 100, VALUE_DIM, dtype=F64) + 1
    sample.query = 1.5 * torch.randn(4, 2 * HEADS, 64, DIM, dtype=F64)
    sample.attention = ntk_attention(sample.query, sample.key, sample.value, is_causal=True, return_lse=True)
    state, report = sample.convert("taylor1", centers=None, method=method)
    torch.testing.assert_close(report.error.double(), sample.errors(state, slice(3, None)), rtol=1e-4, atol=1e-6)


def test_the_report_is_true_of_a_prefix_that_outshines_the_input():
    """By so much that 1 - ρ is rounded to 0."""
    sample = outshining(16.0)
    sample.prefix_key[:, 0] *= 4
    state, report = sample.convert(num_rows=8, method="closed_form")
    assert (report.prefix_share == 1).any()
    expected = [sample.errors(s, slice(3, None)).float() for s in (state, None)]
    torch.testing.assert_close(report.error, expected[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(report.no_prefix_error, expected[1], rtol=1e-3, atol=1e-5)


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


def test_the_report_of_a_prefix_with_a_gradient():
    sample = Sample()
    sample.prefix_key.requires_grad_()
    state, report = sample.convert("taylor1", keep=2, method="closed_form")
    assert state.z.requires_grad and state.keys.requires_grad
    assert not any(value.requires_grad for value in vars(report).values() if isinstance(value, torch.Tensor))


def test_targets_do_not_copy_the_prefix_for_every_row():
    sample = Sample(dtype=torch.bfloat16)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "ntk_attention", lambda query, key, value, **_: seen.extend([key, value]) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sample.convert(num_rows=8)
    assert [tensor.untyped_storage().nbytes() for tensor in seen] == [4 * HEADS * 400 * dim for dim in (DIM, VALUE_DIM)]
