"""What the readers share: the attention inputs that they yield, and the text.

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
    """Attention inputs of one layer: of the prefix [Hkv, m, D], of each input [inputs, H, 512, D] or with Hkv heads.

    Every token of an input sees the whole prefix, and of its own input all tokens or, where the reader says
    `is_causal`, those up to itself.
    """

    prefix_key: Tensor
    prefix_value: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


def package_folder(name: str, *needed: str) -> Path | None:
    """Where the package that ships a model lies, without importing it; None if it or one of `needed` is missing."""
    specs = [find_spec(package) for package in (name, *needed)]
    return None if None in specs else Path(specs[0].origin).parent


def quiet_transformers():
    """transformers, which then neither asks the network nor reports on its loading."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def tokens_of_text(tokenizer) -> Tensor:
    """The text, [tokens]."""
    text = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


def text_without_repeats() -> str:
    """The text with each paragraph once: topics share whole sections, so that parts of the text would not be apart."""
    paragraphs = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())).split("\n\n")
    first = {}
    for paragraph in paragraphs:
        first.setdefault(" ".join(paragraph.split()), paragraph)
    return "\n\n".join(first.values())


def check_length(most: int, prefix_rows: int) -> None:
    """`most` prefix rows leave enough of the text for the inputs."""
    if prefix_rows > most:
        raise ValueError(f"the text is long enough for {most} prefix rows, not for {prefix_rows}")
