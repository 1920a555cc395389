"""Random calls against the float64 reference, within the bounds of `oracle.py`.

300 calls of the torch backend and 60 in Triton's interpreter, the same in every run. `make fuzz` tries 5,000 others. A
failure is shrunk; the `Call(...)` of its message is all that `check` needs to repeat it.
"""

import math
import os
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from backends import FUSED
from cases import BF16, F32, F64, HALF, make_state
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import run

from ntk_kernels import ntk_attention, ntk_attention_decode, ntk_attention_varlen, reference

FUZZ = int(os.environ.get("FUZZ", "0"))  # random calls; 0 for the few of every run
NUM_CALLS = {"torch": 300, "triton": 60}
NUM_SEEDS = 3


@dataclass(frozen=True)
class Call:
    """A call, of random numbers from `seed`."""

    op: str = "attention"  # or "varlen", "decode"
    dtype: str = "f32"
    seed: int = 0
    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    seq_q: int = 1
    seq_k: int = 1
    head_dim: int = 1
    value_dim: int = 1
    strides: str = "BHLD"  # order of dimensions in memory
    size: float = 1.0  # of queries and keys
    feature_map: str | None = None
    centers: int | None = None
    rank: int | None = None
    rows: int = 0
    bias: bool = True
    log_scale: bool = False
    feature_scale: float | None = None
    has_mass: bool = True
    of_queries: bool = False  # whether the state has a head for each of the query
    stack: int | None = None
    scale: float | None = None
    softcap: float | None = None
    is_causal: bool = False
    offset: int | None = None
    window: tuple[int, int] | None = None
    mask: str | None = None
    lengths: bool = False  # key_start and key_stop, or cache_seqlens
    hidden: float = 0.0  # what stands in keys and values that no row sees

    @property
    def torch_dtype(self):
        return {"f16": HALF, "bf16": BF16, "f32": F32, "f64": F64}[self.dtype]


SIZES = st.sampled_from([0, 1, 2, 7, 16, 23])
DIMS = st.sampled_from([1, 3, 8, 16, 17])


@st.composite
def calls(draw, backend):
    op = draw(st.sampled_from(["attention", "attention", "attention", "varlen", "decode"]))
    feature_map = draw(st.sampled_from([None, "elu", "taylor1", "taylor2"]))
    rows = draw(st.sampled_from([0, 1, 5]))
    scale = draw(st.sampled_from([None, None, 0.7, 0.0, -0.4]))
    is_negative, size = scale is not None and scale < 0, draw(st.sampled_from([1.0, 1.0, 30.0]))
    is_causal, window = draw(st.booleans()), draw(st.sampled_from([None, None, (0, 0), (3, -1), (2, 5)]))
    has_diagonal = op == "attention" and (is_causal or window is not None)
    centers = [None, 1, 3] if feature_map == "taylor1" else [None, 1]
    return Call(
        op=op,
        dtype=draw(st.sampled_from(["f32", "f32", "bf16", "f16"] + ["f64"] * (backend == "torch"))),
        seed=draw(st.integers(0, 99)),
        batch=draw(st.sampled_from([1, 2, 3, 0])),
        kv_heads=draw(st.sampled_from([1, 2, 3])),
        group=draw(st.sampled_from([1, 2, 3])),
        seq_q=draw(st.sampled_from([1, 2, 7, 16]) if op == "decode" else SIZES),
        seq_k=draw(SIZES),
        head_dim=draw(DIMS),
        value_dim=draw(DIMS),
        strides=draw(st.sampled_from(["BHLD", "BLHD", "BHDL", "LBHD"])),
        size=size,
        feature_map=feature_map,
        centers=None if feature_map is None else draw(st.sampled_from(centers)),
        rank=None if feature_map is None else draw(st.sampled_from([None, None, 1, 3])),
        rows=rows,
        bias=draw(st.booleans()),
        log_scale=feature_map is not None and draw(st.booleans()),
        feature_scale=0.5 if is_negative else draw(st.sampled_from([None, 0.5])),
        has_mass=size > 1 or draw(st.sampled_from([True, True, False])),  # nothing bounds values without mass
        of_queries=draw(st.booleans()),
        stack=draw(st.sampled_from([None, None, 3])) if feature_map is not None or rows else None,
        scale=scale,
        softcap=draw(st.sampled_from([None, None, 2.5])) if backend == "triton" else None,
        is_causal=is_causal,
        offset=draw(st.sampled_from([None, None, 0, -2, 5])) if has_diagonal else None,
        window=window,
        mask=draw(st.sampled_from([None, None, "bool", "additive", "rows"])) if op == "attention" else None,
        lengths=draw(st.booleans()),
        hidden=draw(st.sampled_from([0.0, math.nan, math.inf])),
    )


