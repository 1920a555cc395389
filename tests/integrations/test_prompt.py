"""`prompt_to_states`: states in the place of a prompt, in models of many families."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from model_cases import BY_NAME, DECODER, VOCABULARY, build, check_logits, llava, no_softcap, sharpened, visible_logits
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ntk_kernels import PrefixState, reference
from ntk_kernels.conversion import gradient
from ntk_kernels.integrations.transformers import (
    attach_prefix,
    attention_shapes,
    detach_prefix,
    prompt,
    prompt_to_states,
)

M, LENGTH = 24, 9
WIDE = {"sliding_window": 64}  # wider than prompt and text
CASES = [  # family, options of the model, position of the first token after the prompt
    ("llama", {}, 0), ("llama", {}, M), ("llama", {}, M + 3), ("qwen3", {}, 0), ("mistral", WIDE, 0), ("glm", {}, 0),
    ("gpt_oss", WIDE, 0), ("opt", {}, M), ("gpt2", {}, M), ("deepseek_v3", {}, 0),
]  # fmt: skip


def tokens(*shape, seed=0):
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def convert(model, calibration=None, **options):
    calibration = tokens(8, LENGTH, seed=1) if calibration is None else calibration
    return prompt_to_states(model, tokens(M), calibration, progress=False, **options)


def positions(start, length):
    return torch.arange(start, start + length)[None]


def with_prompt(text, start=0, prompt=None):
    """Returns the arguments of a model: the prompt in front of each row from position `start` on, no cache."""
    prompt = tokens(M) if prompt is None else prompt
    whole = torch.cat([prompt.expand(len(text), -1), text], dim=1)
    return {"input_ids": whole, "position_ids": positions(start, whole.shape[1]), "use_cache": False}


def logits_after_prompt(model, text, start=0):
    return visible_logits(model, with_prompt(text, start))[:, M:]


def logits_at(model, text, start):
    position_ids = positions(start, text.shape[1])
    return visible_logits(model, {"input_ids": text, "position_ids": position_ids, "use_cache": False})


@pytest.mark.parametrize("name, options, position", CASES, ids=lambda case: case if isinstance(case, str) else None)
def test_all_rows_are_the_prompt(name, options, position):
    model, text = build(BY_NAME[name], **options), tokens(2, LENGTH, seed=2)
    states = convert(model, num_rows=M, text_position=position)
    assert [*states] == [*attention_shapes(model)]
    assert all(state.num_rows == M for state in states.values())
    own = copy.deepcopy(model)
    attach_prefix(model, prefixes=states)
    given = with_prompt(text, position - M if name not in ("opt", "gpt2") else 0)
    check_logits(own, given, first=M, ours=logits_at(model, text, position))


def in_a_row(rows):
    """Puts the rows of the batch one after the other."""
    return torch.cat(rows.split(1), dim=2)


@pytest.mark.parametrize("name, options", [("llama", {}), ("gpt_oss", WIDE), ("opt", {})])
def test_what_the_fit_is_given(name, options, monkeypatch):
    """Keys, queries and attention are those of a forward without cache, taken apart by the definition."""
    position = M if name == "opt" else 0
    given, seen = [], []
    monkeypatch.setattr(prompt, "prefix_to_state", lambda **options: given.append(options) or (None, None))
    model, text = build(BY_NAME[name], **options), tokens(3, LENGTH, seed=1)
    convert(model, text, text_position=position)

    def record(module, query, key, value, attention_mask, scaling=None, s_aux=None, **kwargs):
        if name == "opt":  # OPT scales its query itself
            query, scaling = query * query.shape[-1] ** 0.5, query.shape[-1] ** -0.5
        seen.append((query, key, value, scaling, s_aux))
        return AttentionInterface()["ntk"](
            module, query, key, value, attention_mask, scaling=scaling, s_aux=s_aux, **kwargs
        )

    AttentionInterface.register("recorded", record)
    AttentionMaskInterface.register("recorded", sdpa_mask)
    model.set_attn_implementation("recorded")
    logits_after_prompt(model, text, position - M)
    assert len(given) == len(seen) == 2
    for got, (query, key, value, scale, sinks) in zip(given, seen, strict=True):
        own = slice(M, None)
        if sinks is not None:  # one key more, which adds no value
            state = PrefixState(
                keys=torch.zeros(query.shape[1], 1, query.shape[3]), values=torch.zeros(query.shape[1], 1, value.shape[3]),
                bias=sinks.detach()[:, None],
            )  # fmt: skip
        out, lse = reference.ntk_attention(
            query[:, :, own], key[:, :, own], value[:, :, own], None if sinks is None else state, is_causal=True,
            scale=scale, return_lse=True,
        )  # fmt: skip
        assert got["scale"] == pytest.approx(scale)
        for one, other in (
            (got["prefix_key"], key[0, :, :M]), (got["prefix_value"], value[0, :, :M]),
            (got["query"], in_a_row(query[:, :, own])), (got["attention"][0], in_a_row(out)),
            (got["attention"][1], in_a_row(lse)),
        ):  # fmt: skip
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_few_rows_come_near(monkeypatch):
    """States of few rows, of features and of the smallest size for an error come near, after shorter descents than
    usual."""
    monkeypatch.setattr(gradient, "_STEPS", 100)
    model, text = build(BY_NAME["llama"]), tokens(4, LENGTH, seed=2)
    expected, without = logits_after_prompt(model, text, -M), logits_at(model, text, 0)
    distance = (without - expected).norm()
    for options, most in (
        ({"num_rows": 8}, 0.5),
        ({"feature_map": "taylor1", "num_rows": 4}, 0.8),
        ({"error": 0.3}, 0.7),
    ):
        states, reports = convert(model, tokens(24, LENGTH, seed=1), return_report=True, **options)
        assert [*reports] == [*states]
        prefixes = attach_prefix(model, prefixes=states)
        assert (logits_at(model, text, 0) - expected).norm() < most * distance, options
        assert all(prefix.num_rows < M for prefix in prefixes.values())
        detach_prefix(model)


def test_generating_without_the_prompt():
    model, first = build(BY_NAME["llama"]), tokens(2, 3, seed=2)
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(torch.cat([tokens(M).expand(2, -1), first], dim=1), **options)[:, M:]
    attach_prefix(model, prefixes=convert(model, num_rows=M))
    assert torch.equal(model.generate(first, **options), expected)


def test_shapes_of_the_arguments_and_dtypes():
    """A prompt may be as tokenizers give it, texts one or many, of several lengths, the model in bfloat16."""
    model = build(BY_NAME["llama"])
    convert(model, [tokens(1, 1, seed=1), tokens(7, seed=2), tokens(1, 30, seed=3)], num_rows=M)
    whole = convert(model, tokens(1, 40, seed=1), num_rows=M)
    states = prompt_to_states(
        model, tokens(M)[None].int(), tokens(1, 40, seed=1), modules=r"layers\.1\.", num_rows=M, progress=False
    )
    assert [*states] == ["model.layers.1.self_attn"]
    assert torch.equal(states["model.layers.1.self_attn"].keys, whole["model.layers.1.self_attn"].keys)
    half = convert(model.to(torch.bfloat16), num_rows=M)
    assert {state.keys.dtype for state in half.values()} == {torch.float32}


def test_text_for_a_model_of_images():
    model = llava()
    states = prompt_to_states(model, tokens(M), tokens(4, LENGTH, seed=1), num_rows=M, progress=False)
    assert len(states) == 2 and all("language_model" in name for name in states)
    own, text = copy.deepcopy(model), tokens(2, LENGTH, seed=2)
    attach_prefix(model, prefixes=states)
    check_logits(own, with_prompt(text, -M), first=M, ours=logits_at(model, text, 0))


def test_the_model_is_what_it_was(monkeypatch):
    """The model is unchanged afterwards, even if the fit fails, or the reading."""
    model = build(BY_NAME["llama"]).requires_grad_(False)
    model.train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(True)

    def looks():
        return (
            [name for name, _ in model.named_modules()], [module.training for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()], model.config._attn_implementation,
        )  # fmt: skip

    before = looks()
    with torch.inference_mode():
        convert(model, num_rows=8)
    assert looks() == before
    with pytest.raises(ValueError, match="num_rows"):
        convert(model, num_rows=-1)
    assert looks() == before
    monkeypatch.setattr(type(model.model.layers[1].mlp), "forward", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(model, num_rows=M)
    assert looks() == before


def test_the_bar_is_for_those_who_want_it(capsys):
    model = build(BY_NAME["llama"])
    convert(model, num_rows=M)
    assert capsys.readouterr().err == ""
    prompt_to_states(model, tokens(M), tokens(8, LENGTH, seed=1), num_rows=M)
    shown = capsys.readouterr().err
    assert "reading" in shown and "fitting" in shown


def hybrid():
    """Builds a model of one layer of convolution and one of attention."""
    config = transformers.Lfm2Config(**DECODER | {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48})
    return sharpened(transformers.Lfm2ForCausalLM(config)).eval()


def parallel():
    """Builds a model with attention and a recurrence in each layer."""
    of_recurrence = {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    }
    config = transformers.FalconH1Config(**DECODER, **of_recurrence, mamba_n_groups=1, mamba_expand=2)
    return sharpened(transformers.FalconH1ForCausalLM(config)).eval()


def dynamic():
    """Builds a model whose rotary frequencies depend on the length."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    rope = {"rope_parameters": rope} if transformers.__version__.startswith("5") else {"rope_scaling": rope}
    return build(BY_NAME["llama"], **rope, max_position_embeddings=16)


