import pytest
from cases import CASES, make_inputs
from oracle import check_case

BACKENDS = ["torch"]
FUSED_CASES = [case for case in CASES if "softcap" not in case.options]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", FUSED_CASES, ids=lambda case: case.id)
def test_forward(case, backend):
    check_case(make_inputs(case), case.dtype, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", FUSED_CASES, ids=lambda case: case.id)
def test_backward(case, backend):
    check_case(make_inputs(case), case.dtype, backend=backend, backward=True)
