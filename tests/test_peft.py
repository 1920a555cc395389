"""NTK-Attention as a PEFT method: training, files, several adapters, mixed batches, LoRA beside it, refusals."""

import copy
import itertools
import json
import os
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import transformers
from model_cases import BATCH, BY_NAME, FAMILIES, VOCABULARY, build, inputs, visible_logits, with_labels
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter

from ntk_kernels import NTKPrefix, prefix_to_state
from ntk_kernels.integrations import attention_interface
from ntk_kernels.integrations.peft import NTKConfig, NTKLayer, NTKModel
from ntk_kernels.integrations.transformers import attach_prefix, attention_shapes

pytestmark = [
    pytest.mark.filterwarnings("ignore:ntk_kernels. the 'torch' backend does not support softcap"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),  # PEFT, of models without a name
    pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained in the prefix"),  # harmless here
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:(You are trying to modify a model|Already found a `peft_config`)"),  # meant
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
ROOT = Path(__file__).resolve().parent.parent
LLAMA = BY_NAME["llama"]
TASKS = {"decoder": "CAUSAL_LM", "text_to_text": "SEQ_2_SEQ_LM"}
all_families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def some(*names):
    return pytest.mark.parametrize(
        "family", [BY_NAME[n] for n in names if n in BY_NAME], ids=lambda family: family.name
    )


def config_of(family, **options):
    """An adapter in the modules that most tests of a family use, with mass enough to be seen."""
    options = {"rank": 3, "init_mass": 0.1, "task_type": TASKS.get(family.kind)} | options
    return NTKConfig(target_modules=rf".*{family.attention}", **options)


def randomise(model, name, seed=3):
    """An adapter of about as much mass as the tokens have."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".ntk_states.{name}." in key:
                parameter.normal_(std=0.5, generator=generator)
    return model


def adapted(family, configs=None, dtype=torch.float32, **options):
    """A model with random adapters, "a" and "b" or those of `configs`; the first is active."""
    configs = configs or {"a": config_of(family, **options), "b": config_of(family, **options)}
    model = build(family, dtype=dtype)
    for name, config in configs.items():
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
    for seed, name in enumerate(configs):
        randomise(model, name, seed)
    return model.eval()


def snapshot(model):
    """Names, values and trainability of all parameters, the modules, and the attention implementations."""
    parameters = {n: (p.detach().clone().numpy().tobytes(), p.requires_grad) for n, p in model.named_parameters()}
    modules = {name: type(module) for name, module in model.named_modules()}
    configs = {n: m.config._attn_implementation for n, m in model.named_modules() if hasattr(m, "config")}
    return parameters, modules, configs, hasattr(model, "peft_config")


def prefixes_of(model, name):
    return {
        key.removeprefix("base_model.model.").removesuffix(".ntk_prefix"): module.ntk_states[name]
        for key, module in model.named_modules()
        if isinstance(module, NTKLayer)
    }


# Train, save, load in another process, generate ------------------------------------------------------------------


def outputs(family, model):
    model.eval()
    given = inputs(family, padding="left" if family.kind == "decoder" else None)
    result = {"logits": visible_logits(model, given)}
    if family.kind not in ("encoder", "image"):
        given.pop("decoder_input_ids", None)
        result["tokens"] = model.generate(**given, max_new_tokens=6, do_sample=False)
    return result


@cache
def trained(name, folder):
    """Losses on the way, and the results of the adapter that `folder / name` then has."""
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
from test_peft import outputs
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


# Started from real prefixes --------------------------------------------------------------------------------------


def converted(model, **options):
    """States of a real text, of all modules."""
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
    states = converted(build(family), **options)
    other = build(family)
    attach_prefix(other, prefixes=states)
    expected = visible_logits(other, given)
    state = next(iter(states.values()))
    for exact in ({"positive": None, "scale_by_k": False}, {}):
        model = get_peft_model(build(family), NTKConfig.of_state(state, **exact)).eval()
        model.init_from_states(states)
        ours = visible_logits(model, given)
        assert torch.equal(ours, expected) if exact else (ours - expected).norm() < 1e-4 * expected.norm()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(family), tmp_path)
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


# Several adapters, mixed batches ---------------------------------------------------------------------------------


def by_adapter(model, names, function):
    """Row i of what `function` gives with adapter `names[i]` alone."""
    rows = []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(function()[i])
        else:
            model.set_adapter(name)
            rows.append(function()[i])
    return rows


def close(ours, expected):
    assert (ours - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("names", [["b", "a"], ["a", "__base__"], ["a", "a"], ["__base__", "__base__"]], ids="-".join)
@all_families
def test_a_mixed_batch_gives_each_row_its_adapter(family, names):
    model, given = adapted(family), inputs(family)
    expected = by_adapter(model, names, lambda: model(**given).logits)
    ours = model(**given, adapter_names=names).logits
    for row, other in zip(ours, expected, strict=True):
        close(row, other)


def test_a_mixed_batch_is_one_call_with_a_stack(monkeypatch):
    calls = []
    own = attention_interface.ntk_attention

    def recorded(query, key, value, state, *, state_index, **options):
        calls.append((query.shape[0], state.num_states, state_index.tolist()))
        return own(query, key, value, state, state_index=state_index, **options)

    monkeypatch.setattr(attention_interface, "ntk_attention", recorded)
    adapted(LLAMA)(input_ids=torch.ones(4, 5, dtype=torch.int64), adapter_names=["b", "__base__", "a", "b"])
    assert calls == [(4, 2, [1, -1, 0, 1])] * 2


GENERATIONS = [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}]


@pytest.mark.parametrize("options", GENERATIONS, ids=lambda options: "-".join(options) or "greedy")
@some("llama", "gpt2", "opt", "mistral", "gpt_oss", "whisper", "t5")
def test_generating_from_a_mixed_batch(family, options):
    """With caches, beams, padding and an encoder, whose batch has no beams."""
    model, given = adapted(family), inputs(family, padding="left" if family.kind == "decoder" else None)
    given.pop("decoder_input_ids", None)
    each = options.get("num_return_sequences", 1)

    def generate(**more):
        tokens = model.generate(**given, **options, **more, max_new_tokens=6, do_sample=False)
        return tokens.unflatten(0, (BATCH, each))

    for names in (["b", "a"], ["a", "__base__"]):
        expected = by_adapter(model, names, generate)
        ours = generate(adapter_names=names)
        for row, other in zip(ours, expected, strict=True):
            size = min(row.shape[-1], other.shape[-1])  # a batch is as long as its longest row
            assert torch.equal(row[..., :size], other[..., :size])


def test_beams_of_the_models_own_generation_config():
    model = adapted(LLAMA)
    given = inputs(LLAMA) | {"max_new_tokens": 4, "adapter_names": ["a", "b"]}
    expected = model.generate(**given, num_beams=2)
    model.get_base_model().generation_config.num_beams = 2
    assert torch.equal(model.generate(**given), expected)
    config = transformers.GenerationConfig(num_beams=3, max_new_tokens=4, pad_token_id=0)
    model.generate(**inputs(LLAMA), adapter_names=["a", "b"], generation_config=config)


DIFFERENT = [
    ({}, {"rank": None}),
    ({}, {"rank": 5}),
    ({}, {"num_rows": 2}),
    ({"centers": 1}, {}),
    ({"log_scale": True}, {"positive": "exp", "scale_by_k": False}),
    ({"feature_map": "taylor1", "centers": 2}, {"feature_map": "taylor1", "num_rows": 3}),
    ({"feature_map": "taylor2", "rank": None}, {"feature_map": "taylor2"}),
    ({"feature_map": None, "rank": None, "num_rows": 1}, {"feature_map": None, "rank": None, "num_rows": 4}),
]


@pytest.mark.parametrize("pair", DIFFERENT, ids=str)
def test_adapters_of_different_shapes_in_one_batch(pair):
    model = adapted(LLAMA, {name: config_of(LLAMA, **options) for name, options in zip("ab", pair, strict=True)})
    given = inputs(LLAMA)
    expected = by_adapter(model, ["b", "a"], lambda: model(**given).logits)
    for row, other in zip(model(**given, adapter_names=["b", "a"]).logits, expected, strict=True):
        close(row, other)


def test_adapters_of_different_layers_in_one_batch():
    configs = {"a": config_of(LLAMA, layers_to_transform=0), "b": config_of(LLAMA, layers_to_transform=[1])}
    model, given = adapted(LLAMA, configs), inputs(LLAMA)
    expected = by_adapter(model, ["b", "a"], lambda: model(**given).logits)
    for row, other in zip(model(**given, adapter_names=["b", "a"]).logits, expected, strict=True):
        close(row, other)


@pytest.mark.parametrize("reentrant", [None, False, True])
@some("llama", "gpt2", "bert")
def test_training_on_mixed_batches(family, reentrant):
    """Each adapter gets the gradient of its rows, also where blocks are computed again, after other forwards."""
    model, given = adapted(family), inputs(family)
    batches = [["a", "b"], ["b", "b"], ["__base__", "a"]]

    def loss(row):
        return row.square().mean()

    for names in batches:
        for i, name in enumerate(names):
            if name != "__base__":
                model.set_adapter(name)
                loss(model(**given).logits[i]).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(expected) == 2 * 2 * 3
    model.zero_grad()
    model.train()
    model.set_requires_grad(["a", "b"])
    if reentrant is not None:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    sum(loss(row) for names in batches for row in model(**given, adapter_names=names).logits).backward()
    for name, gradient in expected.items():
        close(model.get_parameter(name).grad, gradient)
    checkpoints = [m._gradient_checkpointing_func for m in model.modules() if "_gradient_checkpointing_func" in vars(m)]
    assert len(checkpoints) == 0 if reentrant is None else len(set(checkpoints)) == 1  # as they were before


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_one_adapter(reentrant):
    model, given = adapted(LLAMA), with_labels(LLAMA, inputs(LLAMA))
    model(**given).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model = build(LLAMA)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model = randomise(get_peft_model(model, config_of(LLAMA), adapter_name="a"), "a", 0)
    model.train()
    model(**given).loss.backward()
    for name, gradient in expected.items():
        close(model.get_parameter(name).grad, gradient)


def test_compiled_with_mixed_batches():
    """In one graph, which serves other rows of the same adapters."""
    model, given = adapted(LLAMA), inputs(LLAMA) | {"use_cache": False}
    batches = [["b", "a"], ["a", "b"], ["a", "a"]]
    with torch.no_grad():
        expected = [model(**given, adapter_names=names).logits for names in batches]
        counter = CompileCounter()
        base = model.get_base_model()
        base.forward = torch.compile(base.forward, backend=counter, fullgraph=True)
        for names, logits, graphs in zip(batches, expected, (1, 1, 2), strict=True):
            close(model(**given, adapter_names=names).logits, logits)
            assert counter.frame_count == graphs


BATCHES = [
    (
        ["a", "c"],
        ValueError,
        r"`adapter_names` must be of the NTK adapters that the model has, \['a', 'b', 'd', 'e', 'f'\], got 'c'",
    ),
    (["a", "b", "a"], ValueError, "`adapter_names` must have a name for each of the 2 rows of the batch, got 3"),
    (["a"], ValueError, "`adapter_names` must have a name for each of the 2 rows of the batch, got 1"),
    ("a", TypeError, "`adapter_names` must be a list with a name for each row, got 'a'"),
    ([], TypeError, r"`adapter_names` must be a list with a name for each row, got \[\]"),
    (
        ["b", "d"],
        ValueError,
        "the adapters 'b' and 'd' must have the same feature_map to be in one batch, got 'elu' and 'taylor1'",
    ),
    (
        ["a", "e"],
        ValueError,
        "the adapters 'a' and 'e' must have the same feature_scale to be in one batch, got None and 0.5",
    ),
]


@pytest.mark.parametrize("names, error, message", BATCHES, ids=[str(row[0]) for row in BATCHES])
def test_batches_that_are_refused(names, error, message):
    others = {
        "d": config_of(LLAMA, feature_map="taylor1"),
        "e": config_of(LLAMA, feature_scale=0.5),
        "f": config_of(LLAMA, feature_map=None, rank=None, num_rows=1),
    }
    model = adapted(LLAMA, {"a": config_of(LLAMA), "b": config_of(LLAMA)} | others)
    expected = model(**inputs(LLAMA)).logits
    with pytest.raises(error, match=message):
        model(**inputs(LLAMA), adapter_names=names)
    assert torch.equal(model(**inputs(LLAMA)).logits, expected)


# Active together -------------------------------------------------------------------------------------------------

PAIRS = [
    ({}, {"rank": 2}),
    ({"rank": None}, {"num_rows": 2}),
    ({}, {"feature_map": None, "rank": None, "num_rows": 3}),
    ({"feature_map": "taylor1", "centers": 2}, {"feature_map": "taylor1"}),
    ({"feature_map": None, "rank": None, "num_rows": 1}, {"feature_map": None, "rank": None, "num_rows": 2}),
]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_active_adapters_act_as_one_prefix_after_the_other(pair):
    model = adapted(LLAMA, {name: config_of(LLAMA, **options) for name, options in zip("ab", pair, strict=True)})
    model.base_model.set_adapter(["a", "b"])
    prefixes = [prefixes_of(model, name) for name in "ab"]
    both = {name: prefix().merge(prefixes[1][name]()) for name, prefix in prefixes[0].items()}
    other = build(LLAMA)
    attach_prefix(other, prefixes=both)
    given = inputs(LLAMA)
    close(visible_logits(model, given), visible_logits(other, given))
    model(**with_labels(LLAMA, given)).loss.backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for n, p in model.named_parameters() if ".ntk_states." in n)


def test_rows_of_active_adapters_are_the_tokens_of_two_prefixes():
    """By the definition: softmax attention over the rows of both, and the tokens."""
    rows = {"feature_map": None, "rank": None, "num_rows": 2}
    model = adapted(LLAMA, {"a": config_of(LLAMA, **rows), "b": config_of(LLAMA, **rows)})
    model.base_model.set_adapter(["a", "b"])
    own = build(LLAMA, "definition32")
    prefixes = [prefixes_of(model, name) for name in "ab"]
    for name, prefix in prefixes[0].items():
        joined = NTKPrefix(2, 8, None, num_rows=4)
        with torch.no_grad():
            for key, parameter in joined.named_parameters():
                parameter.copy_(torch.cat([getattr(prefix, key), getattr(prefixes[1][name], key)], dim=1))
        own.get_submodule(name).ntk_prefix = joined
    close(visible_logits(model, inputs(LLAMA)), visible_logits(own, inputs(LLAMA)))


SETS = [
    (
        ["a", "d"],
        "the adapters 'a' and 'd' must have the same feature_map to be active together, got 'elu' and 'taylor1'",
    ),
    (
        ["a", "b", "e"],
        "the adapters 'a' and 'e' must have no centers, or feature_map='taylor1', to be active together, got centers=None and 1 with 'elu'",
    ),
    (["a", "c"], "`adapter_name` must be of the NTK adapters that the model has, .*, got 'c'"),
    ("c", "`adapter_name` must be of the NTK adapters that the model has, .*, got 'c'"),
]


@pytest.mark.parametrize("names, message", SETS, ids=[str(row[0]) for row in SETS])
def test_sets_that_are_refused(names, message):
    others = {"d": config_of(LLAMA, feature_map="taylor1"), "e": config_of(LLAMA, centers=1)}
    model = adapted(LLAMA, {"a": config_of(LLAMA), "b": config_of(LLAMA)} | others)
    with pytest.raises(ValueError, match=message):
        model.base_model.set_adapter(names)
    assert model.active_adapters == ["a"]


# Taking adapters out of use, and away ----------------------------------------------------------------------------


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
    assert not any(trained for _, trained in ours[0].values())  # as PEFT leaves it
    get_peft_model(base, config_of(family))


def test_deleting_adapters():
    model, given = adapted(LLAMA), inputs(LLAMA)
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
    close(visible_logits(model.base_model.model, given), visible_logits(build(LLAMA), given))


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused(merge):
    model = adapted(LLAMA)
    expected = visible_logits(model, inputs(LLAMA))
    with pytest.raises(ValueError, match="NTK adapters cannot be merged into the weights of a model: what a prefix"):
        getattr(model, merge)()
    assert torch.equal(visible_logits(model, inputs(LLAMA)), expected)


# Beside other things ---------------------------------------------------------------------------------------------


def lora():
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


def test_lora_beside_it(tmp_path):
    torch.manual_seed(0)
    given = inputs(LLAMA)
    model = get_peft_model(build(LLAMA), lora(), adapter_name="lora").eval()
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

    loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path / "lora", adapter_name="lora")
    loaded = PeftModel.from_pretrained(loaded.get_base_model(), tmp_path / "ntk", adapter_name="ntk")
    assert torch.equal(visible_logits(loaded, given), expected)
    model.unload()


def test_lora_put_after_it():
    given = inputs(LLAMA)
    torch.manual_seed(0)
    first = get_peft_model(build(LLAMA), lora(), adapter_name="lora")
    first = get_peft_model(first.get_base_model(), config_of(LLAMA), adapter_name="ntk")
    expected = visible_logits(randomise(first, "ntk").eval(), given)
    torch.manual_seed(0)
    model = randomise(get_peft_model(build(LLAMA), config_of(LLAMA), adapter_name="ntk"), "ntk").eval()
    alone = visible_logits(model, given)
    model = get_peft_model(model.get_base_model(), lora(), adapter_name="lora").eval()
    for name, parameter in first.named_parameters():
        if ".lora_" in name:
            model.get_parameter(name).data.copy_(parameter)
    assert torch.equal(visible_logits(model, given), expected)
    close(visible_logits(model.merge_and_unload(), given), expected)  # of LoRA; the prefixes stay
    assert not torch.equal(alone, expected)


def test_transformers_own_way_to_load_it(tmp_path):
    model = adapted(LLAMA, {"a": config_of(LLAMA)})
    model.save_pretrained(tmp_path)
    base = build(LLAMA)
    base.load_adapter(str(tmp_path / "a"))
    base.load_adapter(str(tmp_path / "a"), adapter_name="other")
    assert torch.equal(visible_logits(base, inputs(LLAMA)), visible_logits(model, inputs(LLAMA)))
    base.disable_adapters()
    close(visible_logits(base, inputs(LLAMA)), visible_logits(build(LLAMA), inputs(LLAMA)))


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
    with pytest.raises(ValueError, match="`target_modules` must match a name of"):
        get_peft_model(model.get_base_model(), NTKConfig(target_modules="nothing"), adapter_name="ntk")
    assert model.peft_config == {"default": config}
    assert snapshot(model) == expected


def test_a_classifier_with_its_head(tmp_path):
    if "bert" not in BY_NAME:
        pytest.skip("BERT has attention of its own in transformers 4")

    def base():
        torch.manual_seed(0)
        options = BY_NAME["bert"].options | {"num_labels": 3}
        return transformers.BertForSequenceClassification(transformers.BertConfig(**options)).eval()

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


def test_training_goes_on_after_loading(tmp_path):
    model = adapted(LLAMA)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path / "a", is_trainable=True)
    loaded.load_adapter(tmp_path / "b", "b", is_trainable=True)
    loaded.set_requires_grad("b")  # which PEFT 0.18 leaves to us
    loaded(**with_labels(LLAMA, inputs(LLAMA)), adapter_names=["default", "b"]).loss.backward()
    assert all(p.grad.norm() > 0 for n, p in loaded.named_parameters() if ".ntk_states." in n)


# What a configuration says ---------------------------------------------------------------------------------------

TARGETS = [
    ({}, ["model.layers.0.self_attn", "model.layers.1.self_attn"]),
    ({"target_modules": ["self_attn"]}, ["model.layers.0.self_attn", "model.layers.1.self_attn"]),
    ({"target_modules": ["layers.1.self_attn"]}, ["model.layers.1.self_attn"]),
    ({"target_modules": {"model.layers.1.self_attn"}}, ["model.layers.1.self_attn"]),
    ({"target_modules": r"model\.layers\.0\..*"}, ["model.layers.0.self_attn"]),
    ({"layers_to_transform": 1}, ["model.layers.1.self_attn"]),
    ({"layers_to_transform": [0], "target_modules": ["self_attn"]}, ["model.layers.0.self_attn"]),
]


@pytest.mark.parametrize("options, names", TARGETS, ids=str)
def test_targets(options, names, tmp_path):
    config = NTKConfig(**options)
    model = get_peft_model(build(LLAMA), config)
    assert list(prefixes_of(model, "default")) == names == list(model.peft_config["default"].shapes)
    assert config.shapes is None  # so that it may go to other models
    randomise(model, "default").save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(LLAMA), tmp_path)
    assert list(prefixes_of(loaded, "default")) == names
    assert torch.equal(visible_logits(loaded, inputs(LLAMA)), visible_logits(model.eval(), inputs(LLAMA)))


def test_many_layers():
    """From twenty on, PEFT shortens lists of targets."""
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
    ({"target_modules": "all-linear"}, "`target_modules` must match a name of .*, got 'all-linear'"),
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
    get_peft_model(model, NTKConfig())
    with pytest.raises(ValueError, match="`model.layers.0.self_attn` must have no attribute 'ntk_prefix' yet"):
        attach_prefix(model)


def test_a_second_adapter_by_get_peft_model():
    """Of another name, it joins the first, whichever PeftModel is asked."""
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
    """The files of an adapter, with other weights or configuration."""
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