def bart():
    config = transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
        is_decoder=True, is_encoder_decoder=False,
    )  # fmt: skip
    return transformers.BartForCausalLM(config).eval()


OTHERS = {"llava": llava, "hybrid": hybrid, "parallel": parallel, "dynamic": dynamic, "bart": bart}
REFUSED = {
    "an encoder": ("bert", {}, {"text_position": M}, ValueError, "`model` must be a decoder with a cache, got BertForMaskedLM"),
    "a decoder with an encoder": ("whisper", {}, {}, ValueError, "`model` must be a decoder, got WhisperFor"),
    "a model of images": ("vit", {}, {}, ValueError, "`model` must take token ids, got ViTForImageClassification"),
    "no rotary embeddings": ("gpt2", {}, {}, ValueError, "`text_position` must be at least m=24 in GPT2LMHeadModel, .* got 0"),
    "no room": ("gpt2", {}, {"text_position": 56}, ValueError, "`text_position` must leave room for the 9 tokens .* the 64 positions .* got 56"),
    "a window": ("mistral", {}, {}, ValueError, "`model` must have attention that states can take part in, got MistralForCausalLM, where a text does not see .* window"),
    "a window as wide as the prompt": ("mistral", {"sliding_window": M + 1}, {}, ValueError, "got MistralForCausalLM, where .* window"),
    "some windows": ("gemma2", {"attn_logit_softcapping": None}, {}, ValueError, "`modules` must match none of `model.layers.0.self_attn`, where a text .* got None; of `model.layers.1.self_attn` it may match all"),
    "a softcap": ("gemma2", {}, {}, ValueError, "got Gemma2ForCausalLM, where a text .* and scores are capped"),
    "modules that tokens don't reach": ("llava", {}, {"modules": "vision"}, ValueError, "`modules` must match an attention module that tokens reach, got 'vision'"),
    "layers without attention": ("hybrid", {}, {}, ValueError, "`model` must pass on a prompt by attention and nothing else"),
    "a recurrence beside attention": ("parallel", {}, {}, ValueError, "`model` must .* FalconH1ForCausalLM"),
    "frequencies by length": ("dynamic", {}, {}, ValueError, "`text_position` fit it: .* in LlamaForCausalLM at text_position=0 .try 24"),
    "positions that it counts itself": ("bart", {}, {"text_position": M}, ValueError, "`model` must take `position_ids`, got BartForCausalLM"),
    "no such module": ("llama", {}, {"modules": "x"}, ValueError, "`modules` must match a name"),
    "a position": ("llama", {}, {"text_position": -1}, ValueError, "`text_position` must be at least 0, got -1"),
    "what the model gives": ("llama", {}, {"scale": 1.0}, TypeError, "`scale` must not be given, only options of prefix_to_state, which are"),
    "an unknown option": ("llama", {}, {"rows": 8}, TypeError, "rows"),
    "an option": ("llama", {}, {"num_rows": 0}, ValueError, "`num_rows` must be at least 1"),
    "progress": ("llama", {}, {"progress": 1}, TypeError, "`progress` must be a bool, got int"),
    "a prompt of texts": ("llama", {}, {"prompt": tokens(2, 5)}, ValueError, r"`prompt` must have shape \[n\] or \[1, n\], n at least 1, got \[2, 5\]"),
    "an empty prompt": ("llama", {}, {"prompt": tokens(0)}, ValueError, r"`prompt` .* got \[0\]"),
    "no tensor": ("llama", {}, {"prompt": "You are"}, TypeError, "`prompt` must be a torch.Tensor of token ids, got str; tokenizer"),
    "no ids": ("llama", {}, {"prompt": torch.rand(5)}, TypeError, "`prompt` must be token ids, int64 or int32, got torch.float32"),
    "ids out of range": ("llama", {}, {"texts": tokens(4, 5) + 60}, ValueError, r"`texts\[0\]` must be token ids from 0 to 60, got"),
    "one text, flat": ("llama", {}, {"texts": tokens(9)}, ValueError, r"`texts` must have shape \[N, L\], got \[9\]"),
    "strings": ("llama", {}, {"texts": ["a"]}, TypeError, r"`texts\[0\]` must be a torch.Tensor of token ids, got str; tokenizer"),
    "a string": ("llama", {}, {"texts": "a"}, TypeError, "`texts` must be a tensor or a sequence of tensors of token ids, got str; tokenizer"),
    "no text": ("llama", {}, {"texts": []}, ValueError, "`texts` must be at least one, got none"),
    "texts in batches": ("llama", {}, {"texts": [tokens(2, 5)]}, ValueError, r"`texts\[0\]` must have shape .* got \[2, 5\]"),
    "too little text": ("gpt2", {}, {"texts": [tokens(1)], "text_position": M}, ValueError, "no state could be fitted for `transformer.h.0.attn`: `query` must give"),
}  # fmt: skip


