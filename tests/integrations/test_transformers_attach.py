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
