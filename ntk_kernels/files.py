"""`Format`: safetensors files of states and prefixes, whose metadata say what they hold."""

import hashlib
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MAY_BE_MINUS_INFINITY = ("bias", "log_scale")  # ends of names: weights that are switched off


class Format(NamedTuple):
    """A kind of file."""

    name: str  # in the metadata
    version: int  # in the metadata
    written_by: str  # name of the public function that writes it, for messages

    def save(self, path: str | PathLike[str], tensors: dict[str, Tensor], **metadata: str) -> None:
        """Writes tensors and metadata; raises FileNotFoundError if the folder does not exist."""
        _, save_file = safetensors()
        if not Path(path).parent.is_dir():
            raise FileNotFoundError(f"`path` must be in a folder that exists, got {str(path)!r}")
        # Copies: safetensors refuses tensors that share memory.
        copies = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        metadata = {"format": self.name, "version": str(self.version), **metadata}
        save_file(copies, str(path), metadata=metadata | {"sha256": _checksum(copies, metadata)})

    def load(self, path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Reads tensors, to the CPU, and metadata.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if it is of another kind or version, has changed since it was written (0.1.0 wrote no
                checksum), or has a number that is not finite, but for weights that are switched off.
        """
        safe_open, _ = safetensors()
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"`path` must be a file written by {self.written_by}, got {str(path)!r}, which is no file"
            )
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors raises its own types for other files
            raise ValueError(f"`path` must be a safetensors file, got {str(path)!r}: {error}") from error
        for what, want in (("format", self.name), ("version", str(self.version))):
            if metadata.get(what) != want:
                raise ValueError(
                    f"`path` must be a file written by {self.written_by} with {what} {want!r}, got {str(path)!r} with "
                    f"{what} {metadata.get(what)!r}"
                )
        checksum = metadata.pop("sha256", None)
        if checksum is not None and checksum != _checksum(tensors, metadata):
            raise ValueError(
                f"`path` must be a file as {self.written_by} wrote it, got {str(path)!r}, whose contents do not have "
                "its checksum"
            )
        for name, tensor in tensors.items():
            check_finite(name, tensor, path)
        return tensors, metadata


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Returns the SHA-256 of tensors, by name, and metadata."""
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, tensor.dtype, list(tensor.shape))).encode())
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_finite(name: str, tensor: Tensor, path: str | PathLike[str]) -> None:
    """Raises ValueError if a tensor of a file has a number that is not finite, other than a weight of e^-inf."""
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:  # refused by their dtype, as are complex ones
        return
    if name.endswith(_MAY_BE_MINUS_INFINITY):
        tensor = tensor.masked_fill(tensor == -torch.inf, 0)
    if not tensor.isfinite().all():
        wrong = tensor[~tensor.isfinite()]
        raise ValueError(f"`{name}` in {str(path)!r} must be finite, got {wrong[0].item()} ({len(wrong)} such numbers)")


def safetensors() -> tuple[Callable[..., Any], Callable[..., None]]:
    """Returns `safe_open` and `save_file` of safetensors; raises ImportError with a hint if it is not installed."""
    try:
        from safetensors import safe_open
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("files of states and prefixes need safetensors: pip install 'ntk-kernels[io]'") from error
    return safe_open, save_file
