"""Parts of a softmax merged, and the prefix as one of the parts."""

import math

import pytest
import torch
from backends import all_backends
from cases import make_state

from ntk_kernels import merge_attention, ntk_attention, prefix_attention_state


@all_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_two_halves_of_the_keys_are_the_whole(dtype, backend):
    query, key, value = (torch.randn(2, 4, length, 16).to(dtype) for length in (9, 40, 40))
    parts = [
        ntk_attention(query, key[:, :, keys], value[:, :, keys], return_lse=True, backend=backend)
        for keys in (slice(0, 11), slice(11, 40))
    ]
    out, lse = merge_attention(*parts[0], *parts[1])
    whole, whole_lse = ntk_attention(query, key, value, return_lse=True, backend=backend)
    assert out.dtype == dtype and lse.dtype == torch.float32
    largest = max(part.abs().max().item() for part, _ in parts)  # each has been rounded to its dtype
    torch.testing.assert_close(out, whole, rtol=0, atol=max(1e-6, torch.finfo(dtype).eps * largest))
    torch.testing.assert_close(lse, whole_lse, rtol=1e-5, atol=1e-4)


@all_backends
@pytest.mark.parametrize("recipe", [
    {}, {"feature_map": "taylor1", "centers": 3, "rows": 2, "log_scale": True}, {"feature_map": None, "rows": 4},
    {"heads": 4, "feature_map": "taylor2"},
], ids=["elu", "all_parts", "rows_only", "per_query_head"])  # fmt: skip
def test_a_prefix_beside_another_kernel(recipe, backend):
    """Everything has gradients, through lse as well."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, heads, 12, 16, generator=generator).requires_grad_() for heads in (4, 2, 2)]
    state = make_state(generator, **{"heads": 2, "head_dim": 16, "value_dim": 16} | recipe)
    tensors = [tensor.requires_grad_() for tensor in state.tensors().values()]
    grad_out, grad_lse = torch.randn(2, 4, 12, 16), torch.randn(2, 4, 12)

    def gradients(out, lse):
        return torch.autograd.grad((out * grad_out).sum() + (lse * grad_lse).sum(), inputs + tensors)

    alone = ntk_attention(*inputs, is_causal=True, return_lse=True, backend=backend)
    merged = merge_attention(*alone, *prefix_attention_state(inputs[0], state, backend=backend))
    together = ntk_attention(*inputs, state, is_causal=True, return_lse=True, backend=backend)
    torch.testing.assert_close(merged, together, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(*merged), gradients(*together), rtol=1e-4, atol=1e-4)


@all_backends
def test_the_prefix_of_each_task(backend):
    state = make_state(torch.Generator().manual_seed(0), heads=2, head_dim=8, value_dim=5, stack=3)
    query, index = torch.randn(3, 4, 6, 8), torch.tensor([2, -1, 0])
    out, lse = prefix_attention_state(query, state, state_index=index, scale=0.5, backend=backend)
    assert out.shape == (3, 4, 6, 5)
    assert (out[1] == 0).all() and (lse[1] == -math.inf).all()
    phi = torch.nn.functional.elu(0.5**0.5 * query[0].double()) + 1
    z, k = (tensor[2].double().repeat_interleave(2, dim=0) for tensor in (state.z, state.k))
    mass = phi @ k.unsqueeze(-1)
    torch.testing.assert_close(out[0].double(), phi @ z / mass, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[0].double(), mass.log().squeeze(-1), rtol=1e-5, atol=1e-5)


def test_rows_that_saw_nothing():
    """An lse of -inf, or +inf as in FlashAttention 2, marks them; their out is ignored."""
    out = torch.tensor([[1.0], [2.0], [math.nan], [math.nan]], requires_grad=True)
    other = torch.tensor([[3.0], [math.nan], [5.0], [7.0]], requires_grad=True)
    lse = torch.tensor([0.0, 1.0, math.inf, -math.inf], requires_grad=True)
    other_lse = torch.tensor([0.0, -math.inf, 2.0, -math.inf], requires_grad=True)
    merged, merged_lse = merge_attention(out, lse, other, other_lse)
    assert merged.squeeze(1).tolist() == [2.0, 2.0, 5.0, 0.0]
    torch.testing.assert_close(merged_lse, torch.tensor([math.log(2), 1.0, 2.0, -math.inf]))
    gradients = torch.autograd.grad(merged.sum() + merged_lse[:3].sum(), (out, lse, other, other_lse))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert [gradient[3].item() for gradient in gradients] == [0, 0, 0, 0]


@pytest.mark.parametrize("dtypes, out_dtype, lse_dtype", [
    ((torch.bfloat16,) * 4, torch.bfloat16, torch.float32),
    ((torch.float64, torch.float32, torch.float32, torch.float32), torch.float64, torch.float64),
    ((torch.float16, torch.float32, torch.float16, torch.float32), torch.float16, torch.float32),
    ((torch.float16, torch.float32, torch.bfloat16, torch.float64), torch.float32, torch.float64),
])  # fmt: skip
def test_dtypes(dtypes, out_dtype, lse_dtype):
    """Nothing is computed in less than float32 or the widest dtype of out_a, lse_a, out_b and lse_b."""
    values = (torch.tensor([[1.0]]), torch.tensor([5.25]), torch.tensor([[0.0]]), torch.tensor([5.125]))
    out, lse = merge_attention(*(value.to(dtype) for value, dtype in zip(values, dtypes, strict=True)))
    assert out.dtype == out_dtype and lse.dtype == lse_dtype
    expected = torch.logaddexp(values[1].double(), values[3].double())
    torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=0)
    tolerance = 4 * max(torch.finfo(out_dtype).eps, torch.finfo(lse_dtype).eps)
    torch.testing.assert_close(out[0].double(), (5.25 - expected).exp(), rtol=tolerance, atol=0)


def test_large_logits():
    out, lse = merge_attention(torch.ones(2, 3), torch.tensor([1000.0, -1000]), torch.zeros(2, 3), torch.zeros(2))
    assert torch.equal(out, torch.tensor([[1.0] * 3, [0.0] * 3]))
    assert lse.tolist() == [1000.0, 0.0]


def test_gradcheck():
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2), (3,)) * 2]
    assert torch.autograd.gradcheck(merge_attention, tensors)
    assert torch.autograd.gradgradcheck(merge_attention, tensors)


def test_compile():
    tensors = [torch.randn(*shape) for shape in ((2, 4, 6, 8), (2, 4, 6)) * 2]
    compiled = torch.compile(merge_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), merge_attention(*tensors))


BAD = {
    "tensor": ({"out_a": 1}, TypeError, "`out_a` must be a torch.Tensor, got int"),
    "dtype": ({"lse_b": torch.zeros(2, 3, dtype=torch.int64)}, TypeError,
              "`lse_b` must be float16, bfloat16, float32 or float64, got torch.int64"),
    "out": ({"out_b": torch.zeros(2, 3, 5)}, ValueError,
            "`out_b` must have the shape of `out_a`, [2, 3, 4], got [2, 3, 5]"),
    "lse": ({"lse_b": torch.zeros(3, 2)}, ValueError,
            "`lse_b` must have the shape of `out_a` without its last dimension, [2, 3], got [3, 2]"),
}  # fmt: skip


@pytest.mark.parametrize("changes, error, message", BAD.values(), ids=BAD)
def test_bad_arguments(changes, error, message):
    arguments = {"out_a": torch.zeros(2, 3, 4), "lse_a": torch.zeros(2, 3)}
    arguments |= {"out_b": torch.zeros(2, 3, 4), "lse_b": torch.zeros(2, 3)}
    with pytest.raises(error) as caught:
        merge_attention(**arguments | changes)
    assert str(caught.value) == message


def test_bad_state():
    state = make_state(torch.Generator(), heads=3, head_dim=8, value_dim=8)
    with pytest.raises(ValueError) as caught:
        prefix_attention_state(torch.zeros(1, 4, 2, 8), state)
    assert str(caught.value) == "`state` must have a number of heads that divides Hq=4, got 3"
    with pytest.raises(TypeError) as caught:
        prefix_attention_state(torch.zeros(1, 4, 2, 8), None)
    assert str(caught.value) == "`state` must be a PrefixState, got NoneType"
