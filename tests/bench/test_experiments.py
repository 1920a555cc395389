"""The experiments `approximation` and `scaling` on small sizes, against independent computations."""

import csv
import json
import math

import pytest
import torch

from bench.__main__ import main
from bench.quality import approximation, scaling
from ntk_kernels import PrefixState, ntk_attention, prefix_attention_state, prefix_to_state, reference

PNG = b"\x89PNG\r\n\x1a\n"


# approximation ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_approximation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("approximation")
    main(["approximation", "--device", "cpu", "--max-rows", "16", "--steps", "2", "--inputs", "3", "--out", str(folder)])  # fmt: skip
    return folder


def test_approximation(of_approximation):
    assert (of_approximation / "approximation.png").read_bytes()[:8] == PNG
    figures = json.loads((of_approximation / "approximation.json").read_text())
    assert figures["prefix_rows"] == [2, 4, 8, 16]
    assert figures["state_rows"]["no prefix"] == 0
    assert figures["state_rows"]["elu, trained"] == 64
    assert figures["state_rows"]["taylor2, converted"] == 1 + 64 + 64 * 65 // 2
    with (of_approximation / "approximation.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(approximation.CURVES) * 4
    assert {row["data"] for row in rows} == set(approximation.DATA)

    sample = approximation.draw(approximation.DATA["logits of order one"], 3 + approximation.HELD_OUT, 16, "cpu")
    query, key, value = (tensor[3:] for tensor in sample[:3])
    measured = figures["data"]["logits of order one"]
    for name, options in (
        ("no prefix", None),
        ("elu, converted", ("elu", None)),
        ("taylor2, converted", ("taylor2", "mean")),
    ):
        for i, m in enumerate(figures["prefix_rows"]):
            prefix = [tensor[:, :m] for tensor in sample[3:]]
            exact = reference.prefix_attention(query, key, value, *prefix)
            state = None if options is None else prefix_to_state(*prefix, options[0], centers=options[1])
            difference = ntk_attention(query, key, value, state) - exact
            error = difference.norm() / exact.norm()
            assert measured["relative_error"][name][i] == pytest.approx(error.item(), rel=1e-3)
            mean = difference.square().mean().item()
            assert measured["mean_squared_error"][name][i] == pytest.approx(mean, rel=1e-3)


def test_approximation_says_where_training_moves_nothing(of_approximation):
    figures = json.loads((of_approximation / "approximation.json").read_text())
    notes = approximation.notes_of(figures)
    assert notes[0].startswith("as published: elu, trained: training does not move it at 4 of 4 lengths")
    assert not any(note.startswith("logits of order one") for note in notes)
    assert all(0 < x < math.inf for x in figures["data"]["logits of order one"]["movement"]["elu, trained"])


@pytest.mark.parametrize("data, tolerance", [("logits of order one", 1e-5), ("as published", 1e-3)])
def test_exact_is_attention_over_the_concatenated_prefix(data, tolerance, monkeypatch):
    monkeypatch.setattr(approximation, "_BLOCK_ROWS", 8)
    sample, lengths = approximation.draw(approximation.DATA[data], 2, 32, "cpu"), [2, 4, 8, 16, 32]
    outs, figures = approximation.exact(sample, lengths)
    query, key, value, prefix_key, prefix_value = (tensor.double() for tensor in sample)
    for out, share, m in zip(outs, figures["prefix_share"], lengths, strict=True):
        keys = torch.cat([prefix_key[None, :, :m].expand(2, -1, -1, -1), key], dim=2)
        values = torch.cat([prefix_value[None, :, :m].expand(2, -1, -1, -1), value], dim=2)
        weights = torch.softmax(query @ keys.mT / 8, dim=-1)
        expected = weights @ values
        assert (out - expected).norm() < tolerance * expected.norm()
        assert share == pytest.approx(weights[..., :m].sum(-1).mean().item(), abs=tolerance)
    mass = torch.logsumexp(query @ key.mT / 8, dim=-1).mean()
    assert figures["log_mass_of_input"] == pytest.approx(mass.item(), rel=1e-5)


def test_a_stack_is_trained_as_its_states_alone():
    sample, lengths = approximation.draw(1 / 8, 4 + approximation.HELD_OUT, 8, "cpu"), [2, 8]
    targets, _ = approximation.exact(sample, lengths)
    start = approximation.start_of_elu(lengths, "cpu", scaled=True)
    together = approximation.train(start, sample, targets, 20)

    def loss(states):
        return (approximation.attend(sample, states, slice(4)) - targets[:, :4]).square().mean().item()

    assert loss(together) < 0.9 * loss(start)
    for i in range(2):
        one = PrefixState(start.z[i : i + 1], start.k[i : i + 1], "elu", log_scale=start.log_scale[i : i + 1])
        alone = approximation.train(one, sample, targets[i : i + 1], 20)
        torch.testing.assert_close(alone.z[0], together.z[i], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(alone.k[0], together.k[i], rtol=1e-3, atol=1e-5)


def test_starts_of_elu():
    """The authors' start, and one whose mass is m times that of a 64th of it."""
    published, scaled = (approximation.start_of_elu([2, 64], "cpu", scaled=scaled) for scaled in (False, True))
    assert (published.k > 0).all()
    torch.testing.assert_close(scaled.z * 64, published.z)
    query = torch.randn(1, 1, 5, 64, dtype=torch.float64)
    lse = [prefix_attention_state(query, states, state_index=torch.tensor([1]))[1] for states in (published, scaled)]  # fmt: skip
    torch.testing.assert_close(lse[0], lse[1])  # of 64 rows


def test_states_without_mass_and_errors_that_are_no_number(of_approximation, tmp_path):
    k = torch.zeros(2, 1, 65)
    k[0, 0, 0], k[1, 0, 0] = 1, -1
    states = PrefixState(torch.zeros(2, 1, 65, 64), k, "taylor1")
    assert approximation.without_mass(torch.randn(3, 1, 4, 64), states) == [0, 1]

    figures = json.loads((of_approximation / "approximation.json").read_text())
    of_data = figures["data"]["logits of order one"]
    of_data["relative_error"]["taylor1, trained"] = approximation._finite(torch.tensor([math.nan, math.inf, 1, 20]))
    of_data["without_mass"]["taylor1, trained"] = [0, 0.25, 0, 0]
    cells = list(approximation.tables_of(figures)[1].columns[-1].cells)
    assert cells == ["not finite", "not finite", "1.000", "2.0e+01", "65 rows"]
    assert any("no positive mass for 25% of the queries at 4 rows" in note for note in approximation.notes_of(figures))
    approximation.plot(tmp_path / "x.png", figures)
    assert (tmp_path / "x.png").read_bytes()[:8] == PNG


# scaling ---------------------------------------------------------------------------------------------------------


def function_by_hand(rows, signs, inputs):
    """F of the docstring, one input at a time."""
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
    assert (tmp_path / "scaling.png").read_bytes()[:8] == PNG
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
    """Of rows that are no longer twins as well: then F is not 0."""
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
    kernel = 25 * phi @ phi.T / (phi @ k)[:, None] / (phi @ k)  # of Z; k has no derivative where Z = 0
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
    """A step far beyond 2 / λ: figures say so, table and plot show gaps."""
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
    assert (tmp_path / "x.png").read_bytes()[:8] == PNG


@pytest.mark.parametrize(
    "arguments, message",
    [(["approximation", "--max-rows", "100"], "must be a power of two from 2, got 100"),
     (["approximation", "--max-rows", "1"], "must be a power of two from 2, got 1"),
     (["approximation", "--steps", "0"], "must be positive, got 0"),
     (["approximation", "--inputs", "-1"], "must be positive, got -1"),
     (["scaling", "--max-rows", "4"], "must be a power of two from 8, got 4"),
     (["scaling", "--max-rows", "-8"], "must be a power of two from 8, got -8"),
     (["scaling", "--max-rows", "many"], "'many'"),
     (["scaling", "--draws", "0"], "must be positive, got 0"),
     (["scaling", "--steps", "1.5"], "invalid int value: '1.5'")],
)  # fmt: skip
def test_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_help_names_them(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert "approximation" in printed
    assert "scaling" in printed
