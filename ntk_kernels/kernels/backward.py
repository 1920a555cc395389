"""Backward of NTK-Attention: a flash backward with the combined lse, and the prefix's own gradients.

Scores and features are computed again, tile by tile; the passes are

    backward_delta.py   Δ, and what the prefix weighs, for each query row
    backward_keys.py    dK, dV
    backward_query.py   dQ, through keys, own rows and linear-attention term
    backward_state.py   dZ, dk, and the gradients of centres, log_scale and own rows

of which those run that somebody wants. The formulas are those of `reference/attention.py`. Two runs agree bit for bit.

Memory beyond inputs, outputs and gradients, in float32: one number for each query row (Δ); with a linear-attention term
one more (Δ') and one for each centre, and if centres or log_scale have gradients another for each centre; and the
partial sums of the state's gradients, as many as there are splits (`backward_state.py`).
"""

import torch

from .backward_delta import run_delta
from .backward_keys import run_dkdv
from .backward_query import DQ
from .backward_state import FEATURE_TENSORS, StateGrads, run_state_backward
from .host.launch import made_addressable, prepare, run_pass


def run_bwd(inputs, out, lse, grad_out, grad_lse, grad_query, grad_key, grad_value, wanted: StateGrads) -> StateGrads:
    """Fills `grad_query`, `grad_key` and `grad_value`, each may be None, but for rows of no packed sequence.

    Args:
        inputs: as for the forward; `z` must not be a pair.
        out, lse, grad_out, grad_lse: results of the forward and their gradients; `grad_lse` may be None.
        wanted: tensors of the state whose gradients are wanted.

    Returns:
        The gradients of the `wanted` tensors, None for the others.
    """
    call = prepare(inputs)
    grad_out, out = made_addressable(grad_out), made_addressable(out)
    needs_weights = grad_query is not None or any(getattr(wanted, name) is not None for name in FEATURE_TENSORS)
    row_terms = run_delta(call, grad_out, grad_lse, out, lse, needs_weights)
    grad_log_weights = empty_log_weights(row_terms, wanted)
    run_dkdv(call, grad_out, row_terms, grad_key, grad_value)
    if grad_query is not None or grad_log_weights is not None:
        run_pass(DQ, call, grad_out, row_terms, grad_query, grad_log_weights)
    return run_state_backward(call, grad_out, row_terms, grad_log_weights, wanted)


def empty_log_weights(row_terms, wanted: StateGrads) -> torch.Tensor | None:
    """Room for the gradients of log w [B, Hq, C, Lq], if a gradient of centres or log_scale is made of them."""
    if wanted.centers is None and wanted.log_scale is None:
        return None
    return torch.empty_like(row_terms.weights)
