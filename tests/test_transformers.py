"""Prefixes in transformers models: the attention of every family, training, files, generation."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from oracle import F64, assert_as_accurate

pytest.importorskip("transformers")

import transformers
from model_cases import BY_NAME, FAMILIES, VOCABULARY, build, inputs, llava, sharpened, visible_logits, with_labels

from ntk_kernels import NTKPrefix, PrefixState, ntk_attention, ntk_attention_decode, prefix_to_state
from ntk_kernels.integrations.transformers import (
    AttentionShape,
    attach_prefix,
    attached_prefixes,
    attention_interface,
    attention_shapes,
    detach_prefix,
    load_prefix,
    ntk_attention_forward,
    save_prefix,
)

pytestmark = pytest.mark.filterwarnings("ignore:ntk_kernels. the 'torch' backend does not support softcap")
all_families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
GENERATING = [family for family in FAMILIES if family.kind not in ("encoder", "image")]


def some(*names):
    return pytest.mark.parametrize(
        "family", [BY_NAME[n] for n in names if n in BY_NAME], ids=lambda family: family.name
    )


@pytest.fixture(autouse=True)
def warn_again(monkeypatch):
    monkeypatch.setattr(attention_interface, "_warned", set())


def randomise(prefixes, seed=3):
    """Prefixes with about as much mass as the tokens have."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for prefix in prefixes.values():
            for name, parameter in prefix.named_parameters():
                parameter.normal_(std=0.5, generator=generator)
                if name == "z":
                    parameter.mul_(3)
    return prefixes


def attach(family, model, *args, **options):
    return attach_prefix(model, *args, modules=family.attention, **options)


def exact(family, prefixes=None, given=None):
    """The model in float64, its attention computed by the definition."""
    model = build(family, "definition64", F64)
    for name, prefix in (prefixes or {}).items():
        model.get_submodule(name).ntk_prefix = copy.deepcopy(prefix).double()
    given = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    return visible_logits(model, given)


# The attention of every family -----------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, "left", "right"])
@all_families
def test_without_a_prefix_it_is_the_models_own_attention(family, padding):
    if padding and family.kind not in ("decoder", "encoder"):
        pytest.skip("takes no padding mask")
    given = inputs(family, padding=padding)
    own = visible_logits(build(family), given)
    ours = visible_logits(build(family, "ntk"), given)
    expected = exact(family, given=given)
    assert_as_accurate("own", own, own, expected, torch.float32)  # the definition is what the model does
    assert (own - expected).norm() < torch.finfo(torch.float32).eps ** 0.5 * expected.norm()
    assert_as_accurate("logits", ours, own, expected, torch.float32)


@all_families
def test_transformers_own_way_to_set_it(family):
    model = build(family)
    model.set_attn_implementation("ntk")
    given = inputs(family)
    assert torch.equal(visible_logits(model, given), visible_logits(build(family, "ntk"), given))


@pytest.mark.parametrize("options", [{}, {"feature_map": "taylor1", "centers": 2, "num_rows": 2}], ids=["elu", "parts"])
@all_families
def test_a_prefix_does_what_the_definition_says(family, options):
    given = inputs(family, padding="left" if family.kind == "decoder" else None)
    model = build(family)
    before = visible_logits(model, given)
    prefixes = randomise(attach(family, model, **options))
    ours = visible_logits(model, given)
    eager = build(family, "definition32")
    for name, prefix in prefixes.items():
        eager.get_submodule(name).ntk_prefix = copy.deepcopy(prefix)
    assert (ours - before).norm() > 0.01 * before.norm()
    expected = exact(family, prefixes, given)
    assert_as_accurate("logits", ours, visible_logits(eager, given), expected, torch.float32)


