"""`attach_prefix` and `detach_prefix`: give prefixes to a model and take them away again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ... import checks
from ...state import PrefixState
from ...trainable import AUTO, NTKPrefix, resolved_map
from .attention_interface import CHILD, IMPLEMENTATION
from .attention_modules import (
    AttentionShape,
    attention_modules,
    configs_of,
    find_shape,
    list_names,
    placement,
    shape_of,
)
from .switch import Switch, add_child, remove_child, sync_parts

_RECORD = "_ntk_attachment"


@dataclass
class _Attachment:
    """The changes of a model that `detach_prefix` reverts."""

    names: list[str]
    switch: Switch
    frozen: list[nn.Parameter]


def attach_prefix(
    model: PreTrainedModel,
    feature_map: str | None = AUTO,
    *,
    modules: str | None = None,
    prefixes: Mapping[str, NTKPrefix | PrefixState] | None = None,
    freeze: bool = True,
    **options: Any,
) -> dict[str, NTKPrefix]:
    """Gives attention modules of a model a trainable prefix each, as their child `ntk_prefix`.

    The model then uses the attention implementation "ntk". Its weights keep their names and values. If an argument is
    refused, nothing of the model has changed. In left-padded batches a rotary decoder takes the positions of tokens
    from `attention_mask` if it is given no `position_ids`, since a prefix has its place before the first token.

    A converted state is as accurate as its conversion if `scale` of the conversion was that of the model (1/sqrt(D) in
    most), and keys and queries were taken after rotation and, in models that scale the query themselves (OPT, Whisper),
    before that scaling.

    Args:
        model: any model that dispatches its attention through transformers' `AttentionInterface` and supports sdpa or
            attention backends. Until `detach_prefix`, forward under another implementation raises RuntimeError.
        feature_map, options: of `NTKPrefix`, the same for every module. A prefix has the key/value heads of its module
            and is float32 (float64 in a float64 model) on its device. The default, "auto", is "elu", and None (rows
            only) with `num_rows` and no option of features.
        modules: a regular expression that is searched for in the names of the modules: r"decoder.*self_attn",
            r"layers\\.[0-7]\\.". None for all, cross-attention and encoders of images included.
        prefixes: instead of these, the prefixes to attach, by the names of their modules: each an `NTKPrefix`, or a
            `PrefixState` (converted, for instance) that one starts from, with the query heads or the key/value heads of
            the module. `attention_shapes(model)` returns names and sizes.
        freeze: whether only the prefixes are trained, until `detach_prefix`.

    Returns:
        The prefixes by the names of their modules.

    Raises:
        TypeError, ValueError: if the model is unsupported or has prefixes already, no name matches, a prefix has other
            sizes than its module, or an option does not fit.
    """
    found = attention_modules(model, modules)
    check_bare(model)
    checks.check_bool("freeze", freeze)
    if prefixes is None:
        feature_map = resolved_map(feature_map, **options)
        shapes = {name: shape_of(name, module) for name, module in found.items()}
        children = {
            name: NTKPrefix(
                shape.num_kv_heads, shape.head_dim, feature_map, value_dim=shape.value_dim, **options,
                **placement(found[name], model),
            )
            for name, shape in shapes.items()
        }  # fmt: skip
    else:
        given = {"feature_map": feature_map != AUTO, "modules": modules is not None} | dict.fromkeys(options, True)
        for name, is_given in given.items():
            if is_given:
                raise ValueError(f"`{name}` must not be given together with `prefixes`, got both")
        children = _given_children(model, found, prefixes)
    attach_children(model, found, children, freeze)
    return children


def detach_prefix(model: PreTrainedModel) -> dict[str, NTKPrefix]:
    """Takes the prefixes away again and restores the model as it was before `attach_prefix`.

    Returns:
        The prefixes by the names of their modules; `attach_prefix(model, prefixes=...)` attaches them again.
    """
    children = attached_prefixes(model)
    record = getattr(model, _RECORD)
    for name in record.names:
        remove_child(model.get_submodule(name))
    record.switch.turn_off()
    sync_parts(model)
    for parameter in record.frozen:
        parameter.requires_grad_(True)
    delattr(model, _RECORD)
    return children


def attached_prefixes(model: PreTrainedModel) -> dict[str, NTKPrefix]:
    """Returns the prefixes that `attach_prefix` or `load_prefix` gave to the model, by the names of their modules.

    Raises:
        ValueError: if there are none.
    """
    record = getattr(model, _RECORD, None)
    if record is None:
        raise ValueError(f"`model` must have prefixes (attach_prefix, load_prefix), got {type(model).__name__} without")
    return {name: getattr(model.get_submodule(name), CHILD) for name in record.names}


def check_bare(model: PreTrainedModel) -> None:
    """Raises ValueError if the model has attached prefixes."""
    if hasattr(model, _RECORD):
        raise ValueError(
            f"`model` must have no prefixes yet, got one with {len(getattr(model, _RECORD).names)}; detach_prefix "
            "takes them away"
        )


def _given_children(
    model: PreTrainedModel, found: dict[str, nn.Module], prefixes: Mapping[str, NTKPrefix | PrefixState]
) -> dict[str, NTKPrefix]:
    if not isinstance(prefixes, Mapping) or not prefixes:
        raise TypeError(f"`prefixes` must be a mapping from names of modules to prefixes, got {prefixes!r:.80}")
    children = {}
    for name, prefix in prefixes.items():
        if name not in found:
            raise ValueError(
                f"`prefixes` must be for attention modules of the model, {list_names(found)}, got {name!r}"
            )
        if not isinstance(prefix, NTKPrefix | PrefixState):
            raise TypeError(f"`prefixes[{name!r}]` must be an NTKPrefix or a PrefixState, got {type(prefix).__name__}")
        if (shape := find_shape(found[name])) is not None:  # else the first forward checks
            _check_fits(name, prefix, shape)
        prefix = NTKPrefix.from_state(prefix) if isinstance(prefix, PrefixState) else prefix
        children[name] = prefix.to(placement(found[name], model)["device"])
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


def attach_children(
    model: PreTrainedModel, found: dict[str, nn.Module], children: Mapping[str, nn.Module], freeze: bool
) -> None:
    """Adds each of `children`, all `PrefixSource`s, to the module of its name in `found`; none of them if one fails."""
    taken = [name for name in children if hasattr(found[name], CHILD)]
    if taken:
        raise ValueError(f"`{taken[0]}` must have no attribute {CHILD!r} yet, got one that has")
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad] if freeze else []
    switch = use_ntk(model, {name: found[name] for name in children})
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
    sync_parts(model)
    setattr(model, _RECORD, _Attachment(list(children), switch, frozen))


def use_ntk(model: PreTrainedModel, modules: dict[str, nn.Module]) -> Switch:
    """Makes modules of a model use the implementation "ntk" until the returned switch is turned off."""
    configs = {id(config): config for name in modules for config in configs_of(model, name)}
    switch = Switch(configs.values())
    for name, module in modules.items():
        config: Any = module.config
        if config._attn_implementation != IMPLEMENTATION:
            got = config._attn_implementation
            switch.turn_off()
            raise RuntimeError(
                f"`{name}` must take the attention implementation {IMPLEMENTATION!r}, got {got!r} in spite of it being "
                "set"
            )
    return switch
