"""The benchmarks for maintainers: tune, all, gate, report."""

import argparse
import json
import shutil

import pytest
import torch
from rich.console import Console

from bench.__main__ import main
from bench.registry import BENCHMARKS
from bench.speed import attention, host, peers
from bench.upkeep import gate, report, suite


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter")
def test_tune_checks_and_times_every_candidate(monkeypatch):
    from bench.upkeep import tune
    from ntk_kernels.kernels.host.configs import TileConfig

    tiles = TileConfig(32, 32, 4, 1), TileConfig(16, 16, 4, 1), TileConfig(0, 16, 4, 1)
    monkeypatch.setattr(tune, "candidates_of", lambda *args: tiles)
    monkeypatch.setattr(tune, "_PARTS", 1)
    monkeypatch.setattr(tune, "_CHECKED_HEADS", 1)
    monkeypatch.setattr(tune, "_median_time", lambda function, device: function() or 1.0)
    for shape, kernel in (
        (tune.Shape("float32", 16, "elu", True, 40), "dq"),
        (tune.Shape("float32", 16, "elu", True, 40, decode=True), "decode"),
    ):
        wrong = tune.check(shape, kernel, "cpu", search=True, part=0)
        assert list(wrong) == [str(tiles[2])]
        (result,) = tune.time(shape, kernel, wrong, argparse.Namespace(search=True, tokens=40, heads=2, device="cpu"))
        assert result["ms"] == {str(tile): 1.0 for tile in tiles[:2]}
        assert str(tiles[0]) in tune.table_of(result).columns[0]._cells[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter")
def test_tune_compares_a_new_kernel_with_calls_without_it(monkeypatch):
    """It becomes the default, with the fastest of its tiles, if calls gain by it."""
    from bench.upkeep import tune
    from ntk_kernels.backends.torch import implementation as torch_backend
    from ntk_kernels.backends.triton import implementation as triton_backend
    from ntk_kernels.kernels.host import launch
    from ntk_kernels.kernels.host.configs import TileConfig

    tiles, names = (TileConfig(32, 32, 4, 1), TileConfig(16, 64, 4, 1)), []
    original = launch.Launch.__call__
    monkeypatch.setattr(launch.Launch, "__call__", lambda self: (names.append(self.kernel.__name__), original(self))[1])
    monkeypatch.setattr(torch_backend, "_kernels_for", lambda inputs: triton_backend)
    monkeypatch.setattr(tune, "candidates_of", lambda *args: tiles)
    monkeypatch.setattr(tune, "_PARTS", 1)
    monkeypatch.setattr(tune, "_CHECKED_HEADS", 1)
    shape, new = tune.Shape("float32", 8, "taylor2", True, 20), "_ntk_add_second_order_kernel"
    assert tune.check(shape, "add_second_order", "cpu", search=True, part=0) == {}
    assert names.count(new) == 3 and names.count("_ntk_add_prefix_kernel") == 1  # which the tiles are compared with

    def time(function, device):
        names.clear()
        function()
        return 2.0 if "_ntk_add_prefix_kernel" in names else 1.0

    monkeypatch.setattr(tune, "_median_time", time)
    arguments = argparse.Namespace(search=True, tokens=20, heads=1, device="cpu")
    (result,) = tune.time(shape, "add_second_order", {}, arguments)
    assert result["calls"] == {"without": 2.0, "with": 1.0}
    result["shape"]["dtype"] = "bfloat16"
    assert tune.best_tiles([result], "sm90").keys() == {"add_second_order, taylor2, 64"}
    assert tune.best_tiles([result | {"calls": {"without": 1.0, "with": 1.0}}], "sm90") == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter")
def test_tune(monkeypatch, tmp_path, capsys):
    from concurrent.futures import ThreadPoolExecutor

    from bench.upkeep import tune

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(tune, "ProcessPoolExecutor", lambda jobs, mp_context: ThreadPoolExecutor(1))
    sizes = ["--head-dim", "16", "--length", "17", "--tokens", "17", "--heads", "1"]
    main(["tune", "--device", "cpu", "--dtype", "float32", "--feature-map", "elu", "--kernel", "dq", *sizes,
          "--out", str(tmp_path)])  # fmt: skip
    assert "dq: float32 D=16 elu causal L=17" in capsys.readouterr().out
    (result,) = json.loads((tmp_path / "tune.json").read_text())["results"]
    assert result["ms"][result["default"]] > 0
    assert not result["wrong"]
    assert "dq,float32,16,elu" in (tmp_path / "tune.csv").read_text()


def test_tune_without_a_gpu(monkeypatch):
    from bench.upkeep import tune

    with pytest.raises(SystemExit, match="needs a GPU"):
        main(["tune", "--device", "cpu", "--write"])
    monkeypatch.setattr(tune, "INTERPRETED", False)
    with pytest.raises(SystemExit, match="needs a GPU"):
        main(["tune", "--device", "cpu"])


def test_tuned_tiles_become_the_default(monkeypatch, tmp_path):
    from bench.upkeep import tune
    from ntk_kernels.kernels.host import configs

    slow, fast, odd = (configs.TileConfig(m, 64, 8, 2) for m in (128, 64, 32))

    def result(feature_map, **ms):
        tiles = {"slow": slow, "fast": fast, "odd": odd}
        return {
            "shape": {"dtype": "bfloat16", "head_dim": 48, "feature_map": feature_map, "causal": True, "length": 4096},
            "kernel": "dq", "default": str(slow), "ms": {str(tiles[name]): time for name, time in ms.items()},
            "tiles": [vars(tiles[name]) for name in ms],
        }  # fmt: skip

    of_elu, of_taylor1 = result("elu", slow=2.0, fast=1.5, odd=1.0), result("taylor1", slow=2.0, fast=2.1)
    assert tune.best_tiles([of_elu], "sm90") == {}  # taylor1 would get it too
    found = tune.best_tiles([of_elu, of_taylor1, result(None, slow=2.0, fast=1.99)], "sm90")
    assert found == {"dq, state, 64": fast}  # odd did not run everywhere, 1.99 is no gain

    monkeypatch.setattr(configs, "_TUNED", tmp_path / "tuned")
    try:
        configs.write_tuned("sm90", {"dq, taylor2, 128": odd})
        configs.write_tuned("sm90", found)
        blocks = configs.blocks("sm90", 48, 48)
        arguments = "dq", "sm90", blocks, torch.bfloat16
        assert configs.candidates(*arguments, "taylor1")[0] == fast
        assert len(configs.candidates(*arguments, "elu")) > 1
        assert configs.candidates(*arguments, "elu", True)[0] != fast  # crowded
        assert configs.candidates(*arguments, None)[0] != fast
        assert configs.candidates("dq", "sm90", configs.blocks("sm90", 128, 128), torch.bfloat16, "taylor2")[0] == odd
        assert configs.candidates("dq", "sm100", blocks, torch.bfloat16, "elu")[0] != fast
    finally:
        configs._read_tuned.cache_clear()
        configs.candidates.cache_clear()


def test_all_goes_on_where_it_stopped(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "200")
    parts = {"counting": ["accounting", "--model", "ViT-B/16"], "no such model": ["accounting", "--model", "ViT-X"]}
    monkeypatch.setitem(suite.PARTS, "cpu", parts)
    command = ["all", "--device", "cpu", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="1 of 2 parts are missing; the same command goes on with them"):
        main(command)
    printed = capfd.readouterr()
    assert "failed with 2" in printed.out
    assert "invalid choice: 'ViT-X'" in printed.err
    state = json.loads((tmp_path / "all.json").read_text())
    assert set(state["seconds"]) == {"counting"}
    assert (tmp_path / "accounting.csv").exists()

    ran = []
    monkeypatch.setattr(
        suite, "_run_part", lambda command, seconds: ran.append(command) or (0 if seconds > 1 else None)
    )
    with pytest.raises(SystemExit, match="1 of 2 parts are missing"):
        main([*command, "--minutes", "1e-9"])
    assert "left for the next run" in capfd.readouterr().out
    with pytest.raises(SystemExit, match="1 of 2 parts are missing"):
        main([*command, "--minutes", "0.01"])
    assert "cut off" in capfd.readouterr().out
    main(command)
    assert "done before" in capfd.readouterr().out
    assert [command[2] for command in ran] == ["ViT-X", "ViT-X"]
    (tmp_path / "all.json").write_text(json.dumps(state | {"commit": "another"}))
    main(command)
    assert len(ran) == 4


def test_parts_of_all_are_commands_that_exist():
    for device, parts in suite.PARTS.items():
        for command in parts.values():
            parser = argparse.ArgumentParser()
            module = BENCHMARKS[command[0]]
            module.add_arguments(parser)
            arguments = parser.parse_args(
                [*command[1:], *suite._options(command[0], argparse.Namespace(device="cpu"), "x")]
            )
            chosen = parser.get_default("device") is not None
            assert not chosen or "--device" in suite._options(command[0], argparse.Namespace(device="cpu"), "x")
            assert arguments.out == "x"
        names = [command[command.index("--name") + 1] for command in parts.values() if "--name" in command]
        assert len(set(names)) == len(names), device


@pytest.mark.skipif(shutil.which("c++") is None, reason="the idle GPU has to be compiled")
def test_host(tmp_path, monkeypatch, capsys):
    """Calls on a GPU that does nothing, and the gate on the functions that they enter."""
    main(["host", "--blocks", "2", "--out", str(tmp_path)])
    calls = json.loads((tmp_path / "host.json").read_text())["calls"]
    assert {name: call["launches"] for name, call in calls.items() if "decode" not in name} == {
        "forward, no state": 1, "forward, elu": 1, "forward, gradients wanted": 1,
        "forward and backward, no state": 4, "forward and backward, frozen state": 4,
        "forward and backward, all gradients": 5, "cuDNN and prefix, forward": 1,
        "cuDNN and prefix, forward and backward": 2, "in torch.compile, forward": 1, "NTKPrefix()": 0,
    }  # fmt: skip
    assert all(0 < call["low_us"] <= call["median_us"] for call in calls.values())
    monkeypatch.setattr(host, "run", lambda folder, blocks: calls)
    gate.check_functions(Console())
    assert "too many" not in capsys.readouterr().out
    calls["forward, elu"]["functions"] = gate.FUNCTIONS["forward, elu"] + 1
    with pytest.raises(SystemExit, match="calls enter too many functions: forward, elu$"):
        gate.check_functions(Console())


def test_gate(monkeypatch, capsys):
    """The gate passes if one of five runs does, and prints what is too slow."""
    monkeypatch.setattr(gate, "check_functions", lambda console: None)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    runs = []

    def measure(arguments, progress):
        runs.append(arguments)
        slow = 9 if len(runs) < failures else 1
        low = {peers.PLAIN: 1.0, gate.OURS: 1.2 * slow, "naive formula": 9.0}
        return {"milliseconds": {name: {peer: {"low": ms} for peer, ms in low.items()} for name in attention.PASSES}}

    with monkeypatch.context() as patch:
        patch.setattr(attention, "measure", measure)
        failures = 5
        main(["gate"])
        assert len(runs) == 5
        failures = 11
        with pytest.raises(SystemExit, match="too slow in each of 5 runs"):
            main(["gate"])
        assert "takes 10.80× SDPA, no prefix, at most 2.2×: too slow" in capsys.readouterr().out
    monkeypatch.setattr(gate, "LIMITS", dict.fromkeys(gate.LIMITS, 1e9))
    main(["gate", "--length", "64", "--seconds", "0.01"])
    assert "naive formula, at most" in capsys.readouterr().out


def test_report_of_every_record():
    """Pages and README are up to date, and pages have every plot."""
    main(["report", "--check"])
    for folder in report.RESULTS.iterdir():
        page = (folder / "README.md").read_text()
        for path in folder.glob("*.png"):
            assert f"![{path.stem}]({path.name})" in page


def test_report_says_what_is_old(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "page_of", lambda folder: "another page")
    with pytest.raises(SystemExit, match="README.md: not the recorded figures; run: python -m bench report"):
        main(["report", "--check"])
    with pytest.raises(ValueError, match="must begin with that of a benchmark"):
        report.tables(tmp_path / "unknown-d64.json")
