"""`RowTerms`: the numbers of each query row that the passes of the backward share, and how they are loaded."""

from typing import NamedTuple

import triton
import triton.language as tl

from .tiles import LOG2_E


class RowTerms(NamedTuple):
    """One number for each query row, [B, Hq, Lq]; `weights` one for each centre and row, [B, Hq, C, Lq]. Float32."""

    lse: object
    delta: object
    mass_delta: object  # None, as the weights, without a linear-attention term
    weights: object


@triton.jit
def load_rows(ptr, offs_m, seq_q):
    """[M] numbers of RowTerms, 0 beyond the last row."""
    return tl.load(ptr + offs_m, mask=offs_m < seq_q, other=0.0)


@triton.jit
def load_lse(ptr, offs_m, seq_q):
    """[M] lse in units of log 2; +inf, which makes e^{s - lse} 0, for rows that see nothing or do not exist."""
    lse = tl.load(ptr + offs_m, mask=offs_m < seq_q, other=float("inf")) * LOG2_E
    return tl.where(lse == -float("inf"), float("inf"), lse)
