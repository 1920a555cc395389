"""Switches the attention implementation of a model to "ntk" and back, and guards it while there is a prefix."""

from collections.abc import Iterable
from typing import Any, ClassVar
from weakref import WeakSet

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .attention_interface import CHILD, IMPLEMENTATION
from .positions import sync_positions

_HOOK = "_ntk_hook"


class Switch:
    """Makes configurations name the implementation "ntk" while it is on, and the one from before while it is off.

    Models may share a configuration: it names "ntk" as long as one of its switches is on.
    """

    _all: ClassVar["WeakSet[Switch]"] = WeakSet()

    configs: list[PretrainedConfig]
    before: list[str | None]
    is_on: bool

    def __new__(cls, *args: Any) -> "Switch":  # copies and unpickled switches come this way too
        switch = super().__new__(cls)
        switch.configs, switch.before, switch.is_on = [], [], False
        cls._all.add(switch)
        return switch

    def __init__(self, configs: Iterable[PretrainedConfig]):
        self.configs = list(configs)
        self.turn_on()

    def turn_on(self) -> None:
        """Makes the configurations name "ntk"."""
        self.before = [self._own_of(config) for config in self.configs]
        self.is_on = True
        for config in self.configs:
            config._attn_implementation_internal = IMPLEMENTATION

    def turn_off(self) -> None:
        """Gives back their implementation to the configurations for which no other switch is on."""
        self.is_on = False
        for config, before in zip(self.configs, self.before, strict=True):
            if not self._on_for(config):
                config._attn_implementation_internal = before

    def _own_of(self, config: PretrainedConfig) -> str | None:
        """Returns the implementation that a configuration names when all its switches are off."""
        for switch in self._on_for(config):
            return next(own for c, own in zip(switch.configs, switch.before, strict=True) if c is config)
        return config._attn_implementation

    def _on_for(self, config: PretrainedConfig) -> list["Switch"]:
        """Returns the switches of a configuration that are on."""
        return [switch for switch in self._all if switch.is_on and any(c is config for c in switch.configs)]


def add_child(module: nn.Module, child: nn.Module) -> None:
    """Gives an attention module its prefix; forward then raises if another implementation would leave it out."""
    module.add_module(CHILD, child)
    setattr(module, _HOOK, module.register_forward_pre_hook(_check_implementation))


def remove_child(module: nn.Module) -> None:
    """Takes the prefix away from an attention module."""
    delattr(module, CHILD)
    module.__dict__.pop(_HOOK).remove()


def _check_implementation(module: nn.Module, args: tuple[Any, ...]) -> None:
    config: Any = module.config
    implementation = config._attn_implementation
    # With disabled adapters, a module of PEFT has its own implementation again.
    if implementation != IMPLEMENTATION and not getattr(getattr(module, CHILD), "disable_adapters", False):
        raise RuntimeError(
            f"the attention implementation must be {IMPLEMENTATION!r} while {type(module).__name__} has a prefix, got "
            f"{implementation!r}, which would leave the prefix out; take the prefix away first (detach_prefix, or "
            "unload() with PEFT)"
        )


def sync_parts(model: PreTrainedModel) -> None:
    """Marks models with prefixes as not supporting flash attention and has them number tokens; undoes that in others.

    Continuous batching would otherwise use flash attention where it is installed, and only log the error of
    `_check_implementation`.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            has_prefix = any(CHILD in module._modules for module in part.modules())
            if has_prefix:
                part._supports_flash_attn = False
            else:
                part.__dict__.pop("_supports_flash_attn", None)
            sync_positions(part, has_prefix)
