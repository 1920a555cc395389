"""Checks of results: relative errors against float64 and their limits."""

import torch
from torch import Tensor


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Returns ‖found - expected‖ / ‖expected‖, in the dtype of `expected`."""
    return ((found.to(expected.dtype) - expected).norm() / expected.norm()).item()


def limit_of(dtype: torch.dtype, in_float32: float = 0.0) -> float:
    """Returns the relative error that a result may have: 8 eps of its dtype, and twice the error of the formula in
    float32, since some sums cancel."""
    return 8 * torch.finfo(dtype).eps + 2 * in_float32


def is_wrong(error: float, limit: float) -> bool:
    """Tells whether an error is too large, or NaN, which no comparison finds too large."""
    return not error < limit
