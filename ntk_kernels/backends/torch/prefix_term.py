"""The terms that a prefix state adds to attention, in plain tensor operations on chunks of query rows.

Tensors of query rows are [B, Hs, G, rows, ...]: the G = Hq / Hs query heads that share a head of the state are side by
side. Tensors of the state are [B or 1, Hs, 1, ...]. The linear-attention term has weights relative to `top`, which is
the largest centre logit or, with several centres, the lse of the other keys if that is larger: numerator =
e^top · (features @ z), mass = e^top · (features @ k). The mass is treated as one more value column: `zk` = [z | k]
gives both in one product, forward and backward. Features of second order never are in memory for all heads:
`second_order.py` makes those of one after the other.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...feature_maps import get_feature_map
from ...inputs import DecodeInputs, Inputs
from ..results import empty_grad
from .second_order import MIN_ROWS, SecondOrder, is_second_order

_CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}  # features per chunk of rows: as many as the cache holds
_MIN_CHUNK_ROWS = 64
MAX_EXPONENT = 40.0  # of the weight of a prefix without mass, which is not bounded otherwise (see the reference)


def normaliser(lse: Tensor) -> Tensor:
    """Returns `lse` with +inf for -inf, so that e^{x - normaliser} is 0 for a row without visible keys, whatever x."""
    return lse.masked_fill(lse == -math.inf, math.inf)


class LinearTerm(NamedTuple):
    """The parts of the linear-attention term on a chunk of rows."""

    x: Tensor  # [B, Hs, G, rows, D]; the feature map may have overwritten it
    phi: Tensor | None  # [B, Hs, G, rows, r]; None, as the features, if they are of second order
    weight: Tensor | None  # [B, Hs, G, rows, C], e^{log w - top}; None for a single centre, whose weight is 1
    features: Tensor | None  # [B, Hs, G, rows, C·r], weight ⊗ phi
    top: Tensor  # [B or 1, Hs or 1, G or 1, rows or 1]

    def weight_in(self, normaliser: Tensor, mass: Tensor) -> Tensor:
        """Returns e^{top - normaliser}, the factor of the term in the output. `mass` is relative to e^top.

        With mass the weight is at most 1 / mass anyway. A mass that rounding has moved to the other side of 0 must not
        lift that bound.
        """
        bound = (1 - mass.log()).nan_to_num_(MAX_EXPONENT, posinf=MAX_EXPONENT).clamp_(min=MAX_EXPONENT)
        return torch.minimum(self.top - normaliser, bound).exp_()


class Prefix:
    """The state of each batch row, in the dtype of the accumulation.

    Args:
        inputs: the call, whose Z is in full.
        query: [B, Hq, L, D], the rows that the prefix is added to.
        dtype: of the accumulation.
    """

    def __init__(self, inputs: Inputs | DecodeInputs, query: Tensor, dtype: torch.dtype):
        z, _, k, centers, log_scale, row_keys, row_values, row_bias, state_index = inputs.state
        self.feature_map = None if inputs.feature_map is None else get_feature_map(inputs.feature_map)
        self.feature_scale, self.scale = inputs.feature_scale, inputs.scale
        self.state_index = state_index
        self.num_heads = (row_keys if k is None else k).shape[1]
        group = query.shape[1] // self.num_heads
        absent = None if state_index is None else state_index < 0
        if absent is not None and absent.device.type == "cpu" and not absent.any():
            absent = None  # saves copies of the states; on other devices the check would have to wait for them
        if absent is not None:
            if k is not None and log_scale is None:
                log_scale = k.new_zeros(k.shape[:3])
            if row_keys is not None and row_bias is None:
                row_bias = row_keys.new_zeros(row_keys.shape[:3])

        def gather(tensor: Tensor | None, *, is_logit: bool = False) -> Tensor | None:
            if tensor is None:
                return None
            if state_index is not None:
                tensor = tensor.index_select(0, state_index.clamp(min=0))
            if absent is not None:
                fill = -math.inf if is_logit else 0
                tensor = tensor.masked_fill(absent.reshape(-1, *(1,) * (tensor.dim() - 1)), fill)
            return tensor.to(dtype).unsqueeze(2)

        self.zk = self.second_order = self.row_keys = None
        if k is not None:
            self.num_centers = k.shape[2]
            if is_second_order(self.feature_map) and query.shape[2] * group >= MIN_ROWS:  # which has one centre
                self.second_order = SecondOrder(gather(z)[:, :, 0, 0], gather(k)[:, :, 0, 0], query.shape[3])
            else:  # [., Hs, 1, C·r, Dv + 1]
                self.zk = torch.cat([gather(z), gather(k).unsqueeze(-1)], dim=-1).flatten(3, 4)
            self.centers = gather(centers)  # [., Hs, 1, C, D]
            log_scale = gather(log_scale, is_logit=True)
            self.log_scale = None if log_scale is None else log_scale.unsqueeze(3)  # [., Hs, 1, 1, C]
            if self.num_centers > 1:
                # A centre without mass must not be `top`, unless no centre has mass.
                has_mass = self.zk[..., -1].unflatten(-1, (self.num_centers, -1)).ne(0).any(-1).unsqueeze(3)
                self.is_massless = ~has_mass & has_mass.any(-1, keepdim=True)  # [., Hs, 1, 1, C]
        if row_keys is not None:
            self.row_keys, self.row_values = gather(row_keys), gather(row_values)  # [., Hs, 1, R, D or Dv]
            row_bias = gather(row_bias, is_logit=True)
            self.row_bias = None if row_bias is None else row_bias.unsqueeze(3)  # [., Hs, 1, 1, R]

        columns = (0 if self.zk is None else self.zk.shape[3]) + (0 if row_keys is None else row_keys.shape[2])
        per_row = query.shape[0] * query.shape[1] * max(columns, 1)
        self._chunk_rows = max(_MIN_CHUNK_ROWS, _CHUNK_ELEMENTS[query.device.type] // max(per_row, 1))
        if self.second_order is not None:
            self._chunk_rows = max(1, min(self._chunk_rows, self.second_order.blocks.max_rows // group))

    def group_heads(self, tensor: Tensor) -> Tensor:
        """Returns the view [B, Hs, G, L, ...] of a tensor [B, Hq, L, ...]."""
        return tensor.unflatten(1, (self.num_heads, -1))

    def chunks(self, num_rows: int) -> Iterator[slice]:
        """Yields slices of the query rows."""
        for start in range(0, num_rows, self._chunk_rows):
            yield slice(start, min(start + self._chunk_rows, num_rows))

    @property
    def has_features(self) -> bool:
        return self.zk is not None or self.second_order is not None

    def numerator_and_mass(self, term: LinearTerm) -> tuple[Tensor, Tensor]:
        """Returns features · z [B, Hs, G, rows, Dv] and features · k [B, Hs, G, rows]."""
        if self.second_order is not None:
            x = term.x.flatten(2, 3)
            numerator, mass = self.second_order.numerator(x), self.second_order.mass(x)
            return numerator.unflatten(2, term.x.shape[2:4]), mass.unflatten(2, term.x.shape[2:4])
        numerator_and_mass = term.features @ self.zk
        return numerator_and_mass[..., :-1], numerator_and_mass[..., -1]

    def row_scores(self, q: Tensor) -> Tensor:
        """Returns the logits [B, Hs, G, rows, R] of the state's own rows."""
        scores = (q @ self.row_keys.mT).mul_(self.scale)
        return scores if self.row_bias is None else scores.add_(self.row_bias)

    def linear_term(self, q: Tensor, lse: Tensor) -> LinearTerm:
        """Computes the linear-attention term of queries [B, Hs, G, rows, D]; `lse` [B, Hs, G, rows], of keys that are
        at least a part of the softmax, bounds the weights of centres without mass."""
        x = q * self.feature_scale
        phi = None if self.second_order is not None else self.feature_map(x)
        if self.centers is None:
            top = x.new_zeros(1, 1, 1, 1) if self.log_scale is None else self.log_scale[..., 0]
            return LinearTerm(x, phi, None, phi, top)
        log_weight = (q @ self.centers.mT).mul_(self.scale)
        if self.log_scale is not None:
            log_weight.add_(self.log_scale)
        if self.num_centers == 1:
            return LinearTerm(x, phi, None, phi, log_weight[..., 0])
        top = torch.maximum(log_weight.masked_fill(self.is_massless, -math.inf).amax(-1), lse)
        weight = log_weight.sub_(normaliser(top).unsqueeze(-1)).clamp_(max=MAX_EXPONENT).exp_()
        return LinearTerm(x, phi, weight, (weight.unsqueeze(-1) * phi.unsqueeze(-2)).flatten(-2), top)


