"""Programs: what a call did to its tensors, and the Python function that is written of it."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 16  # of the addresses that the kernels are compiled for
_SCRATCH_ALIGNMENT = 128
_aten = torch.ops.aten
_ALLOCATIONS = (
    _aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default, _aten.new_empty.default,
    _aten.new_empty_strided.default,
)  # fmt: skip


class Register(NamedTuple):
    """A tensor of a program: one of its inputs, or made by a step."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    nbytes: int  # of its storage

    @classmethod
    def of(cls, tensor: Tensor) -> "Register":
        nbytes = tensor.untyped_storage().nbytes()
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, nbytes)


class View(NamedTuple):
    """A tensor in the memory of a register, `offset` elements behind its first."""

    register: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Operation(NamedTuple):
    """An operation of PyTorch. The results are numbers of registers, -1 for what is no tensor."""

    call: Callable
    args: Any
    kwargs: dict[str, Any]
    results: tuple[int, ...]
    is_pure: bool  # it changes no tensor


class KernelLaunch(NamedTuple):
    """A launch, `run(*grid, stream, *fixed, *args)` with addresses for tensors; `run(*args)` if `grid` is None."""

    run: Callable
    grid: tuple[int, int, int] | None
    fixed: tuple
    args: Any
    results: tuple = ()
    is_pure: bool = False


class Program:
    """Everything that a call did to its tensors, which come first among the registers."""

    def __init__(self, registers: list[Register], num_inputs: int, steps: list, results: list[View | None]):
        self.registers, self.num_inputs, self.results = registers, num_inputs, results
        used, self.steps = set(_registers_in(results)), []
        for step in reversed(steps):
            if step.is_pure and used.isdisjoint(step.results):
                continue
            used.update(_registers_in(tuple(step)))
            self.steps.insert(0, step)

    def function(self) -> Callable[..., tuple | None]:
        """Returns the program as a function of its tensors that returns a tuple of results, or None where an address is
        no multiple of 16 bytes. Its attribute `source` is its text."""
        return _Writer(self.registers, self.num_inputs, self.steps, self.results).function()


def _registers_in(item: Any) -> Iterable[int]:
    """The registers in nested records."""
    if isinstance(item, View):
        yield item.register
    elif isinstance(item, tuple | list):
        for x in item:
            yield from _registers_in(x)
    elif isinstance(item, dict):
        yield from _registers_in(tuple(item.values()))


def _is_contiguous(tensor: Register | View) -> bool:
    return tensor.stride == torch.empty(tensor.shape, device="meta").stride()


