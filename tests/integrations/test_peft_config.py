"""NTKConfig, and adapters that are refused without a change to the model."""

import copy
import json
import math
import pickle

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import transformers
from model_cases import VOCABULARY, build, inputs, visible_logits
from peft import PeftModel, PeftType, get_peft_model
from peft_cases import (
    LLAMA,
    adapted,
    config_of,
    lora,
    prefixes_of,
    quiet,
    randomise,
    snapshot,
)
from safetensors.torch import load_file, save_file

from ntk_kernels.integrations.peft import NTKConfig, NTKLayer, NTKModel
from ntk_kernels.integrations.transformers import attach_prefix

pytestmark = quiet


TARGETS = [
    ({}, ["model.layers.0.self_attn", "model.layers.1.self_attn"]),
    ({"target_modules": ["self_attn"]}, ["model.layers.0.self_attn", "model.layers.1.self_attn"]),
    ({"target_modules": ["layers.1.self_attn"]}, ["model.layers.1.self_attn"]),
    ({"target_modules": {"model.layers.1.self_attn"}}, ["model.layers.1.self_attn"]),
    ({"target_modules": r"model\.layers\.0\..*"}, ["model.layers.0.self_attn"]),
    ({"layers_to_transform": 1}, ["model.layers.1.self_attn"]),
    ({"layers_to_transform": [1, 0]}, ["model.layers.0.self_attn", "model.layers.1.self_attn"]),
    ({"layers_to_transform": [0], "target_modules": ["self_attn"]}, ["model.layers.0.self_attn"]),
]


@pytest.mark.parametrize("options, names", TARGETS, ids=str)
def test_targets(options, names, tmp_path):
    config = NTKConfig(**options)
    model = get_peft_model(build(LLAMA), config)
    assert list(prefixes_of(model, "default")) == names == list(model.peft_config["default"].shapes)
    assert config.shapes is None  # the configuration may serve other models
    randomise(model, "default").save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path)
    assert list(prefixes_of(loaded, "default")) == names
    assert torch.equal(visible_logits(loaded, inputs(LLAMA)), visible_logits(model.eval(), inputs(LLAMA)))


def test_many_layers():
    """PEFT shortens lists of twenty targets and more."""
    names = [f"model.layers.{i}.self_attn" for i in range(22)]
    model = get_peft_model(build(LLAMA, num_hidden_layers=24), NTKConfig(target_modules=names))
    assert list(prefixes_of(model, "default")) == names


def test_options_reach_the_prefixes():
    options = {
        "feature_map": "taylor1", "rank": 2, "centers": 3, "num_rows": 4, "positive": "exp", "scale_by_k": False,
        "log_scale": True, "feature_scale": 0.5,
    }  # fmt: skip
    for prefix in prefixes_of(get_peft_model(build(LLAMA), NTKConfig(**options)), "default").values():
        assert prefix.options == {"num_heads": 2, "head_dim": 8, "value_dim": 8} | options
    model = get_peft_model(build(LLAMA), NTKConfig(init_mass=0.5))
    for prefix in prefixes_of(model, "default").values():
        torch.testing.assert_close(prefix().k.sum(-1), torch.full((2,), 0.5))


def test_the_type_is_one_of_pefts():
    assert PeftType("NTK") is PeftType.NTK is PeftType["NTK"]
    assert list(PeftType)[-1] == "NTK" and PeftType.NTK in set(PeftType)
    config = NTKConfig(rank=2)
    for other in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert other == config
        assert other.peft_type is PeftType.NTK
    assert json.loads(json.dumps(config.to_dict()))["peft_type"] == "NTK"
    assert peft.get_peft_config(config.to_dict()) == config
    assert isinstance(get_peft_model(build(LLAMA), config).base_model, NTKModel)


CONFIGS = [
    ({"feature_map": "relu"}, ValueError, "`feature_map` must be .*, got 'relu'"),
    ({"rank": 0}, ValueError, "`rank` must be .*, got 0"),
    ({"num_rows": -1}, ValueError, "`num_rows` must be .*, got -1"),
    ({"init_mass": 0.0}, ValueError, "`init_mass` must be .*, got 0.0"),
    ({"feature_map": None}, ValueError, "`num_rows` must be at least 1 with feature_map=None, got 0"),
    ({"centers": torch.zeros(1, 1, 1)}, TypeError, "`centers` must be an int"),
    ({"centers": 2}, ValueError, "`centers` must hold one centre .* feature_map='elu'.*, got C=2"),
    (
        {"target_modules": "("},
        ValueError,
        r"`target_modules` must be a regular expression, or a list of names, got '\('",
    ),
    ({"target_modules": []}, TypeError, r"`target_modules` must be a list of names, got \[\]"),
    ({"target_modules": [1]}, TypeError, r"`target_modules` must be a list of names, got \[1\]"),
    ({"layers_to_transform": "1"}, TypeError, "`layers_to_transform` must be a list of numbers, got '1'"),
    ({"layers_to_transform": True}, TypeError, "`layers_to_transform` must be a list of numbers, got True"),
    ({"format_version": 2}, ValueError, "`format_version` must be 1, .*, got 2"),
]


