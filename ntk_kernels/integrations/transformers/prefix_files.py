"""`save_prefix` and `load_prefix`: files that hold the prefixes of a model and nothing else of it."""

import json
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ... import checks
from ...files import Format
from ...trainable import NTKPrefix
from .attach import attach_prefix, attached_prefixes, check_bare
from .attention_interface import CHILD
from .attention_modules import attention_modules

_FILES = Format("ntk-kernels prefixes of a model", 1, "save_prefix")


def save_prefix(model: PreTrainedModel, path: str | PathLike[str]) -> None:
    """Writes the prefixes of a model, and nothing else of it, to `path`, a safetensors file.

    Raises:
        ValueError: if the model has no prefixes.
        FileNotFoundError: if the folder does not exist.
    """
    children = attached_prefixes(model)
    tensors = {
        f"{name}.{CHILD}.{key}": tensor
        for name, child in children.items()
        for key, tensor in child.state_dict().items()
    }
    options = {name: child.options for name, child in children.items()}
    _FILES.save(path, tensors, model=type(model).__name__, prefixes=json.dumps(options))


def load_prefix(model: PreTrainedModel, path: str | PathLike[str], *, freeze: bool = True) -> dict[str, NTKPrefix]:
    """Attaches the prefixes that `save_prefix` wrote; arguments and result as in `attach_prefix`.

    Raises:
        FileNotFoundError: if the file does not exist.
        TypeError, ValueError: if `attach_prefix` refuses the model, the file was not written by `save_prefix` of this
            version or has changed since, or its prefixes do not fit the model or are not finite. Then nothing of the
            model has changed.
    """
    attention_modules(model, None)
    check_bare(model)
    tensors, metadata = _FILES.load(path)
    try:
        prefixes = {}
        for name, options in json.loads(metadata["prefixes"]).items():
            start = f"{name}.{CHILD}."
            own = {key.removeprefix(start): tensors.pop(key) for key in list(tensors) if key.startswith(start)}
            prefixes[name] = _prefix_of(own, options)
        if tensors:
            raise ValueError(f"unknown tensors {sorted(tensors)}")
    except (AttributeError, KeyError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"`path` must hold valid prefixes, got {str(path)!r}: {error}") from error
    try:
        return attach_prefix(model, prefixes=prefixes, freeze=freeze)
    except ValueError as error:
        raise ValueError(
            f"`path` must hold prefixes that fit the model, a {type(model).__name__}, got {str(path)!r}, of a "
            f"{metadata.get('model')}: {error}"
        ) from error


def _prefix_of(tensors: dict[str, Tensor], options: dict[str, Any]) -> NTKPrefix:
    """Returns the prefix of the options with these tensors as its parameters."""
    for name, tensor in tensors.items():
        checks.check_floating(name, tensor)
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors.values()) else torch.float32
    # The meta device takes no memory, whatever sizes the file tells.
    prefix = NTKPrefix(**options, dtype=dtype, device="meta")
    prefix.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    return prefix
