"""Generation with prefixes in transformers models: caches, beams."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from model_cases import (
    BY_NAME,
    GENERATING,
    VOCABULARY,
    attach,
    build,
    check_logits,
    generated,
    inputs,
    no_softcap,
    randomise,
    sharpened,
    some,
    visible_logits,
)
from oracle import F64, close

from ntk_kernels import ntk_attention_decode
from ntk_kernels.integrations.transformers import attach_prefix, attention_interface

pytestmark = no_softcap


@pytest.mark.parametrize("family", GENERATING, ids=lambda family: family.name)
def test_generation_with_a_cache_is_generation_without(family):
    """Greedy search and beams, with left padding where there is a mask, give what recomputing the whole sequence
    gives."""
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
    """`ntk_attention_decode` serves a token if nothing is hidden and nothing is to be differentiated."""
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
    """There are more queries than one against more keys than queries, without a padding mask."""
    model = build(family)
    randomise(attach(family, model))
    given = inputs(family)
    ids = given["input_ids"]
    with torch.no_grad():
        first = model(ids[:, :5], use_cache=True)
        second = model(ids[:, 5:], past_key_values=first.past_key_values)
    pieces = torch.cat([first.logits, second.logits], dim=1)
    check_logits(model, given, pieces=pieces)


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
    model = sharpened(transformers.Gemma4ForCausalLM(config)).to(F64).eval()
    given, static = inputs(BY_NAME["llama"]), {"cache_implementation": "static", "disable_compile": True}

    def logits():
        steps = generated(model, given, **static, max_new_tokens=2, output_logits=True, return_dict_in_generate=True)
        return visible_logits(model, given | {"logits_to_keep": 4}), *steps.logits

    plain = logits()
    attach_prefix(model, init_mass=1e-30)  # next to nothing
    for ours, expected in zip(logits(), plain, strict=True):
        close(ours.double(), expected.double())  # those of a step are rounded to float32
