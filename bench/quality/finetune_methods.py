"""The methods that `bench finetune` compares, with what each trains and starts from."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ntk_kernels import FEATURE_MAPS, PrefixState, feature_dim, prefix_to_state

WHOLE = "whole"  # the size of a Z that is not a product of two matrices, and of the model itself
_TASK = "CAUSAL_LM"


@dataclass(frozen=True)
class Method:
    """A way to fine-tune: `build(model, size, start)` adds to `model` what is trained.

    `start(model, size, text)` makes the start from text; without it, the method starts as it does by default. `counts`
    names the unit of the size, such as rows; without a fixed `size`, the budget decides.
    """

    name: str
    build: Callable
    rates: tuple[float, ...]
    counts: str | None = None
    start: Callable | None = None
    size: int | str | None = None
    ours: bool = False  # must work; others may fail

    @property
    def eps(self) -> float:
        """Adam's eps. Gradients of our fresh prefixes are smaller than its default (see `NTKPrefix`)."""
        return 1e-15 if self.ours else 1e-8


def _ntk(counts: str, **options) -> Callable:
    """Returns the build function of our PEFT method, which starts from states or from a small mass."""

    def build(model, size, start):
        from peft import get_peft_model

        from ntk_kernels.integrations.peft import NTKConfig

        of_size = {} if size == WHOLE else {counts: size}
        model = get_peft_model(model, NTKConfig(**options, **of_size, task_type=_TASK))
        if start is not None:
            model.base_model.init_from_states(start)
        return model

    return build


def _rows_of_text(model, size, text) -> dict[str, PrefixState]:
    """Returns, for each layer, the keys and values of text just before the input as rows."""
    cache = _cache_of(model, text.flatten()[:size], -size)
    return _by_module(model, (PrefixState(keys=layer.keys[0], values=layer.values[0]) for layer in cache.layers))


def _rows_fitted_to_text(model, size, text) -> dict[str, PrefixState]:
    """Returns rows fitted to replace the keys and values of `_LONG` sequences for the text that follows them."""
    from ntk_kernels.integrations.transformers import prompt_to_states

    prefix, following = text[:_LONG].flatten(), text[_LONG : _LONG + _FITTED_ON]
    return prompt_to_states(model, prefix, following, num_rows=size, progress=False)


def _features_of_text(feature_map: str) -> Callable:
    """Returns a start from text just before the input: the first token, an attention sink, as a row, the others in Z
    and k.

    The rank of such a Z is at most the number of tokens, so there are as many tokens as the rank (D for a full Z).
    """

    def start(model, size, text) -> dict[str, PrefixState]:
        taken = _head_dim(model.config) if size == WHOLE else size
        cache = _cache_of(model, text.flatten()[: 1 + taken], -1 - taken)
        return _by_module(model, (state_of(layer.keys[0], layer.values[0], size) for layer in cache.layers))

    def state_of(key, value, size) -> PrefixState:
        state = prefix_to_state(key[:, 1:], value[:, 1:], feature_map, centers="mean")
        state = replace(state, feature_scale=None)  # sqrt(scale), as it was
        state = state if size == WHOLE else _factored(state, size)
        return state.merge(PrefixState(keys=key[:, :1], values=value[:, :1]))

    return start


def _by_module(model, states) -> dict[str, PrefixState]:
    from ntk_kernels.integrations.transformers import attention_shapes

    return dict(zip(attention_shapes(model), states, strict=True))


def _factored(state: PrefixState, rank: int) -> PrefixState:
    """Replaces Z by the closest product of two matrices of that rank."""
    u, s, v = torch.linalg.svd(state.z, full_matrices=False)
    root = s[..., :rank].sqrt()
    return replace(state, z=None, z_a=u[..., :rank] * root[..., None, :], z_b=root[..., None] * v[..., :rank, :])


