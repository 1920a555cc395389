"""States combined: `merge` adds them up, `stack` puts them beside each other."""

import math

import pytest
import torch
from cases import F64
from state_cases import a_state, numerator_and_mass

from ntk_kernels import PrefixState, ntk_attention

MERGES = {
    "same_kind": ({}, {}),
    "log_scale": ({"log_scale": True}, {}),
    "low_rank": ({"rank": 2}, {"rank": 3}),
    "low_rank_and_full": ({"rank": 2}, {}),
    "low_rank_log_scale": ({"rank": 2, "log_scale": True}, {"rank": 1, "log_scale": True}),
    "other_centres": ({"feature_map": "taylor1", "centers": 2}, {"feature_map": "taylor1", "centers": 3}),
    "centres_and_none": ({"feature_map": "taylor1", "centers": 2, "log_scale": True}, {"feature_map": "taylor1"}),
    "centres_low_rank": ({"feature_map": "taylor1", "centers": 2, "rank": 2},
                         {"feature_map": "taylor1", "centers": 1, "rank": 2}),
    "rows": ({"rows": 2}, {"rows": 3, "bias": False}),
    "rows_on_one_side": ({"rows": 2}, {}),
    "rows_only_with_features": ({"feature_map": None, "rows": 2}, {"feature_map": "taylor2"}),
}  # fmt: skip


@pytest.mark.parametrize("recipes", MERGES.values(), ids=MERGES)
def test_merge_adds(recipes):
    one, other = (a_state(seed, dtype=F64, **recipe) for seed, recipe in enumerate(recipes))
    query = torch.randn(1, 2, 9, 4, dtype=F64)
    n_1, m_1 = numerator_and_mass(one, query)
    n_2, m_2 = numerator_and_mass(other, query)
    n, m = numerator_and_mass(one.merge(other), query)
    torch.testing.assert_close(n, n_1 + n_2)
    torch.testing.assert_close(m, m_1 + m_2)


def test_merge_around_the_same_centre_keeps_its_size():
    state = a_state(feature_map="taylor2", centers=1, log_scale=True, dtype=F64)
    twice = state.merge(state)
    assert twice.num_centers == 1
    torch.testing.assert_close(twice.z, 2 * state.z * 0.5)
    torch.testing.assert_close(twice.log_scale, state.log_scale + math.log(2))


def test_merge_of_stacks():
    one, other = (a_state(seed, stack=3, feature_map="taylor1", centers=seed + 1, dtype=F64) for seed in (0, 1))
    both = one.merge(other)
    assert (both.num_states, both.num_centers) == (3, 3)
    query, nothing = torch.randn(3, 2, 9, 4, dtype=F64), torch.zeros(3, 2, 0, 4, dtype=F64)
    lse = [
        ntk_attention(query, nothing, torch.zeros(3, 2, 0, 6, dtype=F64), state, state_index=torch.tensor([2, 0, 1]),
                      return_lse=True)[1]
        for state in (one, other, both)
    ]  # fmt: skip
    torch.testing.assert_close(lse[2], torch.logaddexp(lse[0], lse[1]))


def test_merge_with_rows_keeps_the_feature_scale():
    for states in ((a_state(feature_scale=0.5), a_state(feature_map=None, rows=2)),) * 2:
        merged = states[0].merge(states[1])
        assert (merged.feature_scale, merged.feature_map) == (0.5, "elu")


def test_merge_of_what_is_switched_off():
    """A log_scale of -inf in one state, in the other or in both gives no NaN, not in the gradient either."""
    states, leaves = [], []
    for seed, off in enumerate(([0, 2], [1, 2])):
        state = a_state(seed, feature_map="taylor1", centers=4)
        log_scale = torch.zeros(2, 4)
        log_scale[:, off] = -math.inf
        leaves.append(log_scale.requires_grad_())
        states.append(PrefixState(state.z, state.k, "taylor1", centers=torch.ones(2, 4, 4), log_scale=leaves[-1]))
    both = states[0].merge(states[1])
    torch.testing.assert_close(both.log_scale[0], torch.tensor([0, 0, -math.inf, math.log(2)]))
    torch.testing.assert_close(both.z[:, 0], states[1].z[:, 0])
    torch.testing.assert_close(both.z[:, 1], states[0].z[:, 1])
    loss = both.log_scale.exp().sum() + both.z.sum() + both.k.sum()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, leaves))


