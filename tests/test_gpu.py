"""The option table on a GPU."""

import pytest
import torch
from cases import CASES, make_inputs, served_by
from oracle import check_case, run

from ntk_kernels import ntk_attention

pytestmark = pytest.mark.gpu
BACKENDS = ["torch", "triton"]


@pytest.mark.parametrize(
    "backend, case",
    [
        pytest.param(backend, case, id=f"{backend}-{case.id}")
        for backend in BACKENDS
        for case in served_by(backend)
        if case.dtype != torch.float64
    ],
)
def test_forward_and_backward(backend, case):
    check_case(make_inputs(case), case.dtype, backend=backend, backward=True, device="cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [case for case in CASES if case.id in ("elu", "all_parts", "bf16")],
                         ids=lambda case: case.id)  # fmt: skip
def test_backward_through_lse(case, backend):
    check_case(make_inputs(case), case.dtype, backend=backend, backward=True, grad_lse=True, device="cuda")


@pytest.mark.parametrize("case", [case for case in served_by("triton") if case.dtype != torch.float64],
                         ids=lambda case: case.id)  # fmt: skip
def test_runs_agree_bit_for_bit(case):
    query, key, value, state, options = make_inputs(case)
    grad_out = torch.randn(*query.shape[:3], value.shape[3]).to(case.dtype)

    def attention(*args, **kwargs):
        return ntk_attention(*args, **kwargs, backend="triton")

    first, second = (
        run(attention, query, key, value, state, options, grad_out=grad_out, device="cuda") for _ in range(2)
    )
    for name in first:
        assert torch.equal(first[name], second[name]), name
