"""`PrefixAccumulator`: states of prefixes that come in pieces, grow and shrink, or are spread over processes."""

import math

import torch
from torch import Tensor

from .. import checks, library
from ..backends.centers import nearest_centers
from ..dispatch import sums_backend
from ..feature_maps import get_feature_map
from ..inputs import SumInputs
from ..state import PrefixState
from .closed_form import state_of_sums

_ROUNDING = 1e-12  # of a sum of weights in float64, relative to the sum of all weights added and subtracted


class PrefixAccumulator:
    """Sums the closed form of `prefix_to_state` over a prefix chunk by chunk, in float64.

        accumulator = PrefixAccumulator(num_heads, head_dim, value_dim)
        for keys, values in chunks:  # of any size
            accumulator.update(keys, values)
        state = accumulator.state()

    Up to rounding, `state()` is the state of all rows at once, for any chunks in any order. Not differentiable.

    Args:
        num_heads, head_dim, value_dim: Hs, D and Dv of the state.
        feature_map: "taylor1", "taylor2" or "elu".
        centers: where to expand. "mean": around the mean of all rows so far, which need not be known beforehand (sums
            of polynomials can be moved; not with "elu"). A tensor [(N,) Hs, C, D], for instance
            `prefix_to_state(some_keys, some_values, centers=64).centers`; only "taylor1" may have more than one centre.
            None: around 0.
        num_states: number N of states of a stack; None for one state, without that dimension.
        scale, feature_scale: as in `prefix_to_state`.
        device: device of the sums and of the rows to be added.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        value_dim: int,
        feature_map: str = "taylor1",
        *,
        centers: str | Tensor | None = "mean",
        num_states: int | None = None,
        scale: float | None = None,
        feature_scale: float | None = None,
        device: torch.device | str = "cpu",
    ):
        for name, size in (("num_heads", num_heads), ("head_dim", head_dim), ("value_dim", value_dim)):
            checks.check_int(name, size, minimum=1)
        self._feature_map = get_feature_map(feature_map)
        self._lead: tuple[int, ...] = (num_heads,)
        if num_states is not None:
            checks.check_int("num_states", num_states, minimum=1)
            self._lead = (num_states, num_heads)
        scale = 1 / math.sqrt(head_dim) if scale is None else scale
        checks.check_finite("scale", scale, positive=True)
        self._feature_scale = math.sqrt(scale) if feature_scale is None else feature_scale
        checks.check_finite("feature_scale", self._feature_scale, positive=True)
        self._key_scale = scale / self._feature_scale
        self._head_dim, self._value_dim = head_dim, value_dim
        self._follows_mean = isinstance(centers, str)
        num_centers = 1
        if self._follows_mean:
            if centers != "mean":
                raise ValueError(f"`centers` must be 'mean', a tensor or None, got {centers!r}")
            if not self._feature_map.is_polynomial:
                raise ValueError(
                    f"`centers` must be a tensor or None with feature_map={feature_map!r}, whose sums cannot be moved "
                    "to a mean that is not known yet, got 'mean'"
                )
            centers = torch.zeros(*self._lead, 1, head_dim)
        elif centers is not None:
            if not isinstance(centers, Tensor):
                raise TypeError(f"`centers` must be 'mean', a tensor or None, got {type(centers).__name__}")
            checks.check_floating("centers", centers)
            letters = "Hs C D" if num_states is None else "N Hs C D"
            checks.check_shape("centers", centers, (*self._lead, None, head_dim), letters)
            num_centers = centers.shape[-2]
            self._feature_map.check_num_centers(num_centers)
        if centers is not None:
            dtype = torch.promote_types(centers.dtype, torch.float32)
            centers = centers.detach().to(device, dtype, copy=True)  # the caller's may change, the sums' must not
        self._centers = centers
        num_features = self._feature_map.dim(head_dim)
        sizes = ((num_features, value_dim), (num_features,), ())
        self._z, self._k, self._count = (
            torch.zeros(*self._lead, num_centers, *size, dtype=torch.float64, device=device) for size in sizes
        )
        self._turnover = torch.zeros(*self._lead, 1, dtype=torch.float64, device=device)  # Σ|w| of all centres

    @property
    def count(self) -> Tensor:
        """The number of rows so far, or the sum of their weights, by centre: [(N,) Hs, C]."""
        return self._count.clone()

    def update(self, prefix_key: Tensor, prefix_value: Tensor, weights: Tensor | None = None) -> "PrefixAccumulator":
        """Adds rows [(N,) Hs, m, D] with values [(N,) Hs, m, Dv], each `weights` [(N,) Hs, m] times (None: once).

        Raises:
            TypeError, ValueError: an argument does not fit or a row is not finite. Then nothing is added.
        """
        self._add(prefix_key, prefix_value, weights, 1)
        return self

    def subtract(self, prefix_key: Tensor, prefix_value: Tensor, weights: Tensor | None = None) -> "PrefixAccumulator":
        """Subtracts rows that were added before; arguments as in `update`."""
        self._add(prefix_key, prefix_value, weights, -1)
        return self

    @torch.no_grad()
    def _add(self, prefix_key: Tensor, prefix_value: Tensor, weights: Tensor | None, sign: int) -> None:
        letters = "Hs m" if len(self._lead) == 1 else "N Hs m"
        checks.check_floating("prefix_key", prefix_key)
        checks.check_floating("prefix_value", prefix_value)
        checks.check_shape("prefix_key", prefix_key, (*self._lead, None, self._head_dim), f"{letters} D")
        rows = prefix_key.shape[-2]
        checks.check_shape("prefix_value", prefix_value, (*self._lead, rows, self._value_dim), f"{letters} Dv")
        if prefix_value.dtype != prefix_key.dtype:
            raise ValueError(
                f"`prefix_value` must have the dtype of `prefix_key`, {prefix_key.dtype}, got {prefix_value.dtype}"
            )
        given = {"prefix_key": prefix_key, "prefix_value": prefix_value}
        if weights is not None:
            checks.check_floating("weights", weights)
            checks.check_shape("weights", weights, (*self._lead, rows), letters)
            given["weights"] = weights
        for name, tensor in given.items():
            if tensor.device != self._z.device:
                raise ValueError(f"`{name}` must be on the accumulator's device, {self._z.device}, got {tensor.device}")
            checks.check_finite_rows(name, tensor)
        if rows == 0:
            return
        if self._follows_mean and not self._count.any():
            self._move_to(prefix_key.double().mean(-2, keepdim=True).float())
        sums_dtype = torch.promote_types(prefix_key.dtype, torch.float32)
        if sign < 0:
            weights = -(prefix_key.new_ones(prefix_key.shape[:-1]) if weights is None else weights)
        keys, values = prefix_key.flatten(0, -3), prefix_value.flatten(0, -3)
        weights = None if weights is None else weights.flatten(0, -2)
        centers = None if self._centers is None else self._centers.to(sums_dtype).flatten(0, -3)
        inputs = SumInputs(
            keys, values, None if weights is None else weights.to(sums_dtype), centers, self._feature_map.name,
            self._key_scale, sums_backend(keys, values),
        )  # fmt: skip
        z, k, count = library.sum_features(inputs)
        turnover = keys.new_full((len(keys),), rows, dtype=torch.float64)
        if weights is not None:
            # The op rounds sums of weights to float32, too coarsely to tell when all rows have been subtracted again.
            weights, turnover = weights.double(), weights.double().abs().sum(-1)
            heads = torch.arange(len(keys), device=keys.device)[:, None].expand(-1, rows)
            nearest = nearest_centers(keys, centers) if count.shape[1] > 1 else torch.zeros_like(heads)
            count = torch.zeros_like(count, dtype=torch.float64)
            count.index_put_((heads, nearest), weights, accumulate=True)  # in a fixed order, on GPUs too
        for total, part in zip(self._totals(), (z, k, count, turnover), strict=True):
            total += part.reshape(total.shape)

    @torch.no_grad()
    def merge(self, other: "PrefixAccumulator") -> "PrefixAccumulator":
        """Adds the rows of another accumulator, which was made with the same arguments.

        Raises:
            TypeError, ValueError: if it was not.
        """
        if not isinstance(other, PrefixAccumulator):
            raise TypeError(f"`other` must be a PrefixAccumulator, got {type(other).__name__}")
        if other._arguments() != self._arguments():
            raise ValueError(
                f"`other` must be made with the arguments of this accumulator, {self._arguments()}, got "
                f"{other._arguments()}"
            )
        if not self._follows_mean and self._centers is not None and not torch.equal(self._centers, other._centers):
            raise ValueError("`other` must have the centers of this accumulator, got other ones")
        if self._follows_mean and not self._count.any():
            self._move_to(other._centers)
        theirs = (*other._around(self._centers), *other._totals()[2:])
        for total, part in zip(self._totals(), theirs, strict=True):
            total += part
        return self

    @torch.no_grad()
    def all_reduce(self, group: "torch.distributed.ProcessGroup | None" = None) -> "PrefixAccumulator":
        """Sums the accumulators of all processes of a `torch.distributed` group: each then has the whole prefix.

        Every process of the group has to call it, even one without rows, and only once: a second call would count the
        rows of each process as often as there are processes.

        Raises:
            ValueError: if the processes have different centres.
        """
        from torch import distributed

        if self._follows_mean:
            rows = self._sum_of_keys()
            for tensor in (rows, count := self._count.clone()):
                distributed.all_reduce(tensor, group=group)
            distributed.all_reduce(turnover := self._turnover.clone(), group=group)
            self._move_to(_mean_key(rows, count, turnover).float())
        elif self._centers is not None:
            extremes = torch.stack([self._centers, -self._centers])
            distributed.all_reduce(extremes, distributed.ReduceOp.MAX, group=group)
            if not torch.equal(extremes[0], -extremes[1]):
                raise ValueError("`centers` must be the same in all processes of the group, got different ones")
        for tensor in self._totals():
            distributed.all_reduce(tensor, group=group)
        return self

    @torch.no_grad()
    def state(self, dtype: torch.dtype = torch.float32) -> PrefixState:
        """Returns the state of all rows so far in `dtype`, as `prefix_to_state` converts them in closed form.

        Raises:
            ValueError: if more was subtracted than added.
        """
        if (self._count < -_ROUNDING * self._turnover).any():
            raise ValueError(f"`subtract` must take away what was added, got {self._count.min():g} rows of a centre")
        count = self._count.where(self._count > _ROUNDING * self._turnover, 0)
        centers = self._centers
        if self._follows_mean:  # rounded to `dtype` before the sums are moved to them
            centers = _mean_key(self._sum_of_keys(), count, self._turnover)
        centers = None if centers is None else centers.to(dtype)
        z, k = self._around(centers)
        if centers is None:
            z, k, count = z.squeeze(-3), k.squeeze(-2), count.squeeze(-1)
        else:
            centers = centers.double()
        return state_of_sums(z, k, count, centers, self._feature_map.name, self._feature_scale).to(dtype)

    def _arguments(self) -> dict[str, object]:
        return {
            "num_heads": self._lead[-1], "head_dim": self._head_dim, "value_dim": self._value_dim,
            "feature_map": self._feature_map.name, "num_states": self._lead[0] if len(self._lead) == 2 else None,
            "centers": "mean" if self._follows_mean else None if self._centers is None else self._count.shape[-1],
            "scale": self._key_scale * self._feature_scale, "feature_scale": self._feature_scale,
            "device": self._z.device,
        }  # fmt: skip

    def _sum_of_keys(self) -> Tensor:
        """Returns the sum of the keys [..., 1, D]."""
        linear = self._k[..., 1 : 1 + self._head_dim]  # in every polynomial map the sum of key_scale · (key - centre)
        return linear / self._key_scale + self._count.unsqueeze(-1) * self._centers

    def _totals(self) -> tuple[Tensor, ...]:
        return self._z, self._k, self._count, self._turnover

    def _move_to(self, centers: Tensor) -> None:
        """Moves the sums from the mean so far to `centers`."""
        self._z, self._k = self._around(centers)
        self._centers = centers

    def _around(self, centers: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns z and k around `centers`, as if all rows had been added around them."""
        if not self._follows_mean:
            return self._z, self._k
        move = (centers.double() - self._centers.double()).squeeze(-2) * self._key_scale
        both = torch.cat([self._z, self._k.unsqueeze(-1)], dim=-1).squeeze(-3)
        both = self._feature_map.moved(both, move.unsqueeze(-1)).unsqueeze(-3)
        return both[..., :-1].contiguous(), both[..., -1].contiguous()  # all_reduce needs it


def _mean_key(sum_of_keys: Tensor, count: Tensor, turnover: Tensor) -> Tensor:
    """Returns the mean key [..., 1, D], 0 where no rows are left."""
    return (sum_of_keys / count.unsqueeze(-1)).where((count > _ROUNDING * turnover).unsqueeze(-1), 0)
