"""Puts the attention implementation "ntk" into use in a model and out of use again, and sees that it stays in use."""

from collections.abc import Iterable
from typing import ClassVar
from weakref import WeakSet

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .attention_interface import CHILD, IMPLEMENTATION

_HOOK = "_ntk_hook"


class Switch:
    """On, it has configurations say "ntk"; off, what they said before.

    Models may share a configuration: it says "ntk" for as long as one of its switches is on.
    """

    _all: ClassVar[WeakSet] = WeakSet()

    def __new__(cls, *args):  # the way of copies and of unpickled switches too
        switch = super().__new__(cls)
        switch.configs, switch.before, switch.is_on = [], [], False
        cls._all.add(switch)
        return switch

    def __init__(self, configs: Iterable[PretrainedConfig]):
        self.configs = list(configs)
        self.turn_on()

    def turn_on(self) -> None:
        self.before = [self._own_of(config) for config in self.configs]
        self.is_on = True
        for config in self.configs:
            config._attn_implementation_internal = IMPLEMENTATION

    def turn_off(self) -> None:
        self.is_on = False
        for config, before in zip(self.configs, self.before, strict=True):
            if not self._on_for(config):
                config._attn_implementation_internal = before

    def _own_of(self, config: PretrainedConfig) -> str | None:
        """What a configuration says when all of its switches are off."""
        for switch in self._on_for(config):
            return next(own for c, own in zip(switch.configs, switch.before, strict=True) if c is config)
        return config._attn_implementation

    def _on_for(self, config: PretrainedConfig) -> list["Switch"]:
        return [switch for switch in self._all if switch.is_on and any(c is config for c in switch.configs)]


def add_child(module: nn.Module, child: nn.Module) -> None:
    """Gives an attention module its prefix, and from then on lets nobody leave it out unnoticed."""
    module.add_module(CHILD, child)
    setattr(module, _HOOK, module.register_forward_pre_hook(_check_implementation))


def remove_child(module: nn.Module) -> None:
    delattr(module, CHILD)
    module.__dict__.pop(_HOOK).remove()


def _check_implementation(module: nn.Module, args: tuple) -> None:
    implementation = module.config._attn_implementation
    # With its adapters disabled, a module of PEFT has the implementation that it had before.
    if implementation != IMPLEMENTATION and not getattr(getattr(module, CHILD), "disable_adapters", False):
        raise RuntimeError(
            f"the attention implementation must be {IMPLEMENTATION!r} while {type(module).__name__} has a prefix, got "
            f"{implementation!r}, which would leave the prefix out; take the prefix away first (detach_prefix, or "
            "unload() with PEFT)"
        )


def settle_flash(model: PreTrainedModel) -> None:
    """Models with prefixes say that they do not support flash attention, others what their classes say.

    Continuous batching would take it where it is installed, and report the error of `_check_implementation` nowhere
    but in a log.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            if any(CHILD in module._modules for module in part.modules()):
                part._supports_flash_attn = False
            else:
                part.__dict__.pop("_supports_flash_attn", None)
