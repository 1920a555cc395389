"""NTK-Attention in the models of Hugging Face transformers.

Importing this module registers the attention implementation "ntk" with transformers: softmax attention by
`ntk_attention`, to which a module that has a child `ntk_prefix` adds a prefix. `attach_prefix` gives a model such
children:

    from ntk_kernels.integrations.transformers import attach_prefix, load_prefix, save_prefix

    prefixes = attach_prefix(model, "elu", rank=8)  # freezes the model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, eps=1e-15)

`prompt_to_states` converts a long prompt to states that `attach_prefix(model, prefixes=states)` takes.

Any child that is a `PrefixSource` will do. It is asked in each forward, so its answer may depend on the task at hand.
"""

from typing import TYPE_CHECKING, Any

try:
    from .attach import attach_prefix, attached_prefixes, detach_prefix
    from .attention_interface import PrefixSource, ntk_attention_forward
    from .attention_modules import AttentionShape, attention_shapes
    from .prefix_files import load_prefix, save_prefix
    from .prompt import prompt_to_states
except ImportError as error:
    raise ImportError(
        "ntk_kernels.integrations.transformers needs transformers (4.57 or later): "
        "pip install 'ntk-kernels[transformers]'"
    ) from error

if TYPE_CHECKING:
    from .trainer import SavePrefixCallback

__all__ = [
    "AttentionShape",
    "PrefixSource",
    "SavePrefixCallback",
    "attach_prefix",
    "attached_prefixes",
    "attention_shapes",
    "detach_prefix",
    "load_prefix",
    "ntk_attention_forward",
    "prompt_to_states",
    "save_prefix",
]


def __getattr__(name: str) -> Any:
    if name == "SavePrefixCallback":  # transformers' Trainer takes seconds to import
        from .trainer import SavePrefixCallback

        return SavePrefixCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
