"""Several adapters of a PEFT model: batches that mix them, and adapters that are active together."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers
from model_cases import BATCH, IMAGE, all_families, build, inputs, llava, some, visible_logits, with_labels
from oracle import F64, close
from peft import get_peft_model
from peft_cases import LLAMA, adapted, by_adapter, config_of, prefixes_of, quiet, randomise
from torch._dynamo.testing import CompileCounter

from ntk_kernels import NTKPrefix
from ntk_kernels.integrations.peft import NTKConfig
from ntk_kernels.integrations.transformers import attach_prefix, attention_interface

pytestmark = quiet


@pytest.mark.parametrize("names", [["b", "a"], ["a", "__base__"], ["a", "a"], ["__base__", "__base__"]], ids="-".join)
@all_families
def test_a_mixed_batch_gives_each_row_its_adapter(family, names):
    model, given = adapted(family, dtype=F64), inputs(family, F64)
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
    """Rows keep their adapters with caches, beams, padding and an encoder, whose batch has no beams."""
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
    without = transformers.GenerationConfig(max_new_tokens=4, pad_token_id=0)  # beams are those of the model
    ours = model.generate(**inputs(LLAMA), adapter_names=["a", "b"], generation_config=without)
    assert torch.equal(ours, expected)
    model.generate(**inputs(LLAMA), adapter_names=["a", "b"], generation_config=without, num_beams=1)


def test_rows_of_images_are_not_rows_of_prompts():
    """The first prompt has two images, the second none."""
    prompts = torch.tensor([[*IMAGE, 5, *IMAGE, 6], [*range(3, 13)]])
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=F64)

    def adapted_llava(pattern):
        config = NTKConfig(target_modules=pattern, rank=3, init_mass=0.1)
        model = get_peft_model(llava().to(F64), config, adapter_name="a")
        model.add_adapter("b", config)
        return randomise(randomise(model, "a", 0), "b", 1).eval()

    given = {"input_ids": prompts, "pixel_values": images}
    model = adapted_llava(None)
    for names in (["a", "b"], ["b", "__base__"]):
        with pytest.raises(
            ValueError, match=f"`adapter_names` must name a single adapter, or .*; got '{names[0]}' with `.*vision"
        ):
            model(**given, adapter_names=names)
    close(model(**given, adapter_names=["a", "a"]).logits, model(**given).logits)
    model = adapted_llava(r".*language_model.*")
    expected = by_adapter(model, ["a", "b"], lambda: model(**given).logits)
    for row, other in zip(model(**given, adapter_names=["a", "b"]).logits, expected, strict=True):
        close(row, other)


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
    configs = {name: config_of(LLAMA, **options) for name, options in zip("ab", pair, strict=True)}
    model = adapted(LLAMA, configs, dtype=F64)
    given = inputs(LLAMA)
    expected = by_adapter(model, ["b", "a"], lambda: model(**given).logits)
    for row, other in zip(model(**given, adapter_names=["b", "a"]).logits, expected, strict=True):
        close(row, other)


def test_adapters_of_different_layers_in_one_batch():
    configs = {"a": config_of(LLAMA, layers_to_transform=0), "b": config_of(LLAMA, layers_to_transform=[1])}
    model, given = adapted(LLAMA, configs, dtype=F64), inputs(LLAMA)
    expected = by_adapter(model, ["b", "a"], lambda: model(**given).logits)
    for row, other in zip(model(**given, adapter_names=["b", "a"]).logits, expected, strict=True):
        close(row, other)


@pytest.mark.parametrize("reentrant", [None, False, True])
@some("llama", "gpt2", "bert")
def test_training_on_mixed_batches(family, reentrant):
    """Each adapter gets the gradient of its rows, even if checkpointed blocks are recomputed after other forwards."""
    model, given = adapted(family, dtype=F64), inputs(family)
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
    assert len(checkpoints) == 0 if reentrant is None else len(set(checkpoints)) == 1  # the same as before


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_one_adapter(reentrant):
    model, given = adapted(LLAMA, dtype=F64), with_labels(LLAMA, inputs(LLAMA))
    model(**given).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model = build(LLAMA, dtype=F64)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model = randomise(get_peft_model(model, config_of(LLAMA), adapter_name="a"), "a", 0)
    model.train()
    model(**given).loss.backward()
    for name, gradient in expected.items():
        close(model.get_parameter(name).grad, gradient)


def test_compiled_with_mixed_batches():
    """One graph serves other rows of the same adapters."""
    model, given = adapted(LLAMA, dtype=F64), inputs(LLAMA) | {"use_cache": False}
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
    configs = {name: config_of(LLAMA, **options) for name, options in zip("ab", pair, strict=True)}
    model = adapted(LLAMA, configs, dtype=F64)
    model.base_model.set_adapter(["a", "b"])
    prefixes = [prefixes_of(model, name) for name in "ab"]
    both = {name: prefix().merge(prefixes[1][name]()) for name, prefix in prefixes[0].items()}
    other = build(LLAMA, dtype=F64)
    attach_prefix(other, prefixes=both)
    given = inputs(LLAMA)
    close(visible_logits(model, given), visible_logits(other, given))
    model(**with_labels(LLAMA, given)).loss.backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for n, p in model.named_parameters() if ".ntk_states." in n)


def test_rows_of_active_adapters_are_the_tokens_of_two_prefixes():
    """By the definition, attention is a softmax over the rows of both adapters and the tokens."""
    rows = {"feature_map": None, "rank": None, "num_rows": 2}
    model = adapted(LLAMA, {"a": config_of(LLAMA, **rows), "b": config_of(LLAMA, **rows)}, dtype=F64)
    model.base_model.set_adapter(["a", "b"])
    own = build(LLAMA, "definition64", F64)
    prefixes = [prefixes_of(model, name) for name in "ab"]
    for name, prefix in prefixes[0].items():
        joined = NTKPrefix(2, 8, None, num_rows=4, dtype=F64)
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
        "the adapters 'a' and 'e' must have no centers to be active together, as several go with 'taylor1' only, got centers=None and 1 with 'elu'",
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
