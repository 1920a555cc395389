"""Bad input: each message names the argument, what it must be and what it got; and every backend gives it."""

import math

import numpy
import pytest
import torch

from ntk_kernels import PrefixState, checks, ntk_attention

query, key, value = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
state = PrefixState(torch.rand(2, 8, 8), torch.rand(2, 8), "elu")
stack = PrefixState.stack([state, state, state])
index = torch.tensor([0, 2])


def elu_state(heads=2, dim=8, value_dim=8, device="cpu"):
    return PrefixState(torch.rand(heads, dim, value_dim, device=device), torch.rand(heads, dim, device=device), "elu")


REFUSED = {
    "query_type": (dict(query=query.numpy()), TypeError, "`query` must be a torch.Tensor, got ndarray"),
    "query_rank": (dict(query=query[0]), ValueError, r"`query` must have shape \[B, Hq, Lq, D\], got \[4, 7, 8\]"),
    "query_dtype": (dict(query=query.long()), TypeError, "`query` must be float16, bfloat16, float32 or float64"),
    "query_float8": (dict(query=query.to(torch.float8_e5m2)), TypeError, "`query` must be float16, .*float8"),
    "query_dim": (dict(query=query[..., :0], key=key[..., :0]), ValueError, "head dimension D of at least 1"),
    "key_shape": (dict(key=key[..., :5]), ValueError, r"`key` must have shape \[B=2, Hkv, Lk, D=8\], got \[2, 2, 7, 5\]"),
    "key_batch": (dict(key=key[:1]), ValueError, r"`key` must have shape \[B=2, Hkv, Lk, D=8\], got \[1, 2, 7, 8\]"),
    "value_shape": (dict(value=value[:, :, :3]), ValueError,
                    r"`value` must have shape \[B=2, Hkv=2, Lk=7, Dv\], got \[2, 2, 3, 8\]"),
    "key_dtype": (dict(key=key.double()), TypeError, "`key` must have the dtype of `query`, torch.float32, got"),
    "value_device": (dict(value=value.to("meta")), ValueError, "`value` must be on the device of `query`, cpu, got meta"),
    "heads": (dict(query=query[:, :3]), ValueError, "must be a multiple of the heads of `key`, got Hq=3, Hkv=2"),
    "scale_nan": (dict(scale=math.nan), ValueError, "`scale` must be finite, got nan"),
    "scale_inf": (dict(scale=-math.inf), ValueError, "`scale` must be finite, got -inf"),
    "scale_type": (dict(scale="1"), TypeError, "`scale` must be a float, got str"),
    "scale_sign": (dict(scale=-1.0, state=state), ValueError, "`scale` must not be negative for a state without"),
    "scale_huge_int": (dict(scale=10**400), ValueError, "`scale` must fit a float, got an int of 1329 bits"),
    "softcap": (dict(softcap=0.0), ValueError, "`softcap` must be positive, got 0.0"),
    "window_int": (dict(window=4), TypeError, r"`window` must be a pair \(left, right\) of ints, .* got 4"),
    "window_float": (dict(window=(1.0, 2)), TypeError, r"`window\[0\]` must be an int, got float"),
    "window_low": (dict(window=(-2, 0)), ValueError, r"`window\[0\]` must be at least -1, got -2"),
    "offset_type": (dict(is_causal=True, causal_offset=1.5), TypeError, "`causal_offset` must be an int, got float"),
    "offset_alone": (dict(causal_offset=1), ValueError, "`causal_offset` must come with `is_causal` or `window`"),
    "causal_type": (dict(is_causal=1), TypeError, "`is_causal` must be a bool, got int"),
    "return_lse_type": (dict(return_lse=1), TypeError, "`return_lse` must be a bool, got int"),
    "offset_size": (dict(is_causal=True, causal_offset=2**70), ValueError, "`causal_offset` must be at most"),
    "mask_float8": (dict(attn_mask=torch.ones(7, 7).to(torch.float8_e5m2)), TypeError, "`attn_mask` must be bool"),
    "mask_type": (dict(attn_mask=[[True]]), TypeError, "`attn_mask` must be a torch.Tensor, got list"),
    "mask_dtype": (dict(attn_mask=torch.ones(7, 7).long()), TypeError, "`attn_mask` must be bool .* or floating-point"),
    "mask_double": (dict(attn_mask=torch.ones(7, 7).double()), TypeError,
                    "`attn_mask` must be bool, float32 or narrower, as `query` is torch.float32, got torch.float64"),
    "mask_shape": (dict(attn_mask=torch.ones(3, 1, 7, 7)), ValueError,
                   r"`attn_mask` must be broadcastable to \[B, Hq, Lq, Lk\] = \[2, 4, 7, 7\], got \[3, 1, 7, 7\]"),
    "mask_of_padding": (dict(attn_mask=torch.ones(2, 7).bool(), query=query[:, :, :3]), ValueError,
                        r"got \[2, 7\]; a padding mask \[B, Lk\] goes in as mask\[:, None, None\], or as `key_start` and"),
    "mask_rank": (dict(attn_mask=torch.ones(1, 1, 1, 7, 7)), ValueError, "`attn_mask` must be broadcastable"),
    "mask_device": (dict(attn_mask=torch.ones(7, 7, device="meta")), ValueError, "`attn_mask` must be on the device"),
    "state_type": (dict(state=state.tensors()), TypeError, "`state` must be a PrefixState, got dict"),
    "state_module": (dict(state=torch.nn.Identity()), TypeError,
                     "`state` must be a PrefixState, got Identity, which gives one when it is called"),
    "state_mask": (dict(state=torch.ones(7, 7)), TypeError, "got Tensor; a mask goes in `attn_mask`"),
    "state_list": (dict(state=[state, state]), TypeError, "got list; PrefixState.stack makes one of several"),
    "state_heads": (dict(state=elu_state(heads=3)), ValueError, "`state` must have Hq=4 or Hkv=2 heads, .* got 3"),
    "state_dim": (dict(state=elu_state(dim=6)), ValueError, r"`state` must have the head dimension D=8 of `query`, got D=6 \(6 features of elu\)"),
    "state_value_dim": (dict(state=elu_state(value_dim=6)), ValueError, "head dimension Dv=8 of `value`, got Dv=6"),
    "state_device": (dict(state=elu_state(device="meta")), ValueError, "`state` must be on the device of `query`, cpu"),
    "stack_without_index": (dict(state=stack), ValueError, "`state_index` must say which of the 3 states"),
    "index_without_state": (dict(state_index=index), ValueError, "`state_index` must come with a `state`"),
    "index_type": (dict(state=stack, state_index=[0, 1]), TypeError, "`state_index` must be a torch.Tensor, got list"),
    "index_dtype": (dict(state=stack, state_index=index.float()), TypeError, "`state_index` must be int32 or int64"),
    "index_shape": (dict(state=stack, state_index=index[:1]), ValueError, r"`state_index` must have shape \[B=2\], got"),
    "index_device": (dict(state=stack, state_index=index.to("meta")), ValueError, "`state_index` must be on the device"),
    "index_high": (dict(state=stack, state_index=index + 1), ValueError,
                   r"`state_index` must lie between -1 \(no state\) and 2 .* got values from 1 to 3"),
    "index_low": (dict(state=stack, state_index=index - 2), ValueError, "got values from -2 to 0"),
    "backend": (dict(backend="cuda"), ValueError, "`backend` must be one of None, 'triton', 'torch', 'reference', got 'cuda'"),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("arguments, error, message", REFUSED.values(), ids=REFUSED)
def test_refuses(arguments, error, message, backend):
    arguments = {"query": query, "key": key, "value": value, "backend": backend} | arguments
    with pytest.raises(error, match=message):
        ntk_attention(**arguments)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_accepts_int32_and_int64_indices(backend):
    out = [
        ntk_attention(query, key, value, stack, state_index=index.to(dtype), backend=backend)
        for dtype in (torch.int32, torch.int64)
    ]
    assert torch.equal(*out)


def test_values_on_other_devices_are_read_only_on_demand(monkeypatch):
    """Reading them there would wait for the device."""
    elsewhere = torch.empty(2, device="meta")
    assert checks.readable(torch.zeros(2)) and not checks.readable(None) and not checks.readable(elsewhere)
    monkeypatch.setenv("NTK_KERNELS_CHECK", "1")
    assert checks.readable(elsewhere)


def test_what_was_got_is_short_and_unmistakable():
    for check, value, got in (
        (lambda x: checks.check_one_of("name", x, ("a", None)), torch.zeros(3, 3), "Tensor"),
        (lambda x: checks.check_one_of("name", x, ("a", None)), "b", "'b'"),
        (lambda x: checks.check_bool("name", x), numpy.bool_(True), r"numpy\.bool_?"),
        (lambda x: checks.check_int("name", x), numpy.int64(3), r"numpy\.int64"),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"^`name` must be .*, got {got}$"):
            check(value)
