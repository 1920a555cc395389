"""Which modules of a model can have a prefix, their heads and head dimensions, and where a prefix for them belongs."""

import inspect
import re
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class AttentionShape(NamedTuple):
    """Query heads Hq, key/value heads Hkv, and head dimensions D and Dv of an attention module."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int


def attention_shapes(model: PreTrainedModel, modules: str | None = None) -> dict[str, AttentionShape]:
    """The attention modules of a model that can have a prefix, by name, with their heads and head dimensions.

    Args:
        modules: a regular expression that is searched for in the names; None for all modules.

    Raises:
        TypeError, ValueError: if the model is no transformers model, does not dispatch its attention through
            transformers' `AttentionInterface` or support sdpa or attention backends, or no name matches.
    """
    return {name: shape_of(name, module) for name, module in attention_modules(model, modules).items()}


def attention_modules(model: PreTrainedModel, pattern: str | None) -> dict[str, nn.Module]:
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
        if not any(config is theirs for config in configs_of(model, name) for theirs in other)
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
        raise ValueError(f"`modules` must match a name of {some(found)}, got {pattern!r}")
    return matching


def configs_of(model: PreTrainedModel, name: str) -> list[PretrainedConfig]:
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


def shape_of(name: str, module: nn.Module) -> AttentionShape:
    shape = find_shape(module)
    if shape is None:
        raise ValueError(
            f"`modules` must leave out `{name}` ({type(module).__name__}), or `prefixes` be given: got neither, and "
            "its number of heads and head dimension are not under any of the usual names"
        )
    return shape


def find_shape(module: nn.Module) -> AttentionShape | None:
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


def placement(module: nn.Module, model: PreTrainedModel) -> dict:
    """Device and dtype of a prefix for a module: where it computes; float32, in float64 models that."""
    weights = [*module.parameters()] or [*module.buffers()] or [*model.parameters()]  # buffers: quantized
    is_wide = any(weight.dtype == torch.float64 for weight in weights)
    # accelerate keeps weights that are offloaded on the meta device until they are used.
    hooks = [getattr(part, "_hf_hook", None) for part in module.modules()]
    devices = [device for hook in hooks if (device := getattr(hook, "execution_device", None)) is not None]
    device = torch.device(devices[0]) if devices else weights[0].device
    return {"device": device, "dtype": torch.float64 if is_wide else torch.float32}


def some(names) -> str:
    names = [f"`{name}`" for name in names]
    return ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
