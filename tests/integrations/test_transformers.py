"""The attention implementation "ntk" in transformers models: every family, padding, tasks."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from model_cases import (
    Tasks,
    all_families,
    attach,
    build,
    check_logits,
    generated,
    inputs,
    no_softcap,
    randomise,
    some,
    visible_logits,
    with_labels,
)

from ntk_kernels.integrations.transformers import attach_prefix

pytestmark = no_softcap


# The attention of every family -----------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, "left", "right"])
@all_families
def test_without_a_prefix_it_is_the_models_own_attention(family, padding):
    if padding and family.kind not in ("decoder", "encoder"):
        pytest.skip("takes no padding mask")
    given = inputs(family, padding=padding)
    model = build(family, "ntk")
    own = visible_logits(build(family), given)  # checked too: the definition has to be what the model does
    check_logits(model, given, own=own, ours=visible_logits(model, given))


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
    randomise(attach(family, model, **options))
    ours = visible_logits(model, given)
    assert (ours - before).norm() > 0.01 * before.norm()
    check_logits(model, given, ours=ours)


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
    ours = visible_logits(model, given)
    assert ours.dtype == torch.bfloat16
    check_logits(model, given, torch.bfloat16, ours=ours)
    model(**with_labels(family, given)).loss.backward()
    for prefix in prefixes.values():
        assert all(parameter.grad.dtype == torch.float32 for parameter in prefix.parameters())
    other = attach(family, build(family, dtype=torch.bfloat16))
    assert {parameter.dtype for prefix in other.values() for parameter in prefix.parameters()} == {torch.float32}


@some("llama", "gpt2", "deepseek_v3")
def test_autocast(family):
    """Rotated queries and keys come in float32 there, values in bfloat16 (a cache would make them float32)."""
    given = inputs(family) | {"use_cache": False}
    model = build(family)
    with torch.autocast("cpu", torch.bfloat16):
        own = visible_logits(model, given)
        prefixes = randomise(attach(family, model))
        ours = visible_logits(model, given)
        check_logits(model, given, torch.bfloat16, ours=ours)
        model(**with_labels(family, given)).loss.backward()
    assert ours.dtype == own.dtype
    for prefix in prefixes.values():
        assert all(parameter.grad.abs().sum() > 0 for parameter in prefix.parameters())


# Padding ---------------------------------------------------------------------------------------------------------


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


@some("llama", "gemma2", "gpt_oss", "gpt2", "opt", "bert", "esm")
def test_padding_does_not_spoil_valid_rows(family):
    """The first row gives the same alone, padded left and right, and beside a row that is all padding."""
    model = build(family)
    randomise(attach(family, model))
    ids = inputs(family)["input_ids"][:1, :6]
    with torch.no_grad():
        results = {"alone": model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits}
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
        results[side] = logits[:1, mask[0].bool()]
    check_logits(model, {"input_ids": ids}, **results)


# Tasks -----------------------------------------------------------------------------------------------------------


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
