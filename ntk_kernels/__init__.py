"""NTK-Attention: attention with an infinitely long learned prefix (arXiv 2406.14036).

A prefix of any length is converted to, or trained as, a `PrefixState` of fixed size:

    from ntk_kernels import ntk_attention, prefix_to_state

    attention = ntk_attention(query, key, value, is_causal=True, return_lse=True)
    state = prefix_to_state(prefix_key, prefix_value, query=query, attention=attention)
    out = ntk_attention(query, key, value, state, is_causal=True)
"""

from . import reference
from .attention import ntk_attention
from .conversion.accumulator import PrefixAccumulator
from .conversion.api import prefix_to_state
from .conversion.report import ConversionReport
from .decode import ntk_attention_decode
from .feature_maps import FEATURE_MAPS, feature_dim
from .merge import merge_attention, prefix_attention_state
from .state import PrefixState
from .trainable import NTKPrefix
from .varlen import ntk_attention_varlen

__version__ = "0.2.0"
__all__ = [
    "FEATURE_MAPS",
    "ConversionReport",
    "NTKPrefix",
    "PrefixAccumulator",
    "PrefixState",
    "feature_dim",
    "merge_attention",
    "ntk_attention",
    "ntk_attention_decode",
    "ntk_attention_varlen",
    "prefix_attention_state",
    "prefix_to_state",
    "reference",
]