def merge_prefix(prefix: Prefix, query: Tensor, out: Tensor, lse: Tensor) -> None:
    """Adds the prefix in place to `out` [B, Hq, L, Dv] and `lse` [B, Hq, L] of attention over other keys."""
    query, out, all_lse = (prefix.group_heads(tensor) for tensor in (query, out, lse))
    for rows in prefix.chunks(query.shape[3]):
        q, out_rows, lse = query[..., rows, :].to(all_lse.dtype), out[..., rows, :], all_lse[..., rows]
        merged = out_rows.to(lse.dtype)
        if prefix.row_keys is not None:
            scores = prefix.row_scores(q)
            total = torch.logaddexp(lse, scores.logsumexp(-1))
            shift = normaliser(total)
            merged.mul_((lse - shift).exp_().unsqueeze(-1))
            merged.add_(scores.sub_(shift.unsqueeze(-1)).exp_() @ prefix.row_values)
            lse.copy_(total)
        if prefix.has_features:
            term = prefix.linear_term(q, lse)
            numerator, mass = prefix.numerator_and_mass(term)
            log_mass = mass.clamp(min=0).log_().add_(term.top)
            total = torch.logaddexp(lse, log_mass)
            shift = normaliser(total)
            merged.mul_((lse - shift).exp_().unsqueeze(-1))
            merged.addcmul_(numerator, term.weight_in(shift, mass).unsqueeze(-1))
            lse.copy_(total)
        if merged.dtype != out.dtype:
            out_rows.copy_(merged)


