"""The fused backends keep nothing of size L×L, forward or backward."""

import pytest
import torch
from cases import CAUSAL, TAYLOR1, TAYLOR2, Case, make_inputs
from oracle import op_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from ntk_kernels.backends.torch import implementation as torch_backend
from ntk_kernels.backends.triton import implementation as triton_backend
from ntk_kernels.inputs import Leaves
from ntk_kernels.kernels.host import launch

CASES = {
    "elu": Case("", "", options=CAUSAL),
    "centres": Case("", "", state={"centers": 16, "log_scale": True} | TAYLOR1, options=CAUSAL),
    "taylor2": Case("", "", state=TAYLOR2, options=CAUSAL),
    "rows": Case("", "", state={"rows": 64, "feature_map": None}, options=CAUSAL),
    "window": Case("", "", options=CAUSAL | {"window": (100, 0)}),
    "padding": Case("", "", mask="padding", options=CAUSAL),
    "cache": Case("", "", options=CAUSAL | {"causal_offset": 700}),
}


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("backend", [torch_backend, triton_backend], ids=["torch", "triton"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_largest_tensor_grows_with_the_length(case, backend, monkeypatch):
    monkeypatch.setattr(launch.Launch, "__call__", lambda self: None)  # kernels allocate nothing

    def largest(length):
        sized = Case(
            **{**vars(case), "batch": 2, "heads": 1, "kv_heads": 1, "seq_q": length, "seq_k": length, "head_dim": 4}
        )
        query, key, value, state, options = make_inputs(sized)
        inputs = op_inputs(query, key, value, state, options, "torch").uniform()
        needs = Leaves.of([tensor is not None for tensor in (*inputs[:3], *inputs.state[:-1])])
        with Largest() as seen:
            out, lse = backend.forward(inputs)
            backend.backward(torch.ones_like(out), torch.ones_like(lse), inputs, out, lse, needs)
        return seen.elements

    short, long = largest(1024), largest(4096)
    assert long < 2 * 4096 * 4096 / 8
    assert long <= 4 * short
