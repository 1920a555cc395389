"""NTK-Attention in plain PyTorch: the definition that every backend is tested against.

Nothing here is fast. It runs in the dtype of its inputs (float64 included), materialises every score and can be
differentiated by autograd any number of times. It is installed as ``ntk_kernels.reference``.
"""

from .attention import ntk_attention, ntk_attention_decode, ntk_attention_varlen, prefix_attention
from .convert import prefix_to_state, sum_features
from .feature_maps import elu, feature_map, taylor1, taylor2

__all__ = [
    "elu",
    "feature_map",
    "ntk_attention",
    "ntk_attention_decode",
    "ntk_attention_varlen",
    "prefix_attention",
    "prefix_to_state",
    "sum_features",
    "taylor1",
    "taylor2",
]
