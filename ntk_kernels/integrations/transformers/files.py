"""Files with the prefixes of a model, and nothing else of it."""

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ...modules import NTKPrefix
from ...state import _safetensors
from .attach import attach_prefix, attached_prefixes, check_bare
from .attention_interface import CHILD
from .modules import attention_modules

_FORMAT, _VERSION = "ntk-kernels prefixes of a model", 1


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
    attention_modules(model, None)
    check_bare(model)
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
