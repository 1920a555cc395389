"""Small calls in the widest dtype of each backend, for tests of single properties."""

import torch
from cases import F64, make_state


def dtype_of(backend):
    """Returns the widest dtype that a backend computes in."""
    return torch.float32 if backend == "triton" else F64


def qkv(backend, batch=2, heads=4, kv_heads=2, seq_q=21, seq_k=21, dim=8):
    query = torch.randn(batch, heads, seq_q, dim, dtype=dtype_of(backend))
    key, value = torch.randn(2, batch, kv_heads, seq_k, dim, dtype=dtype_of(backend))
    return query, key, value


def a_state(backend, **recipe):
    recipe = {"head_dim": 8, "value_dim": 8, "heads": 2, "dtype": dtype_of(backend)} | recipe
    return make_state(torch.Generator().manual_seed(0), **recipe)


def sdpa(query, key, value, **kwargs):
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True, **kwargs)
