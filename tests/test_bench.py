"""The benchmarks on small sizes. The demo's encoder is not downloaded for tests: random tensors stand in for it."""

import argparse
import json

import pytest
import torch

from bench import ceilings, decode, demo, encoder, record, timing
from bench.__main__ import main
from ntk_kernels import ntk_attention, prefix_to_state, reference


class RandomReader:
    def __init__(self, prefix_rows, num_inputs):
        self.sizes = prefix_rows, num_inputs

    def layers(self, on_chunk=lambda: None):
        return random_layers(*self.sizes)


def random_layers(prefix_rows, num_inputs):
    generator = torch.Generator().manual_seed(0)

    def rand(*lead):
        return 0.5 * torch.randn(*lead, 8, generator=generator)

    return [
        encoder.Layer(
            rand(2, prefix_rows), rand(2, prefix_rows), *(rand(num_inputs, 2, encoder.CHUNK) for _ in range(3))
        )
        for _ in range(2)
    ]  # fmt: skip


def test_demo(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(encoder, "Reader", RandomReader)
    monkeypatch.setattr(demo, "LENGTHS", [64, 256])
    monkeypatch.setenv("COLUMNS", "200")
    main(["demo", "--device", "cpu", "--prefix-rows", "512", "--seconds", "0.01", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "served by backend='torch'" in printed
    assert str(tmp_path / "demo.png") in printed.replace("\n", "")
    assert (tmp_path / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    figures = json.loads((tmp_path / "demo.json").read_text())
    assert figures["prefix_lengths"] == [64, 256, 512]
    assert figures["state_rows"]["taylor2, mean"] == 1 + 8 + 36
    assert figures["bytes_held"]["exact"] == [64 * 2 * 16 * 4, 256 * 2 * 16 * 4, 512 * 2 * 16 * 4]
    assert figures["environment"]["torch"] == torch.__version__

    layer = random_layers(512, demo.NUM_INPUTS)[1]
    exact = reference.prefix_attention(layer.query, layer.key, layer.value, layer.prefix_key, layer.prefix_value)
    states = {"no prefix": None, "taylor1, mean": prefix_to_state(layer.prefix_key, layer.prefix_value)}
    for name, state in states.items():
        out = ntk_attention(layer.query, layer.key, layer.value, state)
        for head in range(2):
            error = (out[:, head] - exact[:, head]).norm() / exact[:, head].norm()
            assert figures["relative_error"][name][1][head] == pytest.approx(error.item(), abs=1e-4)


@pytest.mark.parametrize(
    "gains, expected", [([-1, 1, 2], 15), ([1, 1, 1], 0), ([-1, -1, -1], None), ([1, -1, 3], 22.5)]
)
def test_crossing(gains, expected):
    """Where exact attention becomes the slower one for good."""
    times = {"exact": [{"ms": 5 + g} for g in gains], "state": [{"ms": 5}] * 3}
    assert demo.crossing([10, 20, 30], times, "state") == expected


@pytest.mark.parametrize(
    "arguments, message",
    [(["demo", "--prefix-rows", "1000"], "must be a multiple of 512, got 1000"),
     (["demo", "--prefix-rows", "-512"], "must be positive, got -512"),
     (["demo", "--seconds", "0"], "must be positive, got 0"),
     (["demo", "--device", "nowhere"], "'nowhere' is not to be had"),
     (["attention", "--length", "0"], "must be positive, got 0"),
     (["attention", "--heads", "many"], "invalid int value: 'many'"),
     (["decode", "--prefix-rows", "1", "0"], "must be positive, got 0"),
     (["attention", "--out", "x", "--record"], "not allowed with argument --out")],
)  # fmt: skip
def test_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_demo_without_its_encoder(monkeypatch):
    monkeypatch.setattr(encoder, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="the encoder is missing: pip install"):
        main(["demo", "--device", "cpu"])


def test_figures_go_where_git_does_not_look():
    arguments = argparse.Namespace(device="cpu", out=None, record=False)
    assert record.results_folder(arguments) == record.ROOT / "bench" / "out" / "cpu"
    assert "bench/out/" in (record.ROOT / ".gitignore").read_text()


def test_attention(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(
        ["attention", "--device", "cpu", "--length", "64", "--heads", "2", "--seconds", "0.01", "--out", str(tmp_path)]
    )
    assert "ours, torch backend" in capsys.readouterr().out
    figures = json.loads((tmp_path / "attention.json").read_text())["milliseconds"]
    assert set(figures) == {"forward", "forward + backward"}
    assert all(times["low"] <= times["ms"] <= times["high"] for passes in figures.values() for times in passes.values())


def test_attention_refuses_to_time_what_is_wrong(monkeypatch, tmp_path):
    from bench import attention

    monkeypatch.setattr(attention, "ntk_attention", lambda q, *args, **kwargs: q)
    with pytest.raises(RuntimeError, match="is wrong: relative error"):
        main(["attention", "--device", "cpu", "--length", "64", "--out", str(tmp_path)])
    assert not (tmp_path / "attention.json").exists()


DECODE = ["decode", "--device", "cpu", "--batch", "2", "--length", "64", "--head-dim", "16", "--seconds", "0.01"]


def test_decode(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setitem(ceilings._COPIED, "cpu", 2**14)
    main([*DECODE, "--prefix-rows", "128", "32", "128", "--out", str(tmp_path)])
    assert "ours, a state per row" in capsys.readouterr().out
    assert (tmp_path / "decode.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    figures = json.loads((tmp_path / "decode.json").read_text())
    assert figures["prefix_rows"] == [32, 128]
    assert set(figures["milliseconds"]) == set(decode.CONTESTANTS)
    cache = 2 * 2 * 2 * 64 * 16 * 4  # keys and values, batch, heads, rows, D, bytes
    assert figures["bytes"]["ours, no prefix"] == cache
    assert figures["bytes"]["ours, a state per row"] == cache + 2 * 2 * 16 * 17 * 4


def test_decode_without_the_memory_for_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setitem(ceilings._COPIED, "cpu", 2**14)
    monkeypatch.setattr(decode, "_free_bytes", lambda device: 2**17)
    main([*DECODE, "--prefix-rows", "32", "4096", "--out", str(tmp_path)])
    assert "an exact prefix of 4,096 rows for each of 2 sequences does not fit" in capsys.readouterr().out
    assert json.loads((tmp_path / "decode.json").read_text())["prefix_rows"] == [32]
    with pytest.raises(SystemExit, match="no exact prefix of 4,096 rows fits into memory"):
        main([*DECODE, "--prefix-rows", "4096", "--out", str(tmp_path)])


def test_decode_refuses_to_time_what_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr(decode, "merge_attention", lambda out, *rest: (out, None))
    with pytest.raises(RuntimeError, match="exact, shared is wrong at m = 32: relative error"):
        main([*DECODE, "--prefix-rows", "32", "--out", str(tmp_path)])
    assert not (tmp_path / "decode.json").exists()


def test_help_names_every_benchmark(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    for name in ("demo", "attention", "decode", "ceilings", "static", "tune", "report"):
        assert name in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter")
def test_tune_checks_and_times_every_candidate(monkeypatch):
    from bench import tune
    from ntk_kernels.kernels import autotune
    from ntk_kernels.kernels.configs import TileConfig

    tiles = TileConfig(32, 32, 4, 1), TileConfig(16, 16, 4, 1), TileConfig(0, 16, 4, 1)
    monkeypatch.setattr(tune, "candidates_of", lambda *args: tiles)
    monkeypatch.setattr(tune, "_PARTS", 1)
    monkeypatch.setattr(tune, "_CHECKED_HEADS", 1)
    monkeypatch.setattr(autotune, "median_time", lambda function: function() or 1.0)
    for shape, kernel in (
        (tune.Shape("float32", 16, "elu", True, 40), "dq"),
        (tune.Shape("float32", 16, "elu", True, 40, decode=True), "decode"),
    ):
        wrong = tune.check(shape, kernel, "cpu", search=True, part=0)
        assert list(wrong) == [str(tiles[2])]
        (result,) = tune.time(shape, kernel, wrong, argparse.Namespace(search=True, tokens=40, heads=2, device="cpu"))
        assert result["ms"] == {str(tile): 1.0 for tile in tiles[:2]}
        assert str(tiles[0]) in tune.table_of(result).columns[0]._cells[0]


def test_tune_without_a_gpu():
    with pytest.raises(SystemExit, match="needs a GPU"):
        main(["tune", "--device", "cpu"])


def test_ceilings(tmp_path):
    main(["ceilings", "--device", "cpu", "--out", str(tmp_path)])
    figures = json.loads((tmp_path / "ceilings.json").read_text())
    assert figures["copy_gb_per_s"] > 0
    assert set(figures["matmul_tflop_per_s"]) == {"bfloat16", "float32"}


def test_timing_takes_turns():
    order = []
    result = timing.measure({name: lambda name=name: order.append(name) for name in "ab"}, "cpu", seconds=0)
    rounds = ["".join(order[i : i + 2]) for i in range(0, len(order), 2)]
    assert set(rounds) == {"ab", "ba"}
    assert result["a"]["rounds"] == result["b"]["rounds"] == len(rounds) - 1 == 5


def test_records_say_where_they_come_from(tmp_path):
    record.save(tmp_path / "x.json", "cpu", [{"ms": 1.5}, {"name": "a"}], figure=1)
    environment = json.loads((tmp_path / "x.json").read_text())["environment"]
    assert {"date", "device", "torch", "triton", "ntk_kernels", "commit", "uncommitted_changes"} <= set(environment)