@some("llama", "gpt2", "esm", "gemma2")
def test_bfloat16(family):
    """Parameters of prefixes stay float32 when the model is cast, before or after."""
    given = inputs(family)
    model = build(family)
    prefixes = randomise(attach(family, model))
    values = {name: copy.deepcopy(prefix.state_dict()) for name, prefix in prefixes.items()}
    model = model.to(torch.bfloat16)
    for name, prefix in prefixes.items():
        for key, tensor in prefix.state_dict().items():
            assert torch.equal(tensor, values[name][key])
    eager = build(family, "definition32", torch.bfloat16)
    for name, prefix in prefixes.items():
        eager.get_submodule(name).ntk_prefix = copy.deepcopy(prefix)
    expected = exact_of(model, family, given)
    ours, plain = visible_logits(model, given), visible_logits(eager, given)
    assert ours.dtype == torch.bfloat16
    assert_as_accurate("logits", ours, plain, expected, torch.bfloat16)
    model(**with_labels(family, given)).loss.backward()
    for prefix in prefixes.values():
        assert all(parameter.grad.dtype == torch.float32 for parameter in prefix.parameters())
    other = attach(family, build(family, dtype=torch.bfloat16))
    assert {parameter.dtype for prefix in other.values() for parameter in prefix.parameters()} == {torch.float32}


def exact_of(model, family, given):
    """The same weights, as they are after rounding, in float64."""
    model = copy.deepcopy(model).double()
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        config._attn_implementation = "definition64"
    for module in model.modules():  # the definition takes prefixes as well
        if "_ntk_hook" in vars(module):
            module._ntk_hook.remove()
    return visible_logits(model, given)


@some("llama", "gpt2", "deepseek_v3")
def test_autocast(family):
    """Rotated queries and keys come in float32 there, values in bfloat16 (a cache would make them float32)."""
    given = inputs(family) | {"use_cache": False}
    model = build(family)
    expected = exact(family, given=inputs(family))
    with torch.autocast("cpu", torch.bfloat16):
        own = visible_logits(model, given)
        prefixes = attach(family, model)
        for prefix in prefixes.values():
            torch.nn.init.constant_(prefix.raw_k, -100)  # no mass
        ours = visible_logits(model, given)
        randomise(prefixes)
        model(**with_labels(family, given)).loss.backward()
    assert ours.dtype == own.dtype
    assert_as_accurate("logits", ours, own, expected, torch.bfloat16)
    for prefix in prefixes.values():
        assert all(parameter.grad.abs().sum() > 0 for parameter in prefix.parameters())


def test_opt_scales_its_query_and_features_see_it_unscaled():
    """The one state gives the same in a model that scales its query and in one that leaves it to attention."""
    query, key, value = torch.randn(3, 1, 2, 5, 16).unbind()
    state = PrefixState(torch.randn(2, 16, 16), torch.rand(2, 16), "elu")
    explicit = PrefixState(state.z, state.k, "elu", feature_scale=0.7)
    for each in (state, explicit):
        module = torch.nn.Module()
        module.ntk_prefix, module.scaling, module.is_causal = NTKPrefix.from_state(each), 16**-0.5, True
        plain, _ = ntk_attention_forward(module, query, key, value, None, scaling=16**-0.5)
        scaled, _ = ntk_attention_forward(module, query * 16**-0.5, key, value, None, scaling=1.0)
        torch.testing.assert_close(plain, scaled)
        expected = ntk_attention(query, key, value, each, is_causal=True)
        torch.testing.assert_close(plain, expected.transpose(1, 2))


def test_softcap_never_touches_the_prefix():
    query, key, value = (10 * torch.randn(3, 1, 2, 5, 8)).unbind()
    module = torch.nn.Module()
    module.ntk_prefix = NTKPrefix.from_state(PrefixState(keys=torch.randn(2, 3, 8), values=torch.randn(2, 3, 8)))
    ours, _ = ntk_attention_forward(module, query, key, value, None, softcap=1.0)
    scale = 8**-0.5
    scores = torch.tanh(scale * query @ key.mT).masked_fill(~torch.ones(5, 5).tril().bool(), -math.inf)
    scores = torch.cat([scale * query @ module.ntk_prefix.keys.mT, scores], dim=-1)
    expected = scores.softmax(-1) @ torch.cat([module.ntk_prefix.values[None], value], dim=2)
    torch.testing.assert_close(ours, expected.transpose(1, 2))


@pytest.mark.parametrize("seq_k", [3, 5, 9])
def test_causal_without_a_mask_is_aligned_top_left(seq_k):
    """As transformers means it: the rest of a static cache is not filled yet."""
    query, key, value = torch.randn(1, 4, 5, 8), torch.randn(1, 2, seq_k, 8), torch.randn(1, 2, seq_k, 8)
    module = torch.nn.Module()  # a module that does not say so is causal
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    ours, _ = ntk_attention_forward(module, query, key, value, None)
    torch.testing.assert_close(ours, expected.transpose(1, 2))
    module.is_causal = False
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    ours, _ = ntk_attention_forward(module, query, key, value, None)
    torch.testing.assert_close(ours, expected.transpose(1, 2))
    ours, _ = ntk_attention_forward(module, query[:, :, :1], key, value, None, is_causal=True)
    torch.testing.assert_close(ours, expected[:, :, :1].transpose(1, 2))


