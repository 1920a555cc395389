"""What the compiler makes of the kernels for GPUs that are not there. In processes of their own, without interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench import aot

ROOT = Path(__file__).parent.parent


def run(*command, **kwargs):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment | {"COLUMNS": "240"},
        text=True,
        capture_output=True,
        **kwargs,
    )


def test_default_configurations_have_no_faults(tmp_path):
    result = run("-m", "bench", "static", "--quick", "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-5000:]
    (record,) = tmp_path.iterdir()
    kernels = json.loads(record.read_text())["kernels"]
    assert {kernel["arch"] for kernel in kernels} == {"sm80", "sm90", "sm100", "gfx942"}
    for kernel in kernels:
        assert kernel["registers"] > 32 and kernel["exp2"] > 0 and kernel["tensor_core"], kernel


LOOP = """
  %r = scf.for %i = %a to %b step %c iter_args(%acc = %zero) -> (tensor<64x64xf32, #mma>)  : i32 {{
    %x = math.exp2 %y : tensor<64x16xf32, #dot>
    %x2 = ttg.convert_layout %x : tensor<64x16xf32, #m> -> tensor<64x16xbf16, #dot>
    %d = ttng.warp_group_dot %x2, %m, %acc {{inputPrecision = 0 : i32, isAsync = true}} : tensor<64x16xbf16, #dot> * !ttg.memdesc<16x64xbf16, #s> -> tensor<64x64xf32, #mma>
    %w:2 = ttng.warp_group_dot_wait %d, %m {{pendings = {pendings} : i32}} : tensor<64x64xf32, #mma>, !ttg.memdesc<16x64xbf16, #s>
    scf.yield %w#0 : tensor<64x64xf32, #mma>
  }}
"""


@pytest.mark.parametrize("pendings, hazards", [(0, 0), (1, 1)])
def test_products_in_flight_are_found(pendings, hazards):
    """Still running (one pending) when the next iteration writes its left side again."""
    assert len(aot.pipelined_register_dots(LOOP.format(pendings=pendings))) == hazards


SPECIALISATIONS = """
from bench import static, aot
from dataclasses import replace
import torch
from ntk_kernels.kernels.forward import ntk_fwd_launch

def key(batch, seq_q, seq_k, **options):
    q, k, v, o = (torch.empty(batch, 8, n, 64, dtype=torch.bfloat16, device="meta") for n in (seq_q, seq_k, seq_k, seq_q))
    lse = torch.empty(batch, 8, seq_q, device="meta")
    z, kk = torch.empty(1, 8, 1, 64, 64, device="meta"), torch.empty(1, 8, 1, 64, device="meta")
    launch = ntk_fwd_launch(q, k, v, o, lse, z=z, k=kk, feature_map="elu", arch="sm90", causal_offset=seq_k - seq_q,
                            **options)
    return repr(aot.specialisation(launch))

for options in ({}, {"window_right": 0}, {"window_right": 0, "window_left": 100}):
    shapes = [(1, 1, 1), (1, 1, 16), (2, 64, 64), (3, 17, 4097), (1, 4096, 4096), (16, 15, 33), (7, 1000, 1001)]
    assert len({key(*shape, **options) for shape in shapes}) == 1, options
"""


def test_no_recompilation_for_another_batch_or_length():
    result = run("-c", SPECIALISATIONS)
    assert result.returncode == 0, result.stderr
