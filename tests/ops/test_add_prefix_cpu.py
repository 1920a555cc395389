"""The compiled pass that adds a prefix on the CPU does what PyTorch's operations do (`prefix_term.py`)."""

import math
import shutil
import sys
from functools import partial

import pytest
import torch
from cases import make_state
from oracle import check_case

from ntk_kernels import PrefixState, ntk_attention, ntk_attention_decode, replay
from ntk_kernels.backends.torch import add_prefix

needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("c++") is None, reason="nothing compiles C++ here"
)


@pytest.fixture
def passes(monkeypatch):
    """The rows of each call of the compiled pass."""
    replay.forget()
    rows, run = [], add_prefix._run

    def counting(tensors, numbers):
        rows.append(tensors[0].shape[2])
        run(tensors, numbers)

    monkeypatch.setattr(add_prefix, "_run", counting)
    yield rows
    replay.forget()


@pytest.fixture
def without(monkeypatch):
    """Calls a function without the compiled pass."""

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(add_prefix, "compiled", lambda: None)
            replay.forget()
            try:
                return function()
            finally:
                replay.forget()

    return call


def a_call(feature_map="elu", heads=4, kv_heads=2, length=37, dim=20, value_dim=24, **state):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads, length, dim, generator=generator)
    key, value = (torch.randn(2, kv_heads, length, size, generator=generator) for size in (dim, value_dim))
    recipe = {"feature_map": feature_map, "centers": None} | state
    state = make_state(generator, heads=kv_heads, head_dim=dim, value_dim=value_dim, **recipe)
    return query, key, value, state


@needs_compiler
def test_it_compiles():
    assert add_prefix.compiled() is not None


@needs_compiler
@pytest.mark.parametrize("feature_map", ["elu", "taylor1"])
@pytest.mark.parametrize(
    "sizes",
    [(4, 2, 37, 20, 24), (2, 2, 1, 64, 64), (2, 1, 103, 16, 5), (3, 3, 6, 3, 40), (1, 1, 97, 128, 128)],
    ids=lambda sizes: "x".join(map(str, sizes)),
)
@pytest.mark.parametrize("centers", [None, 1])
def test_sizes(feature_map, sizes, centers, passes):
    """Query heads, heads, rows, D, Dv."""
    inputs = a_call(feature_map, *sizes, centers=centers, log_scale=centers is None)
    check_case((*inputs, {"is_causal": True}), torch.float32, backend="torch")
    assert passes == [sizes[2]]


@needs_compiler
@pytest.mark.parametrize("mass", ["positive", "mixed", "constant", "none"])
@pytest.mark.parametrize("feature_map", ["elu", "taylor1"])
def test_mass(feature_map, mass, passes):
    inputs = a_call(feature_map, centers=1, log_scale=True, mass=mass)
    check_case((*inputs, {"is_causal": True}), torch.float32, backend="torch")
    assert passes


@needs_compiler
@pytest.mark.parametrize("feature_map", ["elu", "taylor1"])
@pytest.mark.parametrize("log_scale", [-200.0, 0.0, 60.0, 200.0, math.inf, -math.inf, math.nan])
def test_extremes(feature_map, log_scale, passes, without):
    """Huge logits, NaN and infinities in queries, rows that see no key, a mass of 0: the same numbers, or the same of
    what is no number."""
    query, key, value, state = a_call(feature_map, centers=1, mass="mixed")
    scales = torch.full(state.k.shape[:-1], log_scale)
    state = PrefixState(state.z, state.k, feature_map, centers=state.centers, log_scale=scales)
    query[0, 0, 1:4] *= 1000
    query[0, 1, 3, 2], query[0, 1, 4, 0], query[0, 1, 5, 1] = math.nan, math.inf, -math.inf
    query[1, 0, 2] = -100
    mask = torch.ones(37, 37, dtype=torch.bool)
    mask[7] = False
    call = partial(ntk_attention, query, key, value, state, attn_mask=mask, return_lse=True, backend="torch")
    (out, lse), (expected, expected_lse) = call(), without(call)
    assert passes == [37]
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-5, equal_nan=True)
    # Weights are exponentials of differences of numbers as large as lse, each rounded.
    bound = (
        2**-21
        * (1 + expected_lse.nan_to_num().abs())[..., None]
        * (1 + expected.abs().nan_to_num().amax(-1, keepdim=True))
    )
    assert torch.where(out.isfinite(), (out - expected).abs() <= bound, out.isnan() == expected.isnan()).all()


@needs_compiler
def test_layouts(passes, without):
    """Rows of query and out behind one another in other ways; heads in strides."""
    query, key, value, state = a_call()
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    call = partial(ntk_attention, query, key, value, state, return_lse=True, backend="torch")
    results, expected = call(), without(call)
    assert passes and results[0].stride() == expected[0].stride()
    torch.testing.assert_close(results, expected)


@needs_compiler
def test_threads(passes):
    """Results do not depend on their number."""
    inputs, threads, results = a_call(length=400), torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(ntk_attention(*inputs, is_causal=True, backend="torch"))
    finally:
        torch.set_num_threads(threads)
    assert len(passes) == 3
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_compiler
def test_decode(passes, without):
    query, key, value, state = a_call()
    call = partial(ntk_attention_decode, query[:, :, -2:].contiguous(), key, value, None, state, backend="torch")
    results = call()
    assert passes
    torch.testing.assert_close(results, without(call))


@pytest.mark.parametrize(
    "change",
    [{"centers": 2}, {"rows": 3}, {"stack": 2}, {"dtype": torch.bfloat16}, {"feature_map": "taylor2"}],
    ids=str,
)
def test_what_it_does_not_take(change, passes):
    query, key, value, state = a_call(**{"feature_map": "taylor1"} | change)
    index = {"state_index": torch.tensor([1, 0])} if "stack" in change else {}
    ntk_attention(query, key, value, state, **index, backend="torch")
    assert not passes


def test_wider_and_narrower_numbers(passes):
    query, key, value, state = a_call()
    for dtype in (torch.float64, torch.bfloat16):
        ntk_attention(query.to(dtype), key.to(dtype), value.to(dtype), state, backend="torch")
    assert not passes


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler(compiler, monkeypatch, tmp_path):
    """PyTorch's operations do it, and nobody is bothered."""
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    add_prefix.compiled.cache_clear()
    replay.forget()
    try:
        assert add_prefix.compiled() is None
        check_case((*a_call(), {}), torch.float32, backend="torch")
    finally:
        add_prefix.compiled.cache_clear()
    assert not list(tmp_path.rglob("*.so"))
