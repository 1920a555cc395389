"""The backends that tests run: all of them, or those that are not the formula itself.

On a machine with a GPU, the kernels are tested by tests/kernels/test_gpu.py; on others, in Triton's interpreter.
"""

import pytest
import torch

FUSED = ["torch"] if torch.cuda.is_available() else ["torch", "triton"]
BACKENDS = [*FUSED, "reference"]
fused_backends = pytest.mark.parametrize("backend", FUSED)
all_backends = pytest.mark.parametrize("backend", BACKENDS)
triton_only = pytest.mark.skipif("triton" not in FUSED, reason="the interpreter is for machines without a GPU")
