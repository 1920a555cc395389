"""NTK-Attention as a PEFT method: training, files, starts, dtypes."""

import itertools
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from model_cases import BY_NAME, FAMILIES, VOCABULARY, all_families, build, inputs, some, visible_logits, with_labels
from oracle import F64, close
from peft import PeftModel, get_peft_model
from peft_cases import LLAMA, adapted, config_of, outputs, quiet, snapshot
from safetensors.torch import load_file

from ntk_kernels import PrefixState, prefix_to_state
from ntk_kernels.integrations.peft import NTKConfig
from ntk_kernels.integrations.transformers import attach_prefix, attention_shapes

pytestmark = quiet
ROOT = Path(__file__).resolve().parents[2]


# Train, save, load in another process, generate ------------------------------------------------------------------


@cache
def trained(name, folder):
    """Trains an adapter and saves it as `folder / name`; returns the losses, and the results of the trained model."""
    family = BY_NAME[name]
    model = build(family)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model = get_peft_model(model, config_of(family))
    given = with_labels(family, inputs(family))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, eps=1e-15)
    model.train()
    losses = []
    for _ in range(8):
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(folder / name)
    after = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters()}
    assert all(torch.equal(after[name], values) for name, values in before.items())
    assert {name for name, p in after.items() if p.requires_grad} == after.keys() - before.keys()
    assert all(".ntk_prefix.ntk_states.default." in name for name in after.keys() - before.keys())
    return losses, outputs(family, model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@all_families
def test_training(family, folder):
    losses, _ = trained(family.name, folder)
    assert losses[-1] < losses[0] - 0.01
    assert sorted(path.name for path in (folder / family.name).iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    names = load_file(folder / family.name / "adapter_model.safetensors").keys()
    assert all(".ntk_prefix.ntk_states." in name and "default" not in name for name in names)


def run(code, *args):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )


def test_a_fresh_process_gets_the_same_bits(folder):
    expected = {family.name: trained(family.name, folder)[1] for family in FAMILIES}
    torch.save({"threads": torch.get_num_threads()}, folder / "options.pt")
    result = run(
        """
import sys
from pathlib import Path
import torch
sys.path.insert(0, "tests")
import conftest
from peft import PeftModel
import ntk_kernels.integrations.peft
from model_cases import FAMILIES, build
from peft_cases import outputs
folder = Path(sys.argv[1])
torch.set_num_threads(torch.load(folder / "options.pt")["threads"])
results = {family.name: outputs(family, PeftModel.from_pretrained(build(family), folder / family.name))
           for family in FAMILIES}
torch.save(results, folder / "results.pt")
""",
        str(folder),
    )
    assert result.returncode == 0, result.stderr
    results = torch.load(folder / "results.pt")
    for family, name in itertools.product(results, ("logits", "tokens")):
        if name in expected[family]:
            assert torch.equal(results[family][name], expected[family][name]), (family, name)


def test_a_process_without_the_module_says_so(folder):
    trained("llama", folder)
    result = run(
        "import sys; from peft import PeftConfig; PeftConfig.from_pretrained(sys.argv[1])", str(folder / "llama")
    )
    assert result.stderr.splitlines()[-1] == "KeyError: 'NTK'"


def test_training_goes_on_after_loading(tmp_path):
    model = adapted(LLAMA)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path / "a", is_trainable=True)
    loaded.load_adapter(tmp_path / "b", "b", is_trainable=True)
    loaded.set_requires_grad("b")  # PEFT 0.18 leaves it to the user
    loaded(**with_labels(LLAMA, inputs(LLAMA)), adapter_names=["default", "b"]).loss.backward()
    assert all(p.grad.norm() > 0 for n, p in loaded.named_parameters() if ".ntk_states." in n)


# Started from real prefixes --------------------------------------------------------------------------------------


