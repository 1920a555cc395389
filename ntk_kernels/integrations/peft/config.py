"""`NTKConfig`: the configuration of an adapter, as adapter_config.json holds it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from peft import PeftConfig, PeftType
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ... import checks
from ...files import check_finite, safetensors
from ...state import PrefixState
from ...trainable import AUTO, NTKPrefix, PrefixOptions, options_of_state, resolved_map
from ..transformers.attention_interface import CHILD
from ..transformers.attention_modules import list_names

# Attribute of an `NTKLayer` with the prefixes of its adapters. PEFT takes parameters with this in their names to be
# ours, and skips layers with this in their names, so it must not be a part of `CHILD`.
STATES = "ntk_states"
_VERSION = 1
_T = TypeVar("_T")


def _add_peft_type(name: str) -> None:
    """Adds a member to `PeftType`: PEFT registers only methods that are among them, and has no function to add one."""
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)  # an enum's own __setattr__ refuses


if "NTK" not in PeftType.__members__:
    _add_peft_type("NTK")


@dataclass
class NTKConfig(PrefixOptions, PeftConfig):
    """The configuration of one adapter: a prefix in each attention module, all with the same options of `NTKPrefix`.

    Args:
        target_modules: names of attention modules, or the ends of names (["self_attn"]), or one regular expression that
            matches whole names (r".*layers\\.[0-7]\\.self_attn"). Default: all that dispatch their attention through
            transformers' `AttentionInterface`; `attention_shapes` in `ntk_kernels.integrations.transformers` lists
            them.
        layers_to_transform: number or numbers of the layers to which the target modules are restricted.
        feature_map, rank, centers, num_rows, positive, scale_by_k, log_scale, feature_scale, init_mass: as in
            `NTKPrefix`; `centers` is a number. The default "auto" of `feature_map` becomes "elu", and None (rows only)
            with `num_rows` and no option of features.
        modules_to_save: other modules of the model to be trained and saved as a whole, such as a classifier's head.
        shapes: [Hkv, D, Dv] by the names of the adapter's modules, filled in when it meets a model, and saved. A model
            with other shapes is refused.
        format_version: version of the files.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    feature_map: str | None = AUTO
    target_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    modules_to_save: list[str] | None = None
    shapes: dict[str, list[int]] | None = None
    format_version: int = _VERSION

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.NTK
        if self.format_version != _VERSION:
            raise ValueError(
                f"`format_version` must be {_VERSION}, which this version of ntk-kernels reads and writes, got "
                f"{self.format_version!r}"
            )
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(
                    f"`target_modules` must be a regular expression, or a list of names, got {self.target_modules!r}: "
                    f"{error}"
                ) from error
        elif self.target_modules is not None:
            self.target_modules = _list_of("target_modules", self.target_modules, str, "names")
        layers: Any = self.layers_to_transform
        if layers is not None and not _is_int(layers):
            self.layers_to_transform = _list_of("layers_to_transform", layers, int, "numbers")
        if self.centers is not None:
            checks.check_int("centers", self.centers, minimum=1)
        self.feature_map = resolved_map(**self.prefix_options)
        _check_shapes(self.shapes)
        # To refuse options that do not fit; the meta device takes neither memory nor random numbers.
        NTKPrefix(1, 1, **self.prefix_options, device="meta")

    @property
    def prefix_options(self) -> dict[str, Any]:
        """Options of `NTKPrefix`."""
        return {field.name: getattr(self, field.name) for field in fields(PrefixOptions)}

    @classmethod
    def of_state(cls, state: PrefixState, **options: Any) -> "NTKConfig":
        """Returns the configuration of an adapter that can start as this state and others of its form.

        Args:
            state: the state of any module; `NTKModel.init_from_states` takes those of all modules.
            options: all options that the state does not determine.

        Raises:
            TypeError, ValueError: if `state` is not a single PrefixState, or an option does not fit.
        """
        return cls(**options_of_state(state), **options)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Reads adapter_config.json, and checks the weights beside it before they meet a model.

        Raises:
            TypeError, ValueError: if the file does not exist or is of another version, or if the weights are not finite
                or do not have the names and shapes that it implies. Others than prefixes have to be of its
                `modules_to_save`.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        weights = Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        if isinstance(config, cls) and weights.is_file():
            config._check_weights(weights)
        return config

    def _check_weights(self, path: Path) -> None:
        if self.shapes is None:
            raise ValueError(f"adapter_config.json must tell the `shapes` of the weights beside it, {path}, got None")
        expected = {}
        for name, (num_heads, head_dim, value_dim) in self.shapes.items():
            prefix = NTKPrefix(num_heads, head_dim, value_dim=value_dim, **self.prefix_options, device="meta")
            for key, parameter in prefix.named_parameters():
                expected[f"base_model.model.{name}.{CHILD}.{STATES}.{key}"] = list(parameter.shape)
        safe_open, _ = safetensors()
        try:
            with safe_open(str(path), framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors raises its own types
            raise ValueError(f"{path} must be a safetensors file, got another or a part of one: {error}") from error
        found = {key: list(tensor.shape) for key, tensor in tensors.items()}
        if missing := [key for key in expected if key not in found]:
            raise ValueError(
                f"{path} must hold the weights that adapter_config.json tells of, `{missing[0]}` among them, got "
                f"{list_names(found) or 'nothing'}"
            )
        # PEFT would load any weight into the model.
        saved = [f".{name}." for name in self.modules_to_save or ()]
        if unknown := [key for key in found if key not in expected and not any(name in key for name in saved)]:
            raise ValueError(
                f"{path} must hold the prefixes that adapter_config.json tells of and its `modules_to_save`, "
                f"{self.modules_to_save}, alone, got {list_names(unknown)} too (embeddings that were resized: "
                "save_pretrained(..., save_embedding_layers=False) leaves them out)"
            )
        for key, shape in expected.items():
            if found[key] != shape:
                raise ValueError(
                    f"`{key}` in {path} must have the shape that adapter_config.json tells, {shape}, got {found[key]}"
                )
            checks.check_floating(key, tensors[key])
            check_finite(key, tensors[key], path)


def _check_shapes(shapes: Any) -> None:
    """Raises TypeError or ValueError unless `shapes` is None or has [Hkv, D, Dv] for each name."""
    if shapes is None:
        return
    if not isinstance(shapes, Mapping):
        raise TypeError(f"`shapes` must have [Hkv, D, Dv] by the names of modules, got {type(shapes).__name__}")
    for name, sizes in shapes.items():
        if not isinstance(sizes, list | tuple) or len(sizes) != 3:
            raise ValueError(f"`shapes[{name!r}]` must be [Hkv, D, Dv], got {sizes!r:.80}")
        for letters, size in zip(("Hkv", "D", "Dv"), sizes, strict=True):
            checks.check_int(f"shapes[{name!r}]: {letters}", size, minimum=1)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _list_of(name: str, values: Iterable[_T], kind: type[_T], what: str) -> list[_T]:
    """Returns `values` as a list, sorted if it is a set; raises TypeError unless all are of a type."""
    fits = isinstance(values, list | tuple | set) and len(values) > 0
    if not fits or not all(isinstance(value, kind) and not isinstance(value, bool) for value in values):
        raise TypeError(f"`{name}` must be a list of {what}, got {values!r}")
    return sorted(values) if isinstance(values, set) else list(values)
