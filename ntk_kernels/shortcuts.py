"""The short way of the public functions: a call of a kind that has passed its checks goes straight to a replay.

`Shortcuts.take` finds what was learned of the kind of a call. For a new kind, `Shortcuts.add` learns from a call that
has just gone the long way, once its op can be replayed (`replay.py`). A shortcut has no checks, as an equal call has
passed them, and does not go through PyTorch's dispatcher. Calls that somebody watches take the long way: those under
autocast, a transform of torch.func, a mode, a trace or a profiler, and calls with tensors of other classes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from . import checks
from .inputs import NUM_DIFFERENTIABLE, DecodeInputs, Inputs
from .replay import Program, Replayed, is_watched, keep, kinds, modes
from .state import PrefixState


class Call:
    """A call that may become a shortcut: its kind, and the tensors that it has, in the order of its op."""

    __slots__ = ("kind", "tensors")

    def __init__(self, kind: tuple, tensors: list[Tensor]):
        self.kind, self.tensors = kind, tensors


class Shortcuts:
    """The shortcuts of a public function whose op is run by `forward`, and `backward` if it has derivatives.

    `run_backward` is the backward by the long way. `packed`: the tensors are [total, H, ...], those of the op
    [1, H, total, ...].
    """

    def __init__(
        self, forward: Replayed, backward: Replayed | None = None, run_backward: Callable | None = None, *,
        packed: bool = False,
    ):  # fmt: skip
        self.forward, self.backward, self.run_backward, self.packed = forward, backward, run_backward, packed
        self._known: dict[tuple, _Shortcut] = kinds()

    def take(
        self, query: Any, key: Any, value: Any, state: Any, others: tuple, window: Any, return_lse: Any, options: tuple
    ) -> tuple[Any, Call | None]:
        """Returns the result of a call, or None and what `add` wants after the long way.

        Args:
            others: `state_index` and the tensors that follow it in the op.
            options: the other arguments.
        """
        if not _is_ordinary():
            return None, None
        tensors = (query, key, value)
        # With the types, as True == 1 == 1.0; those in a window show in its text.
        kind: list[Any] = [modes(), return_lse, options, *map(type, options), None if window is None else repr(window)]
        if state is None:
            tensors += others
        elif type(state) is PrefixState:
            kind += state.feature_map, state.feature_scale, state.z_a is None
            tensors += (
                state.z if state.z_a is None else state.z_a, state.z_b, state.k, state.centers, state.log_scale,
                state.keys, state.values, state.bias, *others,
            )  # fmt: skip
        else:
            return None, None
        present, needs_grad = [], False
        for x in tensors:
            if x is None:
                kind.append(None)
            elif (type(x) is Tensor or type(x) is Parameter) and x.layout is torch.strided and not x.is_neg():
                kind += x.shape, x.stride(), x.dtype, x.device
                present.append(x)
                if x.requires_grad:
                    needs_grad = True
            else:
                return None, None
        call = Call(tuple(kind), present)
        try:
            shortcut = self._known.get(call.kind)
        except TypeError:  # an option without a hash
            return None, None
        if shortcut is None:
            return None, call
        if needs_grad and torch.is_grad_enabled():
            return (None if self.backward is None else _Attention.apply(shortcut, *present)), None
        results = shortcut.replay(*present)
        if results is None or return_lse:
            return results, None
        return results[0], None

    def add(self, call: Call | None, inputs: Inputs | DecodeInputs) -> None:
        """Learns from a call, and from `inputs` that the long way made of it, if its op can be replayed."""
        if call is None or call.kind in self._known:
            return
        if any(not x.is_floating_point() and x.dtype != torch.bool and checks.readable(x) for x in call.tensors):
            return  # their values are checked in each call
        flat = inputs.flat()
        if (program := self.forward.program(flat)) is not None:
            keep(self._known, call.kind, _Shortcut(self, call, flat, program))


class _Shortcut:
    """A kind of call, and the kinds of its backward."""

    def __init__(self, shortcuts: Shortcuts, call: Call, flat: tuple, program: Program):
        self._shortcuts, self.returns_lse = shortcuts, call.kind[1]
        # Tensors of the op as their shapes, options as they are.
        self._flat = [x.shape if isinstance(x, Tensor) else x for x in flat]
        self._places = [i for i, x in enumerate(flat) if isinstance(x, Tensor)]
        self.replay = program.function(
            call.tensors, lambda results: [(i, self._unpacked(x)) for i, x in enumerate(results)]
        )
        self._backwards: dict[tuple, Callable] = {}

    def forward(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns out and lse."""
        results = self.replay(*tensors)
        if results is None:
            results = [self._unpacked(x) for x in self._shortcuts.forward(*self._arguments(tensors))]
        return results

    def backward(self, grads: tuple, tensors: Sequence[Tensor], results: tuple, needs_grad: tuple) -> Sequence[Any]:
        """Returns None, then the gradients of `tensors`. `grads` are those of `results`, None for those without."""
        if not any(grad is not None for grad in grads):
            return (None,) * (1 + len(tensors))
        kind = modes(), needs_grad, *[grad is not None and (grad.stride(), grad.dtype) for grad in grads]
        given = [grad for grad in grads if grad is not None]
        is_ordinary = not torch.is_grad_enabled() and all(type(grad) is Tensor for grad in given) and not is_watched()
        if is_ordinary and (replay := self._backwards.get(kind)) is not None:
            of_tensors = replay(*given, *tensors, *results)
            if of_tensors is not None:
                return of_tensors
        flat_needs = [False] * NUM_DIFFERENTIABLE
        for place, needed in zip(self._places, needs_grad, strict=True):
            if needed:
                flat_needs[place] = True
        arguments = (
            *[None if grad is None else self._packed(grad) for grad in grads], *self._arguments(tensors),
            *map(self._packed, results), flat_needs,
        )  # fmt: skip
        of_op = self._shortcuts.run_backward(*arguments)
        if is_ordinary and (program := self._shortcuts.backward.program(arguments)) is not None:
            replay = program.function(
                [*given, *tensors, *results], lambda of_op: [None, *self._of_tensors(of_op, tensors, needs_grad)]
            )
            keep(self._backwards, kind, replay)
        return None, *(pair and pair[1] for pair in self._of_tensors(of_op, tensors, needs_grad))

    def _of_tensors(self, of_op: Sequence[Tensor], tensors: Sequence[Tensor], needs_grad: tuple) -> list:
        """The gradients of the op's arguments that are wanted, with their places, as gradients of `tensors`."""
        return [
            (place, self._unpacked(of_op[place]) if place < 3 else of_op[place].view(tensor.shape)) if needed else None
            for place, tensor, needed in zip(self._places, tensors, needs_grad, strict=True)
        ]

    def _arguments(self, tensors: Sequence[Tensor]) -> list:
        """The arguments of the op."""
        arguments = [*self._flat]
        for place, tensor in zip(self._places, tensors, strict=True):
            arguments[place] = self._packed(tensor) if place < 3 else tensor.view(self._flat[place])
        return arguments

    def _packed(self, tensor: Tensor) -> Tensor:
        """A query, key, value or result as the op has it."""
        if not self._shortcuts.packed:
            return tensor
        return (tensor.transpose(0, 1) if tensor.dim() == 3 else tensor).unsqueeze(0)

    def _unpacked(self, tensor: Tensor) -> Tensor:
        """A query, key, value or result of the op as the function has it."""
        if not self._shortcuts.packed:
            return tensor
        return tensor[0].transpose(0, 1) if tensor.dim() == 4 else tensor[0]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shortcut, *tensors):
        results = shortcut.forward(tensors)
        ctx.save_for_backward(*tensors, *results)
        ctx.shortcut = shortcut
        ctx.set_materialize_grads(False)
        return tuple(results) if shortcut.returns_lse else results[0]

    @staticmethod
    def backward(ctx, grad_out, grad_lse=None):
        *tensors, out, lse = ctx.saved_tensors
        return ctx.shortcut.backward((grad_out, grad_lse), tensors, (out, lse), ctx.needs_input_grad[1:])


def _is_ordinary() -> bool:
    """Whether nothing watches or changes what calls do."""
    return not (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._is_any_autocast_enabled()
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
        or is_watched()
    )
