"""`ntk_attention_forward` called as models call it: scales, masks, sinks, tasks, warnings, refusals."""

import math
import warnings

import pytest
import torch

pytest.importorskip("transformers")

from model_cases import BY_NAME, Tasks, build, inputs, no_softcap, randomise

from ntk_kernels import NTKPrefix, PrefixState, ntk_attention
from ntk_kernels.integrations.transformers import attach_prefix, attention_interface, ntk_attention_forward

pytestmark = no_softcap


@pytest.fixture(autouse=True)
def warn_again(monkeypatch):
    monkeypatch.setattr(attention_interface, "_warned", set())


def test_opt_scales_its_query_and_features_see_it_unscaled():
    """One state gives the same in a model that scales its query and in one that leaves it to attention."""
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
    """transformers means it like that: the rest of a static cache is not filled yet."""
    query, key, value = torch.randn(1, 4, 5, 8), torch.randn(1, 2, seq_k, 8), torch.randn(1, 2, seq_k, 8)
    module = torch.nn.Module()  # a module without `is_causal` is causal
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
    """T5's bias is added to the scores, with any mask."""
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
    """The gradients are right too; a row that sees nothing is 0, and gives its sink a gradient of 0."""
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


def test_a_row_that_sees_nothing_gives_zero():
    query, key, value = torch.randn(3, 2, 2, 5, 8, requires_grad=True).unbind()
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[0, :, 2] = False
    out, _ = ntk_attention_forward(torch.nn.Module(), query, key, value, mask)
    assert torch.equal(out[0, 2], torch.zeros(2, 8))
    assert torch.autograd.grad(out.sum(), query)[0].isfinite().all()


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
    with pytest.warns(UserWarning, match="with `output_attentions` a model returns `attentions` that are empty"):
        assert ntk_attention_forward(torch.nn.Module(), *query, None, output_attentions=True)[1] is None


@pytest.mark.parametrize("name", ["cache", "indices", "block_indices", "sinks", "head_mask"])
def test_what_would_be_computed_wrongly_is_refused(name):
    query = torch.randn(3, 1, 2, 5, 8)
    with pytest.raises(NotImplementedError, match=f"'ntk' does not support `{name}`, which Module gives it"):
        ntk_attention_forward(torch.nn.Module(), *query, None, **{name: object()})
    out, _ = ntk_attention_forward(torch.nn.Module(), *query, None, **{name: None}, anything_else=3)
    assert out.shape == (1, 5, 2, 8)
