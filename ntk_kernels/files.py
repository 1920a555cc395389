"""Files of states and prefixes: safetensors, whose metadata say what they hold."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class Format(NamedTuple):
    """What a kind of file says of itself, and the function that writes it."""

    name: str
    version: int
    written_by: str

    def save(self, path, tensors: dict[str, Tensor], **metadata: str) -> None:
        _, save_file = safetensors()
        if not Path(path).parent.is_dir():
            raise FileNotFoundError(f"`path` must be in a folder that exists, got {str(path)!r}")
        # Copies: safetensors refuses tensors that share memory.
        copies = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        save_file(copies, str(path), metadata={"format": self.name, "version": str(self.version), **metadata})

    def load(self, path) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors, on the CPU, and metadata."""
        safe_open, _ = safetensors()
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"`path` must be a file written by {self.written_by}, got {str(path)!r}, which is no file"
            )
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors raises its own types for what isn't one of its files
            raise ValueError(f"`path` must be a safetensors file, got {str(path)!r}: {error}") from error
        for what, want in (("format", self.name), ("version", str(self.version))):
            if metadata.get(what) != want:
                raise ValueError(
                    f"`path` must be a file written by {self.written_by} with {what} {want!r}, got {str(path)!r} with "
                    f"{what} {metadata.get(what)!r}"
                )
        return tensors, metadata


def safetensors():
    """The functions that open and save its files."""
    try:
        from safetensors import safe_open
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("files of states and prefixes need safetensors: pip install 'ntk-kernels[io]'") from error
    return safe_open, save_file