def test_learned_queries_are_shared_by_the_batch():
    query, key, value = torch.randn(1, 2, 3, 8), torch.randn(4, 2, 5, 8), torch.randn(4, 2, 5, 8)
    ours, _ = ntk_attention_forward(torch.nn.Module(), query, key, value, None, is_causal=False)
    expected = torch.nn.functional.scaled_dot_product_attention(query.expand(4, -1, -1, -1), key, value)
    torch.testing.assert_close(ours, expected.transpose(1, 2))


def test_a_single_query_has_gradients():
    query, key, value = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    module = torch.nn.Module()
    module.ntk_prefix = randomise({"": NTKPrefix(2, 8)})[""]
    out, _ = ntk_attention_forward(module, query, key, value, None)
    with torch.no_grad():
        decoded, _ = ntk_attention_forward(module, query, key, value, None)
    torch.testing.assert_close(out, decoded)
    out.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


def test_a_mask_may_have_room_for_more_keys():
    query, key, value = torch.randn(3, 2, 2, 5, 8).unbind()
    mask = torch.rand(2, 1, 5, 9) < 0.7
    mask[..., 0] = True
    ours, _ = ntk_attention_forward(torch.nn.Module(), query, key, value, mask)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[..., :5])
    torch.testing.assert_close(ours, expected.transpose(1, 2))


@pytest.mark.parametrize("mask", ["bool", "additive", None])
def test_position_bias(mask):
    """T5's: added to the scores, with whatever mask there is."""
    query, key, value = torch.randn(3, 2, 2, 5, 8).unbind()
    bias = torch.randn(1, 2, 5, 5)
    keep = torch.rand(2, 1, 5, 5) < 0.7
    keep[..., 0] = True
    given = {"bool": keep, "additive": torch.zeros(keep.shape).masked_fill(~keep, -math.inf), None: None}[mask]
    if mask is None:
        keep = torch.ones(5, 5).tril().bool()
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=bias.masked_fill(~keep, -math.inf)
    )
    ours, _ = ntk_attention_forward(torch.nn.Module(), query, key, value, given, position_bias=bias)
    torch.testing.assert_close(ours, expected.transpose(1, 2))


def test_sinks_share_the_softmax_with_a_prefix():
    """Gradients included; a row that sees nothing is 0, and its sink has a gradient of 0 from it."""
    query, key, value = torch.randn(3, 2, 4, 5, 8).unbind()
    sinks = torch.randn(4, requires_grad=True)
    module = torch.nn.Module()
    module.ntk_prefix = randomise({"": NTKPrefix(4, 8)})[""]
    ours, _ = ntk_attention_forward(module, query, key, value, None, s_aux=sinks)
    gradients = torch.autograd.grad(ours.square().sum(), [sinks, *module.parameters()])
    # A sink is a row of the state with key 0, value 0 and its logit for weight.
    own = module.ntk_prefix()
    rows = torch.zeros(4, 1, 8)
    state = PrefixState(own.z, own.k, "elu", keys=rows, values=rows, bias=sinks[:, None])
    expected = ntk_attention(query, key, value, state, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), [sinks, *module.parameters()]))

    hidden = torch.zeros(2, 1, 5, 5, dtype=torch.bool)
    ours, _ = ntk_attention_forward(torch.nn.Module(), query, key, value, hidden, s_aux=sinks)
    assert torch.equal(ours, torch.zeros_like(ours))
    assert torch.equal(torch.autograd.grad(ours.sum(), sinks)[0], torch.zeros(4))


# Padding ---------------------------------------------------------------------------------------------------------


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


