"""Floating-point operations of the ops, for `torch.utils.flop_counter`. Tensors come as their shapes."""

import math

from .feature_maps import feature_dim
from .inputs import DecodeInputs, Inputs, SumInputs


def of_attention(inputs: Inputs, over_head_dim: int = 1, over_value_dim: int = 1) -> int:
    """Operations of so many products over D and over Dv, as if each packed sequence had the longest one's keys."""
    keys = inputs.key[-2] if inputs.cu_seqlens_q is None else inputs.max_seqlen_k
    return _of_products(inputs, keys, inputs.value[-1], over_head_dim, over_value_dim)


def of_attention_backward(inputs: Inputs) -> int:
    return of_attention(inputs, 3, 2)


def of_decode(inputs: DecodeInputs) -> int:
    """Operations as if every cache were full."""
    pages = 1 if inputs.block_table is None else inputs.block_table[1]
    return _of_products(inputs, inputs.key_cache[2] * pages, inputs.value_cache[3], 1, 1)


def of_sums(inputs: SumInputs, products: int = 1) -> int:
    """Operations of so many products of the features, and of one that finds the nearest centres."""
    heads, rows, head_dim = inputs.keys
    per_row = products * feature_dim(inputs.feature_map, head_dim) * (inputs.values[2] + 1)
    if inputs.centers is not None and inputs.centers[1] > 1:
        per_row += inputs.centers[1] * head_dim
    return 2 * heads * rows * per_row


def of_sums_backward(inputs: SumInputs) -> int:
    return of_sums(inputs, 2)


def _of_products(
    inputs: Inputs | DecodeInputs, keys: int, value_dim: int, over_head_dim: int, over_value_dim: int
) -> int:
    """Every row counts `keys` keys, hidden ones too, as in the formula of scaled_dot_product_attention."""
    *rows, head_dim = inputs.query
    state = inputs.state
    num_centers = 1 if state.centers is None else state.centers[-2]
    if state.row_keys is not None:
        keys += state.row_keys[-2]
    per_row = keys * (over_head_dim * head_dim + over_value_dim * value_dim)
    if state.k is not None:
        columns = state.z[-1] + 1
        if state.z_b is not None:
            per_row += over_value_dim * num_centers * state.z_b[-2] * value_dim
        per_row += over_value_dim * num_centers * state.k[-1] * columns
    if state.centers is not None:
        per_row += over_head_dim * num_centers * head_dim
    return 2 * math.prod(rows) * per_row