def converted(model, **options):
    """Returns the states of a real text in all modules."""
    tokens = torch.randint(3, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        layers = model(tokens, use_cache=True).past_key_values.layers
    return {
        name: prefix_to_state(layer.keys[0], layer.values[0], **options)
        for name, layer in zip(attention_shapes(model), layers, strict=True)
    }


@pytest.mark.parametrize("options", [{}, {"centers": None}, {"feature_map": "elu"}], ids=str)
@some("llama", "gpt2", "qwen3")
def test_adapters_that_start_from_real_prefixes(family, options, tmp_path):
    given = inputs(family)
    states = converted(build(family, dtype=F64), **options)
    other = build(family, dtype=F64)
    attach_prefix(other, prefixes=states)
    expected = visible_logits(other, given)
    state = next(iter(states.values()))
    for exact in ({"positive": None, "scale_by_k": False}, {}):
        model = get_peft_model(build(family, dtype=F64), NTKConfig.of_state(state, **exact)).eval()
        model.init_from_states(states)
        ours = visible_logits(model, given)
        close(ours, expected)
        assert not exact or torch.equal(ours, expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(family, dtype=F64), tmp_path)
    assert torch.equal(visible_logits(loaded, given), ours)


def test_states_that_are_refused():
    states = converted(build(LLAMA))
    names = list(states)
    model = get_peft_model(build(LLAMA), NTKConfig.of_state(states[names[0]]))
    before = snapshot(model)
    more_heads = prefix_to_state(torch.randn(4, 20, 8), torch.randn(4, 20, 8))
    for given, error, message in (
        (list(states), TypeError, "`states` must be a mapping from names of modules to PrefixStates, got"),
        ({names[0]: states[names[0]]}, ValueError, f"the modules of the adapter, .*, got none for `{names[1]}`"),
        (states | {"lm_head": states[names[0]]}, ValueError, "the modules of the adapter, .*, got one for `lm_head`"),
        (states | {names[1]: more_heads}, ValueError, f"`states\\['{names[1]}'\\]` must have num_heads=2, as the adapter has, got 4"),
        (converted(build(LLAMA), feature_map="elu"), ValueError, "must have feature_map='taylor1', as the adapter has, got 'elu'"),
        (converted(build(LLAMA), centers=None), ValueError, "must have centers=1, as the adapter has, got None"),
        (states | {names[1]: None}, TypeError, "`state` must be a PrefixState, got NoneType"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            model.init_from_states(given)
    with pytest.raises(ValueError, match="`adapter_name` must be of the NTK adapters that the model has, .*, got 'b'"):
        model.init_from_states(states, "b")
    assert snapshot(model) == before
    with pytest.raises(TypeError, match="`state` must be a PrefixState, got dict"):
        NTKConfig.of_state(states)
    with pytest.raises(ValueError, match="`state` must be a single state, got a stack of 2"):
        NTKConfig.of_state(PrefixState.stack([states[names[0]]] * 2))


# Dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_adapters_of_a_bfloat16_model_are_float32(tmp_path, low_cpu_mem_usage):
    given = inputs(LLAMA)
    model = adapted(LLAMA, dtype=torch.bfloat16)
    expected = visible_logits(model, given)
    assert expected.dtype == torch.bfloat16

    def dtypes(model):
        return {p.dtype for n, p in model.named_parameters() if ".ntk_states." in n}

    assert dtypes(model) == {torch.float32}
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "a/adapter_model.safetensors").values()} == {torch.float32}
    loaded = PeftModel.from_pretrained(
        build(LLAMA, dtype=torch.bfloat16), tmp_path / "a", adapter_name="a", low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert dtypes(loaded) == {torch.float32}
    assert torch.equal(visible_logits(loaded, given), expected)
    assert dtypes(model.to(torch.bfloat16)) == {torch.float32}
    assert torch.equal(visible_logits(model, given), expected)


def test_adapters_of_a_float64_model_are_float64(tmp_path):
    model = adapted(LLAMA, dtype=torch.float64)
    expected = visible_logits(model, inputs(LLAMA))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(LLAMA, dtype=torch.float64), tmp_path / "a")
    assert {p.dtype for n, p in loaded.named_parameters()} == {torch.float64}
    assert torch.equal(visible_logits(loaded, inputs(LLAMA)), expected)