def prefix_backward(
    prefix: Prefix,
    grad_out: Tensor,
    query: Tensor,
    lse: Tensor,
    delta: Tensor,
    state: Sequence[Tensor | None],
    needs_grad: Sequence[bool],
) -> list[Tensor | None]:
    """Computes the gradients of the query and of the state's tensors through the prefix.

    Args:
        grad_out: [B, Hq, L, Dv].
        query: [B, Hq, L, D].
        lse, delta: [B, Hq, L], of the whole softmax; delta = rowsum(dO∘out) - dlse.
        state: z, k, centers, log_scale, row_keys, row_values and row_bias as in `inputs.py`, [N, Hs, ...].
        needs_grad: for the query and each of these tensors.

    Returns:
        A gradient for the query and each of these tensors, None where it is absent or not needed.
    """
    need_query, *need_state = needs_grad
    grad_query = empty_grad(query, lse.dtype) if need_query else None
    sums, features = _StateSums(prefix, state, need_state, lse.dtype), prefix.second_order
    grad_z = None
    if features is not None and sums.needs("z"):
        states = 1 if prefix.state_index is None else query.shape[0]
        grad_z = query.new_zeros(
            states, prefix.num_heads, features.blocks.num_features, grad_out.shape[3], dtype=lse.dtype
        )
    views = (prefix.group_heads(tensor) for tensor in (query, grad_out, lse, delta))
    all_q, all_grad, all_lse, all_delta = views
    for rows in prefix.chunks(query.shape[2]):
        q, grad = (tensor[..., rows, :].to(lse.dtype) for tensor in (all_q, all_grad))
        row_lse, row_delta = all_lse[..., rows], all_delta[..., rows]
        grad_q = torch.zeros_like(q) if need_query else None
        if prefix.row_keys is not None:
            _rows_backward(prefix, q, grad, row_lse, row_delta, grad_q, sums)
        if prefix.zk is not None:
            _linear_backward(prefix, q, grad, row_lse, row_delta, grad_q, sums)
        if features is not None:
            _second_order_backward(prefix, features, q, grad, row_lse, row_delta, grad_q, sums, grad_z)
        if need_query:
            prefix.group_heads(grad_query)[..., rows, :] = grad_q
    if grad_z is not None:
        sums.add("z", features.blocks.unpack(grad_z).unsqueeze(2))
    return [grad_query, *sums.result()]


