"""NTKPrefix starts as next to nothing, trains from the first step, and can be a converted state to the bit."""

import copy
import math

import pytest
import torch
from oracle import F64

from ntk_kernels import NTKPrefix, PrefixState, ntk_attention, prefix_to_state, reference

HEADS, DIM = 2, 8
OPTIONS = {
    "elu": {},
    "taylor1": {"feature_map": "taylor1"},
    "taylor2": {"feature_map": "taylor2"},
    "low_rank": {"rank": 3},
    "centers": {"feature_map": "taylor1", "centers": 3, "log_scale": True},
    "sums": {"scale_by_k": False},
    "taylor1_sums": {"feature_map": "taylor1", "scale_by_k": False},
    "low_rank_sums": {"rank": 3, "scale_by_k": False},
    "all_parts": {"feature_map": "taylor1", "centers": 2, "rank": 2, "num_rows": 3, "value_dim": 5},
    "taylor2_exp": {"feature_map": "taylor2", "centers": 1, "positive": "exp"},
    "rows": {"feature_map": None, "num_rows": 4},
    "exp": {"positive": "exp"},
    "free": {"positive": None, "feature_scale": 0.5},
    "taylor1_free": {"feature_map": "taylor1", "positive": None},
}

all_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))


def make(options, **more):
    return NTKPrefix(HEADS, DIM, **{"feature_map": "elu"} | options | more)


def inputs(value_dim=DIM, dtype=torch.float32):
    query, key = torch.randn(2, 2, HEADS, 9, DIM).to(dtype).unbind()
    return query, key, torch.randn(2, HEADS, 9, value_dim).to(dtype)


def randomise(prefix):
    """Moves a prefix far from its start: masses of about 1, values of either sign."""
    with torch.no_grad():
        for name, parameter in prefix.named_parameters():
            parameter.normal_(std=0.3)
            if name == "raw_k" and prefix.positive is None:
                parameter.abs_()
    return prefix


@all_options
def test_starts_as_next_to_nothing(options):
    """The mass of the prefix is about `init_mass`; that of the first row's softmax is the exponential of its logit."""
    prefix = make(options, dtype=F64)
    query, key, value = inputs(prefix.value_dim, F64)
    without, lse = ntk_attention(query, key, value, is_causal=True, return_lse=True)
    with_prefix, lse_with = ntk_attention(query, key, value, prefix(), is_causal=True, return_lse=True)
    mass = lse_with.exp() - lse.exp()
    parts = (options.get("feature_map", "elu") is not None) + (options.get("num_rows", 0) > 0)
    assert mass.min() > 0
    assert mass.max() < 10 * parts * 1e-6
    share = (mass / lse_with.exp())[..., None]  # values are 0: this share of the output is missing
    torch.testing.assert_close(with_prefix, (1 - share) * without)


@all_options
def test_every_parameter_has_a_gradient_from_the_start(options):
    prefix = make(options)
    query, key, value = inputs(prefix.value_dim)
    ntk_attention(query, key, value, prefix(), is_causal=True).square().sum().backward()
    zero = [name for name, parameter in prefix.named_parameters() if not parameter.grad.abs().sum() > 0]
    # z_a multiplies z_b = 0, and gets a gradient after the first step of z_b.
    assert zero == (["z_a"] if "rank" in options else [])


