"""Arguments of decode that are refused."""

import pytest
import torch
from backends import all_backends
from cases import make_state

from ntk_kernels import ntk_attention_decode

BAD = {
    "rows": ({"query": torch.randn(2, 4, 17, 8)}, ValueError,
             "`query` must have at most 16 rows (Lq), got 17; ntk_attention takes any number"),
    "key": ({"key_cache": torch.randn(3, 2, 32, 8)}, ValueError,
            "`key_cache` must have shape [B=2, Hkv, Lk, D=8], got [3, 2, 32, 8]"),
    "value": ({"value_cache": torch.randn(2, 2, 31, 8)}, ValueError,
              "`value_cache` must have shape [B=2, Hkv=2, Lk=32, Dv], got [2, 2, 31, 8]"),
    "dtype": ({"key_cache": torch.randn(2, 2, 32, 8).half()}, TypeError,
              "`key_cache` must have the dtype of `query`, torch.float32, got torch.float16"),
    "heads": ({"query": torch.randn(2, 5, 1, 8)}, ValueError,
              "the heads of `query` must be a multiple of the heads of `key_cache`, got Hq=5, Hkv=2"),
    "lengths": ({"cache_seqlens": torch.tensor([5])}, ValueError, "`cache_seqlens` must have shape [B=2], got [1]"),
    "lengths_dtype": ({"cache_seqlens": torch.tensor([5.0, 6.0])}, TypeError,
                      "`cache_seqlens` must be int32 or int64, got torch.float32"),
    "too_long": ({"cache_seqlens": torch.tensor([5, 33])}, ValueError,
                 "`cache_seqlens` must lie between 0 and 32, the keys that the cache has room for, got values from 5 to 33"),
    "negative": ({"cache_seqlens": torch.tensor([-1, 3])}, ValueError,
                 "`cache_seqlens` must lie between 0 and 32, the keys that the cache has room for, got values from -1 to 3"),
    "splits": ({"num_splits": 0}, ValueError, "`num_splits` must be at least 1, got 0"),
    "page_size": ({"block_table": torch.zeros(2, 3, dtype=torch.int32), "key_cache": torch.randn(9, 2, 24, 8),
                   "value_cache": torch.randn(9, 2, 24, 8)}, ValueError,
                  "`key_cache` must have pages [P, Hkv, page_size, D] of a power of two from 16 on, got page_size=24"),
    "table_shape": ({"block_table": torch.zeros(3, 3, dtype=torch.int32)}, ValueError,
                    "`block_table` must have shape [B=2, n], got [3, 3]"),
    "table_dtype": ({"block_table": torch.zeros(2, 3)}, TypeError,
                    "`block_table` must be int32 or int64, got torch.float32"),
    "table_alone": ({"block_table": torch.zeros(2, 3, dtype=torch.int32), "cache_seqlens": None}, ValueError,
                    "`cache_seqlens` must come with `block_table`, got None"),
    "page": ({"block_table": torch.tensor([[0, 2, -1], [1, 99, 99]]), "cache_seqlens": torch.tensor([40, 32])}, ValueError,
             "`block_table` must lie between 0 and 1, the last page, where `cache_seqlens` reaches, got values from 0 to 2"),
    "beyond_table": ({"block_table": torch.tensor([[0], [1]]), "cache_seqlens": torch.tensor([33, 32])}, ValueError,
                     "`cache_seqlens` must lie between 0 and 32, the keys that the cache has room for, got values from "
                     "32 to 33"),
    "index": ({"state": make_state(torch.Generator(), heads=2, head_dim=8, value_dim=8, stack=2),
               "state_index": torch.tensor([0, 2])}, ValueError,
              "`state_index` must lie between -1 (no state) and 1 (`state` holds 2), got values from 0 to 2"),
    "key_start": ({"key_start": torch.tensor([0])}, ValueError, "`key_start` must have shape [B=2], got [1]"),
    "causal": ({"is_causal": 1}, TypeError, "`is_causal` must be a bool, got int"),
}  # fmt: skip


@all_backends
@pytest.mark.parametrize("changes, error, message", BAD.values(), ids=BAD)
def test_bad_arguments(changes, error, message, backend):
    arguments = {"query": torch.randn(2, 4, 1, 8), "key_cache": torch.randn(2, 2, 32, 8),
                 "value_cache": torch.randn(2, 2, 32, 8), "cache_seqlens": torch.tensor([32, 5])}  # fmt: skip
    with pytest.raises(error) as caught:
        ntk_attention_decode(**arguments | changes, backend=backend)
    assert str(caught.value) == message
