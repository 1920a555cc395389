"""`NTKModel`: puts the prefixes of adapters into a model and tells each of them which adapters are in use."""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from ...feature_maps import get_feature_map, several_centers_rule
from ...state import PrefixState
from ...trainable import NTKPrefix
from ..transformers.attach import check_bare, use_ntk
from ..transformers.attention_interface import CHILD
from ..transformers.attention_modules import attention_modules, find_shape, list_names, placement
from ..transformers.switch import add_child, remove_child, sync_parts
from .config import STATES, NTKConfig
from .layer import BASE, NTKLayer

_SWITCHES = "_ntk_peft_switches"  # attribute of the base model: a switch for each adapter that was added


class NTKModel(BaseTuner):
    """A transformers model whose attention modules have prefixes as adapters; `peft.get_peft_model` makes it.

    Differences from most tuners: layers are children of attention modules and wrap nothing; adapters cannot be merged
    into the weights; rows of a batch may have different adapters in training too, with the model's own gradient
    checkpointing.

    Args:
        model: a transformers model that dispatches its attention through `AttentionInterface`.
        peft_config: an `NTKConfig`, or a dictionary with one under the name of the adapter.
        adapter_name: name of the first adapter.
        low_cpu_mem_usage: whether to make parameters on the meta device, to be replaced by loaded ones.

    Raises:
        TypeError, ValueError: if the model is not of this kind, has an adapter of that name or prefixes of
            `attach_prefix`, no module is matched, or sizes differ from those that the adapter is for. Then nothing of
            the model has changed.
    """

    prefix = STATES
    tuner_layer_cls = NTKLayer
    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012  # empty: all attention modules of any model

    def __init__(
        self,
        model: PreTrainedModel,
        peft_config: NTKConfig | dict[str, NTKConfig],
        adapter_name: str,
        *args: Any,
        **kwargs: Any,
    ):
        check_bare(model)
        others = getattr(model, "peft_config", {})  # of LoRA, for instance; PEFT would overwrite one of the same name
        if adapter_name in others:
            raise ValueError(
                f"`adapter_name` must be none of those that the model has, {sorted(others)}, got {adapter_name!r}"
            )
        try:
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        except Exception:
            others.pop(adapter_name, None)
            raise

    # Adding ----------------------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Makes the prefixes of an adapter in all its modules, or in none if anything fails."""
        if kwargs.get("state_dict") is not None:
            raise ValueError("`state_dict` must be None: an adapter's modules are those of its configuration")
        modules, config = _resolve(model, self.peft_config[adapter_name])
        self.peft_config[adapter_name] = config
        children = [(module, dict(module._modules)) for module in model.modules()]
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        switch = use_ntk(model, modules)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            for module, before in children:
                if CHILD in module._modules and CHILD not in before:
                    remove_child(module)
                module._modules.clear()
                module._modules.update(before)
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)
            switch.turn_off()
            raise
        setattr(model, _SWITCHES, [*getattr(model, _SWITCHES, []), switch])
        sync_parts(model)

    def _prepare_adapter_config(self, peft_config: NTKConfig, model_config: dict[str, Any]) -> NTKConfig:
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: NTKConfig, key: str) -> bool:
        return key in peft_config.shapes

    def _create_and_replace(
        self, peft_config: NTKConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, **optional_kwargs: Any,
    ) -> None:  # fmt: skip
        if not hasattr(target, CHILD):
            add_child(target, NTKLayer())
        layer = getattr(target, CHILD)
        layer.update_layer(adapter_name, peft_config, peft_config.shapes[current_key], **placement(target, self.model))
        if adapter_name not in self.active_adapters:
            layer.ntk_states[adapter_name].requires_grad_(False)

    def init_from_states(self, states: Mapping[str, PrefixState], adapter_name: str = "default") -> None:
        """Makes an adapter start from states, for instance converted from the keys and values of real text.

        Args:
            states: one for each module of the adapter, by the names of the modules in the base model, with the
                key/value heads of the module. `NTKConfig.of_state` makes the configuration that goes with them.

        Raises:
            TypeError, ValueError: if their names or forms are not those of the adapter. Then nothing has changed.
        """
        self._check_names("adapter_name", [adapter_name])
        config = self.peft_config[adapter_name]
        if not isinstance(states, Mapping):
            raise TypeError(f"`states` must be a mapping from names of modules to PrefixStates, got {states!r:.80}")
        if different := config.shapes.keys() ^ states.keys():
            name = min(different, key=str)
            raise ValueError(
                f"`states` must be for the modules of the adapter, {list_names(config.shapes)}, got "
                f"{'one' if name in states else 'none'} for `{name}`"
            )
        starts = {}
        for name, state in states.items():
            prefix = getattr(self.model.get_submodule(name), CHILD).ntk_states[adapter_name]
            start = NTKPrefix.from_state(state, positive=config.positive, scale_by_k=config.scale_by_k)
            for key, value in prefix.options.items():
                if start.options[key] != value:
                    raise ValueError(
                        f"`states[{name!r}]` must have {key}={value!r}, as the adapter has, got {start.options[key]!r}"
                    )
            starts[prefix] = start
        for prefix, start in starts.items():
            prefix.load_state_dict(start.state_dict())

    # Using -----------------------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes an adapter active, or several, whose prefixes then act together, as if one followed the other.

        Raises:
            ValueError: if an adapter does not exist, or the states of several cannot be added.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_names("adapter_name", names)
        for i, name in enumerate(names):
            for other in names[:i]:
                _check_together(self.peft_config, other, name, is_sum=True)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def disable_adapter_layers(self) -> None:
        """Disables all adapters: the model is the base model again, its own attention implementation included.

        The implementation stays "ntk" if another model, whose adapters are enabled, shares the configuration object.
        """
        super().disable_adapter_layers()
        for switch in getattr(self.model, _SWITCHES, []):
            switch.turn_off()

    def enable_adapter_layers(self) -> None:
        """Enables the active adapters again."""
        super().enable_adapter_layers()
        for switch in getattr(self.model, _SWITCHES, []):
            switch.turn_on()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Applies `adapter_names` within a `with` block; PEFT enters it around forward and generate."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if not isinstance(names, list | tuple) or not names:
            raise TypeError(f"`adapter_names` must be a list with a name for each row, got {names!r}")
        used = [name for name in dict.fromkeys(names) if name != BASE]
        self._check_names("adapter_names", used)
        for name in used[1:]:
            _check_together(self.peft_config, used[0], name, is_sum=False)
        if len(set(names)) > 1:
            for name in used:
                _check_rows(self.model, name, self.peft_config[name])
        rows = partial(_rows_of, names=names, copies=_copies(self.model, kwargs))
        with rows(self.model), _in_checkpoints(self.model, rows):
            yield

    def _check_names(self, argument: str, names: Sequence[str]) -> None:
        for name in names:
            if name not in (known := self._ntk_adapters()):
                raise ValueError(
                    f"`{argument}` must be of the NTK adapters that the model has, {sorted(known)}, got {name!r}"
                )

    def _ntk_adapters(self) -> list[str]:
        """Returns the names of the adapters, without those of other methods such as LoRA."""
        configs = getattr(self, "peft_config", {})
        return [name for name, config in configs.items() if isinstance(config, NTKConfig)]

    # Taking away -----------------------------------------------------------------------------------------------------

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "NTK adapters cannot be merged into the weights of a model: what a prefix adds to attention is not linear "
            "in the layer's input, so no weight matrix gives it; keep the adapter, or unload() it"
        )

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter. If no other is active, the first remaining adapter becomes active, with a warning."""
        if adapter_name in self.peft_config and adapter_name in self.active_adapters:
            others = [name for name in self.active_adapters if name != adapter_name]
            left = [name for name in self._ntk_adapters() if name != adapter_name]
            if not others and left:
                warnings.warn(
                    f"the active adapter {adapter_name!r} is deleted, {left[0]!r} is active now", stacklevel=3
                )
            if others or left:  # before the deletion, after which each layer would choose among its own adapters
                self.set_adapter(others or left[0])
        super().delete_adapter(adapter_name)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        for module in self.model.modules():
            if isinstance(getattr(module, CHILD, None), NTKLayer):
                remove_child(module)
        if any(isinstance(module, BaseTunerLayer) for module in self.model.modules()):
            self._unload_beside_others()
        else:
            super()._unload_and_optionally_merge(False, *args, **kwargs)
            self.model.__dict__.pop("peft_config", None)  # PEFT up to 0.18 leaves it there
        for switch in self.model.__dict__.pop(_SWITCHES, []):
            switch.turn_off()
        sync_parts(self.model)
        return self.model

    def _unload_beside_others(self) -> None:
        """Removes the rest of our adapters. PEFT's own function would remove the layers of LoRA as well."""
        ours = self._ntk_adapters()
        for name, module in list(self.model.named_modules()):
            if not isinstance(module, AuxiliaryTrainingWrapper) or module._adapters.isdisjoint(ours):
                continue
            if others := sorted(module._adapters.difference(ours)):
                if module.active_adapters[:1] not in ([other] for other in others):
                    module.set_adapter(others[0])
                for adapter in module._adapters.intersection(ours):
                    module.delete_adapter(adapter, module.active_adapters)
            else:
                # PEFT 0.18 cannot unload a wrapper without an active adapter.
                kept = module.original_module
                if module.active_adapters:
                    kept = module.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, kept)
        for name in ours:
            del self.peft_config[name]

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Returns our weights only, without those of LoRA that PEFT takes for ours."""
        tensors = super()._get_adapter_state_dict(*args, **kwargs)
        return {name: tensor for name, tensor in tensors.items() if f".{STATES}." in name}


def _resolve(model: PreTrainedModel, config: NTKConfig) -> tuple[dict[str, nn.Module], NTKConfig]:
    """Returns the modules that an adapter is for, by name, and its configuration with their shapes."""
    found = attention_modules(model, None)
    names = _matching(found, config) if config.shapes is None else config.shapes
    shapes = {}
    for name in names:
        if name not in found:
            raise ValueError(
                f"the adapter must be for attention modules of the model, {list_names(found)}, got `{name}`"
            )
        shape = find_shape(found[name])
        if shape is None:
            raise ValueError(
                f"`target_modules` must leave out `{name}` ({type(found[name]).__name__}), whose number of heads and "
                "head dimension are not under any of the usual names, got it"
            )
        shapes[name] = [shape.num_kv_heads, shape.head_dim, shape.value_dim]
        if config.shapes is not None and list(config.shapes[name]) != shapes[name]:
            raise ValueError(
                f"the adapter must be for the heads of `{name}`, [Hkv, D, Dv] = {shapes[name]}, got one for "
                f"{list(config.shapes[name])}"
            )
    if config.shapes is not None and (others := [name for name in _targeted(found, config) if name not in shapes]):
        warnings.warn(
            f"the adapter has prefixes for {len(shapes)} modules; its `target_modules` and `layers_to_transform` match "
            f"{list_names(others)} too, which stay without one",
            stacklevel=3,
        )
    return {name: found[name] for name in shapes}, replace(config, shapes=shapes)


def _targeted(found: dict[str, nn.Module], config: NTKConfig) -> list[str]:
    """Returns the names that a configuration targets; none if it names modules that the model does not have."""
    try:
        return _matching(found, config)
    except ValueError:
        return []


def _matching(found: dict[str, nn.Module], config: NTKConfig) -> list[str]:
    """Returns the names of the modules that a configuration targets."""
    wanted, names = config.target_modules, list(found)
    if isinstance(wanted, str):
        names = [name for name in found if re.fullmatch(wanted, name)]
        if not names:
            raise ValueError(
                f"`target_modules` must be a regular expression for the whole of a name of {list_names(found)}, or a "
                f"list of their ends, got {wanted!r}"
            )
    elif wanted is not None:
        for end in wanted:
            if not any(f".{name}".endswith(f".{end}") for name in found):
                raise ValueError(f"`target_modules` must be names of {list_names(found)}, or their ends, got {end!r}")
        names = [name for name in found if any(f".{name}".endswith(f".{end}") for end in wanted)]
    if config.layers_to_transform is not None:
        layers = config.layers_to_transform
        layers = [layers] if isinstance(layers, int) else layers
        numbers = {name: int(digits[0]) for name in names if (digits := re.findall(r"\.(\d+)\.", f".{name}."))}
        for layer in layers:
            if layer not in numbers.values():
                raise ValueError(
                    f"`layers_to_transform` must be of the layers {sorted(set(numbers.values()))} of the targeted "
                    f"modules, got {layer}"
                )
        names = [name for name in names if numbers.get(name) in layers]
    return names


def _check_together(configs: Mapping[str, NTKConfig], a: str, b: str, *, is_sum: bool) -> None:
    """Raises ValueError unless the states of two adapters can be added or, without `is_sum`, stacked."""
    ours, theirs = configs[a], configs[b]
    what = "to be active together" if is_sum else "to be in one batch"
    if is_sum and None in (ours.feature_map, theirs.feature_map):
        return  # rows can be joined with anything
    for name in ("feature_map", "feature_scale"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ValueError(
                f"the adapters {a!r} and {b!r} must have the same {name} {what}, got {getattr(ours, name)!r} and "
                f"{getattr(theirs, name)!r}"
            )
    if not is_sum or get_feature_map(ours.feature_map).several_centers:
        return
    if ours.centers is not None or theirs.centers is not None:
        raise ValueError(
            f"the adapters {a!r} and {b!r} must have no centers {what}, as {several_centers_rule()}, got centers="
            f"{ours.centers} and {theirs.centers} with {ours.feature_map!r}"
        )


def _check_rows(model: PreTrainedModel, adapter_name: str, config: NTKConfig) -> None:
    """Raises ValueError unless the rows in all modules of an adapter are those of the batch."""
    if hasattr(model.config, "encoder"):  # two models with equally many rows
        return
    text = model.config.get_text_config(decoder=True)
    for name in config.shapes:
        if type(model.get_submodule(name).config) is not type(text):
            raise ValueError(
                f"`adapter_names` must name a single adapter, or adapters with `target_modules` in the text decoder "
                f"only, since rows elsewhere are images, say, and not those of the batch; got {adapter_name!r} with "
                f"`{name}`"
            )


def _copies(model: PreTrainedModel, kwargs: dict[str, Any]) -> frozenset[int]:
    """Returns the numbers of rows that `generate`, called with `kwargs`, may make of each: beams and returned ones."""
    configs = (kwargs.get("generation_config"), getattr(model, "generation_config", None))
    default = GenerationConfig()  # transformers takes values from the second where the first has the default

    def option(name: str) -> int:
        values = [getattr(config, name, None) for config in configs]
        return kwargs.get(name) or next((value for value in values if value not in (None, getattr(default, name))), 1)

    beams, sequences = option("num_beams"), option("num_return_sequences")
    return frozenset({1, beams, sequences, beams * sequences})  # encoders: 1 or, in Whisper, one per sequence


@contextmanager
def _rows_of(model: nn.Module, names: Sequence[str], copies: frozenset[int]) -> Iterator[None]:
    """Gives row i the adapter `names[i]` in every layer and in the `modules_to_save`, within a `with` block."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, NTKLayer):
                stack.enter_context(module.rows_of(names, copies))
            elif isinstance(module, AuxiliaryTrainingWrapper):
                hook = module.register_forward_pre_hook(partial(_give_names, names=names), with_kwargs=True)
                stack.callback(hook.remove)
        yield


def _give_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Adds `adapter_names` to the arguments of a module, repeated for rows that have become several."""
    copies = max(1, args[0].shape[0] // len(names)) if args else 1
    return args, kwargs | {"adapter_names": [name for name in names for _ in range(copies)]}


@contextmanager
def _in_checkpoints(model: nn.Module, rows: Callable[[nn.Module], AbstractContextManager[None]]) -> Iterator[None]:
    """Makes blocks under gradient checkpointing enter `rows` themselves, within a `with` block.

    Backward computes them again, long after `rows` of the forward was left.
    """

    def keeping_rows(module: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def block(*args: Any, **kwargs: Any) -> Any:
                with rows(module):
                    return function(*args, **kwargs)

            return checkpoint(block, *args, **kwargs)

        return checkpointed

    functions = {
        module: function
        for module in model.modules()
        if (function := module.__dict__.get("_gradient_checkpointing_func")) is not None
    }
    for module, function in functions.items():
        setattr(module, "_gradient_checkpointing_func", keeping_rows(module, function))  # noqa: B010
    try:
        yield
    finally:
        for module, function in functions.items():
            module._gradient_checkpointing_func = function
