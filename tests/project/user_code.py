"""Correct code of a user, in which a type checker must find no error: `test_types.py` checks it and runs `tensors`."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import assert_type

from ntk_kernels import (
    FEATURE_MAPS,
    ConversionReport,
    NTKPrefix,
    PrefixAccumulator,
    PrefixState,
    feature_dim,
    merge_attention,
    ntk_attention,
    ntk_attention_decode,
    ntk_attention_varlen,
    prefix_attention_state,
    prefix_to_state,
    reference,
)
from ntk_kernels.integrations.peft import NTKConfig
from ntk_kernels.integrations.transformers import (
    AttentionShape,
    attach_prefix,
    attached_prefixes,
    attention_shapes,
    detach_prefix,
    load_prefix,
    prompt_to_states,
    save_prefix,
)


def tensors(path: Path) -> None:
    """Every public function on tensors."""
    query, key, value = torch.randn(3, 2, 4, 32, 8).unbind()
    prefix_key, prefix_value = torch.randn(2, 4, 100, 8).unbind()
    assert_type(feature_dim(FEATURE_MAPS[1], 8), int)

    converted = prefix_to_state(prefix_key, prefix_value, "taylor1", centers=prefix_key[:, :2])
    assert_type(converted, PrefixState)
    fitted, report = prefix_to_state(prefix_key, prefix_value, num_rows=2, query=query, return_report=True)
    assert_type(fitted, PrefixState)
    if report is not None:
        assert_type(report.error, Tensor)
    accumulator = PrefixAccumulator(num_heads=4, head_dim=8, value_dim=8)
    state = accumulator.update(prefix_key, prefix_value).subtract(prefix_key[:, :9], prefix_value[:, :9]).state()
    assert_type(state, PrefixState)
    assert_type(accumulator.count, Tensor)

    out, lse = prefix_attention_state(query, state)
    assert_type(merge_attention(out, lse, out, lse), tuple[Tensor, Tensor])
    index = torch.tensor([1, -1])
    stack = PrefixState.stack([state, state.to(torch.float64).detach()])
    assert_type(prefix_attention_state(query, stack, state_index=index, backend="reference"), tuple[Tensor, Tensor])
    ntk_attention(query, key, value, stack, attn_mask=None, is_causal=True, window=(8, 0), state_index=index)
    ntk_attention_decode(query[:, :, -1:], key, value, torch.tensor([32, 9]), stack, state_index=index)
    packed = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    lengths = torch.tensor([0, 20, 32])
    ntk_attention_varlen(packed[0], packed[1], packed[2], lengths, lengths, 20, 20, state, is_causal=True)

    state.merge(state).save(path)
    assert_type(PrefixState.load(path, device="cpu"), PrefixState)
    assert_type(state.z, Tensor | None)
    prefix = NTKPrefix(num_heads=4, head_dim=8, feature_map="taylor1", rank=2, num_rows=1)
    assert_type(prefix.param_count(), int)
    ntk_attention(query, key, value, prefix(), is_causal=True)
    ntk_attention(query, key, value, NTKPrefix.from_state(state)(), scale=0.5)
    reference.ntk_attention(query, key, value, state)


def with_or_without_lse(query: Tensor, key: Tensor, value: Tensor, state: PrefixState, return_lse: bool) -> None:
    """The results of each attention function, by `return_lse`."""
    assert_type(ntk_attention(query, key, value, state), Tensor)
    assert_type(ntk_attention(query, key, value, state, return_lse=False), Tensor)
    assert_type(ntk_attention(query, key, value, state, return_lse=True), tuple[Tensor, Tensor])
    assert_type(ntk_attention(query, key, value, state, return_lse=return_lse), Tensor | tuple[Tensor, Tensor])
    assert_type(ntk_attention_decode(query, key, value), Tensor)
    assert_type(ntk_attention_decode(query, key, value, state=state, return_lse=True), tuple[Tensor, Tensor])
    assert_type(ntk_attention_decode(query, key, value, return_lse=return_lse), Tensor | tuple[Tensor, Tensor])
    lengths = torch.tensor([0, 2])
    assert_type(ntk_attention_varlen(query[0], key[0], value[0], lengths, lengths, 2, 2), Tensor)
    packed = ntk_attention_varlen(query[0], key[0], value[0], lengths, lengths, 2, 2, state, return_lse=True)
    assert_type(packed, tuple[Tensor, Tensor])


def models(model: PreTrainedModel, prompt: Tensor, texts: list[Tensor], path: Path) -> NTKConfig:
    """The integrations; docs/transformers.md and docs/peft.md, whose examples are run, show them at work."""
    assert_type(attention_shapes(model, modules=r"layers\.0\."), dict[str, AttentionShape])
    assert_type(attach_prefix(model, "elu", rank=8, init_mass=0.1), dict[str, NTKPrefix])
    save_prefix(model, path)
    assert_type(detach_prefix(model), dict[str, NTKPrefix])
    load_prefix(model, str(path))
    assert_type(attached_prefixes(model), dict[str, NTKPrefix])
    states = prompt_to_states(model, prompt, texts, num_rows=16, progress=False)
    assert_type(states, dict[str, PrefixState])
    states, reports = prompt_to_states(model, prompt, texts, return_report=True)
    assert_type(reports, dict[str, ConversionReport])
    attach_prefix(model, prefixes=states)
    return NTKConfig(feature_map="elu", rank=8, target_modules=["self_attn"])
