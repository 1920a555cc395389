"""NTK-Attention in the models of Hugging Face transformers.

Importing this module registers the attention implementation "ntk" with transformers: softmax attention by
`ntk_attention`, to which a module that has a child `ntk_prefix` adds a prefix. `attach_prefix` gives a model such
children:

    from ntk_kernels.integrations.transformers import attach_prefix, load_prefix, save_prefix

    prefixes = attach_prefix(model, "elu", rank=8)  # freezes the model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, eps=1e-15)

Any child will do that has a method `state_and_index(batch)`. It gives a `PrefixState`, or None for no prefix; and None
or, with a stack of states, which of them each batch row uses: [batch] int, -1 for none, or shorter, if each row became
several (beams), which lie side by side. It is asked in each forward, so that the answer may depend on the task at hand.
"""

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from .. import checks
from ..modules import NTKPrefix
from ..state import PrefixState, _safetensors

try:
    from transformers import PretrainedConfig, PreTrainedModel

    from .attention_interface import CHILD, IMPLEMENTATION, ntk_attention_forward
    from .switch import Switch, add_child, remove_child, settle_flash
except ImportError as error:
    raise ImportError(
        "ntk_kernels.integrations.transformers needs transformers (4.57 or later): "
        "pip install 'ntk-kernels[transformers]'"
    ) from error

__all__ = [
    "AttentionShape",
    "attach_prefix",
    "attached_prefixes",
    "attention_shapes",
    "detach_prefix",
    "load_prefix",
    "ntk_attention_forward",
    "save_prefix",
]
_FORMAT, _VERSION = "ntk-kernels prefixes of a model", 1
_RECORD = "_ntk_attachment"


