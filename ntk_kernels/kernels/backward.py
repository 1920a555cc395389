"""Backward of NTK-Attention: a flash backward with the combined lse, and the prefix's own gradients.

Scores and features are computed again, tile by tile; the passes are

    backward_delta.py   Δ, and what the prefix weighs, for each query row
    backward_keys.py    dK, dV
    backward_query.py   dQ, through keys, own rows and linear-attention term
    backward_state.py   dZ, dk, and the gradients of centres, log_scale and own rows

of which those run that somebody wants. Formulas are those of `reference/attention.py`. Two runs agree bit for bit.

Memory beyond inputs, outputs and gradients, in float32: one number for each query row (Δ); with a linear-attention term
one more (Δ') and one for each centre, and if centres or log_scale have gradients another for each centre; and the
partial sums of the state's gradients, as many as there are splits (`backward_state.py`).
"""

from functools import partial

import torch

from .add_prefix_backward import run_prefix_pass_backward, takes_backward
from .backward_delta import RowTerms, delta_launch
from .backward_keys import run_dkdv
from .backward_query import dq_launch
from .backward_state import run_state_backward
from .host.launch import Call, contiguous, made_addressable, prepare, run_with_best_tiles


def run_ntk_bwd(
    query, key, value, out, lse, grad_out, grad_lse, grad_query, grad_key, grad_value, wanted, **arguments
) -> dict[str, torch.Tensor]:
    """Fills `grad_query`, `grad_key` and `grad_value`, each may be None, but for rows of no packed sequence. Without
    keys (`key` None, `grad_key` and `grad_value` too) the prefix's gradient is added to `grad_query`.

    Args:
        out, lse, grad_out, grad_lse: results of the forward and their gradients; `grad_lse` may be None.
        wanted: tensors of the state whose gradients are wanted, by their names in `backward_state.StateGrads`.
        arguments: as for the forward; `z` must not be a pair.

    Returns:
        The gradients of the `wanted` tensors.
    """
    call = prepare(query, key, value, **arguments)
    grad_out, out = made_addressable(grad_out), made_addressable(out)
    if takes_backward(call):
        return run_prefix_pass_backward(
            call, grad_out, contiguous(grad_lse), out, lse.contiguous(), grad_query, wanted
        )  # fmt: skip
    needs_weights = grad_query is not None or not wanted.keys().isdisjoint(("z", "k", "centers", "log_scale"))
    row_terms = _row_terms(call, lse, needs_weights)
    delta_launch(call, grad_out, contiguous(grad_lse), out, row_terms, call.candidates("delta")[0])()
    grad_log_weights = torch.empty_like(row_terms.weights) if wanted.keys() & {"centers", "log_scale"} else None
    run_dkdv(call, grad_out, row_terms, grad_key, grad_value)
    if grad_query is not None or grad_log_weights is not None:
        launch_with = partial(dq_launch, call, grad_out, row_terms, grad_query, grad_log_weights)
        run_with_best_tiles(call, "dq", launch_with, (grad_query,) if key is None else ())
    return run_state_backward(call, grad_out, row_terms, grad_log_weights, wanted)


def _row_terms(call: Call, lse: torch.Tensor, needs_weights: bool) -> RowTerms:
    lse = lse.contiguous()
    mass_delta = weights = None
    if call.feature_map is not None and needs_weights:
        mass_delta = torch.empty_like(lse)
        weights = lse.new_empty(*lse.shape[:2], call.state.num_centers, lse.shape[2])
    return RowTerms(lse, torch.empty_like(lse), mass_delta, weights)
