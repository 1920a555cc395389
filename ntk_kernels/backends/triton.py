"""The `triton` backend: the fused forward of `ntk_kernels.kernels`. Its backward is that of the `torch` backend."""

from contextlib import nullcontext

import torch
from torch import Tensor

from ..kernels.forward import addressable, run_ntk_fwd
from .inputs import Inputs
from .layout import empty_out, lse_dtype


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Lq, Dv] and lse [B, Hq, Lq]."""
    query, value = inputs.query, inputs.value
    out = empty_out(query, value)
    lse = torch.empty(query.shape[:3], dtype=lse_dtype(query), device=query.device)
    kernel_out = out if addressable(out) else torch.empty_like(out, memory_format=torch.contiguous_format)
    if inputs.cu_seqlens_q is not None:  # rows that belong to no sequence
        kernel_out.zero_()
        lse.fill_(-torch.inf)
    if not lse.numel():
        return out, lse
    arguments = inputs._asdict()
    for name in ("query", "key", "value", "backend"):
        del arguments[name]
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():  # where Triton launches
        run_ntk_fwd(query, inputs.key, value, kernel_out, lse, **arguments)
    if kernel_out is not out:
        out.copy_(kernel_out)
    return out, lse
