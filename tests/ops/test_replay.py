"""Calls of a known kind are replayed, and give what the same calls give by the long way, to the bit."""

import pytest
import torch
from backends import FUSED, triton_only
from cases import Case, case_named, make_inputs, served_by
from decode_cases import decode_by, make_call
from oracle import run
from test_varlen import make_call as make_packed_call
from test_varlen import varlen

from ntk_kernels import ntk_attention, replay

# Each way that a call takes through the kernels: launches, and operations of PyTorch between them.
KERNELS = ["plain", "low_rank", "all_parts", "mask_additive_causal", "blhd_cache"]
DECODE = ["plain", "low_rank_elu", "all_parts", "index", "key_start_window", "bf16", "bhdl"]


@pytest.fixture
def replayed(monkeypatch):
    """The number of replays of each program."""
    replay.forget()
    counts, function = [], replay.program._Writer.function

    def counting(*args):
        inner, number = function(*args), len(counts)
        counts.append(0)

        def counted(*tensors):
            results = inner(*tensors)
            counts[number] += results is not None
            return results

        return counted

    monkeypatch.setattr(replay.program._Writer, "function", counting)
    yield counts
    replay.forget()


def check(attention, first, other, replayed, expected, **grads):
    """Compares `other` by the long way with the same call after two of `first`; as many replays as `expected` says are seen."""
    by_long_way = run(attention, *other, **grads)
    replay.forget()
    for _ in range(2):
        run(attention, *first, **grads)
    assert sum(replayed) == 0
    by_replay = run(attention, *other, **grads)
    assert sum(replayed) in expected
    for name, tensor in by_long_way.items():
        assert torch.equal(by_replay[name].nan_to_num(), tensor.nan_to_num()), name


def compare(backend, case, replayed, expected):
    def attention(*args, **kwargs):
        return ntk_attention(*args, **kwargs, backend=backend)

    grad_out = torch.randn(case.batch, case.heads, case.seq_q, case.value_dim or case.head_dim)
    check(attention, *(make_inputs(case, seed) for seed in (0, 1)), replayed, expected, grad_out=grad_out)


@pytest.mark.parametrize("case", served_by("torch"), ids=lambda case: case.id)
def test_torch(case, replayed):
    """Not all are replayed: those that look for NaN, as keys do not fill the vectors of the CPU's attention, that read the
    index of a state, or that go on for long."""
    compare("torch", case, replayed, range(3))


@pytest.mark.parametrize("state", [None, {}, {"feature_map": "taylor1", "centers": 2, "rows": 3, "rank": 2}], ids=str)
@pytest.mark.parametrize("mask", [None, "bool"])
def test_torch_is_replayed(mask, state, replayed):
    compare("torch", Case("", "", seq_q=32, seq_k=32, state=state, mask=mask), replayed, [2])


@triton_only
@pytest.mark.parametrize("name", KERNELS)
def test_kernels(name, replayed):
    compare("triton", case_named(name), replayed, [2])


@pytest.mark.parametrize("name", DECODE)
@pytest.mark.parametrize("backend", FUSED)
def test_decode(backend, name, replayed):
    """The CPU's attention takes keys by the lengths of the sequences, which it reads."""
    expected = [int(backend == "triton")]
    check(decode_by(backend), make_call(name, 0), make_call(name, 1), replayed, expected)


@triton_only
@pytest.mark.parametrize("name", ["plain", "index"])
def test_varlen(name, replayed):
    first, other = (make_packed_call(name, seed=seed) for seed in (0, 1))
    check(varlen("triton"), first, other, replayed, [2], grad_out=torch.randn(first[0].shape))
