"""Models with adapters, for the tests of NTK-Attention as a PEFT method."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from model_cases import BY_NAME, build, inputs, no_softcap, visible_logits
from peft import LoraConfig, PeftModel, get_peft_model

from ntk_kernels.integrations.peft import NTKConfig, NTKLayer

# Warnings of PEFT and transformers in tests.
quiet = [
    no_softcap,
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),  # PEFT, of models without a name
    pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained in the prefix"),  # harmless here
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:(You are trying to modify a model|Already found a `peft_config`)"),  # meant
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
LLAMA = BY_NAME["llama"]
TASKS = {"decoder": "CAUSAL_LM", "text_to_text": "SEQ_2_SEQ_LM"}


def config_of(family, **options):
    """Returns an adapter for the modules that most tests of a family use, with mass enough to be seen."""
    options = {"rank": 3, "init_mass": 0.1, "task_type": TASKS.get(family.kind)} | options
    return NTKConfig(target_modules=rf".*{family.attention}", **options)


def randomise(model, name, seed=3):
    """Gives an adapter about as much mass as the tokens have."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".ntk_states.{name}." in key:
                parameter.normal_(std=0.5, generator=generator)
    return model


def adapted(family, configs=None, dtype=torch.float32, **options):
    """Returns a model with random adapters, "a" and "b" or those of `configs`; the first is active."""
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
    """Returns names, values and trainability of all parameters, the modules, and the attention implementations."""
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


def by_adapter(model, names, function):
    """Returns row i of the result of `function` with adapter `names[i]` alone."""
    rows = []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(function()[i])
        else:
            model.set_adapter(name)
            rows.append(function()[i])
    return rows


def lora():
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


def outputs(family, model):
    model.eval()
    given = inputs(family, padding="left" if family.kind == "decoder" else None)
    result = {"logits": visible_logits(model, given)}
    if family.kind not in ("encoder", "image"):
        given.pop("decoder_input_ids", None)
        result["tokens"] = model.generate(**given, max_new_tokens=6, do_sample=False)
    return result
