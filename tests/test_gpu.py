"""The option table on a GPU."""

import pytest
import torch
from cases import CASES, make_inputs
from oracle import check_case

pytestmark = pytest.mark.gpu
BACKENDS = ["torch"]
SERVED = [case for case in CASES if "softcap" not in case.options and case.dtype != torch.float64]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.id)
def test_forward_and_backward(case, backend):
    check_case(make_inputs(case), case.dtype, backend=backend, backward=True, device="cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [case for case in SERVED if case.id in ("elu", "all_parts", "bf16")],
                         ids=lambda case: case.id)  # fmt: skip
def test_backward_through_lse(case, backend):
    check_case(make_inputs(case), case.dtype, backend=backend, backward=True, grad_lse=True, device="cuda")