def _rows_backward(
    prefix: Prefix, q: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, grad_q: Tensor | None,
    sums: "_StateSums",
) -> None:  # fmt: skip
    """Adds the gradients through the state's own rows to `grad_q` and `sums`."""
    p = prefix.row_scores(q).sub_(normaliser(lse).unsqueeze(-1)).exp_()
    grad_scores = (grad @ prefix.row_values.mT).sub_(delta.unsqueeze(-1)).mul_(p)
    if sums.needs("row_values"):
        sums.add("row_values", p.mT @ grad)
    if sums.needs("row_keys"):
        sums.add("row_keys", grad_scores.mT @ q * prefix.scale)
    if sums.needs("row_bias"):
        sums.add("row_bias", grad_scores.sum(-2))
    if grad_q is not None:
        grad_q.add_(grad_scores @ prefix.row_keys, alpha=prefix.scale)


def _linear_backward(
    prefix: Prefix, q: Tensor, grad: Tensor, lse: Tensor, delta: Tensor, grad_q: Tensor | None,
    sums: "_StateSums",
) -> None:  # fmt: skip
    """Adds the gradients through the linear-attention term to `grad_q` and `sums`."""
    term = prefix.linear_term(q, lse)
    mass = (prefix.zk[..., -1:].mT @ term.features.mT).squeeze(-2)  # 5x as fast as a matrix times a column
    weight = term.weight_in(normaliser(lse), mass)
    grad_mass = (delta * weight).neg_().masked_fill_(mass <= 0, 0)
    grad = torch.cat([grad * weight.unsqueeze(-1), grad_mass.unsqueeze(-1)], dim=-1)
    if sums.needs("z", "k"):
        grad_zk = term.features.mT @ grad
        sums.add("z", grad_zk[..., :-1])
        sums.add("k", grad_zk[..., -1])
    needs_weight = sums.needs("centers", "log_scale")
    if grad_q is None and not needs_weight:
        return
    grad_features = grad @ prefix.zk.mT
    if term.weight is None:
        grad_phi = grad_features
    else:
        grad_features = grad_features.unflatten(-1, (prefix.num_centers, -1))
        grad_phi = (term.weight.unsqueeze(-2) @ grad_features).squeeze(-2)
    if prefix.centers is not None or needs_weight:
        if term.weight is None:
            grad_log_weight = (term.phi * grad_features).sum(-1, keepdim=True)
        else:
            grad_log_weight = (grad_features @ term.phi.unsqueeze(-1)).squeeze(-1).mul_(term.weight)
        _weights_backward(prefix, q, grad_log_weight, grad_q, sums)
    if grad_q is not None:
        grad_x = prefix.feature_map.backward(grad_phi, term.x, term.phi)
        grad_q.add_(grad_x, alpha=prefix.feature_scale)


