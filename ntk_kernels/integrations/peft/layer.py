"""`NTKLayer`: the prefixes of all adapters of a model in one attention module."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...state import PrefixState
from ...trainable import NTKPrefix
from .config import STATES, NTKConfig

BASE = "__base__"  # PEFT's name for rows without an adapter


class _BatchRows(NamedTuple):
    """The adapters of the rows of a batch."""

    used: list[str]  # adapters that this layer has
    state_index: Tensor | None  # [num_rows], which of them each row has, -1 for none; None if none is used
    num_rows: int
    copies: frozenset[int]  # numbers of copies that `generate` may make of each row


class NTKLayer(nn.Module, BaseTunerLayer):
    """The child `ntk_prefix` of an attention module. It wraps nothing, so that weights of the model keep their names.

    The attention implementation "ntk" asks it in each forward for the state to use: that of the active adapter, the sum
    of the states of several, or a stack of states for a batch whose rows have different adapters.
    """

    adapter_layer_names = (STATES,)
    other_param_names = ()

    def __init__(self) -> None:
        super().__init__()
        self.ntk_states: Any = nn.ModuleDict({})  # an NTKPrefix for each adapter
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._rows: _BatchRows | None = None  # while rows have adapters of their own
        self._stack: PrefixState | None = None  # of the adapters in use, if it can be kept

    def update_layer(self, adapter_name: str, config: NTKConfig, shape: Sequence[int], **placement: Any) -> None:
        """Adds an adapter: a prefix of `shape` [Hkv, D, Dv]; `placement` is its device and dtype."""
        num_heads, head_dim, value_dim = shape
        prefix = NTKPrefix(num_heads, head_dim, value_dim=value_dim, **config.prefix_options, **placement)
        self.ntk_states[adapter_name] = prefix

    def state_and_index(self, batch: int) -> tuple[PrefixState | None, Tensor | None]:
        """Returns the state for a batch, and which state of a stack each row uses, as `PrefixSource` says.

        Raises:
            ValueError: if the adapters of rows are given, but not of `batch` rows.
        """
        if self.disable_adapters:
            return None, None
        if self._rows is not None:
            return self._state_of_rows(batch)
        active: Any = self.active_adapters
        states = [self.ntk_states[name]() for name in active if name in self.ntk_states]
        return (reduce(PrefixState.merge, states) if states else None), None

    @contextmanager
    def rows_of(self, adapter_names: Sequence[str], copies: frozenset[int]) -> Iterator[None]:
        """Gives row i of a batch the adapter `adapter_names[i]` within a `with` block.

        If each row has become several rows side by side (beams), as many as one of `copies`, all of them have it.
        """
        # Made outside forward and in the order of the layer: other rows with the same adapters recompile nothing.
        used = [name for name in self.ntk_states if name in adapter_names]
        numbers = [used.index(name) if name in used else -1 for name in adapter_names]
        index = torch.tensor(numbers, device=next(self.parameters()).device) if used else None
        before = self._rows, self._stack
        self._rows, self._stack = _BatchRows(used, index, len(numbers), copies), None
        try:
            yield
        finally:
            self._rows, self._stack = before

    def _state_of_rows(self, batch: int) -> tuple[PrefixState | None, Tensor | None]:
        rows = self._rows
        if batch not in {rows.num_rows * copies for copies in rows.copies}:
            raise ValueError(
                f"`adapter_names` must have a name for each of the {batch} rows of the batch, got {rows.num_rows}"
            )
        if not rows.used:
            return None, None
        if torch.is_grad_enabled():
            return PrefixState.stack([self.ntk_states[name]() for name in rows.used]), rows.state_index
        if self._stack is None:  # kept for the next token of a generation
            self._stack = PrefixState.stack([self.ntk_states[name]() for name in rows.used])
        return self._stack, rows.state_index

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Does nothing: a prefix is made on the device of its module, and keeps its dtype."""

    def __repr__(self) -> str:
        return "ntk." + super().__repr__()
