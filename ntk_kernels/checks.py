"""Argument checks and their messages: each names the argument, what it must be and what it got.

Only shapes, dtypes and devices are looked at, so that a check never waits for a device and never breaks a
compiled graph. The values of index tensors are checked where that is free (`check_values`).
"""

import math
import os
import sys
from itertools import pairwise
from numbers import Real

import torch
from torch import Tensor

_MAX_FLOAT = int(sys.float_info.max)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, value) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got {type(value).__name__}")
    if not _is_strided(value):
        raise TypeError(f"`{name}` must be a dense tensor, got {'nested' if value.is_nested else value.layout}")


def _is_strided(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def check_floating(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"`{name}` must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, expected: tuple, names: str) -> None:
    """`expected` has None where any size will do; `names` is the shape in letters, for the message."""
    if tensor.dim() == len(expected):
        for size, want in zip(tensor.shape, expected, strict=True):
            if want is not None and size != want:
                break
        else:
            return
    wanted = ", ".join(
        letter if want is None else f"{letter}={want}" for letter, want in zip(names.split(), expected, strict=True)
    )
    raise ValueError(f"`{name}` must have shape [{wanted}], got {list(tensor.shape)}")


def check_bool(name: str, value) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be a bool, got {_type_of(value)}")


def check_int(name: str, value, *, minimum: int = -(2**62), maximum: int = 2**62) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"`{name}` must be an int, got {_type_of(value)}")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}")
    if value > maximum:
        raise ValueError(f"`{name}` must be at most {maximum}, got {value}")


def check_finite(name: str, value, *, positive: bool = False) -> None:
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real | torch.SymFloat)):
        raise TypeError(f"`{name}` must be a float, got {type(value).__name__}")
    if type(value) is int and not -_MAX_FLOAT <= value <= _MAX_FLOAT:
        raise ValueError(f"`{name}` must fit a float, got an int of {value.bit_length()} bits")
    if not -math.inf < value < math.inf:  # NaN included; math.isfinite would break a graph
        raise ValueError(f"`{name}` must be finite, got {value}")
    if positive and value <= 0:
        raise ValueError(f"`{name}` must be positive, got {value}")


def check_one_of(name: str, value, allowed: tuple) -> None:
    comparable = type(value) in map(type, allowed)
    if not comparable or value not in allowed:
        got = repr(value) if comparable else _type_of(value)
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {got}")


def _type_of(value) -> str:
    """numpy.int64 is not torch.int64, and numpy.bool no bool."""
    kind = type(value)
    return kind.__name__ if kind.__module__ in ("builtins", "torch") else f"{kind.__module__}.{kind.__name__}"


