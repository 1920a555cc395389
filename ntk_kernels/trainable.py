"""`NTKPrefix`: a prefix state whose tensors are trained."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import checks
from .feature_maps import REGISTRY, get_feature_map
from .state import PrefixState

POSITIVE = ("softplus", "exp", None)
_STD = 0.1  # of keys and centres that start at random: they have to differ, and to weigh about the same


class NTKPrefix(nn.Module):
    """The trainable prefix of one attention layer; calling it gives the `PrefixState` to be given to `ntk_attention`.

    It starts close to no prefix at all: `Z` is zero, and the mass that the prefix adds to the denominator of the
    softmax about `init_mass`, while every parameter has a gradient from the first step on (`z_a` from the second).
    Gradients are as small as that mass: give Adam `eps=1e-15`, its default of 1e-8 would be larger than they are.

    `k` has to stay positive: attention divides by it. So its logarithm is trained, or close to that (`positive`):
    all of k with "elu"; with "taylor1" and "taylor2" the factor k_0 in k = k_0·[1, u], whose other entries have either
    sign in real prefixes too.

    Parameters are float32 (or float64) and stay so under a half-precision model: `.to(torch.bfloat16)` and `.half()`
    move a prefix to another device, but do not round it, so that steps that are small against a parameter are not lost.
    `ntk_attention` takes a float32 state beside half-precision queries as it is.

    Args:
        num_heads: Hs, the number of query heads or of key/value heads of the layer.
        head_dim: D, of queries and keys.
        feature_map: "elu", "taylor1", "taylor2", or None for a prefix of `num_rows` rows and nothing else.
        value_dim: Dv, of values; default D.
        rank: s, to train z_a [Hs, C?, r, s] and z_b [Hs, C?, s, Dv], which starts at zero, instead of Z, their product.
        centers: the points to expand around, trained as well: a tensor [Hs, C, D] (means of real keys), or their
            number C, to start at random; None is the origin, not trained. More than one goes with "taylor1" only.
        num_rows: R, rows kept exactly (keys, values and log weights), as prefix tuning trains them.
        positive: "softplus" or "exp", what makes k of its parameter; None trains k as it is, which may go below zero.
        scale_by_k: train U in Z = diag(k)·U (with "taylor1" and "taylor2" Z = k_0·U): what a feature is worth, not the
            sum of what belongs to it. With "elu" the prefix then gives a mean of the rows of U. False trains Z itself,
            which attention multiplies by e^-lse: by thousands where all of a row's scores are low (the first token in
            some layers of real decoders), and the first steps of an optimizer undo the model.
        log_scale: train β_c as well, the log weight of each centre (of all of Z and k without centres), from 0.
        feature_scale: factor on the query inside φ; default sqrt(scale) of the call.
        init_mass: about what the features, and the rows, add to the denominator of the softmax at the start. Where a
            row's own softmax is small (see `scale_by_k`), even 1e-4 takes a share that is felt. In turn, what is in
            proportion to the mass begins to matter when that has grown, in Adam by a factor of e in 1 / learning rate
            steps: a model that bears it learns sooner from 0.01.
        device, dtype: of the parameters; float32 or float64.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """

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
        device=None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        value_dim = head_dim if value_dim is None else value_dim
        for name, size in (("num_heads", num_heads), ("head_dim", head_dim), ("value_dim", value_dim)):
            checks.check_int(name, size, minimum=1)
        if rank is not None:
            checks.check_int("rank", rank, minimum=1)
        checks.check_int("num_rows", num_rows, minimum=0)
        checks.check_one_of("feature_map", feature_map, (*REGISTRY, None))
        checks.check_one_of("positive", positive, POSITIVE)
        checks.check_bool("scale_by_k", scale_by_k)
        checks.check_bool("log_scale", log_scale)
        checks.check_finite("init_mass", init_mass, positive=True)
        checks.check_one_of("dtype", dtype, (torch.float32, torch.float64))
        if feature_map is None:
            for name, given in (
                ("rank", rank is not None), ("centers", centers is not None), ("log_scale", log_scale),
                ("feature_scale", feature_scale is not None),
            ):  # fmt: skip
                if given:
                    raise ValueError(f"`{name}` must come with a `feature_map`, got feature_map=None")
            if num_rows == 0:
                raise ValueError("`num_rows` must be at least 1 with feature_map=None, got 0")
        self.feature_map, self.feature_scale = feature_map, feature_scale
        self.positive, self.scale_by_k = positive, scale_by_k
        self.num_heads, self.head_dim, self.value_dim = num_heads, head_dim, value_dim
        self.rank, self.num_rows = rank, num_rows

        def parameter(*shape, std=0.0):
            tensor = torch.zeros(num_heads, *shape, device=device, dtype=dtype)
            return nn.Parameter(tensor.normal_(std=std) if std else tensor)

        self.centers = self.log_scale = self.z = self.z_a = self.z_b = self.raw_k = None
        if feature_map is not None:
            mid, r = (), get_feature_map(feature_map).dim(head_dim)
            if centers is not None:
                self.centers = self._centers(centers, parameter)
                mid = (self.centers.shape[1],)
            if rank is None:
                self.z = parameter(*mid, r, value_dim)
            else:
                self.z_a = parameter(*mid, r, rank, std=1 / math.sqrt(rank))
                self.z_b = parameter(*mid, rank, value_dim)
            self.raw_k = parameter(*mid, r)
            self.log_scale = parameter(*mid) if log_scale else None
            has_one = get_feature_map(feature_map).is_polynomial  # a feature that is 1 and has all of the mass
            share = init_mass / (math.prod(mid) if has_one else r)
            start = _inverse(torch.tensor(share, dtype=torch.float64, device="cpu"), positive).item()
            with torch.no_grad():
                (self.raw_k[..., 0] if has_one else self.raw_k).fill_(start)
        self.keys = self.values = self.bias = None
        if num_rows:
            self.keys, self.values = parameter(num_rows, head_dim, std=_STD), parameter(num_rows, value_dim)
            self.bias = parameter(num_rows)
            with torch.no_grad():
                self.bias.fill_(math.log(init_mass / num_rows))
        with torch.no_grad():
            self()  # what PrefixState checks

    def _centers(self, centers: int | Tensor, parameter) -> nn.Parameter:
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
        """A prefix that starts as `state`, converted from a real prefix, say; every tensor of it is trained.

        By default what it gives is `state` to the bit. With `positive` and `scale_by_k` (which the class explains) it
        is the same up to rounding.

        Args:
            state: one state, no stack; kept in float32, or float64 if one of its tensors is.

        Raises:
            TypeError, ValueError: if it is not; and if entries of its `k` that `positive` or `scale_by_k` needs to be
                above zero are not.
        """
        if not isinstance(state, PrefixState):
            raise TypeError(f"`state` must be a PrefixState, got {type(state).__name__}")
        if state.is_stack:
            raise ValueError(f"`state` must be a single state, got a stack of {state.num_states}")
        tensors = state.detach().tensors()
        wide = any(tensor.dtype == torch.float64 for tensor in tensors.values())
        prefix = cls(
            state.num_heads, state.head_dim, state.feature_map, value_dim=state.value_dim, rank=state.rank,
            centers=None if state.centers is None else state.num_centers, num_rows=state.num_rows, positive=positive,
            scale_by_k=scale_by_k, log_scale=state.log_scale is not None, feature_scale=state.feature_scale,
            device=state.device, dtype=torch.float64 if wide else torch.float32,
        )  # fmt: skip
        if state.num_rows and state.bias is None:
            tensors["bias"] = state.keys.new_zeros(state.keys.shape[:-1])
        if state.k is not None:
            k = tensors.pop("k").double()
            has_one = get_feature_map(state.feature_map).is_polynomial
            weight = k[..., :1] if has_one else k
            if (positive is not None or scale_by_k) and not (weight > 0).all():
                what = "`state.k[..., 0]`" if has_one else "`state.k`"
                raise ValueError(
                    f"{what} must be positive with positive={positive!r} and scale_by_k={scale_by_k}, got values down "
                    f"to {weight.min().item():.6g}"
                )
            if scale_by_k:
                name = "z" if state.rank is None else "z_a"
                tensors[name] = tensors[name].double() / weight[..., None]
            if positive is not None and has_one:
                tensors["raw_k"] = torch.cat([_inverse(weight, positive), k[..., 1:] / weight], dim=-1)
            else:
                tensors["raw_k"] = _inverse(k, positive)
        with torch.no_grad():
            for name, parameter in prefix.named_parameters():
                parameter.copy_(tensors[name])
        return prefix

    def forward(self) -> PrefixState:
        """The state, differentiable in every parameter."""
        tensors = {name: getattr(self, name) for name in ("z", "z_a", "z_b", "centers", "log_scale")}
        if self.raw_k is not None:
            tensors["k"], weight = self._mass()
            if self.scale_by_k:
                name = "z" if self.rank is None else "z_a"
                tensors[name] = weight[..., None] * tensors[name]
        return PrefixState(
            **tensors, keys=self.keys, values=self.values, bias=self.bias, feature_map=self.feature_map,
            feature_scale=self.feature_scale,
        )  # fmt: skip

    def state_and_index(self, batch: int) -> tuple[PrefixState, Tensor | None]:
        """The state, and which state of a stack each of `batch` rows uses: None, since there is but one.

        This is what an attention layer asks of its prefix (`ntk_kernels.integrations.transformers`).
        """
        return self(), None

    def param_count(self) -> int:
        """The number of trained values."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def options(self) -> dict:
        """The arguments that make a prefix of the same parameters, as JSON can hold them."""
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

    def _mass(self) -> tuple[Tensor, Tensor]:
        """k, and the weight of each feature that `scale_by_k` takes: k, or k_0."""
        if not get_feature_map(self.feature_map).is_polynomial:
            k = _positive(self.raw_k, self.positive)
            return k, k
        if self.positive is None:
            return self.raw_k, self.raw_k[..., :1]
        weight = _positive(self.raw_k[..., :1], self.positive)
        return torch.cat([weight, weight * self.raw_k[..., 1:]], dim=-1), weight

    def _apply(self, fn, recurse=True):
        """Moves the parameters, but does not round them to half precision."""

        def without_rounding(tensor):
            result = fn(tensor)
            if result.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(result.device)  # not of `result`, which is rounded already
            return result

        return super()._apply(without_rounding, recurse)


def _positive(raw: Tensor, positive: str | None) -> Tensor:
    if positive is None:
        return raw
    return F.softplus(raw) if positive == "softplus" else raw.exp()


def _inverse(k: Tensor, positive: str | None) -> Tensor:
    """What `_positive` makes k of."""
    if positive is None:
        return k
    return k + torch.log(-torch.expm1(-k)) if positive == "softplus" else k.log()