@some("llama", "gemma2", "gpt_oss", "gpt2", "opt", "bert", "esm")
def test_padding_does_not_spoil_valid_rows(family):
    """The first row alone, padded left and right, and beside a row that is padding from end to end."""
    model = build(family)
    randomise(attach(family, model))
    ids = inputs(family)["input_ids"][:1, :6]
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    sides = ["right"] if family.kind == "encoder" else ["left", "right"]
    for side in sides:
        pad = torch.zeros(1, 3, dtype=torch.long)
        row = torch.cat([pad, ids] if side == "left" else [ids, pad], dim=1)
        mask = torch.cat([pad, pad + 1, pad + 1] if side == "left" else [pad + 1, pad + 1, pad], dim=1)
        rows, masks = torch.cat([row, row]), torch.cat([mask, torch.zeros_like(mask)])
        given = {} if family.kind == "encoder" or family.name == "opt" else {"position_ids": positions(masks)}
        with torch.no_grad():
            logits = model(input_ids=rows, attention_mask=masks, **given).logits
        assert logits.isfinite().all()
        expected = exact_of(model, family, {"input_ids": ids})[0]
        assert_as_accurate(side, logits[0][mask[0].bool()], alone, expected, torch.float32)


def test_a_row_that_sees_nothing_gives_zero():
    query, key, value = torch.randn(3, 2, 2, 5, 8, requires_grad=True).unbind()
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[0, :, 2] = False
    out, _ = ntk_attention_forward(torch.nn.Module(), query, key, value, mask)
    assert torch.equal(out[0, 2], torch.zeros(2, 8))
    assert torch.autograd.grad(out.sum(), query)[0].isfinite().all()


# Training and files ----------------------------------------------------------------------------------------------


def generated(model, given, **options):
    given = {name: x for name, x in given.items() if name != "decoder_input_ids"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"max_new_tokens": 6, "do_sample": False} | options
        return model.generate(**given, **options)


@all_families
def test_attach_train_save_load_generate(family, tmp_path):
    model = build(family)
    fresh = copy.deepcopy(model)
    base = copy.deepcopy(model.state_dict())
    given = inputs(family)
    prefixes = attach(family, model, rank=4, init_mass=0.1)  # for a training as short as this
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
    """Models have several, copies too."""
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
    """It says "ntk" until the last of them has no prefixes any more."""
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
    """Set between forward and backward."""
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
    """Keys and values of a prefix, all of its rows kept, instead of the prefix in the cache."""
    model = build(BY_NAME["llama"])
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
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


# Generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", GENERATING, ids=lambda family: family.name)
def test_generation_with_a_cache_is_generation_without(family):
    """Greedy and by beams, with left padding where there is a mask, against the whole sequence again in each step."""
    model = build(family)
    given = inputs(family, padding="left" if family.kind == "decoder" else None)
    plain = generated(model, given)
    randomise(attach(family, model))
    expected = generated(model, given, use_cache=False)
    assert not torch.equal(expected, plain)
    assert torch.equal(generated(model, given), expected)
    expected = generated(model, given, use_cache=False, num_beams=3)
    assert torch.equal(generated(model, given, num_beams=3), expected)


def test_a_token_takes_the_kernel_for_it(monkeypatch):
    """`ntk_attention_decode`, where nothing is hidden and nothing is to be differentiated."""
    calls = []

    def decode(query, *args, **options):
        calls.append(query.shape[2])
        return ntk_attention_decode(query, *args, **options)

    monkeypatch.setattr(attention_interface, "ntk_attention_decode", decode)
    model = build(BY_NAME["llama"])
    attach_prefix(model)
    generated(model, inputs(BY_NAME["llama"]), max_new_tokens=3)
    assert calls == [1] * 2 * 2  # layers, tokens after the first


@some("llama", "gemma2", "gpt_oss", "gpt2")
def test_static_caches(family):
    model = build(family)
    randomise(attach(family, model))
    for padding in (None, "left"):
        given = inputs(family, padding=padding)
        expected = generated(model, given)
        assert torch.equal(generated(model, given, cache_implementation="static"), expected)


@some("llama", "mistral", "gpt2")
def test_prefill_in_pieces(family):
    """More queries than one against more keys than queries, without a padding mask."""
    model = build(family)
    randomise(attach(family, model))
    given = inputs(family)
    whole = visible_logits(model, given)
    ids = given["input_ids"]
    with torch.no_grad():
        first = model(ids[:, :5], use_cache=True)
        second = model(ids[:, 5:], past_key_values=first.past_key_values)
    pieces = torch.cat([first.logits, second.logits], dim=1)
    assert_as_accurate("logits", pieces, whole, exact_of(model, family, given), torch.float32)


