"""Small states for tests of states, and their numerators and masses."""

import torch
from cases import make_state

from ntk_kernels import ntk_attention


def a_state(seed=0, **recipe):
    recipe = {"heads": 2, "head_dim": 4, "value_dim": 6} | recipe
    return make_state(torch.Generator().manual_seed(seed), **recipe)


def numerator_and_mass(state, query):
    """Returns N and M of a state: without other keys its attention is N/M, and lse is log M."""
    nothing = query.new_zeros(query.shape[0], state.num_heads, 0, state.head_dim)
    out, lse = ntk_attention(
        query, nothing, query.new_zeros(*nothing.shape[:3], state.value_dim), state, return_lse=True
    )
    return out * lse.exp()[..., None], lse.exp()
