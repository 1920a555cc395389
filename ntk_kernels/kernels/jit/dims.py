"""`Dims`: the constants that a kernel is compiled for, as one argument that kernels hand on whole to their helpers."""

import functools
import inspect
import re
from typing import Any, NamedTuple

import triton.language as tl


class Dims(NamedTuple):
    """Constants of a kernel. None for those that it does not read, so that calls that differ in them share a kernel."""

    FEATURE_MAP: Any = None  # name; None without a linear-attention term
    NUM_FEATURES: Any = None  # r
    SECTION: Any = None  # of the features: "elu", "linear", "pairs" or "squares"
    HEAD_DIM: Any = None  # D
    VALUE_DIM: Any = None  # Dv
    RANK: Any = None  # of a low-rank Z; 1 without one
    STATE_HEADS: Any = None  # heads of the state that the query heads of a group use
    PAGE_SIZE: Any = None  # keys of a page of the cache
    SPLIT: Any = None  # whether the keys are divided among programs
    HAS_LOWER: Any = None  # whether a window hides keys before a row
    HAS_UPPER: Any = None  # whether causality or a window hides keys after a row
    SOFTCAP: Any = None
    HAS_SCALE: Any = None  # whether scale != 0
    POSITIVE_SCALE: Any = None  # whether scale > 0
    PRECISION: Any = None  # of float32 products over the keys
    LOGIT_PRECISION: Any = None  # of those that make logits of the state
    PREFIX_PRECISION: Any = None  # of those with Z and the state's values
    OPERAND: Any = None  # dtype of φ and Z in products
    BLOCK_M: Any = None  # query rows (or prefix rows) of a tile
    BLOCK_N: Any = None  # keys (or own rows) of a tile
    BLOCK_D: Any = None  # D, padded
    BLOCK_DV: Any = None  # Dv, padded
    BLOCK_RANK: Any = None  # RANK, padded
    BLOCK_S: Any = None  # splits merged at a time
    CHUNK: Any = None  # features (or own rows) of a step
    SLICES: Any = None  # programs that share the columns of dK and dV
    STAGES: Any = None  # tiles in flight
    HOPPER: Any = None  # whether products run beside the program, with registers as their left side


def dims_for(kernel, **constants) -> Dims:
    """The constants that `kernel` reads, each a `tl.constexpr`, but for None."""
    read = _read_by(kernel)
    missing = read - constants.keys()
    if missing:
        raise TypeError(f"{kernel.__name__} reads {sorted(missing)}, which its launcher does not give")
    return Dims(**{name: x if (x := constants[name]) is None else tl.constexpr(x) for name in read})


@functools.cache
def _read_by(kernel) -> frozenset[str]:
    """Names of the constants that a kernel and the helpers that it calls read."""
    names, pending, seen = set(), [kernel], set()
    while pending:
        function = pending.pop()
        if function in seen:
            continue
        seen.add(function)
        names.update(re.findall(r"\bdims\.([A-Z_]+)\b", _source_of(function)))
        called = re.findall(r"\b(\w+)\(", _source_of(function))
        pending += [other for name in called if hasattr(other := function.fn.__globals__.get(name), "fn")]
    return frozenset(names)


def _source_of(function) -> str:
    """Source text of a jit function, compiled or interpreted."""
    return function.src if hasattr(function, "src") else inspect.getsource(function.fn)