def _prefix_tuning(model, size, start):
    """Builds PEFT's prefix tuning, which starts from keys and values or, by default, at random."""
    from peft import PrefixTuningConfig, get_peft_model, initialize_kv_prefix_from_past_key_values

    model = get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=size, task_type=_TASK))
    if start is not None:
        initialize_kv_prefix_from_past_key_values(model, past_key_values=start)
    return model


def _past_of_text(model, size, text) -> list[tuple[Tensor, Tensor]]:
    """Returns keys and values of text at positions from 0 on: in PEFT the input's positions follow the prefix's."""
    return [(layer.keys, layer.values) for layer in _cache_of(model, text.flatten()[:size], 0).layers]


def _lora(model, size, start):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=size, target_modules=["q_proj", "v_proj"], task_type=_TASK))


def _whole_model(model, size, start):
    return copy.deepcopy(model).requires_grad_(True)  # a copy, since the other methods share the parameters


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _cache_of(model, tokens: Tensor, start: int):
    """Returns keys and values of all layers; the first token is at position `start`."""
    positions = torch.arange(start, start + len(tokens), device=tokens.device)
    with torch.no_grad():
        return model(input_ids=tokens[None], position_ids=positions[None], use_cache=True).past_key_values


# The default of 1e-6 does not grow to where it matters in a few dozen steps.
_MASS = 0.1
_LONG, _FITTED_ON = 4, 32  # sequences that fitted rows replace, and sequences of calibration
_rows = _ntk("num_rows", feature_map=None, init_mass=_MASS)
_beside_row = {"centers": 1, "log_scale": True, "num_rows": 1}
_taylor1_and_row = _ntk("rank", feature_map="taylor1", **_beside_row)
METHODS = {
    "ntk-elu": Method("NTK, elu", _ntk("rank", feature_map="elu", init_mass=_MASS), (0.03, 0.1, 0.3), "rank",
                      ours=True),
    "ntk-taylor1": Method("NTK, taylor1", _ntk("rank", feature_map="taylor1", init_mass=_MASS), (3e-3, 0.01, 0.03),
                          "rank", ours=True),
    "ntk-rows": Method("NTK, rows", _rows, (0.1, 0.3, 1.0), "rows", ours=True),
    "ntk-rows-text": Method("NTK, rows, from text", _rows, (0.01, 0.03, 0.1), "rows", _rows_of_text, ours=True),
    "ntk-rows-fitted": Method("NTK, rows, fitted to text", _rows, (0.01, 0.03, 0.1), "rows", _rows_fitted_to_text,
                              ours=True),
    "ntk-taylor1-text": Method("NTK, taylor1 and a row, from text", _taylor1_and_row, (3e-3, 0.01, 0.03), "rank",
                               _features_of_text("taylor1"), ours=True),
    "prefix": Method("prefix tuning (PEFT)", _prefix_tuning, (0.01, 0.03, 0.1), "virtual tokens"),
    "prefix-text": Method("prefix tuning (PEFT), from text", _prefix_tuning, (0.01, 0.03, 0.1), "virtual tokens",
                          _past_of_text),
    "lora": Method("LoRA (PEFT), query and value", _lora, (3e-3, 0.01, 0.03), "rank"),
    "full": Method("the whole model", _whole_model, (1e-4, 3e-4, 1e-3), size=WHOLE),
}  # fmt: skip


def ablation(config, ranks: list[int]) -> list[Method]:
    """Returns the feature maps by rank: `elu` from a small mass, polynomials from text and beside a row."""
    methods = []
    for feature_map in FEATURE_MAPS:
        like = METHODS["ntk-elu" if feature_map == "elu" else "ntk-taylor1-text"]
        options = {"init_mass": _MASS} if feature_map == "elu" else _beside_row
        start = None if feature_map == "elu" else _features_of_text(feature_map)
        r = feature_dim(feature_map, _head_dim(config))
        for size in (*ranks, WHOLE):
            name = f"{feature_map}, r = {r:,}, {'Z in full' if size == WHOLE else f's = {size}'}"
            build = _ntk("rank", feature_map=feature_map, **options)
            methods.append(Method(name, build, like.rates, "rank", start, size, ours=True))
    return methods
