"""Tests of the choice of tiles: every call has some, and the autotuner takes the fastest. In the interpreter."""

import json
import os

import pytest
import torch
from cases import case_named, make_inputs
from oracle import check_case

from ntk_kernels import ntk_attention

if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU", allow_module_level=True)

from ntk_kernels.backends.torch import implementation as torch_backend
from ntk_kernels.backends.triton import implementation as triton_backend
from ntk_kernels.kernels.host import autotune, configs
from ntk_kernels.kernels.host.configs import TileConfig


def test_every_kernel_has_tiles_for_every_call():
    for arch in (*configs.SHARED_BYTES, "interpreter"):
        for head_dim in (8, 16, 32, 64, 80, 128, 256):
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                if dtype == torch.float32 and head_dim > 128:
                    continue  # goes to the torch backend
                for feature_map in (None, "elu", "taylor1", "taylor2"):
                    blocks = configs.blocks(arch, head_dim, 96 if head_dim == 80 else head_dim)
                    for kernel in configs.TABLES:
                        if kernel in (("dkdv",) if head_dim > 128 else ("dk", "dv")):
                            continue  # wide heads have the two apart
                        if "resident" in kernel and not (
                            arch == "interpreter" or (arch == "sm90" and dtype == torch.bfloat16
                            and max(blocks[:2]) <= 128 and feature_map in ("elu", "taylor1"))
                        ):  # fmt: skip
                            continue
                        if "second_order" in kernel and not (
                            arch == "interpreter" or (dtype == torch.bfloat16 and max(blocks[:2]) <= 128
                            and feature_map == "taylor2")
                        ):  # fmt: skip
                            continue
                        for mask_bytes in (0, 1, 2, 4):
                            entries = configs.candidates(
                                kernel, arch, blocks, dtype, feature_map, bool(mask_bytes), mask_bytes
                            )  # fmt: skip
                            assert entries and len(set(entries)) == len(entries)
                            for entry in entries:
                                rows = 1 if kernel == "merge" else 16  # which multiplies no tiles
                                assert entry.block_m >= rows and entry.block_n >= 16


class Tuned:
    """A kernel whose time is the number of rows of its tile."""

    def __init__(self):
        self.measured = []

    def __call__(self, config):
        self.measured.append(config)
        if config.block_m == 16:
            raise RuntimeError("out of resources")

    def measure(self, function):
        function()
        return self.measured[-1].block_m


SMALL, MIDDLE, LARGE = (TileConfig(rows, 64, 4, 2) for rows in (16, 32, 64))


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("NTK_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(autotune, "_tables", {})
    return tmp_path


def test_autotune_takes_the_fastest_that_runs_and_remembers_it(cache, monkeypatch):
    kernel = Tuned()

    def fastest(key="D=64", candidates=(LARGE, SMALL, MIDDLE)):
        return autotune.fastest(key, candidates, kernel, "Some GPU (80GB)", kernel.measure)

    assert fastest() == MIDDLE
    assert kernel.measured == [LARGE, SMALL, MIDDLE]
    assert fastest() == MIDDLE and len(kernel.measured) == 3  # in memory
    monkeypatch.setattr(autotune, "_tables", {})
    assert fastest() == MIDDLE and len(kernel.measured) == 3  # on disk
    (file,) = cache.iterdir()
    assert file.name.startswith("some-gpu-80gb-triton-")
    assert fastest("D=128") == MIDDLE and len(kernel.measured) == 6  # another class
    assert set(json.loads(file.read_text())) == {"D=64", "D=128"}
    assert fastest(candidates=(LARGE,)) == LARGE  # the table no longer has the one remembered


def test_autotune_says_when_nothing_runs(cache):
    kernel = Tuned()
    with pytest.raises(RuntimeError, match="none of the 1 tile configurations for D=64 runs on a GPU"):
        autotune.fastest("D=64", (SMALL,), kernel, "a GPU", kernel.measure)


@pytest.mark.parametrize("content", ["{", "[]", '{"D=64": {"block": 3}}', '{"D=64": 1}'])
def test_autotune_survives_a_broken_file(cache, content):
    autotune.cache_file("a GPU").write_text(content)
    kernel = Tuned()
    with pytest.warns(UserWarning, match="cannot read the tuned tiles"):
        assert autotune.fastest("D=64", (LARGE, MIDDLE), kernel, "a GPU", kernel.measure) == MIDDLE


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_autotune_without_a_place_to_write(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NTK_KERNELS_CACHE", str(tmp_path / "file" / "folder"))
    monkeypatch.setattr(autotune, "_tables", {})
    kernel = Tuned()
    with pytest.warns(UserWarning, match="cannot"):
        assert autotune.fastest("D=64", (LARGE, MIDDLE), kernel, "a GPU", kernel.measure) == MIDDLE


def test_the_environment_switches_the_autotuner_on(cache, monkeypatch):
    """Calls of one shape class share a measurement, whatever their batch and length."""
    monkeypatch.setenv("NTK_KERNELS_AUTOTUNE", "1")
    monkeypatch.setattr(configs, "candidates", lambda *args: (TileConfig(16, 16, 4, 1), TileConfig(32, 32, 4, 1)))
    measured = []

    def measure(function):
        function()
        measured.append(function)
        return -len(measured)

    monkeypatch.setattr(autotune, "median_time", measure)
    for batch, length in ((1, 40), (2, 33), (1, 100)):
        query, key, value = torch.randn(3, batch, 2, length, 8)
        out = ntk_attention(query, key, value, is_causal=True, backend="triton")
        torch.testing.assert_close(out, ntk_attention(query, key, value, is_causal=True, backend="torch"))
    assert len(measured) == 2
    ntk_attention(query, key, value, backend="triton")
    assert len(measured) == 4  # without causality: another class
    monkeypatch.delenv("NTK_KERNELS_AUTOTUNE")
    ntk_attention(query, key, value, window=(3, 3), backend="triton")
    assert len(measured) == 4


@pytest.mark.parametrize("name", ["elu", "rows_unbiased"])  # one for either kind of kernels
def test_measuring_leaves_what_is_added_to_alone(name, cache, monkeypatch):
    """The prefix is added to results and gradients that are there, once, however often that is measured."""
    monkeypatch.setattr(torch_backend, "_kernels_for", lambda inputs: triton_backend)
    monkeypatch.setenv("NTK_KERNELS_AUTOTUNE", "1")
    monkeypatch.setattr(configs, "candidates", lambda *args: (TileConfig(16, 16, 4, 1), TileConfig(32, 32, 4, 1)))
    measured = []

    def measure(function):
        function()
        function()
        measured.append(function)
        return len(measured)

    monkeypatch.setattr(autotune, "median_time", measure)
    case = case_named(name)
    check_case(make_inputs(case), case.dtype, backend="torch", backward=True)
    assert len(measured) == 4  # two candidates, forward and backward