def test_merge_refuses_what_does_not_add():
    state = a_state()
    for other, name in (
        (a_state(heads=3), "num_heads"),
        (a_state(head_dim=5), "head_dim"),
        (a_state(value_dim=5), "value_dim"),
        (a_state(stack=2), "is_stack"),
        (a_state(feature_scale=2.0), "feature_scale"),
        (a_state(feature_map="taylor1"), "feature_map"),
        (a_state().to("meta"), "device"),
    ):
        with pytest.raises(ValueError, match=f"`other` must have the same {name} as the state"):
            state.merge(other)
    with pytest.raises(ValueError, match="`other` must be expanded around the same centres.*'taylor1' only"):
        a_state(0, centers=1).merge(a_state(1, centers=1))
    with pytest.raises(TypeError, match="`other` must be a PrefixState, got dict"):
        state.merge({})


STACKS = {
    "alike": [{}, {}],
    "log_scale": [{"log_scale": True}, {}],
    "low_rank": [{"rank": 2}, {"rank": 2}],
    "ranks_differ": [{"rank": 2}, {"rank": 1}, {}],
    "centres": [{"feature_map": "taylor1", "centers": 3}, {"feature_map": "taylor1"},
                {"feature_map": "taylor1", "centers": 1, "log_scale": True}],
    "rows": [{"rows": 3}, {}, {"rows": 1, "bias": False}],
    "rows_only": [{"feature_map": None, "rows": 1}, {"feature_map": None, "rows": 4}],
    "rows_unbiased": [{"feature_map": None, "rows": 4, "bias": False}, {"feature_map": None, "rows": 2, "bias": False}],
}  # fmt: skip


@pytest.mark.parametrize("recipes", STACKS.values(), ids=STACKS)
def test_stack_serves_each_state(recipes):
    states = [a_state(seed, dtype=F64, **recipe) for seed, recipe in enumerate(recipes)]
    stack = PrefixState.stack(states)
    assert stack.num_states == len(states)
    query, key = torch.randn(2, len(states), 2, 9, 4, dtype=F64)
    value = torch.randn(len(states), 2, 9, 6, dtype=F64)
    order = torch.arange(len(states)).flip(0)
    out = ntk_attention(query, key, value, stack, state_index=order)
    for b, n in enumerate(order.tolist()):
        rows = slice(b, b + 1)
        torch.testing.assert_close(out[rows], ntk_attention(query[rows], key[rows], value[rows], states[n]))


def test_stack_refuses_what_does_not_go_together():
    with pytest.raises(TypeError, match="`states` must be a sequence of PrefixStates, got one"):
        PrefixState.stack(a_state())
    with pytest.raises(ValueError, match="`states` must hold at least one"):
        PrefixState.stack([])
    with pytest.raises(TypeError, match=r"`states\[1\]` must be a PrefixState, got int"):
        PrefixState.stack([a_state(), 3])
    with pytest.raises(ValueError, match=r"`states\[1\]` must be a single state, got a stack of 2"):
        PrefixState.stack([a_state(), a_state(stack=2)])
    with pytest.raises(
        ValueError, match=r"`states\[1\]` must have the same feature_scale as `states\[0\]`, None, got 2.0"
    ):
        PrefixState.stack([a_state(), a_state(feature_scale=2.0)])
    with pytest.raises(ValueError, match=r"`states\[1\]` must have the same feature_map as `states\[0\]`, 'elu', got"):
        PrefixState.stack([a_state(), a_state(feature_map="taylor1")])
