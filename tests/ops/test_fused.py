"""PyTorch's fused ops as we call them. Their results are covered by test_attention.py (and, on a GPU, test_gpu.py)."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ntk_kernels.backends.torch import fused


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this PyTorch does not know CUDA tensors")
@pytest.mark.parametrize("op", [fused._Flash, fused._Cudnn, fused._Efficient], ids=lambda op: op.__name__)
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_gpu_ops_take_our_arguments(op, has_bias, monkeypatch):
    """Without a GPU, schema and shapes are checked and nothing else."""
    if has_bias and op is not fused._Efficient:
        pytest.skip("only the efficient op is called with a bias")
    monkeypatch.setattr(fused, "_op", lambda *args: op)
    kv_heads = 8 if op is fused._Cudnn else 2
    with FakeTensorMode():
        query = torch.empty(2, 8, 100, 60, device="cuda", dtype=torch.float16)
        key = torch.empty(2, kv_heads, 130, 60, device="cuda", dtype=torch.float16)
        value = torch.empty(2, kv_heads, 130, 40, device="cuda", dtype=torch.float16)
        bias = torch.empty(2, 1, 1, 130, device="cuda", dtype=torch.float16) if has_bias else None
        out, lse = fused.forward(query, key, value, 0.1, False, bias)
        assert (out.shape, lse.shape, lse.dtype) == ((2, 8, 100, 40), (2, 8, 100), torch.float32)
        grads = fused.backward(out, query, key, value, out, lse, 0.1, False, bias)
        assert [grad.shape for grad in grads] == [query.shape, key.shape, value.shape]


def test_combined_lse_gives_the_gradients_of_a_part():
    """The torch backend relies on it: a flash backward with the out and lse of a larger softmax is exact for its
    keys."""
    query, key, value = (torch.randn(1, 2, n, 8, dtype=torch.float64) for n in (5, 12, 12))
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, scale=0.3)
    grad_out = torch.randn_like(out)
    exact = torch.autograd.grad(out, leaves, grad_out)
    lse = (0.3 * query @ key.mT).logsumexp(-1)
    parts = [
        fused.backward(
            grad_out, query, key[:, :, keys], value[:, :, keys], out.detach(), lse, 0.3, False, None
        )
        for keys in (slice(0, 5), slice(5, None))
    ]  # fmt: skip
    torch.testing.assert_close(parts[0][0] + parts[1][0], exact[0])
    for i in (1, 2):
        torch.testing.assert_close(torch.cat([part[i] for part in parts], dim=2), exact[i])


def test_rows_without_visible_keys():
    """PyTorch's CPU op says lse = 0 there."""
    query, key, value = torch.randn(3, 1, 2, 6, 8)
    bias = torch.zeros(1, 1, 6, 6)
    bias[:, :, 2] = -math.inf
    out, lse = fused.forward(query, key, value, 0.3, False, bias)
    assert (lse[:, :, 2] == -math.inf).all()
    assert (out[:, :, 2] == 0).all()
    assert lse[:, :, 3:].isfinite().all()
    grads = fused.backward(torch.randn_like(out), query, key, value, out, lse, 0.3, False, bias)
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][:, :, 2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_negative_scale_rounds_nothing(dtype):
    """Queries times -32 would not fit in float16, and in bfloat16 be other numbers."""
    query, key, value, grad = (torch.randn(1, 2, 6, 8).to(dtype) for _ in range(4))
    query[0, 0, 0, 0] = 4096
    for scale in (-0.1, -32.0):
        (out, lse), (expected, expected_lse) = (
            fused.forward(q, key, value, x, False, None) for q, x in ((query, scale), (-query, -scale))
        )
        torch.testing.assert_close((out, lse), (expected, expected_lse), rtol=0, atol=0)
        grads, expected_grads = (
            fused.backward(grad, q, key, value, out, lse, x, False, None) for q, x in ((query, scale), (-query, -scale))
        )
        torch.testing.assert_close(grads, (-expected_grads[0], *expected_grads[1:]), rtol=0, atol=0)
