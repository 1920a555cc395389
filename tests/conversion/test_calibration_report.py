"""The report of `prefix_to_state`."""

import pytest
import torch
from fit_cases import DIM, F64, HEADS, STATES, VALUE_DIM, Sample, outshining

from ntk_kernels import ntk_attention


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


def test_the_report_as_text():
    _, report = Sample().convert("taylor1", num_rows=12, keep=2)
    text = str(report)
    assert "relative error on 128 held-out queries a head: median 0." in text
    assert "23 rows a head (2 of the prefix kept exactly)" in text
    assert "do not compress" not in text
    bad = type(report)(**{**vars(report), "error": torch.tensor([0.02, 0.91])})
    assert bad.incompressible_heads == [1]
    assert "heads that do not compress: 1 (0.91)" in str(bad)


@pytest.mark.parametrize("method", ["closed_form", "least_squares", "gradient"])
def test_the_report_is_true_where_the_mass_is_cut_off(method):
    """Features around 0 give many of these queries a mass below 0; the op then keeps their numerator."""
    torch.manual_seed(0)
    sample = Sample(rows=1)
    sample.prefix_key = 1.5 * torch.randn(HEADS, 100, DIM, dtype=F64) + 0.5
    sample.prefix_value = torch.randn(HEADS, 100, VALUE_DIM, dtype=F64) + 1
    sample.query = 1.5 * torch.randn(4, 2 * HEADS, 64, DIM, dtype=F64)
    sample.attention = ntk_attention(sample.query, sample.key, sample.value, is_causal=True, return_lse=True)
    state, report = sample.convert("taylor1", centers=None, method=method)
    torch.testing.assert_close(report.error.double(), sample.errors(state, slice(3, None)), rtol=1e-4, atol=1e-6)


def test_the_report_is_true_of_a_prefix_that_outshines_the_input():
    """The prefix has so much of the mass that 1 - ρ is rounded to 0."""
    sample = outshining(16.0)
    sample.prefix_key[:, 0] *= 4
    state, report = sample.convert(num_rows=8, method="closed_form")
    assert (report.prefix_share == 1).any()
    expected = [sample.errors(s, slice(3, None)).float() for s in (state, None)]
    torch.testing.assert_close(report.error, expected[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(report.no_prefix_error, expected[1], rtol=1e-3, atol=1e-5)


def test_the_report_of_a_prefix_with_a_gradient():
    sample = Sample()
    sample.prefix_key.requires_grad_()
    state, report = sample.convert("taylor1", keep=2, method="closed_form")
    assert state.z.requires_grad and state.keys.requires_grad
    assert not any(value.requires_grad for value in vars(report).values() if isinstance(value, torch.Tensor))