@all_options
def test_training_lowers_the_loss(options):
    # Values in proportion to the mass wait for it to grow: by a factor of e in 1 / lr steps.
    in_proportion = options.get("scale_by_k", True) or options.get("num_rows", 0) > 0
    prefix = make(options, init_mass=0.01 if in_proportion else 1e-6)
    query, key, value = inputs(prefix.value_dim)
    prefix_key, prefix_value = torch.randn(HEADS, 50, DIM), torch.randn(HEADS, 50, prefix.value_dim)
    target = reference.prefix_attention(query, key, value, prefix_key, prefix_value, is_causal=True)
    optimizer = torch.optim.Adam(prefix.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (ntk_attention(query, key, value, prefix(), is_causal=True) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    if prefix.raw_k is not None and prefix.positive is not None:
        k = prefix().k
        assert ((k if prefix.feature_map == "elu" else k[..., 0]) > 0).all()


@all_options
def test_the_state_is_what_the_parametrisation_says(options):
    prefix = randomise(make(options, dtype=F64))
    state = prefix()
    assert state.num_heads == HEADS
    assert state.value_dim == options.get("value_dim", DIM)
    assert state.feature_map == options.get("feature_map", "elu")
    assert state.feature_scale == options.get("feature_scale")
    assert state.num_rows == options.get("num_rows", 0)
    if state.k is None:
        return
    make_positive = {"softplus": torch.nn.functional.softplus, "exp": torch.exp, None: lambda raw: raw}[prefix.positive]
    raw = prefix.raw_k
    if state.feature_map == "elu":
        k = weight = make_positive(raw)
    elif prefix.positive is None:
        k, weight = raw, raw[..., :1]
    else:
        weight = make_positive(raw[..., :1])
        k = weight * torch.cat([torch.ones_like(weight), raw[..., 1:]], dim=-1)
    z = prefix.z if "rank" not in options else prefix.z_a @ prefix.z_b
    if options.get("scale_by_k", True):
        z = weight.unsqueeze(-1) * z
    torch.testing.assert_close(state.k, k)
    torch.testing.assert_close(state.full_z, z)


@all_options
def test_options_and_state_dict_make_it_again(options):
    prefix = randomise(make(options))
    again = NTKPrefix(**prefix.options)
    again.load_state_dict(prefix.state_dict())
    assert_same(again(), prefix())
    assert prefix.param_count() == sum(parameter.numel() for parameter in prefix.parameters())


def test_param_count():
    assert NTKPrefix(HEADS, DIM).param_count() == HEADS * (DIM * DIM + DIM)
    assert NTKPrefix(HEADS, DIM, rank=3).param_count() == HEADS * (2 * DIM * 3 + DIM)
    assert NTKPrefix(HEADS, DIM, None, num_rows=5).param_count() == HEADS * 5 * (2 * DIM + 1)


def assert_same(state, expected):
    assert list(state.tensors()) == list(expected.tensors())
    for name, tensor in expected.tensors().items():
        assert torch.equal(getattr(state, name), tensor), name
    assert (state.feature_map, state.feature_scale) == (expected.feature_map, expected.feature_scale)


def converted(kind):
    key, value = torch.randn(HEADS, 40, DIM), torch.randn(HEADS, 40, DIM)
    if kind == "rows":
        return prefix_to_state(key, value, num_rows=5)
    if kind == "exact_rows":  # without bias
        return PrefixState(keys=key, values=value)
    if kind in ("low_rank", "rank_0"):
        rank = 2 if kind == "low_rank" else 0
        return PrefixState(k=torch.rand(HEADS, DIM), z_a=torch.randn(HEADS, DIM, rank), z_b=torch.randn(HEADS, rank, DIM), feature_map="elu")  # fmt: skip
    feature_map, centers = {"elu": ("elu", None), "taylor2": ("taylor2", "mean"), "centers": ("taylor1", 3)}[kind]
    return prefix_to_state(key, value, feature_map, centers=centers)


KINDS = ["elu", "taylor2", "centers", "low_rank", "rank_0", "rows", "exact_rows"]


@pytest.mark.parametrize("kind", KINDS)
def test_from_state_is_exact(kind):
    state = converted(kind)
    prefix = NTKPrefix.from_state(state)
    got = prefix()
    if kind == "exact_rows":
        assert torch.equal(got.bias, torch.zeros(HEADS, 40))
        got = PrefixState(keys=got.keys, values=got.values)
    if kind == "rank_0":
        state = PrefixState(state.full_z, state.k, "elu")
    assert_same(got, state)
    assert all(parameter.requires_grad for parameter in prefix.parameters())
    assert prefix().tensors().keys() == NTKPrefix(**prefix.options)().tensors().keys()


@pytest.mark.parametrize("scale_by_k", [False, True])
@pytest.mark.parametrize("positive", ["softplus", "exp"])
@pytest.mark.parametrize("kind", ["elu", "taylor2", "centers", "low_rank"])
def test_from_state_with_a_parametrisation_is_exact_up_to_rounding(kind, positive, scale_by_k):
    """The logarithm of k is rounded to float32 relative to its size, which is the relative error of k."""
    state = converted(kind)
    got = NTKPrefix.from_state(state, positive=positive, scale_by_k=scale_by_k)()
    eps = torch.finfo(torch.float32).eps
    for name, tensor in state.tensors().items():
        tolerance = 4 * eps * (1 + tensor[tensor != 0].abs().log().abs().max()).item()
        torch.testing.assert_close(getattr(got, name), tensor, rtol=tolerance, atol=0)
    assert prefix_requires_grad(got)


def prefix_requires_grad(state):
    return all(tensor.requires_grad for tensor in state.tensors().values())


def test_from_state_keeps_half_precision_values_in_float32():
    state = converted("elu").to(torch.bfloat16)
    got = NTKPrefix.from_state(state)()
    assert got.k.dtype == torch.float32
    assert torch.equal(got.k, state.k.float())
    assert NTKPrefix.from_state(state.to(F64))().k.dtype == F64


def test_from_state_is_independent_of_the_state():
    state = converted("elu")
    before = state.z.clone()
    prefix = NTKPrefix.from_state(state)
    with torch.no_grad():
        prefix.z.zero_()
    assert torch.equal(state.z, before)


@pytest.mark.parametrize("cast", [torch.nn.Module.half, torch.nn.Module.bfloat16, lambda m: m.to(torch.bfloat16)])
def test_stays_in_float32_to_the_bit_under_a_half_precision_model(cast):
    prefix = randomise(NTKPrefix(HEADS, DIM))
    before = copy.deepcopy(prefix.state_dict())
    model = cast(torch.nn.ModuleDict({"prefix": prefix, "linear": torch.nn.Linear(3, 3)}))
    assert model["linear"].weight.dtype != torch.float32
    for name, tensor in prefix.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == torch.float32
    query, key, value = inputs(dtype=model["linear"].weight.dtype)
    out = ntk_attention(query, key, value, prefix(), is_causal=True)
    assert out.dtype == query.dtype
    out.float().sum().backward()
    assert prefix.raw_k.grad.dtype == torch.float32
    assert model.double()["prefix"].raw_k.dtype == F64


def test_moves_with_the_model():
    prefix = NTKPrefix(HEADS, DIM, device="meta")
    assert prefix.z.device.type == "meta"
    prefix = prefix.to_empty(device="cpu")
    assert prefix.z.device.type == "cpu"
    assert NTKPrefix(HEADS, DIM).to("meta", torch.bfloat16).z.dtype == torch.float32


@pytest.mark.parametrize("positive", ["softplus", "exp"])
def test_initial_mass(positive):
    prefix = NTKPrefix(HEADS, DIM, positive=positive, init_mass=0.25)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(prefix().k, torch.full((HEADS, DIM), 0.25 / DIM), rtol=8 * eps, atol=0)
    rows = NTKPrefix(HEADS, DIM, None, num_rows=4, init_mass=0.25)
    torch.testing.assert_close(rows().bias, torch.full((HEADS, 4), math.log(0.25 / 4)))
    taylor = NTKPrefix(HEADS, DIM, "taylor1", centers=2, init_mass=0.25, positive=positive)
    torch.testing.assert_close(taylor().k[..., 0], torch.full((HEADS, 2), 0.125), rtol=8 * eps, atol=0)
    assert (taylor().k[..., 1:] == 0).all()


def test_centers_given_as_a_tensor_are_kept():
    centers = torch.randn(HEADS, 3, DIM)
    prefix = NTKPrefix(HEADS, DIM, "taylor1", centers=centers)
    assert torch.equal(prefix().centers, centers)
    assert prefix.centers.requires_grad
    assert prefix.options["centers"] == 3


def test_state_and_index():
    state, index = NTKPrefix(HEADS, DIM).state_and_index(5)
    assert isinstance(state, PrefixState)
    assert index is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_heads": 0}, "`num_heads` must be at least 1, got 0"),
        ({"head_dim": -1}, "`head_dim` must be at least 1, got -1"),
        ({"value_dim": 0}, "`value_dim` must be at least 1, got 0"),
        ({"feature_map": "relu"}, "`feature_map` must be one of 'elu', 'taylor1', 'taylor2', None, got 'relu'"),
        ({"feature_map": None}, "`num_rows` must be at least 1 with feature_map=None, got 0"),
        (
            {"feature_map": None, "num_rows": 2, "rank": 2},
            "`rank` must come with a `feature_map`, got feature_map=None",
        ),
        ({"rank": 0}, "`rank` must be at least 1, got 0"),
        ({"num_rows": -1}, "`num_rows` must be at least 0, got -1"),
        ({"positive": "abs"}, "`positive` must be one of 'softplus', 'exp', None, got 'abs'"),
        ({"centers": 2}, "`centers` must hold one centre .* with feature_map='elu'"),
        ({"centers": torch.zeros(3, 1, DIM)}, r"`centers` must have shape \[Hs=2, C, D=8\], got \[3, 1, 8\]"),
        ({"init_mass": 0.0}, "`init_mass` must be positive, got 0.0"),
        ({"dtype": torch.float16}, "`dtype` must be one of torch.float32, torch.float64, got torch.float16"),
        ({"feature_scale": math.nan}, "`feature_scale` must be finite"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NTKPrefix(**{"num_heads": HEADS, "head_dim": DIM} | arguments)


def test_refused_states():
    with pytest.raises(TypeError, match="`state` must be a PrefixState, got Tensor"):
        NTKPrefix.from_state(torch.zeros(3))
    state = converted("elu")
    with pytest.raises(ValueError, match="`state` must be a single state, got a stack of 2"):
        NTKPrefix.from_state(PrefixState.stack([state, state]))
    negative = PrefixState(state.z, state.k - 1, "elu")
    assert NTKPrefix.from_state(negative)().k.min() < 0
    with pytest.raises(
        ValueError, match=r"`state.k` must be positive with positive='softplus' .* got values down to -"
    ):
        NTKPrefix.from_state(negative, positive="softplus")


def test_half_precision_moves_a_prefix_and_does_not_round_it():
    prefix = NTKPrefix(HEADS, DIM, num_rows=2).to(device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in prefix.parameters()} == {("meta", torch.float32)}