def _weights_backward(
    prefix: Prefix, q: Tensor, grad_log_weight: Tensor, grad_q: Tensor | None, sums: "_StateSums"
) -> None:
    """Adds the gradients through log w [B, Hs, G, rows, C] to `grad_q` and `sums`."""
    if sums.needs("log_scale"):
        sums.add("log_scale", grad_log_weight.sum(-2))
    if prefix.centers is not None:
        if sums.needs("centers"):
            sums.add("centers", grad_log_weight.mT @ q * prefix.scale)
        if grad_q is not None:
            grad_q.add_(grad_log_weight @ prefix.centers, alpha=prefix.scale)


def _second_order_backward(
    prefix: Prefix, features: SecondOrder, q: Tensor, grad: Tensor, lse: Tensor, delta: Tensor,
    grad_q: Tensor | None, sums: "_StateSums", grad_z: Tensor | None,
) -> None:  # fmt: skip
    """Does as `_linear_backward`, but adds the gradient of z to `grad_z`, in the order of `features.blocks`."""
    group = q.shape[2:4]
    term = prefix.linear_term(q, lse)
    x = term.x.flatten(2, 3)
    mass = features.mass(x)
    weight = term.weight_in(normaliser(lse), mass.unflatten(2, group)).flatten(2, 3)
    grad_mass = (delta.flatten(2, 3) * weight).neg_().masked_fill_(mass <= 0, 0)
    grad = grad.flatten(2, 3) * weight.unsqueeze(-1)
    if grad_z is not None:
        features.add_grad_of_z(grad_z, x, grad)
    if sums.needs("k"):
        sums.add("k", features.grad_of_k(x, grad_mass).unsqueeze(2))
    needs_weight = sums.needs("centers", "log_scale")
    if grad_q is None and not needs_weight:
        return
    grad_x, grad_log_weight = features.grad_of_rows(x, grad, grad_mass, mass)
    if prefix.centers is not None or needs_weight:
        _weights_backward(prefix, q, grad_log_weight.unflatten(2, group).unsqueeze(-1), grad_q, sums)
    if grad_q is not None:
        grad_q.add_(grad_x.unflatten(2, group), alpha=prefix.feature_scale)


class _StateSums:
    """Sums of the state's gradients over chunks, heads that share a state and the batch, in a fixed order."""

    _NAMES = ("z", "k", "centers", "log_scale", "row_keys", "row_values", "row_bias")

    def __init__(self, prefix: Prefix, state: Sequence[Tensor | None], need_state: Sequence[bool], dtype: torch.dtype):
        self._prefix = prefix
        self._like = {
            name: tensor for name, tensor, needed in zip(self._NAMES, state, need_state, strict=True) if needed
        }
        self._dtype = dtype
        self._sums: dict[str, Tensor] = {}

    def needs(self, *names: str) -> bool:
        """Returns whether any of these gradients is needed."""
        return any(name in self._like for name in names)

    def add(self, name: str, grad: Tensor) -> None:
        """Adds a gradient [B, Hs, G, ...] if it is needed."""
        if name not in self._like:
            return
        per_batch = grad.sum(2)
        if self._prefix.state_index is None:
            per_batch = per_batch.sum(0, keepdim=True)
        if name in self._sums:
            self._sums[name].add_(per_batch)
        else:
            self._sums[name] = per_batch

    def result(self) -> list[Tensor | None]:
        """Returns the gradients of the state's tensors, None where they are not needed."""
        return [self._of_states(name) if name in self._like else None for name in self._NAMES]

    def _of_states(self, name: str) -> Tensor:
        like, index = self._like[name], self._prefix.state_index
        total = torch.zeros(like.shape, dtype=self._dtype, device=like.device)
        if name in self._sums:
            grads = self._sums[name].reshape(self._sums[name].shape[0], *like.shape[1:])
            if index is None:
                total.add_(grads)
            else:  # one batch row at a time: on a GPU, index_add_ of several rows into one state has no fixed order
                absent = (index < 0).reshape(-1, *(1,) * (grads.dim() - 1))
                grads = grads.masked_fill(absent, 0)
                for row in range(index.shape[0]):
                    total.index_add_(0, index[row : row + 1].clamp(min=0), grads[row : row + 1])
        return total.to(like.dtype)
