"""Calls like an earlier one, without the Python that led the earlier one to its kernels.

Of a call, a `Recording` notes what is done to tensors: PyTorch's operations, and launches of kernels. Views are not
among it: a kernel takes an address, and where an operation takes a view, its place in memory is known. What is left is
written out as a Python function of the call's tensors (`Program.function`). For the forward with an `elu` state that is

    def replay(x0, x1, x2, x3, x4):
        if current_device() != 0:
            with device(0):
                return replay(x0, x1, x2, x3, x4)
        a0 = x0.data_ptr()
        ...
        if (a0 | a1 | a2 | a4) & 15:
            return None
        x5 = empty_like(x0)
        a5 = x5.data_ptr()
        x6 = empty(c1, dtype=c2, device=c3)
        a6 = x6.data_ptr()
        x7 = x3.to(c4)
        a7 = x7.data_ptr()
        f5(256, 1, 1, stream(0), ..., (a0, c5), ((a1, c6), (a2, c7), None, None), (a7, None, a4, ...), ..., c8)
        return (x5, x6)

A call is of a kind with another if all that the recorded code looks at is the same: shapes, strides, dtypes and devices
of tensors, options, and modes of PyTorch (`kind_of`). Code that looks at the numbers in a tensor cannot be recorded.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .kinds import Known, forget, is_watched, kind_of, modes, new_known, watchers
from .recording import current_recording, record, refuse

__all__ = [
    "Known", "Repeated", "Replayed", "current_recording", "forget", "is_watched", "modes", "new_known", "refuse",
    "watchers",
]  # fmt: skip


class Repeated:
    """Calls of one kind of a function that returns tensors or None: the first is made as it is, the second is recorded,
    later ones are replayed."""

    __slots__ = ("_function", "_is_new", "_replay")

    def __init__(self, function: Callable[..., Sequence[Tensor | None]]):
        self._function, self._is_new = function, True
        self._replay: Callable | bool = True  # False if there is none

    def __call__(self, tensors: Sequence[Tensor], arguments_of: Callable) -> Sequence[Tensor | None]:
        """Returns the results of a call with `arguments_of(tensors)`, which has these tensors in this order."""
        replay = self._replay
        if self._is_new:
            self._is_new = False
        elif replay is True:
            with record(arguments_of(tensors)) as recording:
                results = self._function(*recording.arguments)
            program = recording.program(results)
            self._replay = program is not None and program.function()
            return results
        elif replay:
            results = replay(*tensors)
            if results is not None:
                return results
        return self._function(*arguments_of(tensors))


class Replayed:
    """Such a function with calls of any kind."""

    def __init__(self, function: Callable[..., Sequence[Tensor | None]]):
        self.function = function
        self._known = new_known()

    def __call__(self, *arguments: Any) -> Sequence[Tensor | None]:
        if is_watched():
            return self.function(*arguments)
        kind = kind_of(arguments)
        known = self._known.get(kind)
        if known is None:
            known = Repeated(self.function)
            self._known.keep(kind, known)
        return known([x for x in arguments if x is not None and isinstance(x, Tensor)], lambda tensors: arguments)
