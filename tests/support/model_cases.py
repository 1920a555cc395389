"""Tiny random models of many families, and their attention computed a second time by the definition."""

import copy
import math
import warnings
from dataclasses import dataclass

import pytest
import torch
import transformers
from oracle import F64, assert_as_accurate, close, nudged
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ntk_kernels import PrefixState, reference
from ntk_kernels.integrations.transformers import attach_prefix

VOCABULARY, BATCH, LENGTH = 61, 2, 9
DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """`own` is the model's own attention that the results are compared with."""

    name: str
    model: str
    config: str
    options: dict
    own: str = "sdpa"
    kind: str = "decoder"
    attention: str = r"self_attn$"  # modules that get prefixes in most tests
    since: int = 4  # the major version of transformers in which it dispatches its attention


FAMILIES = [
    Family("llama", "LlamaForCausalLM", "LlamaConfig", DECODER),
    Family("qwen2", "Qwen2ForCausalLM", "Qwen2Config", DECODER),
    Family("qwen3", "Qwen3ForCausalLM", "Qwen3Config", DECODER | {"head_dim": 16}),
    Family("mistral", "MistralForCausalLM", "MistralConfig", DECODER | {"sliding_window": 4, "head_dim": 8}),
    Family(
        "gemma2", "Gemma2ForCausalLM", "Gemma2Config",
        DECODER | {"sliding_window": 4, "head_dim": 8, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16,
                   "final_logit_softcapping": None, "tie_word_embeddings": False},
        own="eager",
    ),
    Family("glm", "GlmForCausalLM", "GlmConfig", DECODER | {"head_dim": 8}),
    Family(
        "gpt_oss", "GptOssForCausalLM", "GptOssConfig",
        DECODER | {"sliding_window": 4, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 2},
        own="eager",
    ),
    Family(
        "opt", "OPTForCausalLM", "OPTConfig",
        DECODER | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "attention_dropout": 0.0},
    ),
    Family(
        "gpt2", "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": None, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
        attention=r"\.attn$",
    ),
    Family(
        "deepseek_v3", "DeepseekV3ForCausalLM", "DeepseekV3Config",  # another head dimension of values
        DECODER | {"num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
                   "qk_nope_head_dim": 8, "v_head_dim": 6, "first_k_dense_replace": 2, "n_routed_experts": 4,
                   "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    Family(
        "bert", "BertForMaskedLM", "BertConfig",
        DECODER | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, kind="encoder",
        attention=r"\.self$", since=5,
    ),
    Family(
        "esm", "EsmForMaskedLM", "EsmConfig",
        DECODER | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "position_embedding_type": "rotary",
                   "mask_token_id": 2, "token_dropout": False}, kind="encoder", attention=r"\.self$",
    ),
    Family(
        "vit", "ViTForImageClassification", "ViTConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 8,
         "patch_size": 4, "num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        kind="image", attention="attention",
    ),
    Family(
        "whisper", "WhisperForConditionalGeneration", "WhisperConfig",
        {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
         "num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 32, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "dropout": 0.0, "suppress_tokens": None,
         "begin_suppress_tokens": None},
        kind="speech",
    ),
    Family(
        "t5", "T5ForConditionalGeneration", "T5Config",  # position biases; two copies of its configuration
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
         "dropout_rate": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0},
        kind="text_to_text", attention=r"SelfAttention$", since=5,
    ),
]  # fmt: skip
FAMILIES = [family for family in FAMILIES if family.since <= int(transformers.__version__.split(".")[0])]
BY_NAME = {family.name: family for family in FAMILIES}
no_softcap = pytest.mark.filterwarnings("ignore:ntk_kernels. the 'torch' backend does not support softcap")
all_families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
GENERATING = [family for family in FAMILIES if family.kind not in ("encoder", "image")]


def some(*names):
    return pytest.mark.parametrize(
        "family", [BY_NAME[n] for n in names if n in BY_NAME], ids=lambda family: family.name
    )


