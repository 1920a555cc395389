"""Models, modules and arguments that `attach_prefix` refuses or leaves alone, and files that do not fit."""

import copy
import math

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from model_cases import (
    BY_NAME,
    VOCABULARY,
    build,
    inputs,
    llava,
    no_softcap,
    randomise,
    snapshot,
    visible_logits,
    with_labels,
)

from ntk_kernels import NTKPrefix
from ntk_kernels.integrations.transformers import (
    attach_prefix,
    attached_prefixes,
    attention_shapes,
    detach_prefix,
    load_prefix,
    save_prefix,
)
from ntk_kernels.integrations.transformers.attention_interface import ntk_attention_forward

pytestmark = no_softcap


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
    """It is refused even if flash attention is installed, which it would take."""
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
    """The prefix goes where the buffers are, which hold the weights of quantized modules."""
    model = build(BY_NAME["llama"])
    for linear in model.model.layers[1].self_attn.children():
        weight = linear.weight.detach().to("meta")
        del linear.weight
        linear.register_buffer("weight", weight)
    assert [prefix.z.device.type for prefix in attach_prefix(model).values()] == ["cpu", "meta"]


def written_to(folder, tensors, metadata):
    from safetensors.torch import save_file

    save_file(tensors, str(folder / "changed"), metadata=metadata)
    return folder / "changed"


def test_files_that_do_not_fit(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file

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
    refused(written_to(tmp_path, tensors, metadata | {"model": "another"}), "do not have its checksum")
    del metadata["sha256"]

    def written(tensors, **changes):
        return written_to(tmp_path, tensors, metadata | changes)

    refused(written(tensors, version="2"), "with version '1', got .* with version '2'")
    refused(
        written(tensors, format="ntk-kernels prefix state"), "with format .* with format 'ntk-kernels prefix state'"
    )
    refused(written(tensors, prefixes="[]"), "`path` must hold valid prefixes")
    refused(written(tensors | {"x": torch.zeros(1)}), r"unknown tensors \['x'\]")
    name = "model.layers.0.self_attn.ntk_prefix.z"
    refused(written(tensors | {name: torch.zeros(2, 8, 4)}), r"torch.Size\(\[2, 8, 4\]\)")
    refused(written({key: tensor for key, tensor in tensors.items() if key != name}), 'Missing key.* "z"')
    refused(written(tensors | {name: tensors[name].long()}), "`z` must be float16, .*, got torch.int64")
    refused(written(tensors | {name: tensors[name].cfloat()}), "`z` must be float16, .*, got torch.complex64")
    refused(written(tensors | {name: tensors[name] * math.nan}), f"`{name}` in .* must be finite, got nan")
    for option in ('"device": "cpu"', '"dtype": null', '"num_rows": 1e9', '"nothing": 1'):
        options = metadata["prefixes"].replace("}", f", {option}}}", 1)
        refused(written(tensors, prefixes=options), "`path` must hold valid prefixes")
    refused(written(tensors, prefixes="[" * 100_000), "`path` must hold valid prefixes")
    load_prefix(build(family), written(tensors))  # without a checksum, as 0.1.0 wrote it
    with pytest.raises(ValueError, match="must have no prefixes yet"):
        load_prefix(model, path)


def test_a_file_that_tells_of_a_huge_prefix_takes_no_memory(tmp_path):
    """Sizes are compared before anything is made: 10^13 numbers would not fit."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = tmp_path / "prefix.safetensors"
    model = build(BY_NAME["llama"])
    attach_prefix(model, None, num_rows=2)
    save_prefix(model, path)
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    del metadata["sha256"]
    metadata["prefixes"] = metadata["prefixes"].replace('"num_rows": 2', f'"num_rows": {10**12}')
    save_file(load_file(path), str(path), metadata=metadata)
    with pytest.raises(ValueError, match="size mismatch for keys"):
        load_prefix(build(BY_NAME["llama"]), path)


def test_a_part_of_the_heads_is_refused():
    """A rank of two has 2 of 4 query heads and 1 of 2 key/value heads; the state's 2 heads would fit the former."""
    model = build(BY_NAME["llama"])
    attach_prefix(model)
    module = model.model.layers[0].self_attn
    dim = module.head_dim
    query, key = torch.randn(1, 2, 5, dim), torch.randn(1, 1, 5, dim)
    with pytest.raises(NotImplementedError, match="all Hq=4 query heads of the module, got 2; under tensor parallel"):
        ntk_attention_forward(module, query, key, key, None)
