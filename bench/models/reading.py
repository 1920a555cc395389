"""Shared by the readers of real models: the attention inputs that they return, and the text.

The text is the Python language reference, which ships with Python (`pydoc_data.topics`).
"""

import os
import pydoc_data.topics
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 512  # tokens that a model reads at a time


class Layer(NamedTuple):
    """Attention inputs of one layer: keys and values of the prefix [Hkv, m, D]; queries [inputs, H, 512, D], keys and
    values [inputs, Hkv, 512, D] of the inputs.

    Every token of an input sees the whole prefix, and all tokens of its own input or, if the reader `is_causal`, those
    up to itself.
    """

    prefix_key: Tensor
    prefix_value: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


def package_folder(name: str, *needed: str) -> Path | None:
    """Returns the folder of a package without importing it; None if the package or one of `needed` is missing."""
    specs = [find_spec(package) for package in (name, *needed)]
    return None if None in specs else Path(specs[0].origin).parent


def quiet_transformers():
    """Imports transformers so that it neither uses the network nor reports on loading."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def tokens_of_text(tokenizer) -> Tensor:
    """Returns the tokens of the text, [tokens]."""
    text = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


def text_without_repeats() -> str:
    """Returns the text with each paragraph once; topics share sections, so that parts of the text would overlap."""
    paragraphs = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())).split("\n\n")
    first = {}
    for paragraph in paragraphs:
        first.setdefault(" ".join(paragraph.split()), paragraph)
    return "\n\n".join(first.values())


def check_length(maximum: int, prefix_rows: int) -> None:
    """Raises ValueError if there are more prefix rows than leave enough text for the inputs."""
    if prefix_rows > maximum:
        raise ValueError(f"the text is long enough for {maximum} prefix rows, not for {prefix_rows}")