def build(family, implementation=None, dtype=torch.float32, **options):
    """Returns a model with the same random weights every time, large enough that attention is far from uniform."""
    config = getattr(transformers, family.config)(**family.options | options)
    own = "definition64" if family.own == "eager" and dtype == F64 else family.own  # eager takes softmax in float32
    config._attn_implementation = implementation or own
    config._experts_implementation = "eager"  # others take no float64
    torch.manual_seed(0)
    return sharpened(getattr(transformers, family.model)(config)).to(dtype).eval()


def sharpened(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=2 / math.sqrt(parameter.shape[-1]), generator=generator)
            elif name.endswith("sinks"):
                parameter.normal_(generator=generator)
    return model


IMAGE = [VOCABULARY] * 4  # the tokens of one image, for `llava`


def llava():
    """Returns a model of images and text: a tower whose rows are images, and a decoder whose rows are prompts."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**DECODER | {"vocab_size": VOCABULARY + 1}),
        image_token_index=VOCABULARY, vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    torch.manual_seed(0)
    return sharpened(transformers.LlavaForConditionalGeneration(config)).eval()


def inputs(family, dtype=torch.float32, padding=None):
    """Returns the inputs of a model. `padding`: "left" or "right", three tokens of the first row."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
    if family.kind == "image":
        return {"pixel_values": torch.randn(BATCH, 3, 8, 8, generator=generator).to(dtype)}
    if family.kind == "speech":
        features = torch.randn(BATCH, 4, 16, generator=generator).to(dtype)
        return {"input_features": features, "decoder_input_ids": ids}
    if family.kind == "text_to_text":
        return {"input_ids": ids.flip(1), "decoder_input_ids": ids}
    if padding is None:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[0, slice(0, 3) if padding == "left" else slice(-3, None)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def with_labels(family, given):
    if family.kind == "image":
        return given | {"labels": torch.tensor([0, 2])}
    labels = given.get("decoder_input_ids", given.get("input_ids"))
    return given | {"labels": labels}


def randomise(prefixes, seed=3):
    """Gives prefixes about as much mass as the tokens have."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for prefix in prefixes.values():
            for name, parameter in prefix.named_parameters():
                parameter.normal_(std=0.5, generator=generator)
                if name == "z":
                    parameter.mul_(3)
    return prefixes


class Tasks(torch.nn.Module):
    """A stack of states, and an index for each row, as an adapter with several tasks has them."""

    def __init__(self, *prefixes, index):
        super().__init__()
        self.prefixes, self.index = torch.nn.ModuleList(prefixes), torch.tensor(index)

    def state_and_index(self, batch):
        return PrefixState.stack([prefix() for prefix in self.prefixes]), self.index


def attach(family, model, *args, **options):
    return attach_prefix(model, *args, modules=family.attention, **options)


def visible_logits(model, given):
    """Returns the logits [n, V] of the positions that are no padding."""
    with torch.no_grad():
        logits = model(**given).logits
    return logits[given["attention_mask"].bool()] if "attention_mask" in given else logits


def by_definition(model, dtype):
    """Returns a copy of a model in `dtype`, whose attention, prefixes included, is computed by the definition."""
    model = copy.deepcopy(model).to(dtype)
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        config._attn_implementation = "definition64" if dtype == F64 else "definition32"
    for module in model.modules():
        if "_ntk_hook" in vars(module):  # refuses other implementations than "ntk"
            module._ntk_hook.remove()
    return model


def in_float64(given):
    return {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in given.items()}


def roundings(model, given, dtype, count=16):
    """Yields the logits of runs by the definition, each with all parameters and buffers nudged in `dtype`.

    They differ as those of equivalent computations do, on other processors or with sums in another order: in the
    largest error by factors of five, since a stack of layers amplifies some roundings, and which ones is luck.
    """
    model = by_definition(model, next(model.parameters()).dtype)
    generator = torch.Generator().manual_seed(7)
    tensors = [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]
    start = [tensor.detach().clone() for tensor in tensors]
    for _ in range(count):
        with torch.no_grad():
            for tensor, values in zip(tensors, start, strict=True):
                tensor.copy_(nudged(values, dtype, generator))
        yield visible_logits(model, given)


def with_positions(model, given):
    """Returns the inputs with the positions that a rotary decoder with prefixes gives the tokens of padded rows."""
    mask = given.get("attention_mask")
    if mask is None or "position_ids" in given or not any("_ntk_positions_hook" in vars(m) for m in model.modules()):
        return given
    return given | {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def check_logits(model, given, dtype=torch.float32, first=0, **logits):
    """Asserts that each of `logits`, of the tokens from `first` on, is what the definition gives for a model, but for
    roundings of `dtype`.

    The model has to give the same in float64 too, where no rounding is amplified to the size of a mistake.
    """
    numbered = with_positions(model, given)
    expected = visible_logits(by_definition(model, F64), in_float64(numbered))
    close(visible_logits(copy.deepcopy(model).double(), in_float64(given)), expected)
    expected = expected[..., first:, :]
    samples = [sample[..., first:, :] for sample in roundings(model, numbered, dtype)]
    deviation = torch.stack([(sample - expected).norm() for sample in samples]).square().mean().sqrt() / expected.norm()
    assert deviation < 0.1, f"the runs by the definition err by {deviation:.0%}, which would hide mistakes"
    amplified = 1 if dtype.itemsize < 4 else 2  # nudged parameters are half of the noise of half precision
    for name, ours in logits.items():
        assert_as_accurate(name, ours, samples, expected, dtype, amplified=amplified)


def generated(model, given, **options):
    given = {name: x for name, x in given.items() if name != "decoder_input_ids"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"max_new_tokens": 6, "do_sample": False} | options
        return model.generate(**given, **options)


def _by_definition(compute_dtype):
    def attention(
        module, query, key, value, attention_mask, scaling=None, is_causal=None, softcap=None, s_aux=None,
        position_bias=None, **kwargs,
    ):  # fmt: skip
        """Computes the definition in one dtype: causality as in SDPA, sinks as one more key, the queries that OPT and
        Whisper have scaled put back."""
        state, index = module.ntk_prefix.state_and_index(len(key)) if hasattr(module, "ntk_prefix") else (None, None)
        seq_q, head_dim = query.shape[2:]
        if type(module).__name__.startswith(("OPT", "Whisper")):
            assert scaling == 1.0
            query, scaling = query * head_dim**0.5, head_dim**-0.5
        is_causal = module.is_causal if is_causal is None else is_causal
        if attention_mask is None and is_causal and seq_q > 1:
            attention_mask = torch.ones(seq_q, key.shape[2], dtype=torch.bool).tril()
        if position_bias is not None:
            hidden = False if attention_mask is None else ~attention_mask
            attention_mask = torch.masked_fill(position_bias, torch.as_tensor(hidden), -math.inf)
        if s_aux is not None:
            group = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
            bias = torch.zeros(1, 1, seq_q, key.shape[2], dtype=s_aux.dtype)
            if attention_mask is not None and attention_mask.dtype == torch.bool:
                bias = bias.masked_fill(~attention_mask, -math.inf)
            elif attention_mask is not None:
                bias = bias + attention_mask
            bias = bias.expand(len(query), query.shape[1], -1, -1)
            sinks = s_aux[None, :, None, None].expand(len(query), -1, seq_q, 1)
            attention_mask = torch.cat([bias, sinks], dim=-1)
            key, value = (torch.cat([t, torch.zeros_like(t[:, :, :1])], dim=2) for t in (key, value))
        out = reference.ntk_attention(
            query, key, value, state, attn_mask=attention_mask, scale=scaling, softcap=softcap, state_index=index,
            compute_dtype=compute_dtype,
        )  # fmt: skip
        return out.transpose(1, 2), None

    return attention


AttentionInterface.register("definition32", _by_definition(torch.float32))
AttentionInterface.register("definition64", _by_definition(torch.float64))
for name in ("definition32", "definition64"):
    AttentionMaskInterface.register(name, sdpa_mask)


def snapshot(model):
    """Returns all that attaching a prefix changes and detaching it puts back."""
    training = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return list(model.state_dict()), training, model.config._attn_implementation, set(vars(model))