def check_qkv(query: Tensor, key: Tensor, value: Tensor, suffix: str = "", *, paged: bool = False) -> None:
    """`query` [B, Hq, Lq, D], `key` [B, Hkv, Lk, D], `value` [B, Hkv, Lk, Dv]; one dtype, one device.

    `suffix` belongs to the names of `key` and `value`; `paged`: they are [P, Hkv, page_size, ...].
    """
    tensors = (query, key, value)
    if all(type(tensor) is Tensor and _is_strided(tensor) and tensor.dim() == 4 for tensor in tensors):
        batch, num_heads, _, head_dim = query.shape
        if (
            (paged or key.shape[0] == batch)
            and key.shape[3] == head_dim > 0
            and value.shape[:3] == key.shape[:3]
            and key.shape[1] > 0
            and num_heads % key.shape[1] == 0
            and query.dtype == key.dtype == value.dtype
            and query.dtype in FLOAT_DTYPES
            and query.device == key.device == value.device
        ):
            return  # the usual case in one go; what follows finds the words for what is wrong
    key_name, value_name = f"key{suffix}", f"value{suffix}"
    for name, tensor in zip(("query", key_name, value_name), tensors, strict=True):
        check_floating(name, tensor)
    check_shape("query", query, (None, None, None, None), "B Hq Lq D")
    batch, num_heads, _, head_dim = query.shape
    if head_dim == 0:
        raise ValueError(f"`query` must have a head dimension D of at least 1, got shape {list(query.shape)}")
    batch, letters = (None, "P Hkv page_size") if paged else (batch, "B Hkv Lk")
    check_shape(key_name, key, (batch, None, None, head_dim), f"{letters} D")
    check_shape(value_name, value, (*key.shape[:3], None), f"{letters} Dv")
    for name, tensor in ((key_name, key), (value_name, value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"`{name}` must have the dtype of `query`, {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"`{name}` must be on the device of `query`, {query.device}, got {tensor.device}")
    num_kv_heads = key.shape[1]
    if num_heads != num_kv_heads and (num_kv_heads == 0 or num_heads % num_kv_heads):
        raise ValueError(
            f"the heads of `query` must be a multiple of the heads of `{key_name}`, got Hq={num_heads}, "
            f"Hkv={num_kv_heads}"
        )


def check_attn_mask(attn_mask: Tensor, query: Tensor, key: Tensor) -> None:
    check_tensor("attn_mask", attn_mask)
    if attn_mask.dtype not in (torch.bool, *FLOAT_DTYPES):
        raise TypeError(f"`attn_mask` must be bool (True = visible) or floating-point, got {attn_mask.dtype}")
    if attn_mask.dtype == torch.float64 and query.dtype != torch.float64:
        raise TypeError(
            f"`attn_mask` must be bool, float32 or narrower, as `query` is {query.dtype}, got torch.float64"
        )
    if attn_mask.device != query.device:
        raise ValueError(f"`attn_mask` must be on the device of `query`, {query.device}, got {attn_mask.device}")
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    fits = attn_mask.dim() <= 4 and all(
        size == 1 or size == want
        for size, want in zip(attn_mask.shape[::-1], full[::-1], strict=False)
    )  # fmt: skip
    if not fits:
        hint = ""
        if attn_mask.shape == (full[0], full[3]):
            hint = "; a padding mask [B, Lk] goes in as mask[:, None, None], or as `key_start` and `key_stop`"
        raise ValueError(
            f"`attn_mask` must be broadcastable to [B, Hq, Lq, Lk] = {list(full)}, got {list(attn_mask.shape)}{hint}"
        )


def check_window(window) -> None:
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise TypeError(f"`window` must be a pair (left, right) of ints, -1 for unbounded, got {window!r}")
    for i, side in enumerate(window):
        check_int(f"window[{i}]", side, minimum=-1)


def check_state_fits(state, query: Tensor, key: Tensor, value: Tensor, state_index: Tensor | None, batch: int) -> None:
    """The state has the head dimensions and heads of the call, and `state_index` [B] goes with it."""
    if state.device != query.device:
        raise ValueError(f"`state` must be on the device of `query`, {query.device}, got {state.device}")
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    if state.num_heads != num_heads and state.num_heads != num_kv_heads:  # no `in`: Dynamo finds 2 in no SymInts
        raise ValueError(
            f"`state` must have Hq={num_heads} or Hkv={num_kv_heads} heads, one for each head of `query` or of "
            f"`key` (tensors are [B, H, L, D]), got {state.num_heads}"
        )
    for name, got, want, whose in (
        ("D", state.head_dim, query.shape[3], "query"),
        ("Dv", state.value_dim, value.shape[3], "value"),
    ):
        if got != want:
            features = (
                f" ({state.k.shape[-1]} features of {state.feature_map})"
                if whose == "query" and state.k is not None
                else ""
            )
            raise ValueError(
                f"`state` must have the head dimension {name}={want} of `{whose}`, got {name}={got}{features}"
            )
    if state_index is None:
        if state.is_stack:
            raise ValueError(
                f"`state_index` must say which of the {state.num_states} states of the stack each batch row uses "
                f"(int tensor [B={batch}], -1 for none), got None"
            )
        return
    check_sequence_tensor("state_index", state_index, batch, "B", query)


def check_sequence_tensor(name: str, tensor: Tensor, length: int | None, letters: str, query: Tensor) -> None:
    """`tensor`: int32 or int64 of the given length, beside `query`."""
    check_tensor(name, tensor)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"`{name}` must be int32 or int64, got {tensor.dtype}")
    check_shape(name, tensor, (length,), letters)
    if tensor.device != query.device:
        raise ValueError(f"`{name}` must be on the device of `query`, {query.device}, got {tensor.device}")


def check_values(inputs) -> None:
    """Checks the values of the index tensors of `Inputs`, where reading them is free: on the CPU.

    With NTK_KERNELS_CHECK=1 on other devices too, which the call then waits for.
    """
    if not (readable(inputs.state.state_index) or readable(inputs.cu_seqlens_q) or readable(inputs.cu_seqlens_k)):
        return
    inputs = inputs.uniform()
    if readable(inputs.state.state_index):
        check_index_range(inputs.state.state_index, inputs.state.num_states)
    for letter, tensor in (("q", inputs.query), ("k", inputs.key)):
        cu_seqlens, longest = getattr(inputs, f"cu_seqlens_{letter}"), getattr(inputs, f"max_seqlen_{letter}")
        if readable(cu_seqlens):
            check_cu_seqlens(f"cu_seqlens_{letter}", cu_seqlens, f"max_seqlen_{letter}", longest, tensor.shape[2])


def check_cache_values(inputs) -> None:
    """Checks those of `DecodeInputs`: lengths within the cache, and the pages that they need within those there are."""
    cache_seqlens, block_table = inputs.cache_seqlens, inputs.block_table
    if readable(inputs.state.state_index):
        check_index_range(inputs.state.state_index, inputs.state.uniform().num_states)
    if not readable(cache_seqlens):
        return
    num_pages, _, page_size, _ = inputs.key_cache.shape
    size = inputs.cache_size
    if cache_seqlens.numel():
        low, high = (int(bound) for bound in cache_seqlens.aminmax())
        if low < 0 or high > size:
            raise ValueError(
                f"`cache_seqlens` must lie between 0 and {size}, the keys that the cache has room for, got values from "
                f"{low} to {high}"
            )
    if readable(block_table) and block_table.numel():
        used = torch.arange(0, size, page_size, device=block_table.device) < cache_seqlens[:, None]
        pages = block_table[used]
        if pages.numel() and not 0 <= int(pages.min()) <= int(pages.max()) < num_pages:
            raise ValueError(
                f"`block_table` must lie between 0 and {num_pages - 1}, the last page, where `cache_seqlens` reaches, "
                f"got values from {int(pages.min())} to {int(pages.max())}"
            )


def check_finite_rows(name: str, tensor: Tensor) -> None:
    """Refuses NaN and infinity with the index of the first row [..., D] that has one. Reads values."""
    wrong = ~tensor.detach().isfinite().all(-1)
    if wrong.any():
        index = wrong.nonzero()[0].tolist()
        raise ValueError(f"`{name}` must be finite, got {tensor[tuple(index)].tolist()[:4]}... at index {index}")


def readable(tensor: Tensor | None) -> bool:
    """Returns whether values are to be read: on the CPU, and elsewhere with NTK_KERNELS_CHECK=1."""
    if tensor is None:
        return False
    return tensor.device.type == "cpu" or os.environ.get("NTK_KERNELS_CHECK", "0") == "1"


def check_cu_seqlens(name: str, cu_seqlens: Tensor, longest_name: str, longest: int, total: int) -> None:
    """Starts at 0, never falls, ends within the `total` packed rows; no sequence exceeds `longest`. Reads values."""
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in pairwise(bounds)]
    if bounds[0] != 0 or min(lengths, default=0) < 0 or bounds[-1] > total:
        raise ValueError(f"`{name}` must rise from 0 to at most {total}, the number of packed rows, got {bounds}")
    if max(lengths, default=0) > longest:
        raise ValueError(f"`{longest_name}` must be at least the longest sequence, {max(lengths)}, got {longest}")


def check_index_range(state_index: Tensor, num_states: int) -> None:
    """Every entry is -1 (no state) or a state of the stack. Reads the values: only for tensors on the CPU."""
    if state_index.numel():
        low, high = (int(bound) for bound in state_index.aminmax())
        if low < -1 or high >= num_states:
            raise ValueError(
                f"`state_index` must lie between -1 (no state) and {num_states - 1} (`state` holds {num_states}), "
                f"got values from {low} to {high}"
            )