@no_softcap
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    name, of_model, options, error, message = REFUSED[case]
    if name in BY_NAME or name in OTHERS:
        model = build(BY_NAME[name], **of_model) if name in BY_NAME else OTHERS[name]()
    else:
        pytest.skip(f"this version of transformers does not dispatch {name}")
    given = {"prompt": tokens(M), "texts": tokens(4, LENGTH, seed=1), "progress": False} | options
    with pytest.raises(error, match=message):
        prompt_to_states(model, **given)


def test_a_model_that_has_prefixes_is_refused():
    model = build(BY_NAME["llama"])
    attach_prefix(model)
    with pytest.raises(ValueError, match="`model` must have no prefixes yet"):
        convert(model)


def test_modules_in_spite_of_layers_without_attention():
    states = convert(hybrid(), modules="self_attn", num_rows=M)
    assert [*states] == ["model.layers.1.self_attn"]


def test_where_tokens_go():
    """Weights may be offloaded, and outputs may be tuples by default."""
    accelerate = pytest.importorskip("accelerate")
    model = build(BY_NAME["llama"], return_dict=False)
    expected = convert(model, num_rows=M)
    accelerate.cpu_offload(model, execution_device="cpu")
    states = convert(model, num_rows=M)
    for name, state in states.items():
        assert torch.equal(state.keys, expected[name].keys)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_two_prompts_in_one_batch():
    """Adapters of PEFT hold all rows of their prompts."""
    peft = pytest.importorskip("peft")
    from ntk_kernels.integrations.peft import NTKConfig

    model, text = build(BY_NAME["llama"]), tokens(1, LENGTH, seed=2)
    prompts = {"one": tokens(M), "two": tokens(M, seed=5)}
    texts = tokens(8, LENGTH, seed=1)
    states = {
        name: prompt_to_states(model, prompt, texts, num_rows=M, progress=False) for name, prompt in prompts.items()
    }
    own = copy.deepcopy(model)
    config = {name: NTKConfig.of_state(of_module["model.layers.0.self_attn"]) for name, of_module in states.items()}
    model = peft.get_peft_model(model, config["one"], adapter_name="one")
    model.add_adapter("two", config["two"])
    for name, of_module in states.items():
        model.init_from_states(of_module, name)
    model.eval()
    with torch.no_grad():
        logits = model(text.expand(3, -1), adapter_names=["one", "two", "__base__"]).logits
    for row, first in zip(logits.split(1), prompts.values(), strict=False):
        check_logits(own, with_prompt(text, prompt=first), first=M, ours=row)
    check_logits(own, {"input_ids": text}, ours=logits[2:])