def test_masks_of_models_whose_layers_share_keys():
    """Gemma 4 cuts queries to `logits_to_keep` where keys are shared, and the mask with them."""
    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("no Gemma 4 in this version of transformers")
    config = transformers.Gemma4TextConfig(
        vocab_size=VOCABULARY, vocab_size_per_layer_input=VOCABULARY, hidden_size=32, intermediate_size=48,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8, global_head_dim=16,
        hidden_size_per_layer_input=8, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=32, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = sharpened(transformers.Gemma4ForCausalLM(config)).eval()
    given, static = inputs(BY_NAME["llama"]), {"cache_implementation": "static", "disable_compile": True}

    def logits():
        steps = generated(model, given, **static, max_new_tokens=2, output_logits=True, return_dict_in_generate=True)
        return visible_logits(model, given | {"logits_to_keep": 4}), *steps.logits

    plain = logits()
    attach_prefix(model, init_mass=1e-30)  # next to nothing
    torch.testing.assert_close(logits(), plain, rtol=1e-4, atol=1e-4)


# Tasks -----------------------------------------------------------------------------------------------------------


class Tasks(torch.nn.Module):
    """As an adapter with several tasks is to be: a stack of states, and an index for each row."""

    def __init__(self, *prefixes, index):
        super().__init__()
        self.prefixes, self.index = torch.nn.ModuleList(prefixes), torch.tensor(index)

    def state_and_index(self, batch):
        return PrefixState.stack([prefix() for prefix in self.prefixes]), self.index


@pytest.mark.parametrize("beams", [1, 2])
@some("llama", "gpt_oss")
def test_each_row_may_have_its_own_task(family, beams):
    given = inputs(family, padding="left")
    tasks = [randomise(attach(family, build(family)), seed) for seed in (5, 6)]
    expected = []
    for row, prefixes in enumerate([tasks[1], None]):
        model = build(family, "ntk")
        if prefixes is not None:
            attach_prefix(model, prefixes=prefixes)
        expected.append(generated(model, {k: v[row : row + 1] for k, v in given.items()}, num_beams=beams))
    mixed = build(family, "ntk")
    for name in tasks[0]:
        mixed.get_submodule(name).ntk_prefix = Tasks(*(prefixes[name] for prefixes in tasks), index=[1, -1])
    assert torch.equal(generated(mixed, given, num_beams=beams), torch.cat(expected))


def test_rows_of_tasks_must_divide_the_batch():
    module = torch.nn.Module()
    module.ntk_prefix = Tasks(NTKPrefix(2, 8), index=[0, 0, -1])
    with pytest.raises(
        ValueError, match=r"`ntk_prefix` must give the state of each batch row, \[batch=4\] or a divisor"
    ):
        ntk_attention_forward(module, *torch.randn(3, 4, 2, 5, 8), None)


def test_a_child_without_an_active_state_adds_nothing():
    module, query = torch.nn.Module(), torch.randn(3, 1, 2, 5, 8)
    module.ntk_prefix = torch.nn.Module()
    module.ntk_prefix.state_and_index = lambda batch: (None, None)
    expected, _ = ntk_attention_forward(torch.nn.Module(), *query, None)
    assert torch.equal(ntk_attention_forward(module, *query, None)[0], expected)


# Warnings, refusals ----------------------------------------------------------------------------------------------


def test_dropout_that_is_not_applied_is_said_once():
    model = build(BY_NAME["llama"], attention_dropout=0.1)
    attach_prefix(model)
    given = inputs(BY_NAME["llama"])
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**given)
    model.train()
    with pytest.warns(UserWarning, match="dropout of attention weights is not applied, the model asks for 0.1") as seen:
        model(**given)
        model(**given)
    assert len(seen) == 1


def test_attention_weights_are_not_given():
    query = torch.randn(3, 1, 2, 5, 8)
    with pytest.warns(UserWarning, match="`output_attentions` gives None"):
        assert ntk_attention_forward(torch.nn.Module(), *query, None, output_attentions=True)[1] is None


