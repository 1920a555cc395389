"""Replays of compiled kernels, which take addresses; in the interpreter they take tensors (tests/ops/test_replay.py)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.idle_gpu.build import build

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("c++") is None, reason="the idle GPU has to be compiled")
def test_replays_launch_what_the_long_way_launches():
    """The same kernels with the same numbers, on the same memory, and results in the memory that they wrote."""
    folder = str(build())
    environment = os.environ | {"LD_LIBRARY_PATH": folder, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    script = ROOT / "tests/support/launches_on_idle_gpu.py"
    done = subprocess.run([sys.executable, str(script), folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    for name, call in figures.items():
        assert call["differs"] is None, (name, call["differs"])
    replays = {name: call["replays"] for name, call in figures.items()}
    both = dict.fromkeys(("plain", "elu", "centres and rows", "D=256"), 2)
    assert replays == both | {"decode in splits": 1, "packed": 1}
    launches = {name: call["launches"] for name, call in figures.items()}
    assert launches["elu"] == 5 and launches["D=256"] == 5 and launches["decode in splits"] == 2
