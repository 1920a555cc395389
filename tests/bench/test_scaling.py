"""`bench scaling` on small sizes, against independent computations."""

import json
import math

import pytest
import torch
from plots import is_png

from bench.__main__ import main
from bench.quality import scaling
from ntk_kernels import reference


def function_by_hand(rows, signs, inputs):
    """Computes F of the module's docstring, one input at a time."""
    outs = []
    for x in inputs:
        weights = (rows @ x).exp() / (rows @ x).exp().sum()
        outs.append(math.sqrt(len(rows)) * sum(w * a * row for w, a, row in zip(weights, signs, rows, strict=True)))
    return torch.stack(outs)


def test_scaling(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["scaling", "--device", "cpu", "--max-rows", "16", "--inputs", "3", "--steps", "30", "--draws", "2", "--out", str(tmp_path)])  # fmt: skip
    printed = capsys.readouterr().out
    assert "slope, m ≥ 8" in printed
    assert "taylor2 state" in printed
    assert is_png(tmp_path / "scaling.png")
    figures = json.loads((tmp_path / "scaling.json").read_text())
    assert figures["prefix_rows"] == [2, 4, 8, 16]
    assert figures["states"]["elu"]["parameters"] == 8 * 9
    assert figures["states"]["taylor2"]["parameters"] == (1 + 8 + 36) * 9
    assert len((tmp_path / "scaling.csv").read_text().splitlines()) == 1 + 4 * 2 + 2

    inputs, targets = scaling.task(3, "cpu")
    torch.testing.assert_close(inputs.norm(dim=1), torch.ones(3, dtype=torch.float64))
    rows, signs = scaling.draw_prefixes(8, 2, "cpu")
    trained = rows[1].clone().requires_grad_()
    for _ in range(30):
        loss = 0.5 * (function_by_hand(trained, signs, inputs) - targets).square().sum()
        (grad,) = torch.autograd.grad(loss, trained)
        trained = (trained - figures["settings"]["step_size"] * grad).detach().requires_grad_()
    loss = (function_by_hand(trained, signs, inputs) - targets).square().sum() / targets.square().sum()
    assert figures["final_loss"][2][1] == pytest.approx(loss.item())
    moved = (trained - rows[1]).detach()
    assert figures["movement"][2][1] == pytest.approx((moved.norm() / rows[1].norm()).item())
    largest = moved.norm(dim=1).max() / rows[1].square().sum(1).mean().sqrt()
    assert figures["row_movement"][2][1] == pytest.approx(largest.item())
    kernels = [kernel_by_autograd(w.detach(), signs, inputs) for w in (rows[1], trained)]
    assert figures["kernel_change"][2][1] == pytest.approx(
        ((kernels[1] - kernels[0]).norm() / kernels[0].norm()).item()
    )

    longest, signs = scaling.draw_prefixes(16, 2, "cpu")
    largest = torch.linalg.eigvalsh(kernel_by_autograd(longest[0], signs, inputs))[-1].item()
    assert figures["settings"]["step_size"] == pytest.approx(0.5 / largest)


def kernel_by_autograd(rows, signs, inputs):
    jacobian = torch.autograd.functional.jacobian(lambda rows: function_by_hand(rows, signs, inputs), rows)
    jacobian = jacobian.reshape(inputs.numel(), rows.numel())
    return jacobian @ jacobian.mT


def test_tangent_kernel(monkeypatch):
    """The kernel is right for rows that are no longer twins, too, for which F is not 0."""
    monkeypatch.setattr(scaling, "_KERNEL_ROWS", 4)
    inputs, _ = scaling.task(3, "cpu")
    rows, signs = scaling.draw_prefixes(6, 1, "cpu")
    for w in (rows[0], rows[0] + 0.3 * torch.randn_like(rows[0])):
        torch.testing.assert_close(scaling.tangent_kernel(w, signs, inputs), kernel_by_autograd(w, signs, inputs))


def test_nothing_moves_in_no_steps():
    inputs, targets = scaling.task(3, "cpu")
    rows, signs = scaling.draw_prefixes(4, 2, "cpu")
    assert scaling.prefix_function(rows, signs, inputs).abs().max() < 1e-14
    figures = scaling.of_prefix(rows, signs, inputs, targets, 0.1, 0)
    for name in scaling.CHANGES:
        assert figures[name] == [0, 0]
    assert figures["final_loss"] == [1, 1]
    assert figures["curve"] == [1]