@pytest.mark.parametrize("name", ["cache", "indices", "block_indices", "sinks", "head_mask"])
def test_what_would_be_computed_wrongly_is_refused(name):
    query = torch.randn(3, 1, 2, 5, 8)
    with pytest.raises(NotImplementedError, match=f"'ntk' does not support `{name}`, which Module gives it"):
        ntk_attention_forward(torch.nn.Module(), *query, None, **{name: object()})
    out, _ = ntk_attention_forward(torch.nn.Module(), *query, None, **{name: None}, anything_else=3)
    assert out.shape == (1, 5, 2, 8)


def test_shapes():
    def shapes(name):
        return attention_shapes(build(BY_NAME[name]), BY_NAME[name].attention)

    assert shapes("llama") == {f"model.layers.{i}.self_attn": AttentionShape(4, 2, 8, 8) for i in range(2)}
    assert set(shapes("qwen3").values()) == {AttentionShape(4, 2, 16, 16)}
    assert set(shapes("deepseek_v3").values()) == {AttentionShape(4, 4, 12, 6)}
    assert set(shapes("esm").values()) == {AttentionShape(4, 4, 8, 8)}
    assert set(shapes("gpt2").values()) == {AttentionShape(4, 4, 8, 8)}
    assert len(attention_shapes(build(BY_NAME["whisper"]))) == 5  # cross-attention too


def snapshot(model):
    training = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return list(model.state_dict()), training, model.config._attn_implementation, set(vars(model))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"feature_map": "relu"}, ValueError, "`feature_map` must be one of"),
        ({"rank": 0}, ValueError, "`rank` must be at least 1, got 0"),
        ({"modules": "mlp"}, ValueError, r"`modules` must match a name of `model.layers.0.self_attn`, .*, got 'mlp'"),
        ({"modules": 3}, TypeError, "`modules` must be a regular expression, got int"),
        ({"modules": "("}, ValueError, r"`modules` must be a regular expression, got '\(': missing \)"),
        ({"freeze": 1}, TypeError, "`freeze` must be a bool, got int"),
        ({"prefixes": []}, TypeError, r"`prefixes` must be a mapping from names of modules to prefixes, got \[\]"),
        ({"prefixes": {"x": NTKPrefix(2, 8)}}, ValueError, "`prefixes` must be for attention modules of the model, .*, got 'x'"),
        ({"prefixes": {"model.layers.0.self_attn": 3}}, TypeError, r"must be an NTKPrefix or a PrefixState, got int"),
        ({"prefixes": {"model.layers.0.self_attn": NTKPrefix(2, 8), "model.layers.1.self_attn": NTKPrefix(3, 8)}},
         ValueError, r"prefix of `model.layers.1.self_attn` must have the Hq=4 or Hkv=2 heads of the module, got 3"),
        ({"prefixes": {"model.layers.1.self_attn": NTKPrefix(2, 16)}}, ValueError, "head dimension D=8 of the module, got D=16"),
        ({"prefixes": {"model.layers.1.self_attn": NTKPrefix(2, 8, value_dim=4)}}, ValueError, "head dimension Dv=8 of the module, got Dv=4"),
        ({"prefixes": {"model.layers.1.self_attn": NTKPrefix(2, 8)}, "rank": 3}, ValueError, "`rank` must not be given together with `prefixes`"),
    ],
)  # fmt: skip
def test_refused_and_nothing_changed(options, error, message):
    model = build(BY_NAME["llama"])
    before = snapshot(model)
    with pytest.raises(error, match=message):
        attach_prefix(model, **options)
    assert snapshot(model) == before


def test_sizes_under_unusual_names():
    model = build(BY_NAME["llama"])
    model.config.num_attention_heads = 0
    name = "model.layers.0.self_attn"
    with pytest.raises(ValueError, match=r"`modules` must leave out `model.layers.0.self_attn` \(LlamaAttention\), or"):
        attach_prefix(model)
    attach_prefix(model, prefixes={name: NTKPrefix(3, 8)})
    with pytest.raises(ValueError, match="`state` must have Hq=4 or Hkv=2 heads, .*, got 3"):
        model(**inputs(BY_NAME["llama"]))


def test_modules_that_have_such_a_child_are_left_alone():
    model = build(BY_NAME["llama"])
    model.model.layers[1].self_attn.ntk_prefix = torch.nn.Identity()
    before = snapshot(model)
    with pytest.raises(ValueError, match="`model.layers.1.self_attn` must have no attribute 'ntk_prefix' yet"):
        attach_prefix(model)
    assert snapshot(model) == before


