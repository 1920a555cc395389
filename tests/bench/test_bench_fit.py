"""The benchmark of fits on small prefixes."""

import json

import pytest
import torch

from bench.__main__ import main
from bench.models import decoder, encoder
from bench.quality import fit
from ntk_kernels import ntk_attention, prefix_to_state, reference
from ntk_kernels.conversion import gradient

PNG = b"\x89PNG\r\n\x1a\n"  # how such a file begins


class ClusteredReader:
    """Prefixes in clusters, of two layers."""

    is_causal, query_heads = False, 2

    def __init__(self, prefix_rows, num_inputs, layers=(0, 1)):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(*shape, generator=generator)

        def prefix():
            return (randn(2, 1, 8) + randn(2, 40, 8))[:, torch.arange(prefix_rows) % 40] + 0.3 * randn(
                2, prefix_rows, 8
            )

        both = [
            encoder.Layer(prefix(), prefix(), *(randn(num_inputs, h, 128, 8) for h in (self.query_heads, 2, 2)))
            for _ in range(2)
        ]
        self.kept = [both[i] for i in layers]

    def layers(self, on_chunk=lambda: None):
        return self.kept


class CausalReader(ClusteredReader):
    """A causal reader with two query heads per state head, as in the decoder."""

    is_causal, query_heads = True, 4


READERS = {"encoder": ClusteredReader, "decoder": CausalReader}


@pytest.mark.parametrize("model", ["encoder", "decoder"])
def test_fit(monkeypatch, tmp_path, capsys, model):
    """Errors agree with the reference on the chunks of the test, which are the first ones."""
    monkeypatch.setattr({"encoder": encoder, "decoder": decoder}[model], "Reader", READERS[model])
    monkeypatch.setattr(fit, "MAX_BY_LEAST_SQUARES", 18)
    monkeypatch.setattr(fit, "FAILED", 0.0)
    monkeypatch.setattr(gradient, "_STEPS", 50)
    monkeypatch.setattr(gradient, "_BATCH", 256)
    main(["fit", "--device", "cpu", "--model", model, "--layers", "1", "0", "--prefix-rows", "512", "--rows", "4", "18",
          "20", "--calibration", "5", "--test", "1", "--out", str(tmp_path)])  # fmt: skip
    assert "rows, gradient" in capsys.readouterr().out
    assert (tmp_path / f"fit-{model}.png").read_bytes()[:8] == PNG
    figures = json.loads((tmp_path / f"fit-{model}.json").read_text())
    names = ["rows, closed form", "rows, least squares (attention matching)", fit.GRADIENT]
    taylor1 = ["taylor1, closed form", "taylor1, least squares"]
    methods = {None: [fit.NO_PREFIX, *fit.OWN_SIZE], 4: names, 18: [*taylor1, *names], 20: [taylor1[0], *names[::2]]}
    found = {(c["layer"], c["rows"], c["method"]): c for c in figures["conversions"]}
    assert list(found) == [(i, size, name) for i in (0, 1) for size in methods for name in methods[size]]
    assert len((tmp_path / f"fit-{model}.csv").read_text().splitlines()) == 1 + 2 * len(found)
    tables = fit.tables_of(figures)
    assert [table.title.partition(":")[0] for table in tables[:4]] == [
        "States of 4 rows a head", "States of 18 rows a head", "States of 20 rows a head",
        "States that have one size only",
    ]  # fmt: skip
    assert [table.row_count for table in tables] == [4, 6, 4, 2, 4]
    assert tables[4].title.endswith("an error above 0.0 with 20 rows by the gradient")

    reader = READERS[model](512, 6)
    causal = {"is_causal": reader.is_causal}
    for i, layer in enumerate(reader.kept):
        prefix, inputs = layer[:2], layer[2:]
        test, others = [tensor[:1] for tensor in inputs], [tensor[1:] for tensor in inputs]
        exact = reference.prefix_attention(*test, *prefix, **causal)
        calibration = {"query": others[0], "attention": ntk_attention(*others, **causal, return_lse=True)}
        states = {
            (None, fit.NO_PREFIX): None,
            (None, "elu, closed form"): prefix_to_state(*prefix, "elu", centers=None),
            (18, "taylor1, closed form"): prefix_to_state(*prefix, "taylor1", centers=2),
            (4, "rows, closed form"): prefix_to_state(*prefix, num_rows=4),
            (18, fit.GRADIENT): prefix_to_state(*prefix, num_rows=18, **calibration),
        }
        for (size, name), state in states.items():
            conversion = found[i, size, name]
            difference = reference.ntk_attention(*test, state, **causal) - exact
            for head, error in enumerate(conversion["relative_error"]):
                own = slice(2 * head, 2 * head + 2) if reader.is_causal else head
                expected = difference[:, own].norm() / exact[:, own].norm()
                assert error == pytest.approx(expected.item(), rel=1e-3, abs=1e-5)
            assert conversion["bytes"] == (0 if state is None else state.nbytes)
        for size, better, worse in ((4, 2, 0), (18, 2, 0), (18, 1, 0), (20, 2, 0)):
            pairs = (found[i, size, names[which]] for which in (better, worse))
            for ours, closed in zip(*(pair["relative_error"] for pair in pairs), strict=True):
                assert ours < closed
        gradient_at_18 = found[i, 18, fit.GRADIENT]
        assert gradient_at_18["held_out_error"] == pytest.approx(gradient_at_18["relative_error"], rel=0.3)