class _Writer:
    """Writes a program as Python: xi is the tensor of register i, ai its address, c. and f. are constants."""

    def __init__(self, registers: list[Register], num_inputs: int, steps: list, results: list):
        self.registers, self.num_inputs, self.steps, self.results = registers, num_inputs, steps, results
        self.lines: list[str] = []
        self.values: dict[str, Any] = {}
        self.names: dict[int, str] = {}  # of values, by id
        launches = [step for step in steps if isinstance(step, KernelLaunch)]
        operations = [step for step in steps if isinstance(step, Operation)]
        self.takes_addresses = any(step.grid is not None for step in launches)
        self.addressed = set(_registers_in([step.args for step in launches])) if self.takes_addresses else set()
        made = {number for step in operations if step.call in _ALLOCATIONS for number in step.results}
        self.as_tensors = set(_registers_in([results, [(step.args, step.kwargs) for step in operations]]))
        # Room that only kernels see is allocated at once.
        self.scratch = sorted((made & self.addressed) - self.as_tensors)

    def function(self) -> Callable:
        inputs = ", ".join(f"x{i}" for i in range(self.num_inputs))
        if self.takes_addresses:
            self._write_start(inputs)
        last_uses = self._last_uses()
        for i, step in enumerate(self.steps):
            self._write_step(step)
            if done := last_uses.get(i):
                self.lines.append(f"del {', '.join(f'x{number}' for number in done)}")
        self.lines.append(f"return ({''.join(f'{self._tensor(view)}, ' for view in self.results)})")
        source = f"def replay({inputs}):\n" + "".join(f"    {line}\n" for line in self.lines)
        exec(source, self.values)  # as dataclasses do; nothing is in it but what is written here
        replay = self.values["replay"]
        replay.source = source
        return replay

    def _last_uses(self) -> dict[int, list[int]]:
        """The registers that are not needed any more after each step."""
        last = {}
        for i, step in enumerate(self.steps):
            last |= dict.fromkeys((*_registers_in(tuple(step)), *step.results), i)
        kept = {-1, *range(self.num_inputs), *self.scratch, *_registers_in(self.results)}
        return {i: [number for number in last if last[number] == i and number not in kept] for i in set(last.values())}

    def _write_start(self, inputs: str) -> None:
        index = self._device().index
        self.values |= {"device": torch.cuda.device, "current_device": torch._C._cuda_getDevice,
                        "stream": torch._C._cuda_getCurrentRawStream}  # fmt: skip
        self.lines += [f"if current_device() != {index}:", f"    with device({index}):",
                       f"        return replay({inputs})"]  # fmt: skip
        given = [i for i in sorted(self.addressed) if i < self.num_inputs]
        self.lines += [f"a{i} = x{i}.data_ptr()" for i in given]
        addresses = " | ".join(f"a{i}" for i in given)
        self.lines += [f"if ({addresses}) & {_ALIGNMENT - 1}:", "    return None"]
        size = 0
        for i in self.scratch:
            self.lines.append(f"a{i} = a + {size}")
            size += -(-self.registers[i].nbytes // _SCRATCH_ALIGNMENT) * _SCRATCH_ALIGNMENT
        if self.scratch:
            of_scratch = len(self.lines) - len(self.scratch)
            options = f"dtype={self._constant(torch.uint8)}, device={self._constant(self._device())}"
            self.lines[of_scratch:of_scratch] = [
                f"x = {self._name(torch.empty)}(({size},), {options})",
                "a = x.data_ptr()",
            ]

    def _device(self) -> torch.device:
        return self.registers[0].device

    def _write_step(self, step: Operation | KernelLaunch) -> None:
        if isinstance(step, KernelLaunch):
            self.lines.append(self._launch(step))
            return
        if step.results and step.results[0] in self.scratch:
            return
        value = self._allocation(step) if step.call in _ALLOCATIONS else self._operation(step)
        targets = ["_" if number < 0 else f"x{number}" for number in step.results]
        self.lines.append(f"{', '.join(targets)} = {value}" if targets else value)
        self.lines += [f"a{i} = x{i}.data_ptr()" for i in step.results if i in self.addressed]

    def _allocation(self, step: Operation) -> str:
        (number,) = step.results
        made = self.registers[number]
        if step.call is _aten.empty_like.default:
            model = self.registers[step.args[0].register]
            if made[:4] == model[:4]:
                return f"{self._name(torch.empty_like)}({self._tensor(step.args[0])})"
        options = f"dtype={self._constant(made.dtype)}, device={self._constant(made.device)}"
        if _is_contiguous(made):
            return f"{self._name(torch.empty)}({self._constant(made.shape)}, {options})"
        return (
            f"{self._name(torch.empty_strided)}({self._constant(made.shape)}, {self._constant(made.stride)}, {options})"
        )

    def _operation(self, step: Operation) -> str:
        if step.call is _aten._to_copy.default and list(step.kwargs) == ["dtype"]:  # faster than the op by its name
            (taken,) = step.args
            shape_matters = step.results[0] in self.as_tensors or not self._is_whole(taken)
            source = self._tensor(taken) if shape_matters else f"x{taken.register}"
            return f"{source}.to({self._constant(step.kwargs['dtype'])})"
        arguments = [self._expression(x, self._tensor) for x in step.args]
        arguments += [f"{name}={self._expression(x, self._tensor)}" for name, x in step.kwargs.items()]
        return f"{self._name(step.call)}({', '.join(arguments)})"

    def _launch(self, step: KernelLaunch) -> str:
        if step.grid is None:
            arguments = [self._expression(x, self._tensor) for x in step.args]
        else:
            arguments = [*map(str, step.grid), f"stream({self._device().index})", *map(self._constant, step.fixed)]
            arguments += [self._expression(x, self._address) for x in step.args]
        return f"{self._name(step.run)}({', '.join(arguments)})"

    def _expression(self, item: Any, of_view: Callable[[View], str]) -> str:
        """Nested records as an expression; those without tensors are a constant."""
        if isinstance(item, View):
            return of_view(item)
        if not isinstance(item, tuple | list) or not any(True for _ in _registers_in(item)):
            return self._constant(item)
        items = "".join(f"{self._expression(x, of_view)}, " for x in item)
        if hasattr(item, "_fields") and not self.takes_addresses:
            return f"{self._name(type(item))}({items})"
        return f"[{items}]" if isinstance(item, list) else f"({items})"

    def _address(self, view: View) -> str:
        nbytes = view.offset * self.registers[view.register].dtype.itemsize
        return f"a{view.register} + {nbytes}" if nbytes else f"a{view.register}"

    def _tensor(self, view: View | None) -> str:
        if view is None:
            return "None"
        name, register = f"x{view.register}", self.registers[view.register]
        if view.offset == 0 and view[1:3] == register[:2]:
            return name
        if self._is_whole(view):
            return f"{name}.view({self._constant(view.shape)})"  # faster than the general way
        offset = str(view.offset)
        if view.register < self.num_inputs:
            offset = f"{name}.storage_offset()" + (f" + {offset}" if view.offset else "")
        return f"{name}.as_strided({self._constant(view.shape)}, {self._constant(view.stride)}, {offset})"

    def _is_whole(self, view: View) -> bool:
        """Returns whether a view has the numbers of its register in their order."""
        register = self.registers[view.register]
        same_size = math.prod(view.shape) == math.prod(register.shape)
        return view.offset == 0 and same_size and _is_contiguous(view) and _is_contiguous(register)

    def _constant(self, value: Any) -> str:
        return repr(value) if value is None or type(value) in (bool, int) else self._name(value, "c")

    def _name(self, value: Any, letter: str = "f") -> str:
        if id(value) not in self.names:
            self.names[id(value)] = name = f"{letter}{len(self.names)}"
            self.values[name] = value
        return self.names[id(value)]
