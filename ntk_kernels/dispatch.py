"""Chooses the backend that serves a call.

`None` (the default) takes the environment variable NTK_KERNELS_BACKEND or else the fastest backend for the device. A
call that it does not support falls back to the next one, with one warning per reason; a backend named in the call
raises instead.
"""

import os
import warnings

import torch
from torch import Tensor

from . import checks
from .backends import BACKENDS
from .backends.triton import kernels_lack

_warned: set[tuple[str, str]] = set()


def choose_backend(
    requested: str | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    softcap: float | None = None,
    *,
    is_square: bool = False,
) -> str:
    """The backend that serves the call. `is_square`: nothing is hidden, or all that lies right of the diagonal of as
    many rows as keys.

    Raises:
        ValueError: if `requested`, or the environment variable, is no backend.
        NotImplementedError: if `requested` cannot serve the call.
    """
    checks.check_one_of("backend", requested, (None, *BACKENDS))
    if requested is not None:
        first = requested
    elif first := os.environ.get("NTK_KERNELS_BACKEND"):
        checks.check_one_of("NTK_KERNELS_BACKEND", first, tuple(BACKENDS))
    else:
        is_square = is_square and softcap is None
        first = next(name for name, backend in BACKENDS.items() if backend.prefers(query, key, value, is_square))
    lacks = BACKENDS[first].lacks(query, value, attn_mask, softcap)
    if lacks is None:
        return first
    names = list(BACKENDS)
    others = [
        name
        for name in names[names.index(first) + 1 :]
        if BACKENDS[name].lacks(query, value, attn_mask, softcap) is None
    ]
    if requested is not None:
        choice = " or ".join(map(repr, others))
        raise NotImplementedError(f"backend={requested!r} does not support {lacks}; use backend=None or {choice}")
    if not torch.compiler.is_compiling() and (first, lacks) not in _warned:
        _warned.add((first, lacks))
        cost = ", which is slower and takes O(Lq·Lk) memory" if others[0] == "reference" else ""
        warnings.warn(
            f"ntk_kernels: the {first!r} backend does not support {lacks}; this call, and later ones like it, go to "
            f"{others[0]!r}{cost}",
            stacklevel=3,
        )
    return others[0]


def sums_backend(keys: Tensor, values: Tensor) -> str:
    """The backend for sums of features: the kernels where they can be had, unless the environment asks for another."""
    first = os.environ.get("NTK_KERNELS_BACKEND") or ("triton" if keys.device.type == "cuda" else "torch")
    checks.check_one_of("NTK_KERNELS_BACKEND", first, tuple(BACKENDS))
    return "triton" if first == "triton" and kernels_lack(keys, values) is None else "torch"
