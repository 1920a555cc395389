"""The attention modules of a model that can have a prefix: names, heads, head dimensions, device and dtype."""

import inspect
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple, TypedDict, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class AttentionShape(NamedTuple):
    """Numbers of heads and head dimensions of an attention module."""

    num_heads: int  # Hq
    num_kv_heads: int  # Hkv
    head_dim: int  # D
    value_dim: int  # Dv


class Placement(TypedDict):
    """Device and dtype of a prefix."""

    device: torch.device
    dtype: torch.dtype


def attention_shapes(model: PreTrainedModel, modules: str | None = None) -> dict[str, AttentionShape]:
    """Returns heads and head dimensions of the attention modules that can have a prefix, by name.

    Args:
        modules: a regular expression that is searched for in the names; None for all modules.

    Raises:
        TypeError, ValueError: if the model is no transformers model, does not dispatch its attention through
            transformers' `AttentionInterface` or support sdpa or attention backends, or no name matches.
    """
    return {name: shape_of(name, module) for name, module in attention_modules(model, modules).items()}


def attention_modules(model: PreTrainedModel, pattern: str | None) -> dict[str, nn.Module]:
    """Returns the attention modules that can have a prefix, by name; arguments and errors as in `attention_shapes`."""
    if not isinstance(model, PreTrainedModel):
        hint = ", whose get_base_model() is one" if hasattr(model, "get_base_model") else ""
        raise TypeError(f"`model` must be a transformers.PreTrainedModel, got {type(model).__name__}{hint}")
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "config", None), PretrainedConfig) and _dispatches(cast(Any, type(module)))
    }
    # Models without this support may dispatch attention, but rely on the masks of "eager" or dispatch only a part.
    unsupported = [
        module.config
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and not (module._supports_sdpa or module._supports_attention_backend)
    ]
    found = {
        name: module
        for name, module in found.items()
        if not any(config is other for config in configs_of(model, name) for other in unsupported)
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
        raise ValueError(f"`modules` must match a name of {list_names(found)}, got {pattern!r}")
    return matching


def configs_of(model: PreTrainedModel, name: str) -> list[PretrainedConfig]:
    """Returns the configurations that tell an attention module and the masks for it which implementation to use.

    They are its own and those of the models around it, which may be others.
    """
    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    return [model.get_submodule(name).config, *(part.config for part in around if isinstance(part, PreTrainedModel))]


@lru_cache
def _dispatches(cls: Any) -> bool:
    """Returns whether modules of a class ask the interface for their attention function, as their code shows."""
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(cls.forward)
    except (OSError, TypeError, AttributeError):  # no source
        return False


def shape_of(name: str, module: nn.Module) -> AttentionShape:
    """Returns heads and head dimensions of an attention module; raises ValueError if they are not found."""
    shape = find_shape(module)
    if shape is None:
        raise ValueError(
            f"`modules` must leave out `{name}` ({type(module).__name__}), or `prefixes` be given: got neither, and "
            "its number of heads and head dimension are not under any of the usual names"
        )
    return shape


def find_shape(module: nn.Module) -> AttentionShape | None:
    """Returns heads and head dimensions, looked for under the names that models use; None if they are not found."""

    def size(of_module: tuple[str, ...], of_config: tuple[str, ...], default: int | None = None) -> int | None:
        for owner, names in ((module, of_module), (getattr(module, "config", None), of_config)):
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


def placement(module: nn.Module, model: PreTrainedModel) -> Placement:
    """Returns the device of a prefix, where its module computes, and its dtype: float32, float64 in float64 models."""
    # A quantized module has buffers only.
    weights: list[torch.Tensor] = [*module.parameters()] or [*module.buffers()] or [*model.parameters()]
    is_wide = any(weight.dtype == torch.float64 for weight in weights)
    # accelerate keeps weights that are offloaded on the meta device until they are used.
    hooks = [getattr(part, "_hf_hook", None) for part in module.modules()]
    devices = [device for hook in hooks if (device := getattr(hook, "execution_device", None)) is not None]
    device = torch.device(devices[0]) if devices else weights[0].device
    return {"device": device, "dtype": torch.float64 if is_wide else torch.float32}


def list_names(names: Iterable[str]) -> str:
    """Returns names for a message, the first four and the number of them all if there are more."""
    names = [f"`{name}`" for name in names]
    return ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")
