"""The terms of a state: by the reference, ψ·Z is its numerator and ψ·k its mass."""

import pytest
import torch
from cases import F64
from state_cases import a_state

from ntk_kernels import reference
from ntk_kernels.conversion.terms import Terms

STATES = {
    "elu": {},
    "taylor2": {"feature_map": "taylor2", "log_scale": True},
    "taylor1, mass below 0": {"feature_map": "taylor1", "mass": "mixed"},
    "centre": {"centers": 1},
    "centres": {"feature_map": "taylor1", "centers": 3, "log_scale": True},
    "low rank": {"rank": 2},
    "rows": {"feature_map": None, "rows": 3},
    "rows without bias": {"feature_map": None, "rows": 3, "bias": False},
    "all parts": {"feature_map": "taylor1", "centers": 2, "rank": 2, "rows": 3, "log_scale": True, "mass": "mixed"},
}


@pytest.mark.parametrize("recipe", STATES.values(), ids=STATES)
def test_numerator_and_mass_are_those_of_the_reference(recipe):
    """Beside a key of logit 0 and value 0, out is N / (1 + M), and lse is log(1 + M)."""
    if recipe.get("feature_map", "elu") is not None:
        recipe = recipe | {"feature_scale": 0.7}
    state, scale = a_state(**recipe, dtype=F64), 0.6
    query = torch.randn(2, 9, 4, dtype=F64)
    key, value = (torch.zeros(1, 2, 1, dim, dtype=F64) for dim in (4, 6))
    out, lse = reference.ntk_attention(query[None], key, value, state, scale=scale, return_lse=True)
    terms, z, k = Terms.of_state(state, scale)
    logits = terms.logits(query)
    weights = terms.weights(query, logits)
    torch.testing.assert_close(weights @ z, (out * lse.exp()[..., None])[0])
    torch.testing.assert_close(terms.mass(weights, k[:, None]).squeeze(1), lse[0].expm1())
    for head in range(2):
        alone = terms.of_head(head)
        assert alone.num_rows == terms.num_rows
        torch.testing.assert_close(alone.logits(query[head]), logits[head])
        torch.testing.assert_close(alone.weights(query[head], logits[head]), weights[head])


def test_terms_of_a_float32_state_are_float64():
    _, *tensors = Terms.of_state(a_state(rows=2, rank=2, bias=False), 0.6)
    assert {tensor.dtype for tensor in tensors} == {F64}
