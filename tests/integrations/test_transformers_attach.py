"""Prefixes attached to transformers models: training, files, taking them away."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from model_cases import (
    BY_NAME,
    GENERATING,
    VOCABULARY,
    all_families,
    attach,
    build,
    generated,
    inputs,
    no_softcap,
    randomise,
    snapshot,
    some,
    visible_logits,
    with_labels,
)
from oracle import F64, close

from ntk_kernels import prefix_to_state
from ntk_kernels.integrations.transformers import (
    AttentionShape,
    attach_prefix,
    attached_prefixes,
    attention_shapes,
    detach_prefix,
    load_prefix,
    save_prefix,
)

pytestmark = no_softcap


@all_families
def test_attach_train_save_load_generate(family, tmp_path):
    model = build(family)
    fresh = copy.deepcopy(model)
    base = copy.deepcopy(model.state_dict())
    given = inputs(family)
    prefixes = attach(family, model, rank=4, init_mass=0.1)  # enough for so short a training
    assert len(prefixes) >= 2
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == sum(len(list(prefix.parameters())) for prefix in prefixes.values())
    start = {name: copy.deepcopy(prefix.state_dict()) for name, prefix in prefixes.items()}
    optimizer = torch.optim.Adam(trained, lr=0.05)
    model.train()
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(**with_labels(family, given)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    assert losses[-1] < losses[0]
    now = model.state_dict()
    for name, tensor in base.items():
        assert torch.equal(now[name], tensor), name
    for name, prefix in prefixes.items():
        assert all(not torch.equal(tensor, start[name][key]) for key, tensor in prefix.state_dict().items())

    save_prefix(model, tmp_path / "prefix.safetensors")
    loaded = load_prefix(fresh, tmp_path / "prefix.safetensors")
    assert loaded.keys() == prefixes.keys()
    assert torch.equal(visible_logits(fresh, given), visible_logits(model, given))
    if family in GENERATING:
        assert torch.equal(generated(fresh, given), generated(model, given))


def test_unfrozen_and_detached_again():
    family = BY_NAME["llama"]
    model = build(family)
    model.model.embed_tokens.weight.requires_grad_(False)
    given = inputs(family)
    before = visible_logits(model, given)
    names = list(model.state_dict())
    prefixes = randomise(attach_prefix(model, freeze=False))
    assert model.model.layers[0].mlp.up_proj.weight.requires_grad
    changed = visible_logits(model, given)
    assert detach_prefix(model) == prefixes
    attach_prefix(model, prefixes=prefixes)
    assert attached_prefixes(model) == prefixes
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert torch.equal(visible_logits(model, given), changed)
    detach_prefix(model)
    assert list(model.state_dict()) == names
    assert model.config._attn_implementation == "sdpa"
    assert model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert not model.model.embed_tokens.weight.requires_grad
    assert torch.equal(visible_logits(model, given), before)


def implementations(model):
    return [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]


@all_families
def test_every_configuration_is_put_back(family):
    """A model may have several, copies too."""
    model = build(family)
    before = implementations(model)
    names = attach(family, model)
    assert {model.get_submodule(name).config._attn_implementation for name in names} == {"ntk"}
    detach_prefix(model)
    assert implementations(model) == before


def test_one_part_of_a_model_of_two():
    """The other part keeps the attention implementation that it has."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = sizes | {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "eos_token_id": 2}
    vision = sizes | {"image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = transformers.CLIPModel(config).eval()
    before = snapshot(model)
    prefixes = randomise(attach_prefix(model, modules="text"))
    assert len(prefixes) == 1
    given = {"input_ids": inputs(BY_NAME["llama"])["input_ids"], "pixel_values": inputs(BY_NAME["vit"])["pixel_values"]}
    with torch.no_grad():
        changed = model(**given)
    assert model.vision_model.config._attn_implementation == "sdpa"
    detach_prefix(model)
    assert snapshot(model) == before
    with torch.no_grad():
        plain = model(**given)
    assert torch.equal(changed.image_embeds, plain.image_embeds)
    assert not torch.equal(changed.text_embeds, plain.text_embeds)


def test_a_copy_of_a_model_is_a_model_of_its_own():
    model = build(BY_NAME["llama"])
    attach_prefix(model)
    other = copy.deepcopy(model)
    detach_prefix(other)
    assert len(attached_prefixes(model)) == 2
    assert model.config._attn_implementation == "ntk"
    assert other.config._attn_implementation == "sdpa"


def test_models_of_one_configuration():
    """The configuration says "ntk" until the last of the models has no prefixes any more."""
    config, given = build(BY_NAME["llama"]).config, inputs(BY_NAME["llama"])
    models = [transformers.LlamaForCausalLM(config).eval() for _ in range(2)]
    plain = [visible_logits(model, given) for model in models]
    for model in models:
        randomise(attach_prefix(model))
    expected = [visible_logits(model, given) for model in models]
    for _ in range(2):  # also when one comes back
        prefixes = detach_prefix(models[0])
        assert torch.equal(visible_logits(models[1], given), expected[1])
        attach_prefix(models[0], prefixes=prefixes)
    assert torch.equal(visible_logits(models[0], given), expected[0])
    del models[0]  # with its prefixes
    detach_prefix(models[0])
    assert config._attn_implementation == "sdpa"
    assert torch.equal(visible_logits(models[0], given), plain[1])


SETTINGS = {
    "model": lambda model: model.set_attn_implementation("sdpa"),
    "part": lambda model: model.model.set_attn_implementation("eager"),
    "config": lambda model: setattr(model.config, "_attn_implementation", "sdpa"),
}


@pytest.mark.parametrize("copied", [lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["itself", "copy", "pickle"])  # fmt: skip
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_another_implementation_never_leaves_a_prefix_out(setting, copied):
    given = inputs(BY_NAME["llama"])
    model = build(BY_NAME["llama"])
    randomise(attach_prefix(model))
    expected = visible_logits(model, given)
    model = copied(model)
    setting(model)
    with pytest.raises(RuntimeError, match="must be 'ntk' while LlamaAttention has a prefix, got '(sdpa|eager)'"):
        model(**given)
    model.set_attn_implementation("ntk")
    assert torch.equal(visible_logits(model, given), expected)
    detach_prefix(model)
    setting(model)
    assert torch.equal(visible_logits(model, given), visible_logits(build(BY_NAME["llama"], model.config._attn_implementation), given))  # fmt: skip


def test_another_implementation_under_checkpointing():
    """The implementation changes between forward and backward."""
    model, given = build(BY_NAME["llama"]).train(), with_labels(BY_NAME["llama"], inputs(BY_NAME["llama"]))
    attach_prefix(model)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    loss = model(**given, use_cache=False).loss
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="must be 'ntk' while LlamaAttention has a prefix, got 'sdpa'"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
@some("llama", "gpt2", "bert", "esm")
def test_checkpointing_gives_the_same_gradients(family, reentrant):
    given = with_labels(family, inputs(family))
    model = build(family).train()
    prefixes = randomise(attach(family, model))
    parameters = [parameter for prefix in prefixes.values() for parameter in prefix.parameters()]
    expected = torch.autograd.grad(model(**given).loss, parameters)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model(**given, use_cache=False).loss.backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_a_converted_prefix_does_what_the_prefix_did():
    """A state that keeps all rows of a prefix replaces the prefix in the cache."""
    model = build(BY_NAME["llama"], dtype=F64)
    ids = torch.cat([inputs(BY_NAME["llama"])["input_ids"]] * 2, dim=1)[:1]
    prefix, rest = ids[:, :8], ids[:, 8:]
    with torch.no_grad():
        expected = model(ids).logits[:, 8:]
        cache = model(prefix, use_cache=True).past_key_values
        states = {
            name: prefix_to_state(cache.layers[i].keys[0], cache.layers[i].values[0], num_rows=8)
            for i, name in enumerate(attention_shapes(model))
        }
        attach_prefix(model, prefixes=states)
        position_ids = torch.arange(8, ids.shape[1])[None]
        logits = model(rest, position_ids=position_ids).logits
    close(logits, expected)


def test_shapes():
    def shapes(name):
        return attention_shapes(build(BY_NAME[name]), BY_NAME[name].attention)

    assert shapes("llama") == {f"model.layers.{i}.self_attn": AttentionShape(4, 2, 8, 8) for i in range(2)}
    assert set(shapes("qwen3").values()) == {AttentionShape(4, 2, 16, 16)}
    assert set(shapes("deepseek_v3").values()) == {AttentionShape(4, 4, 12, 6)}
    assert set(shapes("esm").values()) == {AttentionShape(4, 4, 8, 8)}
    assert set(shapes("gpt2").values()) == {AttentionShape(4, 4, 8, 8)}
    assert len(attention_shapes(build(BY_NAME["whisper"]))) == 5  # cross-attention too


def test_compiles_in_one_graph():
    family = BY_NAME["llama"]
    model = build(family, dtype=F64)
    randomise(attach_prefix(model))
    given = inputs(family)
    expected = visible_logits(model, given)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(visible_logits(compiled, given), expected)
    model.set_attn_implementation("sdpa")  # a graph cannot hold the error that this raises
    with pytest.raises(RuntimeError, match="Observed exception"):
        compiled(**given)


# Positions, packed batches, checkpoints --------------------------------------------------------------------------


def padded_call(lengths=(9, 5, 1)):
    """Returns a left-padded batch with its mask, and the positions of its tokens."""
    tokens = torch.randint(3, VOCABULARY, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return tokens * mask, mask, (mask.cumsum(-1) - 1).clamp(min=0)


@some("llama", "gemma2", "gpt_oss", "glm")
@pytest.mark.parametrize("by", ["attach", "peft"])
def test_left_padded_rows_are_as_without_padding(family, by):
    """A state has its place before position 0, so rows must begin there."""
    model = build(family)
    if by == "peft":
        peft = pytest.importorskip("peft")
        from ntk_kernels.integrations.peft import NTKConfig

        called = peft.get_peft_model(model, NTKConfig(num_rows=3))
        randomise({name: module for name, module in model.named_modules() if name.endswith("ntk_states.default")})
    else:
        called = model
        randomise(attach_prefix(model, num_rows=3))
    tokens, mask, positions = padded_call()
    logits = called(input_ids=tokens, attention_mask=mask).logits
    assert torch.equal(logits, called(input_ids=tokens, attention_mask=mask, position_ids=positions).logits)
    for row, length in enumerate(mask.sum(-1).tolist()):
        alone = called(input_ids=tokens[row : row + 1, -length:]).logits
        torch.testing.assert_close(logits[row : row + 1, -length:], alone, rtol=1e-4, atol=1e-4)
    shifted = called(input_ids=tokens, attention_mask=mask, position_ids=torch.arange(9)[None]).logits
    assert (shifted - logits)[1, -5:].abs().max() > 0.01, "the positions would not matter"
    if by == "peft":
        with called.disable_adapter():
            disabled = called(input_ids=tokens, attention_mask=mask).logits
        assert torch.equal(disabled, build(family)(input_ids=tokens, attention_mask=mask).logits)


@pytest.mark.parametrize("cache", ["dynamic", "static", "static, long mask"])
def test_left_padding_with_a_cache(cache):
    """The tokens are read in two parts; the second knows from the mask how many came before."""
    model = build(BY_NAME["llama"])
    randomise(attach_prefix(model, num_rows=3))
    tokens, mask, _ = padded_call()
    expected = model(input_ids=tokens, attention_mask=mask).logits
    past = transformers.DynamicCache(config=model.config)
    if cache != "dynamic":
        past = transformers.StaticCache(config=model.config, max_cache_len=12)
    if cache == "static, long mask":
        mask = torch.nn.functional.pad(mask, (0, 3))
    parts = []
    with torch.no_grad():
        for start, stop in ((0, 6), (6, 9)):
            seen = mask if cache == "static, long mask" else mask[:, :stop]
            part = model(input_ids=tokens[:, start:stop], attention_mask=seen, past_key_values=past, use_cache=True)
            parts.append(part.logits)
    logits = torch.cat(parts, dim=1)
    for row, length in enumerate((9, 5, 1)):
        torch.testing.assert_close(logits[row, -length:], expected[row, -length:], rtol=1e-4, atol=1e-4)


def test_positions_are_the_models_own_again_without_prefixes():
    model = build(BY_NAME["llama"])
    tokens, mask, _ = padded_call()
    expected = model(input_ids=tokens, attention_mask=mask).logits
    attach_prefix(model)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for each in (model, copied):
        assert len(each.model._forward_pre_hooks) == 1
        detach_prefix(each)
        assert not each.model._forward_pre_hooks and not each.model._forward_pre_hooks_with_kwargs
        assert torch.equal(each(input_ids=tokens, attention_mask=mask).logits, expected)


@some("llama", "gemma2", "gpt_oss", "opt")
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("position_ids", [False, True])
def test_packed_sequences_do_not_see_each_other(family, use_cache, position_ids, monkeypatch):
    """Batches of DataCollatorWithFlattening: each sequence gives what it gives alone, without a mask of all tokens."""
    from ntk_kernels.integrations.transformers import attention_interface

    model = build(family)
    randomise(attach(family, model, num_rows=3))
    lengths = (4, 9, 1, 7)
    features = [{"input_ids": torch.arange(3, 3 + length).tolist()} for length in lengths]
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = {name: x for name, x in collator(features, return_tensors="pt").items() if name != "labels"}
    expected = [model(input_ids=torch.tensor([feature["input_ids"]])).logits for feature in features]
    calls, varlen = [], attention_interface.ntk_attention_varlen
    monkeypatch.setattr(
        attention_interface,
        "ntk_attention_varlen",
        lambda *args, **kwargs: (calls.append(1), varlen(*args, **kwargs))[1],
    )
    if not position_ids and family.name != "opt":  # rotary: only distances count, but for the prefix
        for module in model.modules():
            if hasattr(module, "ntk_prefix"):
                module.ntk_prefix.bias.data.fill_(-1e9)
        expected = [model(input_ids=torch.tensor([feature["input_ids"]])).logits for feature in features]
        del batch["position_ids"]
    logits = model(**batch, use_cache=use_cache).logits
    torch.testing.assert_close(logits, torch.cat(expected, dim=1), rtol=1e-4, atol=1e-4)
    assert len(calls) == 2


def test_packed_sequences_and_other_masks():
    """Where a layer's mask is more than causality and a window, sequences are hidden within it."""
    from ntk_kernels.integrations.transformers import ntk_attention_forward

    query, key, value = torch.randn(3, 1, 2, 9, 8)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    packed = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 5, "max_length_k": 5}
    bias = torch.randn(1, 2, 9, 9)
    module = torch.nn.Module()
    module.is_causal = False
    for options in ({}, {"position_bias": bias}, {"attention_mask": bias}, {"attention_mask": bias[:, :1] > -1}):
        arguments = {"attention_mask": None} | options
        ours, _ = ntk_attention_forward(module, query, key, value, **arguments, **packed)
        for part in (slice(0, 4), slice(4, 9)):
            alone = {k: None if x is None else x[..., part, part] for k, x in arguments.items()}
            expected, _ = ntk_attention_forward(module, *(x[:, :, part] for x in (query, key, value)), **alone)
            torch.testing.assert_close(ours[:, part], expected)
    with pytest.raises(ValueError, match="`cu_seq_lens_q` must come with one batch row of packed sequences, got 2"):
        ntk_attention_forward(module, *(x.expand(2, -1, -1, -1) for x in (query, key, value)), None, **packed)


def test_rows_alone_mean_no_features():
    model = build(BY_NAME["llama"])
    for options, feature_map in (
        ({"num_rows": 2}, None),
        ({"num_rows": 2, "init_mass": 0.1}, None),
        ({"num_rows": 2, "rank": 3}, "elu"),
        ({"num_rows": 2, "feature_map": "elu"}, "elu"),
        ({}, "elu"),
    ):
        prefixes = attach_prefix(model, **options)
        assert {prefix.feature_map for prefix in prefixes.values()} == {feature_map}
        detach_prefix(model)


def test_checkpoints_of_a_trainer_have_the_prefixes(tmp_path):
    pytest.importorskip("accelerate")
    from ntk_kernels.integrations.transformers import SavePrefixCallback

    model = build(BY_NAME["llama"])
    randomise(attach_prefix(model, num_rows=3))
    examples = [{"input_ids": torch.arange(3, 12), "labels": torch.arange(3, 12)}] * 4
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, learning_rate=0.1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=examples, callbacks=[SavePrefixCallback()])
    trainer.train()
    expected = visible_logits(model.eval(), inputs(BY_NAME["llama"]))
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2").eval()
    assert not torch.equal(visible_logits(again, inputs(BY_NAME["llama"])), expected)
    load_prefix(again, tmp_path / "checkpoint-2" / SavePrefixCallback.FILE)
    torch.testing.assert_close(visible_logits(again, inputs(BY_NAME["llama"])), expected)
    assert (tmp_path / "checkpoint-1" / "prefix.safetensors").is_file()
