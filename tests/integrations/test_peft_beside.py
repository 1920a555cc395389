"""NTK adapters beside other things: LoRA, heads that are trained as a whole, transformers' own loader and trainer."""

import copy

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers
from model_cases import BATCH, BY_NAME, build, inputs, visible_logits
from oracle import F64, close
from peft import PeftModel, get_peft_model
from peft_cases import LLAMA, adapted, by_adapter, config_of, lora, quiet, randomise, snapshot
from safetensors.torch import load_file

from ntk_kernels.integrations.peft import NTKConfig

pytestmark = quiet


def test_lora_beside_it(tmp_path):
    torch.manual_seed(0)
    given = inputs(LLAMA)
    model = get_peft_model(build(LLAMA, dtype=F64), lora(), adapter_name="lora").eval()
    without = visible_logits(model, given)
    model = get_peft_model(model.get_base_model(), config_of(LLAMA), adapter_name="ntk").eval()
    randomise(model, "ntk")
    expected = visible_logits(model, given)
    assert not torch.equal(expected, without)
    close(visible_logits(model, given | {"adapter_names": ["__base__"] * BATCH}), without)
    ours = model(**given, adapter_names=["ntk", "__base__"]).logits
    close(ours[0], expected[0])
    close(ours[1], without[1])
    model.save_pretrained(tmp_path)
    assert all(".lora_" in name for name in load_file(tmp_path / "lora/adapter_model.safetensors"))
    assert all(".ntk_states." in name for name in load_file(tmp_path / "ntk/adapter_model.safetensors"))

    loaded = PeftModel.from_pretrained(build(LLAMA, dtype=F64), tmp_path / "lora", adapter_name="lora")
    loaded = PeftModel.from_pretrained(loaded.get_base_model(), tmp_path / "ntk", adapter_name="ntk")
    assert torch.equal(visible_logits(loaded, given), expected)


def test_lora_put_after_it():
    given = inputs(LLAMA)
    torch.manual_seed(0)
    first = get_peft_model(build(LLAMA, dtype=F64), lora(), adapter_name="lora")
    first = get_peft_model(first.get_base_model(), config_of(LLAMA), adapter_name="ntk")
    expected = visible_logits(randomise(first, "ntk").eval(), given)
    torch.manual_seed(0)
    model = build(LLAMA, dtype=F64)
    model = randomise(get_peft_model(model, config_of(LLAMA), adapter_name="ntk"), "ntk").eval()
    alone = visible_logits(model, given)
    model = get_peft_model(model.get_base_model(), lora(), adapter_name="lora").eval()
    for name, parameter in first.named_parameters():
        if ".lora_" in name:
            model.get_parameter(name).data.copy_(parameter)
    assert torch.equal(visible_logits(model, given), expected)
    close(visible_logits(model.merge_and_unload(), given), expected)  # LoRA is merged, the prefixes stay
    assert not torch.equal(alone, expected)


def test_transformers_own_way_to_load_it(tmp_path):
    model = adapted(LLAMA, {"a": config_of(LLAMA)}, dtype=F64)
    model.save_pretrained(tmp_path)
    base = build(LLAMA, dtype=F64)
    base.load_adapter(str(tmp_path / "a"))
    base.load_adapter(str(tmp_path / "a"), adapter_name="other")
    assert torch.equal(visible_logits(base, inputs(LLAMA)), visible_logits(model, inputs(LLAMA)))
    base.disable_adapters()
    close(visible_logits(base, inputs(LLAMA)), visible_logits(build(LLAMA, dtype=F64), inputs(LLAMA)))


def test_a_trainer_that_is_interrupted(tmp_path):
    """Training from a checkpoint goes on as if nothing had happened."""
    data = [{"input_ids": torch.arange(3, 12), "labels": torch.arange(3, 12)}] * 4
    options = transformers.TrainingArguments(
        tmp_path, max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=0.1, adam_epsilon=1e-15,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, use_cpu=True,
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    results = []
    for checkpoint in (None, tmp_path / "checkpoint-2"):
        model = get_peft_model(build(LLAMA), config_of(LLAMA))
        transformers.Trainer(model, options, train_dataset=data).train(resume_from_checkpoint=checkpoint)
        results.append({name: p for name, p in model.named_parameters() if ".ntk_states." in name})
    assert all(torch.equal(results[1][name], p) for name, p in results[0].items())


def test_a_copy_stands_by_itself():
    model, given = adapted(LLAMA), inputs(LLAMA)
    expected = visible_logits(model, given)
    other = copy.deepcopy(model)
    with other.disable_adapter():
        assert torch.equal(visible_logits(model, given), expected)
        assert torch.equal(visible_logits(other, given), visible_logits(build(LLAMA), given))
    assert torch.equal(visible_logits(other, given), expected)


def test_the_names_of_adapters_beside_each_other_differ():
    model = get_peft_model(build(LLAMA), lora())
    expected, config = snapshot(model), model.peft_config["default"]
    with pytest.raises(
        ValueError, match=r"`adapter_name` must be none of those that the model has, \['default'\], got 'default'"
    ):
        get_peft_model(model.get_base_model(), config_of(LLAMA))
    with pytest.raises(ValueError, match="`target_modules` must be .* a name of .*, got 'nothing'"):
        get_peft_model(model.get_base_model(), NTKConfig(target_modules="nothing"), adapter_name="ntk")
    assert model.peft_config == {"default": config}
    assert snapshot(model) == expected


def test_a_classifier_with_its_head(tmp_path):
    if "bert" not in BY_NAME:
        pytest.skip("BERT has attention of its own in transformers 4")

    def base():
        torch.manual_seed(0)
        options = BY_NAME["bert"].options | {"num_labels": 3}
        return transformers.BertForSequenceClassification(transformers.BertConfig(**options)).to(F64).eval()

    given = inputs(BY_NAME["bert"])
    config = config_of(BY_NAME["bert"], task_type="SEQ_CLS")
    model = get_peft_model(base(), config, adapter_name="a")
    assert model.classifier.modules_to_save["a"].weight.requires_grad
    model.add_adapter("b", config_of(BY_NAME["bert"], task_type="SEQ_CLS"))
    for seed, name in enumerate("ab"):
        randomise(model, name, seed)
        torch.nn.init.normal_(model.classifier.modules_to_save[name].weight)
    model.eval()
    names = ["b", "a"]
    expected = by_adapter(model, names, lambda: model(**given).logits)
    for row, other in zip(model(**given, adapter_names=names).logits, expected, strict=True):
        close(row, other)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path / "a", adapter_name="a")
    loaded.load_adapter(tmp_path / "b", "b")
    ours, theirs = (m(**given, adapter_names=names).logits for m in (loaded, model))
    assert torch.equal(ours, theirs)
    head = model.classifier.modules_to_save["a"]
    assert model.unload().classifier is head  # PEFT keeps what was trained as a whole