@pytest.mark.parametrize("options, error, message", CONFIGS, ids=[str(row[0]) for row in CONFIGS])
def test_configurations_that_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        NTKConfig(**options)


# Refused, and nothing of the model has changed -------------------------------------------------------------------

FITS = [
    ({"target_modules": ["q_proj"]}, "`target_modules` must be names of `model.layers.0.self_attn`, .*, got 'q_proj'"),
    (
        {"target_modules": "all-linear"},
        "`target_modules` must be a regular expression for the whole of a name of .*, got 'all-linear'",
    ),
    ({"layers_to_transform": 2}, r"`layers_to_transform` must be of the layers \[0, 1\] of .*, got 2"),
    (
        {"shapes": {"model.layers.5.self_attn": [2, 8, 8]}},
        "the adapter must be for attention modules .*, got `model.layers.5.self_attn`",
    ),
    (
        {"shapes": {"model.layers.1.self_attn": [4, 8, 8]}},
        r"the heads of `model.layers.1.self_attn`, \[Hkv, D, Dv\] = \[2, 8, 8\], got one for \[4, 8, 8\]",
    ),
]


@pytest.mark.parametrize("options, message", FITS, ids=[str(row[0]) for row in FITS])
def test_adapters_that_do_not_fit(options, message):
    model = build(LLAMA)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, NTKConfig(**options))
    assert snapshot(model) == before
    model = adapted(LLAMA)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        model.add_adapter("c", NTKConfig(**options))
    assert snapshot(model) == before
    assert list(model.peft_config) == ["a", "b"]


def test_models_that_do_not_fit():
    config = transformers.GPTJConfig(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, bos_token_id=1, eos_token_id=2)  # fmt: skip
    with pytest.raises(ValueError, match="`model` must dispatch its attention through .*, got GPTJForCausalLM"):
        get_peft_model(transformers.GPTJForCausalLM(config), NTKConfig())
    with pytest.raises(TypeError, match="`model` must be a transformers.PreTrainedModel, got Linear"):
        get_peft_model(torch.nn.Linear(2, 2), NTKConfig())
    model = build(LLAMA)
    attach_prefix(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match="`model` must have no prefixes yet, got one with 2"):
        get_peft_model(model, NTKConfig())
    assert snapshot(model) == before
    model = build(LLAMA)
    of_peft = get_peft_model(model, NTKConfig(num_rows=2))
    assert of_peft.peft_config["default"].feature_map is None
    with pytest.raises(TypeError, match=r"PreTrainedModel, got PeftModel, whose get_base_model\(\) is one"):
        attach_prefix(of_peft)
    with pytest.raises(ValueError, match="`model.layers.0.self_attn` must have no attribute 'ntk_prefix' yet"):
        attach_prefix(model)


def test_a_second_adapter_by_get_peft_model():
    """An adapter of another name joins the first, whichever PeftModel is asked."""
    base, given = build(LLAMA), inputs(LLAMA)
    expected = visible_logits(base, given)
    get_peft_model(base, config_of(LLAMA), adapter_name="a")
    with pytest.raises(ValueError, match=r"must be none of those that the model has, \['a'\], got 'a'"):
        get_peft_model(base, config_of(LLAMA), adapter_name="a")
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        model = get_peft_model(base, config_of(LLAMA), adapter_name="b")
    model(**given, adapter_names=["a", "b"])
    assert torch.equal(visible_logits(model.unload(), given), expected)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head", "layers"]}], ids=["layer", "modules_to_save"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_failing_half_way_changes_nothing(first, options, monkeypatch):
    model = build(LLAMA) if first else adapted(LLAMA)
    before = snapshot(model)
    if options:
        message = "modules_to_save cannot be applied to modules of type"  # after lm_head and all prefixes, or so
    else:
        message, update_layer, calls = "no more layers", NTKLayer.update_layer, []

        def fails(*args, **kwargs):
            update_layer(*args, **kwargs)
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("no more layers")

        monkeypatch.setattr(NTKLayer, "update_layer", fails)
    with pytest.raises((RuntimeError, TypeError), match=message):
        if first:
            get_peft_model(model, NTKConfig(**options))
        else:
            model.add_adapter("c", NTKConfig(**options))
    assert snapshot(model) == before