def inputs_of(call):
    """Returns query, key, value, state, options, and for each key whether no row of the batch row may see it."""
    generator = torch.Generator().manual_seed(call.seed)
    heads, dtype = call.kv_heads * call.group, call.torch_dtype

    def tensor(heads, length, dim, size=1.0):
        sizes = dict(zip("BHLD", (call.batch, heads, length, dim), strict=True))
        x = size * torch.randn([sizes[letter] for letter in call.strides], generator=generator, dtype=F64)
        return x.permute([call.strides.index(letter) for letter in "BHLD"]).to(dtype)

    query = tensor(heads, call.seq_q, call.head_dim, call.size)
    key = tensor(call.kv_heads, call.seq_k, call.head_dim, call.size)
    value = tensor(call.kv_heads, call.seq_k, call.value_dim)
    state = None
    mass = "positive" if call.has_mass else "none"
    if call.feature_map == "taylor1" and call.size > 1:
        mass = "constant"  # that of 1 + x·y would not be positive
    if call.feature_map is not None or call.rows:
        state = make_state(
            generator, head_dim=call.head_dim, value_dim=call.value_dim, heads=heads if call.of_queries else call.kv_heads,
            feature_map=call.feature_map, stack=call.stack, centers=call.centers, rank=call.rank, rows=call.rows,
            bias=call.bias, log_scale=call.log_scale, mass=mass,
            feature_scale=None if call.feature_map is None else call.feature_scale, dtype=dtype,
        )  # fmt: skip
    options = {"is_causal": call.is_causal}
    for name, given_ in (("scale", call.scale), ("softcap", call.softcap), ("window", call.window), ("causal_offset", call.offset)):  # fmt: skip
        if given_ is not None:
            options[name] = given_
    if call.stack is not None:
        options["state_index"] = torch.randint(-1, call.stack, (call.batch,), generator=generator)
    hidden = torch.zeros(call.batch, call.seq_k, dtype=torch.bool)
    stop = torch.randint(0, call.seq_k + 1, (call.batch,), generator=generator)
    j = torch.arange(call.seq_k)
    if call.op == "decode":
        if call.lengths:
            options["cache_seqlens"], hidden = stop, j >= stop[:, None]
    elif call.op == "attention" and call.lengths:
        start = torch.randint(0, call.seq_k // 2 + 1, (call.batch,), generator=generator)
        options |= {"key_start": start, "key_stop": stop}
        hidden = (j < start[:, None]) | (j >= stop[:, None])
    if call.mask is not None:
        shape = (call.batch, 1 if call.mask == "rows" else heads, call.seq_q, 1 if call.mask == "rows" else call.seq_k)
        keep = torch.rand(shape, generator=generator) < 0.7
        options["attn_mask"] = keep
        if call.mask == "additive":
            options["attn_mask"] = torch.randn(shape, generator=generator).masked_fill(~keep, -math.inf).to(dtype)
    if call.op == "varlen":  # the batch rows one after the other, as [total, H, D]
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        for name, length in (("cu_seqlens_q", call.seq_q), ("cu_seqlens_k", call.seq_k)):
            options[name] = torch.arange(call.batch + 1) * length
    return query, key, value, state, options, hidden


def attention_of(call, backend, hidden=None):
    """Returns the op as a function of query, key, value, state and options; `hidden` keys and values hold
    `call.hidden`."""
    is_reference = backend == "reference"
    module = reference if is_reference else None

    def attention(query, key, value, state, **options):
        if not is_reference:
            options["backend"] = backend
        if hidden is not None and call.hidden != 0 and call.op != "varlen":
            key, value = (x.masked_fill(hidden[:, None, :, None], call.hidden) for x in (key, value))
        if call.op == "attention":
            return (module.ntk_attention if module else ntk_attention)(query, key, value, state, **options)
        if call.op == "decode":
            decode = module.ntk_attention_decode if module else ntk_attention_decode
            return decode(query, key, value, options.pop("cache_seqlens", None), state, **options)
        bounds = [options.pop(f"cu_seqlens_{letter}") for letter in "qk"]
        if module:
            return module.ntk_attention_varlen(query, key, value, *bounds, state, **options)
        return ntk_attention_varlen(query, key, value, *bounds, call.seq_q, call.seq_k, state, **options)

    return attention


def norms(tensor):
    return tensor.max(), tensor.square().mean().sqrt()


def bounds_of(call, grads):
    """Returns the errors that results may have, by name: largest, and root mean square.

    They are those of `oracle.assert_as_accurate`, with the errors of the formula in float32 and the sizes of results
    taken from the call itself and from calls of its kind with other random numbers: a result of a few entries may be
    small by accident, where terms cancel.
    """
    dtype, expected, bounds = call.torch_dtype, attention_of(call, "reference"), {}
    eps, lse_eps = torch.finfo(dtype).eps, torch.finfo(F64 if dtype == F64 else torch.float32).eps
    for seed in range(call.seed, call.seed + NUM_SEEDS):
        arguments = inputs_of(replace(call, seed=seed))[:-1]
        exact = run(expected, *arguments, **grads, dtype=F64)
        in_float32 = run(partial(expected, compute_dtype=torch.float32), *arguments, **grads)
        lse = exact["lse"].abs().masked_fill(~exact["lse"].isfinite(), 0)
        lse_size = lse.max().item() if lse.numel() else 0.0
        for name, x in exact.items():
            if not x.numel():
                continue
            finite = x.isfinite()
            errors = norms((in_float32[name].to(F64) - x).abs().masked_fill(~finite, 0))
            sizes = norms(x.abs().masked_fill(~finite, 0))
            if name == "lse":  # the logarithm of a sum errs by as much as the sum does relatively
                sizes = [max(size, 1.0) for size in sizes]
            scale = eps / torch.finfo(torch.float32).eps if dtype == F64 else 1
            of_seed = [scale * 3 * e + (eps + lse_eps * lse_size) * n for e, n in zip(errors, sizes, strict=True)]
            bounds[name] = [max(x, y) for x, y in zip(of_seed, bounds.get(name, (0, 0)), strict=True)]
    return bounds


def check(call, backend):
    """Compares a call and its gradients with the reference; by the torch backend also with its third run, a replay."""
    query, key, value, state, options, hidden = inputs_of(call)
    dtype = call.torch_dtype
    ours, expected = attention_of(call, backend, hidden), attention_of(call, "reference")
    with torch.no_grad():
        runs = [
            ours(query, key, value, state, **options, return_lse=True) for _ in range(3 if backend == "torch" else 1)
        ]
    out, lse = runs[0]
    for repeated in runs[1:]:
        for x, y in zip(repeated, runs[0], strict=True):
            assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)), "a repeated call has other bits"
    grads = {}
    if call.op != "decode" and dtype.itemsize >= 4:  # gradients of half precision: tests/ops/test_attention.py
        generator = torch.Generator().manual_seed(1)
        grads["grad_out"] = torch.randn(out.shape, generator=generator, dtype=F64).to(dtype)
        grads["grad_lse"] = torch.randn(lse.shape, generator=generator, dtype=F64).to(dtype)
    results = run(ours, query, key, value, state, options, **grads)
    exact = run(expected, query, key, value, state, options, **grads, dtype=F64)
    bounds = bounds_of(call, grads)
    for name, result in results.items():
        assert result.shape == exact[name].shape, name
        finite = exact[name].isfinite()
        assert torch.equal(result.isfinite(), finite), f"{name}: not finite where the reference is, or vice versa"
        assert torch.equal(result[~finite].to(F64), exact[name][~finite]), (
            f"{name}: another infinity than the reference"
        )
        if result.numel():
            errors = norms((result.to(F64) - exact[name]).abs().masked_fill(~finite, 0))
            for kind, error, bound in zip(("max", "rms"), errors, bounds[name], strict=True):
                assert error <= bound, f"{name}: {kind} error {error:.3g} exceeds {bound:.3g}"


def profile(backend):
    return settings(
        max_examples=FUZZ or NUM_CALLS[backend],
        derandomize=not FUZZ,
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.skipif("torch" not in FUSED, reason="needs the torch backend")
@profile("torch")
@given(calls("torch"))
def test_torch(call):
    check(call, "torch")


@pytest.mark.skipif("triton" not in FUSED, reason="the interpreter is for machines without a GPU")
@profile("triton")
@given(calls("triton"))
def test_triton(call):
    assume(call.dtype != "f64")
    check(call, "triton")
