"""`bench approximation` on small sizes, against independent computations."""

import csv
import json
import math

import pytest
import torch
from plots import is_png

from bench.__main__ import main
from bench.quality import approximation
from ntk_kernels import PrefixState, ntk_attention, prefix_attention_state, prefix_to_state, reference


@pytest.fixture(scope="module")
def of_approximation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("approximation")
    main(["approximation", "--device", "cpu", "--max-rows", "16", "--steps", "2", "--inputs", "3", "--out", str(folder)])  # fmt: skip
    return folder


def test_approximation(of_approximation):
    assert is_png(of_approximation / "approximation.png")
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
    """The scaled start of m rows has m 64ths of the mass of the authors' start, for 64 rows the same."""
    published, scaled = (approximation.start_of_elu([2, 64], "cpu", scaled=scaled) for scaled in (False, True))
    assert (published.k > 0).all()
    torch.testing.assert_close(scaled.z * 64, published.z)
    query = torch.randn(1, 1, 5, 64, dtype=torch.float64)
    lse = [prefix_attention_state(query, states, state_index=torch.tensor([1]))[1] for states in (published, scaled)]  # fmt: skip
    torch.testing.assert_close(lse[0], lse[1])  # the lse of 64 rows


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
    assert is_png(tmp_path / "x.png")


@pytest.mark.parametrize(
    "arguments, message",
    [(["--max-rows", "100"], "must be a power of two from 2, got 100"),
     (["--max-rows", "1"], "must be a power of two from 2, got 1"),
     (["--steps", "0"], "must be positive, got 0"),
     (["--inputs", "-1"], "must be positive, got -1")],
)  # fmt: skip
def test_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["approximation", *arguments])
    assert message in capsys.readouterr().err


def test_help_names_it(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "approximation" in capsys.readouterr().out
