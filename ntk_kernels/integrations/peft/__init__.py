"""NTK-Attention as a method of PEFT, laid out as PEFT's own tuners are: config, layer, model.

Importing this module registers the method "NTK" with PEFT, whose functions then work with it as with any other:

    from peft import PeftModel, get_peft_model

    from ntk_kernels.integrations.peft import NTKConfig

    model = get_peft_model(model, NTKConfig(feature_map="elu", rank=8, task_type="CAUSAL_LM"))
    model.save_pretrained("adapter")
    model = PeftModel.from_pretrained(base_model, "adapter")

Every process that loads such an adapter has to import this module, otherwise PEFT raises KeyError: 'NTK'.
"""

try:
    import peft  # noqa: F401
except ImportError as error:
    raise ImportError(
        "ntk_kernels.integrations.peft needs peft (0.18 or later): pip install 'ntk-kernels[peft]'"
    ) from error

from peft.utils import register_peft_method

from .config import NTKConfig
from .layer import NTKLayer
from .model import NTKModel

__all__ = ["NTKConfig", "NTKLayer", "NTKModel"]

register_peft_method(name="ntk", config_cls=NTKConfig, model_cls=NTKModel, prefix=NTKModel.prefix)