def rewritten(folder, weights=None, **options):
    """Rewrites the files of an adapter with other weights or another configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    if weights is not None:
        save_file(weights, folder / "adapter_model.safetensors")


def test_files_that_are_refused(tmp_path):
    model = adapted(LLAMA, {"a": config_of(LLAMA)})
    model.save_pretrained(tmp_path)
    folder = tmp_path / "a"
    good, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    name = "base_model.model.model.layers.1.self_attn.ntk_prefix.ntk_states.z_b"
    get_peft_model(build(LLAMA), lora()).save_pretrained(tmp_path / "lora")
    of_lora = load_file(tmp_path / "lora/adapter_model.safetensors")
    cases = [
        ({"format_version": 2}, None, "`format_version` must be 1, which .*, got 2"),
        ({"shapes": None}, None, r"must tell the `shapes` of the weights beside it, .*, got None"),
        ({}, {k: v for k, v in good.items() if k != name}, f"must hold the weights .*, `{name}` among them, got `base"),
        ({}, of_lora, r"must hold the weights .* among them, got `base_model.*lora_A.weight`"),
        ({}, good | {name: good[name][:1].clone()}, rf"`{name}` in .* must have the shape that adapter_config.json tells, \[2, 3, 8\], got \[1, 3, 8\]"),
        ({"rank": 4}, None, r"must have the shape that adapter_config.json tells, \[2, 8, 4\], got \[2, 8, 3\]"),
        ({"rank": None}, None, r"must hold the weights .*ntk_states.z` among them"),
        ({}, good | {"base_model.model.lm_head.weight": torch.zeros(2)}, "`modules_to_save`, None, alone, got `base_model.model.lm_head.weight` too"),
        ({"modules_to_save": ["head"]}, good | {"base_model.model.lm_head.weight": torch.zeros(2)}, "alone, got `base_model.model.lm_head"),
        ({"shapes": dict(list(config["shapes"].items())[:1])}, None, "alone, got `base_model.model.model.layers.1"),
        ({"shapes": {"model.layers.1.self_attn": [2, 8]}}, None, r"`shapes\['model.layers.1.self_attn'\]` must be \[Hkv, D, Dv\], got \[2, 8\]"),
        ({"shapes": {"model.layers.1.self_attn": [2, 8, 0]}}, None, "Dv` must be at least 1, got 0"),
        ({}, good | {name: good[name] * math.nan}, f"`{name}` in .* must be finite, got nan"),
    ]  # fmt: skip
    for options, weights, message in cases:
        rewritten(folder, weights, **options)
        base = build(LLAMA)
        before = snapshot(base)
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(base, folder)
        assert snapshot(base) == before
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            model.load_adapter(folder, "b")
        assert snapshot(model) == before
        rewritten(folder, good, **config)
    for options, weights, message in (
        ({"shapes": []}, None, "`shapes` must have .* by the names of modules, got list"),
        ({}, good | {name: good[name].long()}, "must be float16, bfloat16, float32 or float64, got torch.int64"),
    ):
        rewritten(folder, weights, **options)
        with pytest.raises(TypeError, match=message):
            PeftModel.from_pretrained(build(LLAMA), folder)
        rewritten(folder, good, **config)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes((whole := weights.read_bytes())[:-8])
    with pytest.raises(ValueError, match=f"{weights} must be a safetensors file, got another or a part of one"):
        PeftModel.from_pretrained(build(LLAMA), folder)
    weights.write_bytes(whole)
    assert torch.equal(
        visible_logits(PeftModel.from_pretrained(build(LLAMA), folder), inputs(LLAMA)),
        visible_logits(model, inputs(LLAMA)),
    )
    with pytest.raises(ValueError, match="Found (PeftType.)?NTK and (PeftType.)?LORA"):
        model.load_adapter(tmp_path / "lora", "b")


def test_models_of_other_sizes_are_refused(tmp_path):
    adapted(LLAMA, {"a": config_of(LLAMA)}).save_pretrained(tmp_path)
    for options, message in (
        ({"num_key_value_heads": 4}, r"\[Hkv, D, Dv\] = \[4, 8, 8\], got one for \[2, 8, 8\]"),
        ({"head_dim": 16}, r"\[Hkv, D, Dv\] = \[2, 16, 16\], got one for \[2, 8, 8\]"),
        ({"num_hidden_layers": 1}, "modules of the model, `model.layers.0.self_attn`, got `model.layers.1.self_attn`"),
    ):
        base = build(LLAMA, **options)
        before = snapshot(base)
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(base, tmp_path / "a")
        assert snapshot(base) == before
    with pytest.warns(UserWarning, match="for 2 modules; .* match `model.layers.2.self_attn` too"):
        deeper = PeftModel.from_pretrained(build(LLAMA, num_hidden_layers=3), tmp_path / "a")
    assert list(prefixes_of(deeper, "default")) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def test_direct_injection_by_weights_is_refused():
    model = build(LLAMA)
    before = snapshot(model)
    with pytest.raises(ValueError, match="`state_dict` must be None"):
        peft.inject_adapter_in_model(NTKConfig(), model, state_dict={"x": torch.zeros(1)})
    assert snapshot(model) == before


def test_layers_name_their_method():
    model = adapted(LLAMA)
    assert {status.module_type for status in model.get_layer_status()} == {"ntk.NTKLayer"}
    status = model.get_model_status()
    assert (
        status.available_adapters == ["a", "b"] and status.enabled and status.requires_grad == {"a": True, "b": False}
    )