def test_fit_of_several_lengths(monkeypatch, tmp_path):
    """The shorter prefix is the end of the longer one, and has the same figures as alone."""
    monkeypatch.setattr(encoder, "Reader", ClusteredReader)
    monkeypatch.setattr(gradient, "_STEPS", 50)
    monkeypatch.setattr(gradient, "_BATCH", 256)
    sizes = ["--layers", "1", "--rows", "4", "--calibration", "5", "--test", "1", "--out", str(tmp_path)]
    main(["fit", "--device", "cpu", "--prefix-rows", "1024", "512", *sizes, "--name", "fit-lengths"])
    figures = json.loads((tmp_path / "fit-lengths.json").read_text())
    assert figures["prefix_rows"] == [512, 1024]
    first, second = (table.title for table in fit.tables_of(figures))
    assert "prefix of m=512 rows" in first and "prefix of m=1,024 rows" in second
    short = [c for c in figures["conversions"] if c["prefix_rows"] == 512]
    reader = ClusteredReader(1024, 6)
    layer = reader.kept[1]
    layer = layer._replace(prefix_key=layer.prefix_key[:, -512:], prefix_value=layer.prefix_value[:, -512:])
    alone = fit.convert(layer, fit.methods_of(8, [4]), 1, is_causal=False)
    for found, expected in zip(short, alone, strict=True):
        assert found["relative_error"] == pytest.approx(expected["relative_error"], rel=1e-3, abs=1e-5)
    assert (tmp_path / "fit-lengths.png").read_bytes()[:8] == PNG


def test_fit_of_a_budget(monkeypatch, tmp_path):
    monkeypatch.setattr(encoder, "Reader", ClusteredReader)
    monkeypatch.setattr(gradient, "_STEPS", 50)
    monkeypatch.setattr(gradient, "_BATCH", 256)
    main(["fit", "--device", "cpu", "--layers", "1", "0", "--prefix-rows", "512", "--rows", "4", "18", "--budget",
          "--calibration", "5", "--test", "1", "--out", str(tmp_path)])  # fmt: skip
    figures = json.loads((tmp_path / "fit-encoder.json").read_text())
    best, rows = ([c for c in figures["conversions"] if c["method"] == name] for name in (fit.BUDGET, fit.GRADIENT))
    assert [(c["layer"], c["rows"], c["rows_per_head"]) for c in best] == [
        (0, 4, 4),
        (0, 18, 18),
        (1, 4, 4),
        (1, 18, 18),
    ]
    for of_budget, of_rows in zip(best, rows, strict=True):
        held_out = {name: sum(c["held_out_error"]) / 2 for name, c in (("budget", of_budget), ("rows", of_rows))}
        assert min(of_budget["tried"].values()) == pytest.approx(held_out["budget"], abs=2e-6)
        assert of_budget["tried"][f"{of_rows['rows']} rows"] == pytest.approx(held_out["rows"], abs=2e-6)
    first, second = fit.tables_of(figures)[2:4]
    assert [table.title.partition(":")[0] for table in (first, second)] == [
        "Budgets of 4 rows a head", "Budgets of 18 rows a head",
    ]  # fmt: skip
    assert list(second.columns[0].cells) == list(best[1]["tried"])
    for column, i in zip(second.columns[1:], (1, 3), strict=True):
        errors = list(best[i]["tried"].values())
        assert list(column.cells) == [f"{error:.4f}{' *' * (error == min(errors))}" for error in errors]
    with (tmp_path / "fit-encoder.csv").open(encoding="utf-8") as file:
        assert "tried" not in file.readline()


@pytest.mark.parametrize(
    "arguments, message",
    [(["--prefix-rows", "1000"], "--prefix-rows must be a multiple of 512 for the encoder, got 1000"),
     (["--layers", "0", "6"], r"--layers must be from 0 to 5, got \[0, 6\]"),
     (["--model", "decoder", "--layers", "-1"], r"--layers must be from 0 to 29, got \[-1\]"),
     (["--prefix-rows", "512", "--rows", "512"], "--rows must be less than the 512 rows of the prefix, got 512")],
)  # fmt: skip
def test_fit_refuses(arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(["fit", "--device", "cpu", *arguments])