def test_configurations_that_cannot_be_set(monkeypatch):
    model = build(BY_NAME["llama"])
    before = snapshot(model)
    monkeypatch.setattr(type(model.config), "_attn_implementation", property(lambda config: "sdpa"))
    with pytest.raises(RuntimeError, match="must take the attention implementation 'ntk', got 'sdpa' in spite of it"):
        attach_prefix(model)
    assert snapshot(model) == before


def test_failing_half_way_changes_nothing(monkeypatch):
    model = build(BY_NAME["llama"])
    before = snapshot(model)

    def fails(name, child):
        raise RuntimeError("no more children")

    monkeypatch.setattr(model.model.layers[1].self_attn, "add_module", fails)
    with pytest.raises(RuntimeError, match="no more children"):
        attach_prefix(model)
    assert snapshot(model) == before


def test_models_that_it_is_not_for():
    config = transformers.GPTJConfig(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, bos_token_id=1, eos_token_id=2)  # fmt: skip
    model = transformers.GPTJForCausalLM(config)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match="`model` must dispatch its attention through .*, got GPTJForCausalLM, none of"
    ):
        attach_prefix(model)
    assert snapshot(model) == before
    with pytest.raises(TypeError, match="`model` must be a transformers.PreTrainedModel, got Linear"):
        attach_prefix(torch.nn.Linear(2, 2))
    model = build(BY_NAME["llama"])
    for function in (attached_prefixes, detach_prefix, lambda model: save_prefix(model, "x")):
        with pytest.raises(ValueError, match="`model` must have prefixes .*, got LlamaForCausalLM without"):
            function(model)
    attach_prefix(model)
    with pytest.raises(ValueError, match="`model` must have no prefixes yet, got one with 2"):
        attach_prefix(model)


def other_models():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = sizes | {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision = sizes | {"image_size": 8, "patch_size": 4}
    both = {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": VOCABULARY,
    }  # fmt: skip
    return {
        "SplinterModel": transformers.SplinterConfig(**text),
        "GitForCausalLM": transformers.GitConfig(vision_config=vision, **text),
        "NllbMoeModel": transformers.NllbMoeConfig(**both, num_experts=2, encoder_sparse_step=0, decoder_sparse_step=0),
    }


@pytest.mark.parametrize("name", ["SplinterModel", "GitForCausalLM", "NllbMoeModel"])
def test_models_that_count_on_the_masks_of_eager(name):
    """Without them, encoders would be causal, and decoders would see what comes after."""
    model = getattr(transformers, name)(other_models()[name])
    before = snapshot(model)
    for function in (attach_prefix, attention_shapes):
        with pytest.raises(ValueError, match=f"and support sdpa or attention backends, got {name}, none of whose"):
            function(model)
    assert snapshot(model) == before


def test_parts_that_cannot_have_prefixes_are_left_out(monkeypatch):
    model = llava()
    assert len(attention_shapes(model, "vision")) == len(attention_shapes(model, "language")) == 2
    tower = next(part for name, part in model.named_modules() if name.endswith("vision_tower"))
    for name in ("_supports_sdpa", "_supports_attention_backend"):
        monkeypatch.setattr(type(tower), name, False)
    assert attention_shapes(model) == attention_shapes(model, "language")
    with pytest.raises(ValueError, match="`modules` must match a name of .*, got 'vision'"):
        attach_prefix(model, modules="vision")


def test_continuous_batching_is_refused(monkeypatch):
    """Also where flash attention is installed, which it would take."""
    api = pytest.importorskip("transformers.generation.continuous_batching.continuous_api")
    managers = [c for c in vars(api).values() if hasattr(c, "switch_to_cb_friendly_attn")]
    if not managers:
        pytest.skip("this version of transformers does not choose an implementation for it")
    for version in (2, 3):
        monkeypatch.setattr(api, f"is_flash_attn_{version}_available", lambda **kwargs: True)
    model = build(BY_NAME["llama"])
    attach_prefix(model)
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda *args: pytest.fail("the prefix was left out"))
    manager = managers[0].__new__(managers[0])
    for part in (model, copy.deepcopy(model), model.model):
        with pytest.raises(ValueError, match="ntk is not supported for continuous batching"):
            manager.switch_to_cb_friendly_attn(part)
    detach_prefix(model)
    assert model._supports_flash_attn and model.model._supports_flash_attn


