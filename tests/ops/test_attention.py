"""The option table, forward and backward, against the float64 reference."""

import pytest
import torch
from backends import FUSED, fused_backends
from cases import CASES, case_named, make_inputs, served_by
from oracle import check_case, run

from ntk_kernels import ntk_attention
from ntk_kernels.backends.torch import add_prefix
from ntk_kernels.backends.torch import prefix_term as prefix

WITH_LSE_GRADIENT = ["plain", "elu", "all_parts", "fewer_keys_plain", "more_keys", "mask_bool", "value_wider", "bf16"]


@pytest.mark.parametrize(
    "backend, case",
    [pytest.param(backend, case, id=f"{backend}-{case.id}") for backend in FUSED for case in served_by(backend)],
)
def test_forward_and_backward(backend, case):
    check_case(make_inputs(case), case.dtype, backend=backend, backward=True, roundings=case.roundings)


@fused_backends
@pytest.mark.parametrize("case", [case for case in CASES if case.id in WITH_LSE_GRADIENT], ids=lambda case: case.id)
def test_backward_through_lse(case, backend):
    check_case(make_inputs(case), case.dtype, backend=backend, backward=True, grad_lse=True)


@pytest.mark.parametrize("rows", [9, 36])
@pytest.mark.parametrize(
    "case", [case for case in served_by("torch") if case.state and case.seq_q == 37], ids=lambda case: case.id
)
def test_chunks_of_rows(case, rows, monkeypatch):
    """The prefix is added in chunks: five of them here, or one of 36 rows and one of a single row."""
    monkeypatch.setattr(prefix, "_CHUNK_ELEMENTS", {"cpu": 1})
    monkeypatch.setattr(prefix, "_MIN_CHUNK_ROWS", rows)
    monkeypatch.setattr(add_prefix, "compiled", lambda: None)
    check_case(make_inputs(case), case.dtype, backend="torch", backward=True)


def test_out_is_in_memory_like_query():
    query, key, value, state, options = make_inputs(case_named("blhd"))
    assert ntk_attention(query, key, value, state, **options, backend="torch").stride() == query.stride()


@pytest.mark.parametrize("case", [case for case in CASES if "softcap" in case.options], ids=lambda case: case.id)
def test_what_only_the_reference_serves(case):
    with pytest.warns(UserWarning, match="softcap"):
        check_case(make_inputs(case), case.dtype, backend=None, backward=True)


@pytest.mark.parametrize("case", served_by("torch"), ids=lambda case: case.id)
def test_runs_agree_bit_for_bit(case):
    """The kernels' runs are compared on GPUs: the interpreter runs one program after the other."""
    inputs = make_inputs(case)
    grads = {"grad_out": torch.randn(*inputs[0].shape[:3], inputs[2].shape[3]).to(case.dtype)}

    def attention(*args, **kwargs):
        return ntk_attention(*args, **kwargs, backend="torch")

    first, second = (run(attention, *inputs, **grads) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@fused_backends
@pytest.mark.parametrize("asked", ["query", "key", "value", "z", "k", "centers", "log_scale", "keys", "values", "bias"])
def test_one_gradient_alone(asked, backend):
    """A frozen model asks for few gradients; each must be the same as when all are asked for."""
    case = case_named("all_parts")
    query, key, value, state, options = make_inputs(case)
    state = type(state)(
        state.full_z, **{name: tensor for name, tensor in state.tensors().items() if name[:2] != "z_"},
        feature_map=state.feature_map,
    )  # fmt: skip
    tensors = {"query": query, "key": key, "value": value} | state.tensors()

    def gradients(names):
        leaves = {name: tensor.clone().requires_grad_(name in names) for name, tensor in tensors.items()}
        of_state = {name: leaf for name, leaf in leaves.items() if name not in ("query", "key", "value")}
        out = ntk_attention(
            leaves["query"], leaves["key"], leaves["value"],
            type(state)(**of_state, feature_map=state.feature_map), **options, backend=backend,
        )  # fmt: skip
        out.square().sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    alone, together = gradients([asked]), gradients(list(tensors))
    assert [name for name, grad in alone.items() if grad is not None] == [asked]
    assert torch.equal(alone[asked], together[asked])
