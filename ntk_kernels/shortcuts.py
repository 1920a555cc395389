"""The short way of the public functions: what is known of a kind of call that has passed its checks.

A call that is like an earlier one in all that checks and code look at needs neither: `Shortcuts.take` goes straight to
the implementation of the op, which is replayed once it is known (`replay/`), with an autograd node of its own and
without PyTorch's dispatcher. Calls that somebody watches take the long way, through the op: those under autocast, a
transform of torch.func, a mode, a trace or a profiler, and calls with tensors of other classes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._device import DeviceContext

from . import checks, library
from .inputs import NUM_DIFFERENTIABLE, DecodeInputs, Inputs
from .replay import Known, Repeated, Replayed, is_watched, modes, new_known
from .state import PrefixState

_is_transformed, _is_autocast = torch._C._are_functorch_transforms_active, torch._C._is_any_autocast_enabled
_num_dispatch_modes, _num_function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_is_profiled, _tracing_state = torch._C._autograd._profiler_enabled, torch._C._get_tracing_state
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # by `is_grads_batched`


class Call:
    """A call of an unknown kind: the tensors that it has, in the order of its op, and what it wants."""

    __slots__ = ("kind", "needs_grad", "tensors")

    def __init__(self, kind: tuple, tensors: list[Tensor], needs_grad: bool):
        self.kind, self.tensors, self.needs_grad = kind, tensors, needs_grad


class Shortcuts:
    """Knows the calls of a public function. `replayed` is the implementation of its op, `check` checks the
    numbers among its arguments."""

    def __init__(self, replayed: Replayed, check: Callable, *, has_backward: bool):
        self.replayed, self.check, self.has_backward = replayed, check, has_backward
        self._known = new_known()

    def take(
        self, query: Any, key: Any, value: Any, state: Any, others: tuple, window: Any, return_lse: Any, options: tuple
    ) -> tuple[Any, Call | None]:
        """Returns the result of a call of a known kind; for an unknown one None and what `learn` takes, None if the
        call is watched.

        Args:
            others: `state_index` and the tensors that follow it in the op.
            options: the other arguments.
        """
        if not _is_ordinary():
            return None, None
        # With the types, as True == 1 == 1.0; those in a window show in its text.
        options += (return_lse,)
        kind: list[Any] = [modes(), options, *map(type, options), None if window is None else repr(window)]
        if state is None:
            present = [query, key, value]
        elif type(state) is PrefixState:
            names, of_state = state.op_tensors
            kind += names, state.feature_map, state.feature_scale
            present = [query, key, value, *of_state]
        else:
            return None, None
        needs_grad = False
        try:
            for x in others:
                kind.append(x is None)
                if x is not None:
                    present.append(x)
                    if x.requires_grad:  # a mask, whose gradient only the reference has
                        return None, None
            for x in present:
                if (type(x) is not Tensor and type(x) is not Parameter) or x.is_neg():
                    return None, None
                kind += x.shape, x.stride(), x.dtype, x.device
                if x.requires_grad:
                    needs_grad = True
            kind = tuple(kind)
            shortcut = self._known.get(kind)
        except (AttributeError, RuntimeError, TypeError):  # no tensor, one without strides, an option without a hash
            return None, None
        if needs_grad:
            needs_grad = torch.is_grad_enabled()
            if needs_grad and not self.has_backward:
                return None, None
        if shortcut is None:
            return None, Call(kind, present, needs_grad)
        return shortcut(present, needs_grad), None

    def learn(self, call: Call, inputs: Inputs | DecodeInputs, return_lse: bool) -> Any:
        """Returns the result of a call of an unknown kind that has passed its checks, of which `inputs` were made."""
        shortcut = _Shortcut(self, call, inputs.flat(), return_lse)
        self._known.keep(call.kind, shortcut)
        return shortcut(call.tensors, call.needs_grad)


class _Shortcut:
    """A kind of call."""

    def __init__(self, shortcuts: Shortcuts, call: Call, flat: tuple, returns_lse: bool):
        self.returns_lse = returns_lse
        # Of tensors among the op's arguments.
        self._places = [i for i, x in enumerate(flat) if x is not None and isinstance(x, Tensor)]
        self._options = [*flat]
        for place in self._places:
            self._options[place] = None
        # Of numbers, in each call.
        has_numbers = any(x.dtype in _INDEX and checks.readable(x) for x in call.tensors[3:])
        self._check = shortcuts.check if has_numbers else None
        self._repeated = Repeated(shortcuts.replayed.function)
        self._backwards = Known()

    def __call__(self, tensors: Sequence[Tensor], needs_grad: bool) -> Any:
        if needs_grad:
            return _Attention.apply(self, *tensors)
        results = self.forward(tensors)
        return results if self.returns_lse else results[0]

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns out and lse."""
        if self._check is not None:
            self._check(self._arguments(tensors))
        return self._repeated(tensors, self._arguments)

    def backward(self, ctx, *grads: Tensor | None) -> list[Tensor | None]:
        """Returns the gradients of the tensors, given those of the results."""
        needs_grad = ctx.needs_input_grad[1:]
        given = [grad for grad in grads if grad is not None]
        if not given:
            return [None] * len(needs_grad)
        tensors = [*given, *ctx.saved_tensors]

        def arguments_of(tensors):
            tensors = iter(tensors)
            given_or_none = [None if grad is None else next(tensors) for grad in grads]
            *tensors, out, lse = tensors
            flat_needs_grad = [False] * len(self._options)
            for place, needed in zip(self._places, needs_grad, strict=True):
                flat_needs_grad[place] = needed
            return *given_or_none, *self._arguments(tensors), out, lse, flat_needs_grad[:NUM_DIFFERENTIABLE]

        is_plain = all(type(grad) is Tensor and not _is_batched(grad) for grad in given)
        if torch.is_grad_enabled() or not is_plain or not _is_ordinary():
            of_op = library.attention_backward(*arguments_of(tensors))
        else:
            kind = modes(), needs_grad, *[grad is not None and (grad.stride(), grad.dtype) for grad in grads]
            repeated = self._backwards.get(kind)
            if repeated is None:
                repeated = Repeated(library.backward.function)
                self._backwards.keep(kind, repeated)
            with library.no_autocast(tensors[0]):
                of_op = repeated(tensors, arguments_of)
        return [of_op[place] if needed else None for place, needed in zip(self._places, needs_grad, strict=True)]

    def _arguments(self, tensors: Sequence[Tensor]) -> list:
        """The arguments of the op."""
        arguments = [*self._options]
        for place, tensor in zip(self._places, tensors, strict=True):
            arguments[place] = tensor
        return arguments


_INDEX = (torch.int32, torch.int64)


class _Attention(torch.autograd.Function):
    """Saves all tensors and results, as the op's own function does: checkpointing may recompute the other way."""

    @staticmethod
    def forward(ctx, shortcut, *tensors):
        results = shortcut.forward(tensors)
        ctx.save_for_backward(*tensors, *results)
        ctx.shortcut = shortcut
        ctx.set_materialize_grads(False)
        return tuple(results) if shortcut.returns_lse else results[0]

    @staticmethod
    def backward(ctx, grad_out, grad_lse=None):
        return None, *ctx.shortcut.backward(ctx, grad_out, grad_lse)


def _has_function_modes() -> bool:
    """Returns whether there are others than those of `torch.set_default_device` and `with torch.device(...)`."""
    return any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(_num_function_modes()))


def _is_ordinary() -> bool:
    """Returns whether nothing watches or changes what calls do."""
    return not (
        _is_transformed()
        or forward_ad._current_level >= 0
        or _num_dispatch_modes()
        or (_num_function_modes() and _has_function_modes())
        or _is_autocast()
        or _is_profiled()
        or _tracing_state() is not None
        or is_watched()
    )
