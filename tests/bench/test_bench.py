"""The benchmarks on small sizes. The demo's encoder is not downloaded for tests: random tensors stand in for it."""

import argparse
import json
import sys
import time
import types
from contextlib import nullcontext

import pytest
import torch

from bench.__main__ import UPKEEP, main
from bench.lib import record, timing
from bench.models import encoder, reading
from bench.quality import demo
from bench.registry import BENCHMARKS, ROOMS
from bench.speed import attention, ceilings, convert, decode, peers, sweep
from ntk_kernels import ntk_attention, prefix_to_state, reference

PNG = b"\x89PNG\r\n\x1a\n"  # how such a file begins


class RandomReader:
    def __init__(self, prefix_rows, num_inputs, layers):
        self.sizes, self.kept = (prefix_rows, num_inputs), layers

    def layers(self, on_chunk=lambda: None):
        layers = random_layers(*self.sizes)
        return [layers[i] for i in self.kept]


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
    sizes = ["--prefix-rows", "512", "--layers", "1", "0", "--seconds", "0.01"]
    main(["demo", "--device", "cpu", *sizes, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for step in (*(f"layer {i}, {name}" for i in (0, 1) for name in demo.STATES), "64 rows", "256 rows", "512 rows"):
        assert f": {step} (" in printed
    assert str(tmp_path / "demo.png") in printed.replace("\n", "")
    assert (tmp_path / "demo.png").read_bytes()[:8] == PNG
    figures = json.loads((tmp_path / "demo.json").read_text())
    assert figures["prefix_lengths"] == [64, 256, 512]
    assert figures["state_rows"]["taylor2, mean"] == 1 + 8 + 36
    assert figures["state_rows"]["fitted, 32 rows"] == 32
    fitted, around_mean = (figures["relative_error"][name][0] for name in ("fitted, 32 rows", "taylor1, mean"))
    assert all(ours < closed for ours, closed in zip(fitted, around_mean, strict=True))
    assert figures["bytes_held"]["exact"] == [64 * 2 * 16 * 4, 256 * 2 * 16 * 4, 512 * 2 * 16 * 4]
    assert figures["environment"]["torch"] == torch.__version__

    layer = demo.inputs_of(random_layers(512, demo.NUM_INPUTS + demo.NUM_CALIBRATION)[1], slice(demo.NUM_INPUTS))
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
    """The crossing is where the gain becomes positive for good."""
    assert timing.crossing([10, 20, 30], gains) == expected


@pytest.mark.parametrize(
    "arguments, message",
    [(["demo", "--prefix-rows", "1000"], "must be a multiple of 512, got 1000"),
     (["demo", "--prefix-rows", "-512"], "must be positive, got -512"),
     (["demo", "--seconds", "0"], "must be positive, got 0"),
     (["demo", "--device", "nowhere"], "'nowhere' is not available"),
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
    monkeypatch.setattr(reading, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="the encoder is missing: pip install"):
        main(["demo", "--device", "cpu"])


def test_figures_go_where_git_does_not_look():
    arguments = argparse.Namespace(device="cpu", out=None, record=False)
    assert record.results_folder(arguments) == record.ROOT / "bench" / "out" / "cpu"
    assert "bench/out/" in (record.ROOT / ".gitignore").read_text()


SMALL = ["attention", "--device", "cpu", "--length", "256", "--heads", "2", "--seconds", "0.01"]


def test_attention(tmp_path, capsys, monkeypatch):
    """Runs all peers of a CPU except compiled ones; of those only FlexAttention, which has no backward there."""
    monkeypatch.setenv("COLUMNS", "200")
    names = ("SDPA", "ours", "naive formula", "reference", "FlexAttention, no")
    monkeypatch.setattr(attention, "all_peers", lambda s: [p for p in peers.all_peers(s) if "compiled" not in p.name])
    main([*SMALL, "--prefix-rows", "32", "--only", *names, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "SDPA over a prefix of 32 rows" in printed
    assert "SDPA by flash over a prefix of 32 rows" in printed
    record = json.loads((tmp_path / "attention.json").read_text())
    forward, both = (record["milliseconds"][name] for name in attention.PASSES)
    assert {"SDPA by flash, no prefix", "SDPA by math, no prefix", "ours, torch backend", "reference"} < set(forward)
    if "FlexAttention, no prefix" in forward:  # where there is a compiler
        left_out = record["left_out"]["FlexAttention, no prefix"]
        assert list(left_out) == ["forward + backward"]
        assert f"left out: FlexAttention, no prefix (forward + backward): {left_out['forward + backward']}" in printed
    assert "FlexAttention, no prefix" not in both
    for times in (forward, both):
        assert all(result["low"] <= result["ms"] <= result["high"] for result in times.values())
        assert times["ours, torch backend"]["peak_bytes"] < times["naive formula"]["peak_bytes"]
    (line, *lines) = (tmp_path / "attention.csv").read_text().splitlines()
    assert {"commit", "torch", "pass", "name", "ms", "ratio", "tflop_per_s", "peak_bytes"} < set(line.split(","))
    assert len(lines) == len(forward) + len(both)


def test_attention_refuses_peers_that_are_none(tmp_path):
    with pytest.raises(SystemExit, match=r"--only must be part of the name of a peer here, got 'magic': \['SDPA, no"):
        main([*SMALL, "--only", "ours", "magic", "--out", str(tmp_path)])


def test_attention_refuses_to_time_what_is_wrong(monkeypatch, tmp_path):
    """A wrong result of ours is an error; a peer with a wrong result is left out."""
    monkeypatch.setattr(peers, "ntk_attention", lambda q, *args, **kwargs: q)
    with pytest.raises(RuntimeError, match="ours, no prefix is wrong: relative error"):
        main([*SMALL, "--only", "ours", "--out", str(tmp_path)])
    assert not (tmp_path / "attention.json").exists()
    monkeypatch.setattr(peers, "naive", lambda q, *args, **kwargs: 1.01 * q)
    main([*SMALL, "--only", "naive formula", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "attention.json").read_text())
    assert set(record["milliseconds"]["forward"]) == {peers.PLAIN}
    for reason in record["left_out"]["naive formula"].values():
        assert "wrong: relative error" in reason


def test_peers_that_only_gpus_have(monkeypatch):
    """Peers with layout [B, L, H, D] are called in it; without their packages they raise ImportError."""
    setting = peers.Setting("cuda", 8, 2, 4)
    query, key, value = torch.randn(3, 1, 2, 8, 4).unbind()
    theirs = {peer.name.partition(",")[0]: peer.function for peer in peers.all_peers(setting)}

    def attention_of_theirs(q, k, v, causal=True):
        assert q.shape == (1, 8, 2, 4)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return peers.sdpa(q, k, v, is_causal=causal).transpose(1, 2)

    modules = {
        "flash-attn 2": ("flash_attn", "flash_attn_func", attention_of_theirs),
        "flash-attn 4": ("flash_attn.cute", "flash_attn_func", lambda *a, **k: (attention_of_theirs(*a, **k), None)),
        "flash-linear-attention's attention": ("fla.ops.attn", "parallel_attn", attention_of_theirs),
    }
    for name, (module, function, stand_in) in modules.items():
        with pytest.raises(ImportError):
            theirs[name](query, key, value, None)
        parts = module.split(".")
        for i in range(len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), types.ModuleType(parts[i]))
        setattr(sys.modules[module], function, stand_in)
        out = theirs[name](query, key, value, None)
        assert torch.allclose(out, peers.sdpa(query, key, value, is_causal=True), atol=1e-6)


def test_peak_bytes():
    x = torch.randn(256, 256)
    assert timing.peak_bytes(lambda: (x + x).exp(), "cpu") == 2 * x.nbytes
    assert timing.peak_bytes(lambda: x[:1], "cpu") == 0


def test_sweep(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    small = ["--heads", "2", "--head-dim", "8", "--length", "16", "--lengths", "8", "--rows-at-length", "32"]
    for options in ([], ["--causal", "--backward"]):
        main(["sweep", "--device", "cpu", "--prefix-rows", "64", "16", "--seconds", "0.01", *small, *options,
              "--out", str(tmp_path)])  # fmt: skip
        printed = capsys.readouterr().out
        assert "by rows of the exact prefix" in printed
        assert "break-even" in printed
        name = "sweep-d8-backward" if options else "sweep-d8"
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == PNG
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert record["prefix_rows"] == [16, 64]
        assert record["states"]["taylor1, C=16"]["rows_per_head"] == 16 * 9
        assert record["states"]["taylor1, C=16"]["on_paper"] == 8 * 9
        assert record["states"]["32 rows"]["on_paper"] == record["states"]["32 rows"]["rows_per_head"] == 32
        elu = record["by_prefix_rows"][0]["ours, elu"]
        pairs = 16 * 17 // 2 if options else 16 * 16  # of queries and keys; then the same tokens and the state's rows
        work = 2 * (4 * pairs * 8 + 2 * 16 * 8 * 9) * (3.5 if options else 1)
        assert elu["tflop_per_s"] == pytest.approx(work / elu["ms"] / 1e9)
        assert record["states"]["taylor2"]["nbytes"] == 4 * 2 * ((1 + 8 + 36) * 9 + 8 + 1)
        held = [times[sweep.EXACT]["bytes"] for times in record["by_prefix_rows"]]
        more = 48 * 2 * 2 * 8 * 4  # rows, keys and values, heads, D, bytes; and their gradients
        assert held[1] - held[0] >= more * (2 if options else 1)


def test_sweep_refuses_to_time_what_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "_ours", lambda inputs: inputs.query)
    with pytest.raises(RuntimeError, match="ours, elu is wrong: relative error"):
        main(["sweep", "--device", "cpu", "--heads", "1", "--head-dim", "8", "--prefix-rows", "8", "--length", "8",
              "--out", str(tmp_path)])  # fmt: skip


def test_accounting(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["accounting", "--model", "LLaMA-3.1-8B", "ViT-B/16", "--out", str(tmp_path)])
    assert "LLaMA-3.1-8B: 32 layers, 32/8 heads, D=128" in capsys.readouterr().out
    assert (tmp_path / "accounting.png").read_bytes()[:8] == PNG
    methods = {(m["model"], m["method"]): m for m in json.loads((tmp_path / "accounting.json").read_text())["methods"]}
    elu = methods["LLaMA-3.1-8B", "NTK-Attention, elu"]
    assert elu["per_layer"] == 8 * (128 * 128 + 128)  # d² + d a head, as the paper counts
    assert elu["parameters"] == 32 * elu["per_layer"]
    assert elu["bfloat16_mib"] == 2 * elu["parameters"] / 2**20
    assert methods["LLaMA-3.1-8B", "NTK-Attention, elu, Z of rank 8"]["per_layer"] == 8 * (2 * 128 * 8 + 128)
    # LLaMA's query projection is 4096 x 4096, its value projection 4096 x 1024
    assert methods["LLaMA-3.1-8B", "LoRA, rank 8, query and value"]["per_layer"] == 8 * (4096 + 4096 + 4096 + 1024)
    assert methods["ViT-B/16", "P-Tuning v2, 100 rows"]["per_layer"] == 100 * 2 * 768


def test_convert(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setitem(ceilings._COPIED, "cpu", 2**14)
    command = ["convert", "--device", "cpu", "--heads", "2", "--head-dim", "8", "--seconds", "0.01"]
    main([*command, "--prefix-rows", "64", "16", "--out", str(tmp_path)])
    assert "Converting a prefix (H=2, D=8, float32)" in capsys.readouterr().out
    assert (tmp_path / "convert.png").read_bytes()[:8] == PNG
    record = json.loads((tmp_path / "convert.json").read_text())
    assert record["row_bytes"] == 2 * 2 * 8 * 4
    assert set(record["milliseconds"][1]) == {*convert.KINDS, convert.PRODUCTS, convert.PRODUCTS_16}
    monkeypatch.setattr(
        convert, "prefix_to_state", lambda key, value, **options: prefix_to_state(key, -value, **options)
    )
    with pytest.raises(RuntimeError, match="elu is wrong: its z differs by 2 "):
        main([*command, "--prefix-rows", "64", "--out", str(tmp_path)])


DECODE = ["decode", "--device", "cpu", "--batch", "2", "--length", "64", "--head-dim", "16", "--seconds", "0.01"]


def test_decode(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setitem(ceilings._COPIED, "cpu", 2**14)
    main([*DECODE, "--prefix-rows", "128", "32", "128", "--out", str(tmp_path)])
    assert "ours, a state per row" in capsys.readouterr().out
    assert (tmp_path / "decode.png").read_bytes()[:8] == PNG
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
    for name, module in (BENCHMARKS | UPKEEP).items():
        line = next(line for line in printed.splitlines() if line.split()[:1] == [name])
        assert line.split(maxsplit=1)[1] in module.__doc__
    assert all(f"{room}:" in printed for room in (*ROOMS, "Upkeep"))
    assert max(map(len, printed.splitlines())) <= 80


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


def test_a_gpu_is_busy_as_long_as_python_needs(monkeypatch):
    """A flush takes 0.5 ms by the events: the fast call gets one, the slow one as many as its 2 ms take."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 0.5

    class Cache:
        def zero_(self):
            log.append("flush")

    for name, fake in {
        "Event": Event,
        "device": lambda device: nullcontext(),
        "synchronize": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(timing, "_flushed", lambda device: Cache())

    def slow():
        log.append("slow")
        time.sleep(0.002)

    calls = {"slow": slow, "fast": lambda: log.append("fast")}
    result = timing.measure(calls, "cuda", seconds=0)
    assert result["slow"]["ms"] == result["fast"]["ms"] == 0.5
    rounds = " ".join([*log, ""]).split(" event ")
    before = {
        name: [rounds[i - 1].count("flush") for i, called in enumerate(rounds) if called == name] for name in calls
    }
    assert len(before["slow"]) == len(before["fast"]) == result["slow"]["rounds"] == 5
    assert set(before["fast"]) == {1}
    assert len(set(before["slow"])) == 1 and before["slow"][0] >= 5


def test_records_say_where_they_come_from(tmp_path):
    record.save(tmp_path / "x.json", "cpu", [{"ms": 1.5}, {"name": "a"}], figure=1)
    environment = json.loads((tmp_path / "x.json").read_text())["environment"]
    assert {"date", "device", "torch", "triton", "ntk_kernels", "commit", "uncommitted_changes"} <= set(environment)