def test_models_whose_weights_are_offloaded(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    family = BY_NAME["llama"]
    model, given = build(family), inputs(family)
    states = {name: prefix() for name, prefix in randomise(attach_prefix(model)).items()}
    expected = visible_logits(model, given)
    save_prefix(model, tmp_path / "prefix.safetensors")
    offloaded = build(family)
    accelerate.cpu_offload(offloaded, execution_device="cpu")
    assert {parameter.device.type for parameter in offloaded.parameters()} == {"meta"}
    attach_prefix(offloaded, rank=2)
    offloaded(**with_labels(family, given)).loss.backward()
    assert all(p.grad is not None for prefix in detach_prefix(offloaded).values() for p in prefix.parameters())
    mine = {name: NTKPrefix.from_state(state.detach()) for name, state in states.items()}
    assert attach_prefix(offloaded, prefixes=mine) == mine
    assert torch.equal(visible_logits(offloaded, given), expected)
    detach_prefix(offloaded)
    load_prefix(offloaded, tmp_path / "prefix.safetensors")
    assert torch.equal(visible_logits(offloaded, given), expected)


def test_modules_whose_weights_are_buffers():
    """As quantized ones are: the prefix is where they are."""
    model = build(BY_NAME["llama"])
    for linear in model.model.layers[1].self_attn.children():
        weight = linear.weight.detach().to("meta")
        del linear.weight
        linear.register_buffer("weight", weight)
    assert [prefix.z.device.type for prefix in attach_prefix(model).values()] == ["cpu", "meta"]


def test_files_that_do_not_fit(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    family = BY_NAME["llama"]
    model = build(family)
    attach_prefix(model)
    path = tmp_path / "prefix.safetensors"
    save_prefix(model, path)
    with pytest.raises(FileNotFoundError, match="`path` must be in a folder that exists"):
        save_prefix(model, tmp_path / "none" / "prefix.safetensors")

    def refused(path, message, error=ValueError, **options):
        target = build(family, **options)
        before = snapshot(target)
        with pytest.raises(error, match=message):
            load_prefix(target, path)
        assert snapshot(target) == before

    refused(path, r"got .* of a LlamaForCausalLM: .* Hq=8 or Hkv=8 heads of the module, got 2", num_attention_heads=8, num_key_value_heads=8)  # fmt: skip
    refused(path, "head dimension D=16 of the module, got D=8", head_dim=16)
    refused(path, "must be for attention modules of the model, .*, got 'model.layers.1.self_attn'", num_hidden_layers=1)
    refused(tmp_path / "other", "which is no file", FileNotFoundError)
    (tmp_path / "text").write_text("no tensors")
    refused(tmp_path / "text", "`path` must be a safetensors file")

    tensors = load_file(path)
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()

    def written(tensors, **changes):
        save_file(tensors, str(tmp_path / "changed"), metadata=metadata | changes)
        return tmp_path / "changed"

    refused(written(tensors, version="2"), "with version '1', got .* with version '2'")
    refused(
        written(tensors, format="ntk-kernels prefix state"), "with format .* with format 'ntk-kernels prefix state'"
    )
    refused(written(tensors, prefixes="[]"), "`path` must hold valid prefixes")
    refused(written(tensors | {"x": torch.zeros(1)}), r"unknown tensors \['x'\]")
    name = "model.layers.0.self_attn.ntk_prefix.z"
    refused(written(tensors | {name: torch.zeros(2, 8, 4)}), r"torch.Size\(\[2, 8, 4\]\)")
    refused(written({key: tensor for key, tensor in tensors.items() if key != name}), 'Missing key.* "z"')
    with pytest.raises(ValueError, match="must have no prefixes yet"):
        load_prefix(model, path)


def test_compiles_in_one_graph():
    family = BY_NAME["llama"]
    model = build(family)
    randomise(attach_prefix(model))
    given = inputs(family)
    expected = visible_logits(model, given)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(visible_logits(compiled, given), expected)
    model.set_attn_implementation("sdpa")  # what that raises, a graph cannot hold
    with pytest.raises(RuntimeError, match="Observed exception"):
        compiled(**given)
