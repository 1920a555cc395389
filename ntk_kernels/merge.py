"""`merge_attention` and `prefix_attention_state`: a prefix state beside any other attention kernel."""

import torch
from torch import Tensor

from . import checks
from .attention import ntk_attention
from .backends.torch.lse import merge
from .state import PrefixState


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, from the results over each: out = (e^lse_a·out_a + e^lse_b·out_b) / e^lse.

    For splitting keys (cascades, ring attention), or for putting a prefix beside another kernel's result:

        out, lse = any_attention_that_returns_lse(query, key, value)
        out, lse = merge_attention(out, lse, *prefix_attention_state(query, state))

    Differentiable; plain PyTorch, which torch.compile makes one kernel of.

    Args:
        out_a, out_b: [..., Dv], results normalised by their own softmax. FlashAttention's, [B, L, H, Dv] beside lse
            [B, H, L], as `out.transpose(1, 2)`.
        lse_a, lse_b: [...], their log-sum-exp, natural logarithm. An infinite one marks a row that saw nothing, whose
            out is not looked at (-inf here, +inf in FlashAttention 2).

    Returns:
        out [..., Dv] in the dtype of `out_a` and `out_b` (promoted), and lse [...], log(e^lse_a + e^lse_b), in float32
        at least; 0 and -inf for a row that saw nothing in either.

    Raises:
        TypeError, ValueError: a tensor is not floating-point, or the shapes do not fit each other.
    """
    for name, tensor in (("out_a", out_a), ("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        checks.check_floating(name, tensor)
    if out_b.shape != out_a.shape:
        raise ValueError(f"`out_b` must have the shape of `out_a`, {list(out_a.shape)}, got {list(out_b.shape)}")
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        if lse.shape != out_a.shape[:-1]:
            raise ValueError(
                f"`{name}` must have the shape of `out_a` without its last dimension, {list(out_a.shape[:-1])}, got "
                f"{list(lse.shape)}"
            )
    out, lse = merge(out_a, lse_a, out_b, lse_b)
    return out.to(torch.promote_types(out_a.dtype, out_b.dtype)), lse


def prefix_attention_state(
    query: Tensor,
    state: PrefixState,
    *,
    scale: float | None = None,
    state_index: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The prefix by itself: what `ntk_attention` gives over the prefix and no other key, to be merged with the rest.

    In the notation of `PrefixState`, the numerator N normalised by the mass M, and log M. A row without mass (M = 0)
    gives 0 and -inf: what N it has, `merge_attention` cannot take into account, in contrast to `ntk_attention`. States
    converted from a prefix, and any "elu" state with k > 0, have mass everywhere; a state that is to be trained from
    k = 0 gets no gradient this way. In float16, N / M may exceed its range where the weight of the prefix is tiny.

    Args:
        query: [B, Hq, Lq, D].
        state: a prefix state, whose heads divide Hq.
        scale, state_index, backend: as in `ntk_attention`.

    Returns:
        N / M [B, Hq, Lq, Dv] in the dtype of `query` and log M [B, Hq, Lq], as the result of an attention and its lse.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what it must be and what it got.
    """
    checks.check_floating("query", query)
    checks.check_shape("query", query, (None, None, None, None), "B Hq Lq D")
    if not isinstance(state, PrefixState):
        raise TypeError(f"`state` must be a PrefixState, got {type(state).__name__}")
    batch, num_heads = query.shape[:2]
    if num_heads % state.num_heads:
        raise ValueError(f"`state` must have a number of heads that divides Hq={num_heads}, got {state.num_heads}")
    key, value = (query.new_empty(batch, state.num_heads, 0, dim) for dim in (query.shape[3], state.value_dim))
    return ntk_attention(
        query, key, value, state, scale=scale, state_index=state_index, return_lse=True, backend=backend
    )
