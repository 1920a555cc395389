"""Tests of the compiled kernels for GPUs that are not there. In processes of their own, without the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench.upkeep import aot

ROOT = Path(__file__).resolve().parents[2]


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
    """At D = 64 in bfloat16; CI goes through the others, with each version of triton that has a baseline."""
    options = ("--quick", "--head-dim", "64", "--dtype", "bfloat16")
    result = run("-m", "bench", "static", *options, "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-5000:]
    (record,) = tmp_path.glob("*.json")
    kernels = json.loads(record.read_text())["kernels"]
    assert {kernel["arch"] for kernel in kernels} == {"sm80", "sm90", "sm100", "gfx942"}
    for kernel in kernels:
        assert kernel["registers"] > 16


MACHINE_CODE = """
        /*0010*/                   MUFU.EX2 R1, R1 ;
.L_x_0:
        /*0020*/                   MUFU.EX2 R2, R3 ;
        /*0030*/              @!P0 FADD R2, R2, R1 ;
        /*0040*/                   HMMA.1688.F32.TF32 R4, R8, R9, R4 ;
        /*0050*/                   {branch} `(.L_x_0) ;
        /*0060*/                   EXIT ;
"""


@pytest.mark.parametrize("branch", ["BRA", "@P0 BRA", "BRA.U UP0,", "BRA.U !UP0,"])
def test_machine_code_is_read(branch):
    """A loop may end in a branch of any kind."""
    compiled = aot.Compiled("sm100", None)
    compiled.machine_code = MACHINE_CODE.format(branch=branch)
    assert (compiled.instructions, compiled.exp2_in_main_loop, compiled.tensor_core) == (6, 1, "HMMA×1")


def test_kinds_that_no_kernel_is_of_are_refused():
    result = run("-m", "bench", "static", "--quick", "--arch", "sm80", "--dtype", "float16")
    assert result.returncode == 1
    assert result.stderr == "no kernel is of these kinds; without --quick there are more\n"


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
from bench.upkeep import aot
import torch
from ntk_kernels.inputs import DecodeInputs, Inputs, StateTensors
from ntk_kernels.kernels.backward_delta import delta_launch
from ntk_kernels.kernels.backward_keys import dkdv_launch
from ntk_kernels.kernels.backward_query import dq_launch
from ntk_kernels.kernels.backward_state import StateGrads, rows_launch, state_launch
from ntk_kernels.kernels.decode import DecodeResults, decode_launch, merge_launch
from ntk_kernels.kernels.forward import fwd_launch
from ntk_kernels.kernels.host.launch import prepare
from ntk_kernels.kernels.jit.row_terms import RowTerms

def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")

def keys(batch, seq_q, seq_k, **options):
    q, k, v, o, do = (meta(batch, 8, n, 64, dtype=torch.bfloat16) for n in (seq_q, seq_k, seq_k, seq_q, seq_q))
    lse = meta(batch, 8, seq_q)
    state = dict(z=meta(1, 8, 1, 64, 64), k=meta(1, 8, 1, 64), row_keys=meta(1, 8, 4, 64), row_values=meta(1, 8, 4, 64))
    inputs = Inputs(q, k, v, StateTensors(**state), feature_map="elu", causal_offset=seq_k - seq_q, **options)
    call = prepare(inputs, "sm90")
    terms = RowTerms(lse, lse, lse, meta(batch, 8, 1, seq_q))
    splits = 3 * batch + seq_q
    sums = StateGrads(**{n: meta(splits, *t.shape) for n, t in state.items()})
    tile = lambda kernel: call.kind.candidates(kernel)[0]
    launches = [
        fwd_launch(call, o, lse, tile("forward")),
        delta_launch(call, do, lse, o, terms, tile("delta")),
        dkdv_launch(call, do, terms, k, v, tile("dkdv")),
        dq_launch(call, do, terms, q, None, tile("dq")),
        state_launch(call, do, terms, None, sums, splits, "elu", tile("state")),
        rows_launch(call, do, terms, sums, splits, "keys", tile("rows")),
    ]
    return [repr(aot.specialisation(launch)) for launch in launches]

for options in ({}, {"window_right": 0}, {"window_right": 0, "window_left": 100}):
    shapes = [(1, 1, 1), (1, 1, 16), (2, 64, 64), (3, 17, 4097), (1, 4096, 4096), (16, 15, 33), (7, 1000, 1001)]
    for kernel, variants in enumerate(zip(*(keys(*shape, **options) for shape in shapes), strict=True)):
        assert len(set(variants)) == 1, (kernel, options)
"""


SPECIALISATIONS_OF_DECODE = (
    SPECIALISATIONS.partition("def keys")[0]
    + """
def launches(batch, seq_q, pages, splits, paged, **options):
    q, o = (meta(batch, 8, seq_q, 64, dtype=torch.bfloat16) for _ in range(2))
    k, v = (meta(99 if paged else batch, 2, 64 if paged else 64 * pages, 64, dtype=torch.bfloat16) for _ in range(2))
    table = meta(batch, pages, dtype=torch.int32) if paged else None
    state = StateTensors(
        z=meta(9, 2, 1, 64, 64), k=meta(9, 2, 1, 64), state_index=meta(batch, dtype=torch.int32)
    )
    inputs = DecodeInputs(q, k, v, state, cache_seqlens=meta(batch, dtype=torch.int32), block_table=table,
                          feature_map="elu", **options)
    call = prepare(inputs, "sm90")
    lse = meta(splits, batch, 8, seq_q)
    results = DecodeResults(meta(splits, *q.shape), lse, lse, meta(batch, 8, seq_q, dtype=torch.int32))
    tiles = [call.kind.candidates(kernel)[0] for kernel in ("decode", "merge")]
    return [repr(aot.specialisation(launch)) for launch in (
        decode_launch(call, results, tiles[0], num_splits=splits, block_table=table),
        merge_launch(call, results, o, lse[0], tiles[1]),
    )]

for options in ({}, {"window_right": 0, "window_left": 100}):
    for paged in (False, True):
        shapes = [(1, 1, 1, 2), (1, 1, 16, 16), (2, 3, 17, 7), (32, 16, 64, 60), (7, 1, 1000, 3), (64, 1, 5, 4)]
        for kernel, variants in enumerate(zip(*(launches(*shape, paged, **options) for shape in shapes), strict=True)):
            assert len(set(variants)) == 1, (kernel, options, paged)
"""
)


SPECIALISATIONS_OF_SUMS = """
from bench.upkeep import aot
import torch
from ntk_kernels.kernels.host import configs
from ntk_kernels.kernels.sums import SumGrads, Sums, prepare_rows, sums_bwd_launch, sums_launch

def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")

def launches(heads, length, centers, splits, ordered):
    keys, values = (meta(heads, length, 64, dtype=torch.bfloat16) for _ in range(2))
    order = (None,) * 2
    if ordered:
        order = meta(heads, length, dtype=torch.int64), meta(heads, centers + 1, dtype=torch.int64)
    rows = prepare_rows(keys, values, None, meta(heads, centers, 64), *order)
    z, k = meta(heads, centers, 65, 64, dtype=torch.bfloat16), meta(heads, centers, 65)
    sums = Sums(meta(splits, *z.shape), meta(splits, *k.shape), meta(splits, heads, centers))
    grads = SumGrads(keys, values, meta(splits, heads, centers, 64))
    config = configs.TileConfig(64, 64, 4, 2)
    return [repr(aot.specialisation(launch)) for launch in (
        sums_launch(rows, sums, "linear", 0.5, config, "sm90"),
        sums_bwd_launch(rows, z, k, grads, "values", "taylor1", splits, 0.5, config, "sm90"),
        sums_bwd_launch(rows, z, k, grads, "keys", "taylor1", splits, 0.5, config, "sm90"),
    )]

for ordered in (False, True):
    shapes = [(1, 1, 1, 1), (3, 17, 1, 16), (16, 4096, 16, 2), (7, 1000, 1000, 5), (2, 10**6, 3, 7)]
    for kernel, variants in enumerate(zip(*(launches(*shape, ordered) for shape in shapes), strict=True)):
        assert len(set(variants)) == 1, (kernel, ordered)
"""


def test_no_recompilation_of_sums():
    """Other numbers of heads, rows, centres or splits share a compiled kernel."""
    result = run("-c", SPECIALISATIONS_OF_SUMS)
    assert result.returncode == 0, result.stderr


def test_no_recompilation_of_decode():
    """Another batch, number of queries, pages or splits, or length shares a compiled kernel."""
    result = run("-c", SPECIALISATIONS_OF_DECODE)
    assert result.returncode == 0, result.stderr


def test_no_recompilation_for_another_batch_or_length():
    result = run("-c", SPECIALISATIONS)
    assert result.returncode == 0, result.stderr


def test_growth_is_noticed(monkeypatch, tmp_path):
    """More registers, spilled bytes or shared memory than the baseline's, or 2% more instructions."""
    from bench.upkeep import static

    found = {
        "arch": "sm90", "kernel": "forward", "head_dim": 64, "feature_map": "elu", "option": "", "dtype": "bfloat16",
        "config": "128x64 8w 3s", "registers": 128, "spilled": 0, "shared": 1000, "instructions": 1000,
    }  # fmt: skip
    monkeypatch.setattr(static, "_baseline", lambda: tmp_path / "baseline" / "triton-0.csv")
    assert static.read_baseline() == {}
    other = found | {"kernel": "dq"}
    static.write_baseline([found, other])
    static.write_baseline([other | {"registers": 100}])
    baseline = static.read_baseline()
    assert static.grown_since(baseline, found) == []
    assert static.grown_since(baseline, found | {"instructions": 1020, "registers": 90}) == []
    assert static.grown_since(baseline, found | {"instructions": 1021}) == ["instructions grew from 1,000 to 1,021"]
    assert static.grown_since(baseline, found | {"spilled": 8}) == ["spilled grew from 0 to 8"]
    assert static.grown_since(baseline, other) == ["registers grew from 100 to 128"]
    assert static.grown_since(baseline, found | {"option": "rows"}) == []  # new, with nothing to compare


def test_every_default_has_a_baseline():
    """The tested version of triton has a line for each kernel; `bench static --quick --accept` writes it."""
    from bench.upkeep import launches, static

    kernels = [vars(shape) for shape in launches.shapes([arch for arch in aot.TARGETS if arch != "sm86"], quick=True)]
    with (ROOT / "bench" / "baseline" / "triton-3.7.1.csv").open(encoding="utf-8") as file:
        known = {line.partition(",")[0] for line in file}
    assert {static.name_of(kernel) for kernel in kernels} <= known
