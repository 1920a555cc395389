"""The implementations that `bench attention` compares: plain attention, exact prefixes and NTK-Attention.

A peer that is not installed, not for this device or without a compiler raises at its first call. So one list serves all
machines, and missing peers are reported with the reason.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from ntk_kernels import ntk_attention, reference

PLAIN = "SDPA, no prefix"
NO_PREFIX, STATE, EXACT = "no prefix", "a state", "an exact prefix"
sdpa = torch.nn.functional.scaled_dot_product_attention


@dataclass(frozen=True)
class Peer:
    """An implementation: `function` maps query, key, value [B, H, L, D] and a state to the output [B, H, L, D]."""

    name: str
    function: Callable
    prefix: str = STATE  # what is in front of the keys
    ours: bool = False  # must work; others may be missing
    large: bool = False  # keeps L×L scores in memory


@dataclass(frozen=True)
class Setting:
    """The shape of the calls, which peers may prepare for."""

    device: str
    length: int
    heads: int
    head_dim: int
    causal: bool = True
    prefix_rows: int | None = None

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"


def all_peers(setting: Setting) -> list[Peer]:
    """Returns all peers in the order of the tables. The first is `PLAIN`, with which the others are compared."""
    causal = setting.causal
    listed = [Peer(PLAIN, lambda q, k, v, state: sdpa(q, k, v, is_causal=causal), NO_PREFIX)]
    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
    if setting.on_gpu:
        kernels |= {"efficient": SDPBackend.EFFICIENT_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    listed += [
        Peer(f"SDPA by {name}, no prefix", _sdpa_by(backend, causal), NO_PREFIX, large=name == "math")
        for name, backend in kernels.items()
    ]
    listed.append(Peer("FlexAttention, no prefix", _flex(setting, 0), NO_PREFIX))
    if setting.on_gpu:
        listed += [
            Peer("flash-attn 2, no prefix", _flash_attn(causal), NO_PREFIX),
            Peer("flash-attn 4, no prefix", _flash_attn_4(causal), NO_PREFIX),
        ]
        if causal:  # the only kind that it has
            listed.append(Peer("flash-linear-attention's attention, no prefix", _fla, NO_PREFIX))
    listed.append(Peer("ours, no prefix", _ours(causal, None, with_state=False), NO_PREFIX, ours=True))
    if setting.on_gpu:
        listed += [
            Peer("ours, triton backend, no prefix", _ours(causal, "triton", with_state=False), NO_PREFIX, ours=True),
            Peer("ours, triton backend", _ours(causal, "triton"), ours=True),
        ]
    compiled = torch.compile(naive, dynamic=False, fullgraph=True)
    listed += [
        Peer("ours, torch backend", _ours(causal, "torch"), ours=True),
        Peer("naive formula", lambda q, k, v, state: naive(q, k, v, state, causal=causal), large=True),
        Peer("naive, compiled", lambda q, k, v, state: compiled(q, k, v, state, causal=causal), large=True),
        Peer("reference", _ours(causal, "reference"), ours=True, large=True),
    ]
    if setting.prefix_rows:
        rows = f"a prefix of {setting.prefix_rows:,} rows"
        listed += [
            Peer(f"SDPA over {rows}", exact_prefix(setting), EXACT),
            *(
                Peer(f"SDPA by {name} over {rows}", exact_prefix(setting, backend), EXACT)
                for name, backend in kernels.items()
                if name != "math"  # the naive formula is there already
            ),
            Peer(f"FlexAttention over {rows}", _flex(setting, setting.prefix_rows), EXACT),
        ]
    return listed


def naive(query: Tensor, key: Tensor, value: Tensor, state, *, causal: bool) -> Tensor:
    """Evaluates the formula as it is written, with the L×L scores, their exponentials and the features in memory."""
    scale = query.shape[3] ** -0.5
    scores = scale * query @ key.mT
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    shift = scores.detach().amax(-1, keepdim=True).clamp(min=0)
    p = (scores - shift).exp()
    phi = reference.feature_map(query.to(state.z.dtype) * scale**0.5, state.feature_map) * (-shift).exp()
    numerator = p @ value + phi @ state.z
    return (numerator / (p.sum(-1, keepdim=True) + (phi @ state.k.unsqueeze(-1)).relu())).to(query.dtype)


def exact_prefix(setting: Setting, backend: SDPBackend | None = None) -> Callable:
    """Returns PyTorch's fused attention over a prefix, different for each head, that is copied in front of the keys."""
    bias = causal_lower_right(setting.length, setting.prefix_rows + setting.length) if setting.causal else None
    rows = prefix_of(setting)

    def attend(q, k, v, state):
        with sdpa_kernel(backend) if backend is not None else nullcontext():
            return sdpa(q, *_behind(rows, k, v), attn_mask=bias)

    return attend


@functools.cache
def prefix_of(setting: Setting) -> Tensor:
    """Returns keys and values of a prefix [2, 1, H, m, D], the same for every peer."""
    generator = torch.Generator().manual_seed(setting.prefix_rows)
    shape = (2, 1, setting.heads, setting.prefix_rows, setting.head_dim)
    return torch.randn(shape, generator=generator).to(setting.device)


def _behind(rows: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    return [
        torch.cat([prefix.to(tensor.dtype).expand(tensor.shape[0], -1, -1, -1), tensor], dim=2)
        for prefix, tensor in zip(rows, (key, value), strict=True)
    ]


def _ours(causal: bool, backend: str | None, *, with_state: bool = True) -> Callable:
    return lambda q, k, v, state: ntk_attention(
        q, k, v, state if with_state else None, is_causal=causal, backend=backend
    )


def _sdpa_by(backend: SDPBackend, causal: bool) -> Callable:
    def attend(q, k, v, state):
        with sdpa_kernel(backend):
            return sdpa(q, k, v, is_causal=causal)

    return attend


def _flex(setting: Setting, prefix_rows: int) -> Callable:
    """Returns FlexAttention over a causal mask, compiled at its first call."""
    ready = []

    def prepare():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def visible(batch, head, row, column):
            return row + prefix_rows >= column

        mask = None
        if setting.causal:
            sizes = setting.length, prefix_rows + setting.length
            mask = create_block_mask(visible, None, None, *sizes, device=setting.device)
        ready.extend(
            (
                torch.compile(flex_attention, dynamic=False, fullgraph=True),
                mask,
                prefix_of(setting) if prefix_rows else None,
            )
        )

    def attend(q, k, v, state):
        if q.requires_grad and not setting.on_gpu:
            raise NotImplementedError("it has no backward on the CPU")
        if not ready:
            prepare()
        attention, mask, rows = ready
        if prefix_rows:
            k, v = _behind(rows, k, v)
        return attention(q, k, v, block_mask=mask)

    return attend


def _flash_attn(causal: bool) -> Callable:
    def attend(q, k, v, state):
        from flash_attn import flash_attn_func

        return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal).transpose(1, 2)

    return attend


def _flash_attn_4(causal: bool) -> Callable:
    def attend(q, k, v, state):
        from flash_attn.cute import flash_attn_func

        return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal)[0].transpose(1, 2)

    return attend


def _fla(q, k, v, state):
    from fla.ops.attn import parallel_attn

    return parallel_attn(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
