"""Decode with the keys of a sequence shared by several programs."""

import pytest
import torch
from backends import triton_only
from cases import F32, F64, make_state
from decode_cases import CALLS, check, decode_by, make_call, served
from oracle import run

from ntk_kernels import PrefixState, ntk_attention_decode, reference


@triton_only
@pytest.mark.parametrize("name", [name for name in CALLS if served(name, "triton")])
def test_splits(name):
    """Three splits are asked for; by default the interpreter, which counts as four multiprocessors, has one for these
    calls."""
    call = make_call(name)
    check(name, call, run(decode_by("triton", num_splits=3), *call), call[0].dtype)


@triton_only
@pytest.mark.parametrize("splits", [2, 20])
@pytest.mark.parametrize("name", ["elu", "all_parts", "no_mass", "window", "index"])
def test_other_numbers_of_splits(name, splits):
    """With 20 splits, most get no keys."""
    call = make_call(name)
    check(name, call, run(decode_by("triton", num_splits=splits), *call), call[0].dtype)


@triton_only
@pytest.mark.parametrize("recipe", [None, {}, {"mass": "none"}], ids=["plain", "elu", "no_mass"])
@pytest.mark.parametrize("splits", [None, 33, 80])
def test_many_splits_with_keys(splits, recipe, monkeypatch):
    """More splits than the 32 that the interpreter merges at once have keys: 59 tiles and a part of one."""
    from ntk_kernels.kernels import decode
    from ntk_kernels.kernels.host import configs

    merged, merge_launch = [], decode.merge_launch

    def recording(call, splits, *rest):
        merged.append(splits.out.shape[0])
        return merge_launch(call, splits, *rest)

    monkeypatch.setattr(configs, "multiprocessors", lambda device: 1000)  # the default splits for as many
    monkeypatch.setattr(decode, "merge_launch", recording)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, n, 8, generator=generator) for heads, n in ((2, 2), (1, 1920), (1, 1920))
    )
    key[:, :, 1100:] *= 3  # the largest logits come late
    state = None if recipe is None else make_state(generator, heads=1, head_dim=8, value_dim=8, **recipe)
    call = query, key, value, state, {"cache_seqlens": torch.tensor([1919, 1003])}
    check("many splits", call, run(decode_by("triton", num_splits=splits), *call), F32)
    assert merged == [splits or 26]


@triton_only
@pytest.mark.parametrize("splits", [1, 2, 7])
@pytest.mark.parametrize("mass", [1e-37, 1e-36])
def test_a_prefix_with_next_to_no_mass(mass, splits):
    """N / M exceeds float32, its part in the softmax does not, even if its split has no keys."""
    query, key, value = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 150, 16), torch.randn(1, 1, 150, 16)
    state = PrefixState(torch.full((1, 16, 16), 1e3), torch.full((1, 16), mass), "elu")
    out, lse = ntk_attention_decode(
        query, key, value, None, state, num_splits=splits, return_lse=True, backend="triton"
    )  # fmt: skip
    expected, expected_lse = reference.ntk_attention_decode(
        *(tensor.double() for tensor in (query, key, value)), None, state.to(F64), return_lse=True
    )
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=0)


def test_number_of_splits():
    decode = pytest.importorskip("ntk_kernels.kernels.decode")
    assert decode.splits_for(programs=256, tiles=64, multiprocessors=132) == 1  # busy enough
    assert decode.splits_for(programs=8, tiles=4, multiprocessors=132) == 1  # too few keys
    assert decode.splits_for(programs=8, tiles=64, multiprocessors=132) == 14  # 112 of 132
    assert decode.splits_for(programs=1, tiles=1000, multiprocessors=132) == 113  # 85% of all of them
    assert decode.splits_for(programs=8, tiles=10, multiprocessors=132) == 5  # two tiles each
    for programs in range(1, 200):
        splits = decode.splits_for(programs, 64, 132)
        assert 1 <= splits <= 32
