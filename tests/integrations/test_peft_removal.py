"""PEFT adapters of NTK-Attention disabled, deleted and unloaded, and refusals to run without an active one."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers
from model_cases import all_families, build, inputs, visible_logits
from oracle import F64, close
from peft import PeftModel, get_peft_model
from peft_cases import LLAMA, adapted, config_of, lora, quiet, randomise, snapshot

from ntk_kernels.integrations.peft import NTKLayer

pytestmark = quiet


@all_families
def test_disabled_it_is_the_base_model_to_the_bit(family):
    given = inputs(family)
    expected = visible_logits(build(family), given)
    model = adapted(family)
    ours = visible_logits(model, given)
    assert not torch.equal(ours, expected)
    with model.disable_adapter():
        assert torch.equal(visible_logits(model, given), expected)
        assert torch.equal(visible_logits(model, given | {"adapter_names": ["a", "b"]}), expected)
    assert torch.equal(visible_logits(model, given), ours)


def test_models_of_one_configuration():
    """Disabling or unloading one of them does not touch the other."""
    config, given = build(LLAMA).config, inputs(LLAMA)
    torch.manual_seed(0)
    models = [
        randomise(get_peft_model(transformers.LlamaForCausalLM(config), config_of(LLAMA)), "default").eval()
        for _ in range(2)
    ]
    expected = visible_logits(models[1], given)
    with models[0].disable_adapter():
        assert torch.equal(visible_logits(models[1], given), expected)
    with models[0].disable_adapter(), models[1].disable_adapter():
        assert config._attn_implementation == "sdpa"
    assert config._attn_implementation == "ntk"
    models[0].unload()
    assert torch.equal(visible_logits(models[1], given), expected)
    models[1].unload()
    assert config._attn_implementation == "sdpa"


def test_another_implementation_never_leaves_an_adapter_out():
    model, given = adapted(LLAMA), inputs(LLAMA)
    expected = visible_logits(model, given)
    refused = pytest.raises(RuntimeError, match="must be 'ntk' while LlamaAttention has a prefix, got 'sdpa'.*unload")
    model.get_base_model().set_attn_implementation("sdpa")
    with refused:
        model(**given)
    with model.disable_adapter():
        assert torch.equal(visible_logits(model, given), visible_logits(build(LLAMA), given))
        for module in model.modules():
            if isinstance(module, NTKLayer):
                module.enable_adapters(True)  # LoRA beside it does so and knows nothing of implementations
        with refused:
            model(**given)
    assert torch.equal(visible_logits(model, given), expected)
    model.unload().set_attn_implementation("sdpa")


def test_a_model_whose_weights_are_offloaded(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, given = adapted(LLAMA), inputs(LLAMA)
    expected = visible_logits(model, given)
    model.save_pretrained(tmp_path)
    base = build(LLAMA)
    accelerate.cpu_offload(base, execution_device="cpu")
    loaded = PeftModel.from_pretrained(base, tmp_path / "a")
    assert torch.equal(visible_logits(loaded, given), expected)


@all_families
def test_unload_gives_the_base_model_back(family):
    expected = snapshot(build(family))
    model = adapted(family)
    base = model.unload()
    assert model.unload() is base
    assert type(base).__name__ == family.model
    ours = snapshot(base)
    assert ours[1:] == expected[1:]
    assert {n: values for n, (values, _) in ours[0].items()} == {n: values for n, (values, _) in expected[0].items()}
    assert not any(trained for _, trained in ours[0].values())  # PEFT leaves it so
    get_peft_model(base, config_of(family))


def test_deleting_adapters():
    model, given = adapted(LLAMA, dtype=F64), inputs(LLAMA)
    model.set_adapter("b")
    expected = visible_logits(model, given)
    model.delete_adapter("a")
    assert list(model.peft_config) == ["b"]
    assert not any(".ntk_states.a." in name for name, _ in model.named_parameters())
    assert torch.equal(visible_logits(model, given), expected)
    with pytest.raises(ValueError, match="got 'a'"):
        model(**given, adapter_names=["a", "b"])
    with pytest.raises(ValueError, match="a does not exist"):
        model.delete_adapter("a")
    model.add_adapter("a", config_of(LLAMA))
    model(**given, adapter_names=["a", "b"])
    model.delete_adapter("a")
    model.delete_adapter("b")
    close(visible_logits(model.base_model.model, given), visible_logits(build(LLAMA, dtype=F64), given))


def test_deleting_the_active_adapter_of_adapters_in_different_layers():
    layers = {"a": [0, 1], "b": [0], "c": [1]}
    model = adapted(LLAMA, {name: config_of(LLAMA, layers_to_transform=layers[name]) for name in layers})
    model.set_adapter("b")
    expected = visible_logits(model, inputs(LLAMA))
    model.set_adapter("a")
    with pytest.warns(UserWarning, match="the active adapter 'a' is deleted, 'b' is active now") as seen:
        model.delete_adapter("a")
    assert len(seen) == 1
    assert model.active_adapters == model.base_model.active_adapters == ["b"]
    assert torch.equal(visible_logits(model, inputs(LLAMA)), expected)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".ntk_states.b." in name
    }
    model.base_model.set_adapter(["b", "c"])
    model.delete_adapter("b")
    assert [layer.active_adapters for layer in model.modules() if isinstance(layer, NTKLayer)] == [["c"], ["c"]]


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused(merge):
    model = adapted(LLAMA)
    expected = visible_logits(model, inputs(LLAMA))
    with pytest.raises(ValueError, match="NTK adapters cannot be merged into the weights of a model: what a prefix"):
        getattr(model, merge)()
    assert torch.equal(visible_logits(model, inputs(LLAMA)), expected)


@pytest.mark.parametrize("first", ["lora", "ntk"])
def test_unload_leaves_lora_beside_it(first):
    """LoRA keeps all that is its own, a head that both adapters train among it."""
    given = inputs(LLAMA)
    configs = {"lora": lora(), "ntk": config_of(LLAMA, modules_to_save=["lm_head", "model.norm"])}
    configs["lora"].modules_to_save = ["lm_head"]
    alone, models, base = build(LLAMA, dtype=F64), {}, build(LLAMA, dtype=F64)
    torch.manual_seed(0)
    expected = visible_logits(get_peft_model(alone, lora(), adapter_name="lora").eval(), given)
    for name in (first, "ntk" if first == "lora" else "lora"):
        torch.manual_seed(0)
        models[name] = get_peft_model(base, configs[name], adapter_name=name).eval()
    randomise(base, "ntk")
    assert not torch.equal(visible_logits(base, given), expected)
    assert models["ntk"].unload() is base
    close(visible_logits(base, given), expected)
    assert list(base.peft_config) == ["lora"]
    assert not any("ntk" in name for name, _ in base.named_parameters())
    assert base.config._attn_implementation == "sdpa"
    assert list(base.lm_head.modules_to_save) == base.lm_head.active_adapters == ["lora"]
    assert type(base.model.norm).__name__ == "LlamaRMSNorm"
    close(visible_logits(models["lora"].unload(), given), visible_logits(build(LLAMA, dtype=F64), given))
