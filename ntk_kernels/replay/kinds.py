"""Kinds of calls: all that the code of a call looks at, beside the numbers in tensors."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_MAX_KINDS = 1024
_names = ("NTK_KERNELS_BACKEND", "NTK_KERNELS_AUTOTUNE", "NTK_KERNELS_CHECK")
# os.environ decodes and encodes at each look, which takes longer than a launch.
_environment = getattr(os.environ, "_data", os.environ)
_backend, _autotune, _check = (
    os.environ.encodekey(name) if hasattr(os.environ, "encodekey") else name for name in _names
)
_is_deterministic, _has_cudnn = torch._C._get_deterministic_algorithms, torch._C._get_cudnn_sdp_enabled
_has_flash, _has_efficient = torch._C._get_flash_sdp_enabled, torch._C._get_mem_efficient_sdp_enabled
_is_cudnn_enabled, _is_cudnn_deterministic = torch._C._get_cudnn_enabled, torch._C._get_cudnn_deterministic


def modes() -> tuple:
    """Returns all that calls look at beside their arguments."""
    return (
        _environment.get(_backend), _environment.get(_autotune), _environment.get(_check),
        _is_deterministic(), _has_cudnn(), _has_flash(), _has_efficient(), _is_cudnn_enabled(),
        _is_cudnn_deterministic(),
    )  # fmt: skip


_NUMBERS = (int, float, bool, str)


def kind_of(arguments: Iterable[Any]) -> tuple:
    """Returns the kind of a call of an op's implementation."""
    return (
        modes(),
        *[
            x if x is None or x.__class__ in _NUMBERS
            else (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor)
            else tuple(x) if isinstance(x, list) else x
            for x in arguments
        ],
    )  # fmt: skip


class Known(dict[tuple, Any]):
    """A table of kinds of calls. It is emptied when it is full."""

    def keep(self, kind: tuple, value: Any) -> None:
        if len(self) >= _MAX_KINDS:
            self.clear()
        self[kind] = value


_all_known: list[Known] = []


def new_known() -> Known:
    """Returns an empty `Known` that `forget` empties too."""
    _all_known.append(Known())
    return _all_known[-1]


def forget() -> None:
    """Forgets all kinds of calls, for when something has changed that decides what calls do."""
    for known in _all_known:
        known.clear()


watchers: list[Callable[[], bool]] = []  # each says whether something wants to see every launch


def is_watched() -> bool:
    """Returns whether something wants to see every launch, such as a hook of Triton's."""
    for watcher in watchers:  # noqa: SIM110 (`any` takes twice as long)
        if watcher():
            return True
    return False
