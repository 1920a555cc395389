"""`NTKPrefix`: a prefix state whose tensors are trained."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import checks, optimizer_eps
from .feature_maps import REGISTRY, get_feature_map
from .state import PrefixState

AUTO = "auto"
POSITIVE = ("softplus", "exp", None)
_STD = 0.1  # of random keys and centres: they have to differ, but to weigh about the same


@dataclass
class PrefixOptions:
    """The options of a trained prefix that do not depend on its layer; `NTKPrefix` explains them."""

    feature_map: str | None = "elu"
    rank: int | None = None
    centers: int | Tensor | None = None
    num_rows: int = 0
    positive: str | None = "softplus"
    scale_by_k: bool = True
    log_scale: bool = False
    feature_scale: float | None = None
    init_mass: float = 1e-6

    def check_options(self) -> None:
        """Raises TypeError or ValueError if an option does not fit; `PrefixState` checks the rest."""
        if self.rank is not None:
            checks.check_int("rank", self.rank, minimum=1)
        checks.check_int("num_rows", self.num_rows, minimum=0)
        checks.check_one_of("feature_map", self.feature_map, (*REGISTRY, None))
        checks.check_one_of("positive", self.positive, POSITIVE)
        checks.check_bool("scale_by_k", self.scale_by_k)
        checks.check_bool("log_scale", self.log_scale)
        checks.check_finite("init_mass", self.init_mass, positive=True)
        if self.feature_map is not None:
            return
        for name, is_given in (
            ("rank", self.rank is not None), ("centers", self.centers is not None), ("log_scale", self.log_scale),
            ("feature_scale", self.feature_scale is not None),
        ):  # fmt: skip
            if is_given:
                raise ValueError(f"`{name}` must come with a `feature_map`, got feature_map=None")
        if self.num_rows == 0:
            raise ValueError("`num_rows` must be at least 1 with feature_map=None, got 0")


def resolved_map(feature_map: str | None, num_rows: int = 0, **options: Any) -> str | None:
    """Returns `feature_map`, or for "auto" None (rows only) if of the options only `num_rows` is of a state's parts,
    else "elu"."""
    if feature_map != AUTO:
        return feature_map
    has_options = any(
        options.get(name) not in (None, False) for name in ("rank", "centers", "log_scale", "feature_scale")
    )
    return None if num_rows and not has_options else PrefixOptions.feature_map


def options_of_state(state: PrefixState) -> dict[str, Any]:
    """Returns the `PrefixOptions` that a single state determines, by name.

    Raises:
        TypeError, ValueError: if `state` is not a single PrefixState.
    """
    if not isinstance(state, PrefixState):
        raise TypeError(f"`state` must be a PrefixState, got {type(state).__name__}")
    if state.is_stack:
        raise ValueError(f"`state` must be a single state, got a stack of {state.num_states}")
    return {
        "feature_map": state.feature_map,
        "rank": state.rank or None,  # a pair of rank 0 is a Z of 0
        "centers": None if state.centers is None else state.num_centers,
        "num_rows": state.num_rows,
        "log_scale": state.log_scale is not None,
        "feature_scale": state.feature_scale,
    }


class NTKPrefix(nn.Module):
    """The trainable prefix of one attention layer; calling it returns a `PrefixState` for `ntk_attention`.

    It starts close to no prefix: `Z` is zero and the mass that it adds to the denominator of the softmax is about
    `init_mass`, yet every parameter has a gradient from the first step on (`z_a` from the second). Gradients are as
    small as that mass: give Adam `eps=1e-15`, since its default of 1e-8 is larger than they are (a warning at the first
    step of such an optimizer says so).

    `k` has to stay positive, as attention divides by it. So its logarithm, or nearly that (`positive`), is trained:
    with "elu" of every entry, with "taylor1" and "taylor2" of the factor k_0 in k = k_0·[1, u] only, as the entries of
    u have either sign in real prefixes too.

    Parameters are float32 (or float64) and stay so under a half-precision model: `.to(torch.bfloat16)` and `.half()`
    move a prefix to another device but do not round it, so that small steps are not lost. `ntk_attention` takes a
    float32 state beside half-precision queries as it is.

    Args:
        num_heads: Hs, the number of query heads or of key/value heads of the layer.
        head_dim: D, of queries and keys.
        feature_map: "elu", "taylor1", "taylor2", or None for a prefix of `num_rows` rows only.
        value_dim: Dv, of values; default D.
        rank: s, to train z_a [Hs, C?, r, s] and z_b [Hs, C?, s, Dv], which starts at zero, instead of their product Z.
        centers: the points to expand around, which are trained too: a tensor [Hs, C, D] (means of real keys), or their
            number C for a random start. None: the origin, not trained. Only "taylor1" may have more than one centre.
        num_rows: R, rows kept exactly (keys, values and log weights), as prefix tuning trains them.
        positive: "softplus" or "exp", the function that gives k from its parameter. None trains k itself, which may
            become negative.
        scale_by_k: whether to train U in Z = diag(k)·U ("taylor1" and "taylor2": Z = k_0·U), the value of each feature
            instead of its value times its mass. With "elu" the output of the prefix is then a weighted mean of the rows
            of U. False trains Z itself, which attention multiplies by e^-lse: by thousands where all scores of a query
            are low (the first token in some layers of real decoders), so that the first steps of an optimizer undo the
            model.
        log_scale: whether to train β_c too, the log weight of each centre (of Z and k as a whole without centres), from
            0 on.
        feature_scale: factor on the query inside φ; default sqrt(scale) of the call.
        init_mass: approximate mass that the features, and likewise the rows, add to the denominator of the softmax at
            the start. Where the denominator of a query is small (see `scale_by_k`), even 1e-4 is a noticeable share. On
            the other hand, parameters that act in proportion to the mass matter only once it has grown, with Adam by a
            factor of e in 1 / learning rate steps: a model that tolerates it learns sooner from 0.01.
        device, dtype: of the parameters; float32 or float64.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    # The parameters, None where the options leave them out.
    z: nn.Parameter | None
    z_a: nn.Parameter | None
    z_b: nn.Parameter | None
    raw_k: nn.Parameter | None
    centers: nn.Parameter | None
    log_scale: nn.Parameter | None
    keys: nn.Parameter | None
    values: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        feature_map: str | None = "elu",
        *,
        value_dim: int | None = None,
        rank: int | None = None,
        centers: int | Tensor | None = None,
        num_rows: int = 0,
        positive: str | None = "softplus",
        scale_by_k: bool = True,
        log_scale: bool = False,
        feature_scale: float | None = None,
        init_mass: float = 1e-6,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        value_dim = head_dim if value_dim is None else value_dim
        for name, size in (("num_heads", num_heads), ("head_dim", head_dim), ("value_dim", value_dim)):
            checks.check_int(name, size, minimum=1)
        options = PrefixOptions(
            feature_map, rank, centers, num_rows, positive, scale_by_k, log_scale, feature_scale, init_mass
        )
        options.check_options()
        checks.check_one_of("dtype", dtype, (torch.float32, torch.float64))
        self.num_heads, self.head_dim, self.value_dim = num_heads, head_dim, value_dim
        self.feature_map, self.feature_scale = feature_map, feature_scale
        self.positive, self.scale_by_k = positive, scale_by_k
        self.rank, self.num_rows = rank, num_rows

        def parameter(*shape: int, std: float = 0.0) -> nn.Parameter:
            tensor = torch.zeros(num_heads, *shape, device=device, dtype=dtype)
            return nn.Parameter(tensor.normal_(std=std) if std else tensor)

        self.centers = self.log_scale = self.z = self.z_a = self.z_b = self.raw_k = None
        if feature_map is not None:
            self._add_features(options, parameter)
        self.keys = self.values = self.bias = None
        if num_rows:
            self.keys, self.values = parameter(num_rows, head_dim, std=_STD), parameter(num_rows, value_dim)
            self.bias = parameter(num_rows)
            with torch.no_grad():
                self.bias.fill_(math.log(init_mass / num_rows))
        with torch.no_grad():
            PrefixState(**self._state())  # for its checks
        optimizer_eps.watch(self)

    def _add_features(self, options: PrefixOptions, parameter: Callable[..., nn.Parameter]) -> None:
        feature_map = get_feature_map(options.feature_map)
        mid: tuple[int, ...] = ()
        r = feature_map.dim(self.head_dim)
        if options.centers is not None:
            self.centers = self._make_centers(options.centers, parameter)
            mid = (self.centers.shape[1],)
        if self.rank is None:
            self.z = parameter(*mid, r, self.value_dim)
        else:
            self.z_a = parameter(*mid, r, self.rank, std=1 / math.sqrt(self.rank))
            self.z_b = parameter(*mid, self.rank, self.value_dim)
        self.raw_k = parameter(*mid, r)
        self.log_scale = parameter(*mid) if options.log_scale else None
        # The mass of a polynomial map is that of its first feature, which is 1.
        share = options.init_mass / (math.prod(mid) if feature_map.is_polynomial else r)
        start = _inverse(torch.tensor(share, dtype=torch.float64, device="cpu"), self.positive).item()
        with torch.no_grad():
            (self.raw_k[..., 0] if feature_map.is_polynomial else self.raw_k).fill_(start)

    def _make_centers(self, centers: int | Tensor, parameter: Callable[..., nn.Parameter]) -> nn.Parameter:
        if not isinstance(centers, Tensor):
            checks.check_int("centers", centers, minimum=1)
            return parameter(centers, self.head_dim, std=_STD)
        checks.check_floating("centers", centers)
        checks.check_shape("centers", centers, (self.num_heads, None, self.head_dim), "Hs C D")
        values = parameter(centers.shape[1], self.head_dim)
        with torch.no_grad():
            values.copy_(centers)
        return values

    @classmethod
    def from_state(cls, state: PrefixState, *, positive: str | None = None, scale_by_k: bool = False) -> "NTKPrefix":
        """Makes a prefix that starts as `state`, for instance a converted one; all tensors of it are trained.

        By default the first state that it returns is `state` to the bit. With `positive` and `scale_by_k`, which the
        class explains, it is the same up to rounding.

        Args:
            state: a single state, not a stack. Parameters are float32, or float64 if one of its tensors is. A pair of
                rank 0 is trained as its product.

        Raises:
            TypeError, ValueError: if it is not a single state, or if entries of its `k` that have to be positive for
                `positive` or `scale_by_k` are not.
        """
        options = options_of_state(state)
        tensors = state.detach().tensors()
        is_wide = any(tensor.dtype == torch.float64 for tensor in tensors.values())
        prefix = cls(
            state.num_heads, state.head_dim, value_dim=state.value_dim, **options, positive=positive,
            scale_by_k=scale_by_k, device=state.device, dtype=torch.float64 if is_wide else torch.float32,
        )  # fmt: skip
        if state.rank == 0:
            tensors["z"] = state.full_z
        if state.num_rows and state.bias is None:
            tensors["bias"] = state.keys.new_zeros(state.keys.shape[:-1])
        if state.k is not None:
            k = tensors.pop("k").double()
            is_polynomial = get_feature_map(state.feature_map).is_polynomial
            weight = k[..., :1] if is_polynomial else k
            if (positive is not None or scale_by_k) and not (weight > 0).all():
                name = "`state.k[..., 0]`" if is_polynomial else "`state.k`"
                raise ValueError(
                    f"{name} must be positive with positive={positive!r} and scale_by_k={scale_by_k}, got values down "
                    f"to {weight.min().item():.6g}"
                )
            if scale_by_k:
                name = "z_a" if state.rank else "z"
                tensors[name] = tensors[name].double() / weight[..., None]
            if positive is not None and is_polynomial:
                tensors["raw_k"] = torch.cat([_inverse(weight, positive), k[..., 1:] / weight], dim=-1)
            else:
                tensors["raw_k"] = _inverse(k, positive)
        with torch.no_grad():
            for name, parameter in prefix.named_parameters():
                parameter.copy_(tensors[name])
        return prefix

    def forward(self) -> PrefixState:
        """Returns the state, differentiable in every parameter."""
        values = self._state()
        return PrefixState(**values) if torch.compiler.is_compiling() else PrefixState.unchecked(values)

    def _state(self) -> dict[str, Any]:
        """Returns the arguments of the state; their shapes are checked when the prefix is made."""
        tensors: dict[str, Any] = {name: getattr(self, name) for name in ("z", "z_a", "z_b", "centers", "log_scale")}
        if self.raw_k is not None:
            tensors["k"], weight = self._k_and_weight()
            if self.scale_by_k:
                name = "z" if self.rank is None else "z_a"
                tensors[name] = weight[..., None] * tensors[name]
        return tensors | {
            "keys": self.keys, "values": self.values, "bias": self.bias, "feature_map": self.feature_map,
            "feature_scale": self.feature_scale,
        }  # fmt: skip

    def state_and_index(self, batch: int) -> tuple[PrefixState, Tensor | None]:
        """Returns the state, and None, as there is no stack of which `batch` rows would choose.

        Attention layers get their prefix by this method (`ntk_kernels.integrations.transformers`).
        """
        return self(), None

    def param_count(self) -> int:
        """Returns the number of trained values."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def options(self) -> dict[str, Any]:
        """Arguments that make a prefix with parameters of the same shapes and meaning, fit for JSON."""
        return {
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
            "feature_map": self.feature_map,
            "value_dim": self.value_dim,
            "rank": self.rank,
            "centers": None if self.centers is None else self.centers.shape[1],
            "num_rows": self.num_rows,
            "positive": self.positive,
            "scale_by_k": self.scale_by_k,
            "log_scale": self.log_scale is not None,
            "feature_scale": None if self.feature_scale is None else float(self.feature_scale),
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def _k_and_weight(self) -> tuple[Tensor, Tensor]:
        """Returns k and the factor of `scale_by_k`: k itself, or k_0 for polynomial maps."""
        if not get_feature_map(self.feature_map).is_polynomial:
            k = _positive(self.raw_k, self.positive)
            return k, k
        if self.positive is None:
            return self.raw_k, self.raw_k[..., :1]
        weight = _positive(self.raw_k[..., :1], self.positive)
        return torch.cat([weight, weight * self.raw_k[..., 1:]], dim=-1), weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NTKPrefix":
        """Moves the parameters, but does not round them to half precision."""

        def without_rounding(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(result.device)  # the original values: `result` is rounded already
            return result

        return super()._apply(without_rounding, recurse)


def _positive(raw: Tensor, positive: str | None) -> Tensor:
    if positive is None:
        return raw
    return F.softplus(raw) if positive == "softplus" else raw.exp()


def _inverse(k: Tensor, positive: str | None) -> Tensor:
    """Returns the parameter from which `_positive` computes k."""
    if positive is None:
        return k
    return k + torch.log(-torch.expm1(-k)) if positive == "softplus" else k.log()