@pytest.mark.parametrize("feature_map", scaling.STATES)
def test_state_is_trained_by_gradient_descent(feature_map):
    inputs, targets = scaling.task(3, "cpu")
    figures = scaling.of_state(feature_map, 5.0, inputs, targets, 10)
    phi = reference.feature_map(inputs, feature_map)
    k = torch.full(phi.shape[1:], 1 / 8, dtype=phi.dtype) if feature_map == "elu" else torch.eye(phi.shape[1], dtype=phi.dtype)[0]  # fmt: skip
    z = torch.zeros(phi.shape[1], 8, dtype=phi.dtype)
    kernel = 25 * phi @ phi.T / (phi @ k)[:, None] / (phi @ k)  # kernel of Z; k has no derivative where Z = 0
    step = 0.5 / torch.linalg.eigvalsh(kernel)[-1].item()
    assert figures["step_size"] == pytest.approx(step)
    for _ in range(10):
        z.requires_grad_(), k.requires_grad_()
        loss = 0.5 * (5 * (phi @ z) / (phi @ k)[:, None] - targets).square().sum()
        grads = torch.autograd.grad(loss, (z, k))
        z, k = (z - step * grads[0]).detach(), (k - step * grads[1]).detach()
    loss = (5 * (phi @ z) / (phi @ k)[:, None] - targets).square().sum() / targets.square().sum()
    assert figures["final_loss"] == pytest.approx(loss.item())
    assert figures["smallest_mass"] == pytest.approx((phi @ k).min().item())


def test_what_is_made_of_scaling():
    assert scaling.steps_to([1, 0.5, 0.1, 0.2, 0.001]) == [2, 4]
    assert scaling.steps_to([1, 0.5, math.nan]) == [None, None]
    assert scaling.medians([[3, None, 1], [None, None, 1], [math.nan, 5, 4]]) == [3, None, 5]
    lengths = [2, 4, 8, 16]
    assert scaling.slope(lengths, [9, None, 8**-0.5, 16**-0.5]) == pytest.approx(-0.5)
    assert scaling.slope(lengths, [1, 1, None, 1]) is None
    assert scaling.curve_steps(3) == [0, 1, 2, 3]
    assert scaling.curve_steps(2000)[-3:] == [1778, 1995, 2000]


def test_prefixes_that_diverge(tmp_path):
    """With a step far beyond 2 / λ the figures say so, and table and plot show gaps."""
    inputs, targets = scaling.task(3, "cpu")
    rows, signs = scaling.draw_prefixes(4, 1, "cpu")
    diverged, trained = (scaling.of_prefix(rows, signs, inputs, targets, step, 2) for step in (math.inf, 0.01))
    assert diverged["final_loss"] == diverged["movement"] == [None]
    assert diverged["steps_to"] == [[None, None]]
    state = scaling.of_state("elu", 1.0, inputs, targets, 2)
    figures = {
        "settings": {"inputs": 3, "dim": 8, "steps": 2, "draws": 1, "step_size": math.inf}, "prefix_rows": [2, 4],
        **{name: [diverged[name], trained[name]] for name in trained}, "curve_steps": scaling.curve_steps(2),
        "states": {"elu": state}, "slopes": dict.fromkeys(scaling.CHANGES),
    }  # fmt: skip
    assert list(scaling.tables_of(figures)[0].columns[2].cells)[:2] == ["-", f"{trained['final_loss'][0]:.1e}"]
    scaling.plot(tmp_path / "x.png", figures)
    assert is_png(tmp_path / "x.png")


@pytest.mark.parametrize(
    "arguments, message",
    [(["--max-rows", "4"], "must be a power of two from 8, got 4"),
     (["--max-rows", "-8"], "must be a power of two from 8, got -8"),
     (["--max-rows", "many"], "'many'"),
     (["--draws", "0"], "must be positive, got 0"),
     (["--steps", "1.5"], "invalid int value: '1.5'")],
)  # fmt: skip
def test_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["scaling", *arguments])
    assert message in capsys.readouterr().err


def test_help_names_it(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "scaling" in capsys.readouterr().out