class AttentionShape(NamedTuple):
    """Query heads Hq, key/value heads Hkv, and head dimensions D and Dv of an attention module."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int


@dataclass
class _Attachment:
    """What `detach_prefix` gives back to the model."""

    names: list[str]
    switch: Switch
    frozen: list[nn.Parameter]


def attention_shapes(model: PreTrainedModel, modules: str | None = None) -> dict[str, AttentionShape]:
    """The attention modules of a model that can have a prefix, by name, with their heads and head dimensions.

    Args:
        modules: a regular expression that is searched for in the names; None for all modules.

    Raises:
        TypeError, ValueError: if the model is no transformers model, does not dispatch its attention through
            transformers' `AttentionInterface` or support sdpa or attention backends, or no name matches.
    """
    return {name: _shape(name, module) for name, module in _attention_modules(model, modules).items()}


def attach_prefix(
    model: PreTrainedModel,
    feature_map: str | None = "elu",
    *,
    modules: str | None = None,
    prefixes: Mapping[str, NTKPrefix | PrefixState] | None = None,
    freeze: bool = True,
    **options,
) -> dict[str, NTKPrefix]:
    """Gives attention modules of a model a trainable prefix each, as their child `ntk_prefix`.

    The model then computes its attention by the implementation "ntk". Its weights keep their names and values. If an
    argument is refused, nothing of the model has changed.

    Args:
        model: any model that dispatches its attention through transformers' `AttentionInterface`, and says that it
            supports sdpa or attention backends. Until `detach_prefix`, forward under another implementation raises
            RuntimeError.
        feature_map, options: of `NTKPrefix`, the same for every module. A prefix has the key/value heads of its module
            and is float32 (float64 in a float64 model) on its device.
        modules: a regular expression that is searched for in the names of the modules: r"decoder.*self_attn",
            r"layers\\.[0-7]\\.". None for all: cross-attention and the encoders of images too.
        prefixes: instead, what to attach to which module, by its name: an `NTKPrefix`, or a `PrefixState`, converted
            from a real prefix, say, from which one is made; they have the query heads or the key/value heads of the
            module. `attention_shapes(model)` tells names and sizes.
        freeze: let only the prefixes be trained, until `detach_prefix`.

    Returns:
        The prefixes by the names of their modules.

    Raises:
        TypeError, ValueError: if the model is none of these, has prefixes already, no name matches, a prefix has other
            sizes than its module, or an option does not fit.

    A converted state is exact if `scale` of the conversion was the one of the model (1/sqrt(D) in most) and keys and
    queries were taken after rotation and, in models that scale the query themselves (OPT, Whisper), before that.
    """
    found = _attention_modules(model, modules)
    _check_bare(model)
    checks.check_bool("freeze", freeze)
    if prefixes is None:
        shapes = {name: _shape(name, module) for name, module in found.items()}
        children = {
            name: NTKPrefix(
                shape.num_kv_heads, shape.head_dim, feature_map, value_dim=shape.value_dim, **options,
                **_placement(found[name], model),
            )
            for name, shape in shapes.items()
        }  # fmt: skip
    else:
        given = {"feature_map": feature_map != "elu", "modules": modules is not None} | dict.fromkeys(options, True)
        for name, is_given in given.items():
            if is_given:
                raise ValueError(f"`{name}` must not be given together with `prefixes`, got both")
        children = _given_children(model, found, prefixes)
    _attach(model, found, children, freeze)
    return children


def detach_prefix(model: PreTrainedModel) -> dict[str, NTKPrefix]:
    """Takes the prefixes away again: the model is what it was before `attach_prefix`.

    Returns:
        The prefixes by the names of their modules; `attach_prefix(model, prefixes=...)` attaches them again.
    """
    children = attached_prefixes(model)
    record = getattr(model, _RECORD)
    for name in record.names:
        remove_child(model.get_submodule(name))
    record.switch.turn_off()
    settle_flash(model)
    for parameter in record.frozen:
        parameter.requires_grad_(True)
    delattr(model, _RECORD)
    return children


def attached_prefixes(model: PreTrainedModel) -> dict[str, NTKPrefix]:
    """The prefixes that `attach_prefix` or `load_prefix` gave to the model, by the names of their modules.

    Raises:
        ValueError: if there are none.
    """
    record = getattr(model, _RECORD, None)
    if record is None:
        raise ValueError(f"`model` must have prefixes (attach_prefix, load_prefix), got {type(model).__name__} without")
    return {name: getattr(model.get_submodule(name), CHILD) for name in record.names}


def _check_bare(model: PreTrainedModel) -> None:
    if hasattr(model, _RECORD):
        raise ValueError(
            f"`model` must have no prefixes yet, got one with {len(getattr(model, _RECORD).names)}; detach_prefix "
            "takes them away"
        )


def _attention_modules(model: PreTrainedModel, pattern: str | None) -> dict[str, nn.Module]:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"`model` must be a transformers.PreTrainedModel, got {type(model).__name__}")
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "config", None), PretrainedConfig) and _dispatches(type(module))
    }
    # Such a model may dispatch its attention, but counts on the masks of "eager", or dispatches only a part.
    other = [
        module.config
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and not (module._supports_sdpa or module._supports_attention_backend)
    ]
    found = {
        name: module
        for name, module in found.items()
        if not any(config is theirs for config in _configs(model, name) for theirs in other)
    }
    if not found:
        raise ValueError(
            f"`model` must dispatch its attention through transformers' AttentionInterface and support sdpa or "
            f"attention backends, got {type(model).__name__}, none of whose modules does"
        )
    if pattern is None:
        return found
    if not isinstance(pattern, str):
        raise TypeError(f"`modules` must be a regular expression, got {type(pattern).__name__}")
    try:
        matching = {name: module for name, module in found.items() if re.search(pattern, name)}
    except re.error as error:
        raise ValueError(f"`modules` must be a regular expression, got {pattern!r}: {error}") from error
    if not matching:
        raise ValueError(f"`modules` must match a name of {_some(found)}, got {pattern!r}")
    return matching


def _configs(model: PreTrainedModel, name: str) -> list[PretrainedConfig]:
    """What tells an attention module its implementation: its own configuration, and, perhaps others, those of the
    models around it, which make the masks."""
    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    return [model.get_submodule(name).config, *(part.config for part in around if isinstance(part, PreTrainedModel))]


@lru_cache
def _dispatches(cls: type) -> bool:
    """Whether modules of a class ask the interface for their attention function: nothing but the code tells."""
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(cls.forward)
    except (OSError, TypeError, AttributeError):  # no source at hand
        return False


def _shape(name: str, module: nn.Module) -> AttentionShape:
    shape = _find_shape(module)
    if shape is None:
        raise ValueError(
            f"`modules` must leave out `{name}` ({type(module).__name__}), or `prefixes` be given: got neither, and "
            "its number of heads and head dimension are not under any of the usual names"
        )
    return shape


def _find_shape(module: nn.Module) -> AttentionShape | None:
    """Heads and head dimensions under the names that models have for them."""

    def size(of_module: tuple, of_config: tuple, default: int | None = None) -> int | None:
        for owner, names in ((module, of_module), (module.config, of_config)):
            for name in names:
                if isinstance(value := getattr(owner, name, None), int) and value > 0:
                    return value
        return default

    heads = size(("num_heads", "num_attention_heads", "n_heads", "n_head", "heads"), ("num_attention_heads",))
    hidden = size(("internal_dim", "embed_dim", "hidden_size"), ("hidden_size",))
    head_dim = size(
        ("qk_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim"),
        ("head_dim",),
        hidden // heads if hidden and heads else None,
    )
    if heads is None or head_dim is None:
        return None
    groups = size(("num_key_value_groups",), ())
    kv_heads = heads // groups if groups else size(("num_key_value_heads", "num_kv_heads"), (), heads)
    return AttentionShape(heads, kv_heads, head_dim, size(("v_head_dim",), (), head_dim))


def _placement(module: nn.Module, model: PreTrainedModel) -> dict:
    """Device and dtype of a prefix for a module: where it computes; float32, in float64 models that."""
    weights = [*module.parameters()] or [*module.buffers()] or [*model.parameters()]  # buffers: quantized
    is_wide = any(weight.dtype == torch.float64 for weight in weights)
    # accelerate keeps weights that are offloaded on the meta device until they are used.
    hooks = [getattr(part, "_hf_hook", None) for part in module.modules()]
    devices = [device for hook in hooks if (device := getattr(hook, "execution_device", None)) is not None]
    device = torch.device(devices[0]) if devices else weights[0].device
    return {"device": device, "dtype": torch.float64 if is_wide else torch.float32}


def _given_children(model: PreTrainedModel, found: dict[str, nn.Module], prefixes: Mapping) -> dict[str, NTKPrefix]:
    if not isinstance(prefixes, Mapping) or not prefixes:
        raise TypeError(f"`prefixes` must be a mapping from names of modules to prefixes, got {prefixes!r:.80}")
    children = {}
    for name, prefix in prefixes.items():
        if name not in found:
            raise ValueError(f"`prefixes` must be for attention modules of the model, {_some(found)}, got {name!r}")
        if not isinstance(prefix, NTKPrefix | PrefixState):
            raise TypeError(f"`prefixes[{name!r}]` must be an NTKPrefix or a PrefixState, got {type(prefix).__name__}")
        if (shape := _find_shape(found[name])) is not None:  # else the first call finds out
            _check_fits(name, prefix, shape)
        prefix = NTKPrefix.from_state(prefix) if isinstance(prefix, PrefixState) else prefix
        children[name] = prefix.to(_placement(found[name], model)["device"])
    return children


def _check_fits(name: str, prefix: NTKPrefix | PrefixState, shape: AttentionShape) -> None:
    if prefix.num_heads not in (shape.num_heads, shape.num_kv_heads):
        raise ValueError(
            f"the prefix of `{name}` must have the Hq={shape.num_heads} or Hkv={shape.num_kv_heads} heads of the "
            f"module, got {prefix.num_heads}"
        )
    for letters, got, want in (
        ("D", prefix.head_dim, shape.head_dim),
        ("Dv", prefix.value_dim, shape.value_dim),
    ):
        if got != want:
            raise ValueError(
                f"the prefix of `{name}` must have the head dimension {letters}={want} of the module, got "
                f"{letters}={got}"
            )


def _attach(model: PreTrainedModel, found: dict, children: dict[str, NTKPrefix], freeze: bool) -> None:
    """All or nothing."""
    taken = [name for name in children if hasattr(found[name], CHILD)]
    if taken:
        raise ValueError(f"`{taken[0]}` must have no attribute {CHILD!r} yet, got one that has")
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad] if freeze else []
    switch = _use_ntk(model, {name: found[name] for name in children})
    try:
        for name, child in children.items():
            add_child(found[name], child)
    except Exception:
        for name in children:
            if CHILD in found[name]._modules:
                remove_child(found[name])
        switch.turn_off()
        raise
    for parameter in frozen:
        parameter.requires_grad_(False)
    settle_flash(model)
    setattr(model, _RECORD, _Attachment(list(children), switch, frozen))


def _use_ntk(model: PreTrainedModel, modules: dict[str, nn.Module]) -> Switch:
    """Makes modules of a model compute attention by "ntk", until the switch is turned off."""
    configs = {id(config): config for name in modules for config in _configs(model, name)}
    switch = Switch(configs.values())
    for name, module in modules.items():
        if module.config._attn_implementation != IMPLEMENTATION:
            got = module.config._attn_implementation
            switch.turn_off()
            raise RuntimeError(
                f"`{name}` must take the attention implementation {IMPLEMENTATION!r}, got {got!r} in spite of it being "
                "set"
            )
    return switch


def _some(names) -> str:
    names = [f"`{name}`" for name in names]
    return ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")


# Files -----------------------------------------------------------------------------------------------------------


def save_prefix(model: PreTrainedModel, path) -> None:
    """Writes the prefixes of a model, and nothing else of it, to `path`, a safetensors file.

    Raises:
        ValueError: if the model has none.
        FileNotFoundError: if there is no such folder.
    """
    children = attached_prefixes(model)
    _, save_file = _safetensors()
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"`path` must be in a folder that exists, got {str(path)!r}")
    options = {name: child.options for name, child in children.items()}
    metadata = {
        "format": _FORMAT,
        "version": str(_VERSION),
        "model": type(model).__name__,
        "prefixes": json.dumps(options),
    }
    tensors = {
        f"{name}.{CHILD}.{key}": tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, child in children.items()
        for key, tensor in child.state_dict().items()
    }
    save_file(tensors, str(path), metadata=metadata)


def load_prefix(model: PreTrainedModel, path, *, freeze: bool = True) -> dict[str, NTKPrefix]:
    """Attaches the prefixes that `save_prefix` wrote; arguments and result as in `attach_prefix`.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError, ValueError: if the model is one that `attach_prefix` refuses, or the file no such file, of another
            version, or its prefixes don't fit the model. Then nothing of the model has changed.
    """
    _attention_modules(model, None)
    _check_bare(model)
    safe_open, _ = _safetensors()
    if not Path(path).is_file():
        raise FileNotFoundError(f"`path` must be a file written by save_prefix, got {str(path)!r}, which is no file")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own types for what isn't one of its files
        raise ValueError(f"`path` must be a safetensors file, got {str(path)!r}: {error}") from error
    for name, want in (("format", _FORMAT), ("version", str(_VERSION))):
        if metadata.get(name) != want:
            raise ValueError(
                f"`path` must be a file written by save_prefix with {name} {want!r}, got {str(path)!r} with {name} "
                f"{metadata.get(name)!r}"
            )
    try:
        prefixes = {}
        for name, options in json.loads(metadata["prefixes"]).items():
            start = f"{name}.{CHILD}."
            own = {key.removeprefix(start): tensors.pop(key) for key in list(tensors) if key.startswith(start)}
            dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in own.values()) else torch.float32
            prefixes[name] = NTKPrefix(**options, dtype=dtype)
            prefixes[name].load_state_dict(own)
        if tensors:
            raise ValueError(f"unknown tensors {sorted(tensors)}")
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"`path` must hold valid prefixes, got {str(path)!r}: {error}") from error
    try:
        return attach_prefix(model, prefixes=prefixes, freeze=freeze)
    except ValueError as error:
        raise ValueError(
            f"`path` must hold prefixes that fit the model, a {type(model).__name__}, got {str(path)!r}, of a "
            f"{metadata.get('model')}: {error}"
        ) from error
