"""Recordings of what a call does to its tensors."""

import threading
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .program import KernelLaunch, Operation, Program, Register, View

_MAX_STEPS = 200  # a longer recording, of a loop over chunks, gains nothing
_aten = torch.ops.aten
_NEEDS_NUMBERS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_active = threading.local()


def refuse(reason: str) -> None:
    """Tells the recording that the caller is part of, if there is one, that the call cannot be replayed."""
    if (recording := current_recording()) is not None:
        recording.problem = reason


def current_recording() -> "Recording | None":
    """Returns the recording that the caller is part of."""
    return getattr(_active, "recording", None)


class Recording(TorchDispatchMode):
    """Records what is done, while it is entered, to the tensors of `arguments` and to those made of them.

    The recorded code has to take `arguments` from here: they are other objects than those given, so that two tensors
    that are the same, or share memory, can be told apart. It is entered by `record`.
    """

    def __init__(self, arguments: Iterable[Any]):
        super().__init__()
        self.arguments = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
        self.problem: str | None = None  # why there is no program
        self._is_paused = False
        self._inputs = [x for x in self.arguments if isinstance(x, Tensor)]
        self._registers: list[Register] = []
        self._offsets: list[int] = []  # of registers in their storages
        self._in_storage: dict[int, list[int]] = {}
        self._steps: list[Operation | KernelLaunch] = []
        for tensor in self._inputs:
            numbers = self._in_storage.get(tensor.untyped_storage()._cdata, [])
            self._in_storage[tensor.untyped_storage()._cdata] = [*numbers, self._add(tensor)]

    @contextmanager
    def paused(self):
        """Leaves out what runs inside."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.problem is not None or self._is_paused:
            return func(*args, **kwargs)
        with self:  # ops that consist of others arrive whole below autograd
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        if func.is_view or func is _aten._unsafe_view.default:
            return result
        if _NEEDS_NUMBERS & set(func.tags) or len(self._steps) == _MAX_STEPS:
            self.problem = f"{func} needs numbers of a tensor, or is one operation too many"
            return result
        is_pure, numbers = not func._schema.is_mutable, []
        taken, named = self._refer(args), {name: self._refer(x) for name, x in kwargs.items()}
        for x in (result if isinstance(result, tuple | list) else (result,)) if is_pure else ():
            numbers.append(self._add(x) if isinstance(x, Tensor) else -1)
            if isinstance(x, Tensor):  # whatever was in such a storage before is gone
                self._in_storage[x.untyped_storage()._cdata] = [numbers[-1]]
        self._steps.append(Operation(func, taken, named, tuple(numbers), is_pure))
        return result

    def launch(self, run: Callable, args: tuple, grid: tuple[int, int, int] | None = None, fixed: tuple = ()) -> None:
        """Adds the launch of a kernel, with the arguments of `KernelLaunch`."""
        if self.problem is None:
            self._steps.append(KernelLaunch(run, grid, fixed, self._refer(args)))

    def program(self, results: Iterable[Tensor | None]) -> Program | None:
        """Returns what was done to get `results`, None if it depends on more than the kind of the call."""
        views = [None if result is None else self._locate(result) for result in results]
        if self.problem is not None:
            return None
        return Program(self._registers, len(self._inputs), self._steps, views)

    def _add(self, tensor: Tensor) -> int:
        self._registers.append(Register.of(tensor))
        self._offsets.append(tensor.storage_offset())
        return len(self._registers) - 1

    def _refer(self, item: Any) -> Any:
        """The item with views of registers for tensors."""
        if isinstance(item, Tensor):
            return self._locate(item)
        if isinstance(item, tuple | list):
            items = [self._refer(x) for x in item]
            return type(item)(*items) if hasattr(item, "_fields") else type(item)(items)
        return item

    def _locate(self, tensor: Tensor) -> View | None:
        candidates = self._in_storage.get(tensor.untyped_storage()._cdata, [])
        if len(candidates) > 1:  # inputs that share a storage
            of_it = [i for i in candidates if self._inputs[i] is tensor]
            candidates = of_it or [i for i in candidates if self._offsets[i] == tensor.storage_offset()]
        if len(candidates) != 1 or self._registers[candidates[0]].dtype != tensor.dtype:
            self.problem = "a tensor is not a view of one that is known"
            return None
        (number,) = candidates
        return View(number, tuple(tensor.shape), tensor.stride(), tensor.storage_offset() - self._offsets[number])


@contextmanager
def record(arguments: Iterable[Any]):
    """Makes a recording of a call with `arguments`, of which what runs inside is a part."""
    before, recording = current_recording(), Recording(arguments)
    _active.recording = recording
    try:
        with recording:
            yield recording
    finally:
        _active.recording = before
