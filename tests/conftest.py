import os

import pytest
import torch

if not torch.cuda.is_available():  # then the Triton kernels run in its interpreter, which it decides when they load
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

from ntk_kernels import dispatch

if os.environ.get("TRITON_INTERPRET") == "1":
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    # As on GPUs, where the smaller and the larger of NaN and a number are the number, unless propagate_nan is asked for.
    InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Every test starts from the same random numbers, without a default backend, with every warning still to come."""
    torch.manual_seed(0)
    monkeypatch.delenv("NTK_KERNELS_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "_warned", set())
