"""A feature map that the package does not know: a record, and its definition for the reference, are all that it takes."""

import ast
import math
from pathlib import Path

import pytest
import torch
from cases import CAUSAL, Case, make_inputs
from fit_cases import Sample
from oracle import assert_as_accurate, check_case
from sums_cases import a_prefix, check

import ntk_kernels
from ntk_kernels import (
    NTKPrefix,
    PrefixAccumulator,
    PrefixState,
    feature_dim,
    ntk_attention,
    ntk_attention_decode,
    prefix_to_state,
    reference,
)  # fmt: skip
from ntk_kernels.conversion import gradient
from ntk_kernels.feature_maps import LINEAR, REGISTRY, SQUARES, FeatureMap, Section

F64 = torch.float64


class _Softplus(Section):
    """log(1 + e^x)."""

    name = "softplus"

    def dim(self, head_dim):
        return head_dim

    def features(self, x):
        return [torch.nn.functional.softplus(x)]

    def backward(self, grad, x, features):
        return grad * torch.sigmoid(x)


MAPS = {
    "softplus": (FeatureMap("softplus", (_Softplus(),)), lambda x: torch.log1p(x.exp())),
    "diagonal": (
        FeatureMap("diagonal", (LINEAR, SQUARES), order=2, several_centers=True),
        lambda x: torch.cat([torch.ones_like(x[..., :1]), x, x**2 / math.sqrt(2)], dim=-1),
    ),
}


@pytest.fixture(params=MAPS)
def name(request, monkeypatch):
    record, definition = MAPS[request.param]
    monkeypatch.setitem(REGISTRY, record.name, record)
    monkeypatch.setitem(reference.feature_maps.FEATURE_MAPS, record.name, definition)
    return record.name


def state_of(name):
    """What a case takes to make a state; positive features have mass everywhere, the others little around 0."""
    return {"feature_map": name, "log_scale": True} | ({"centers": 3} if REGISTRY[name].several_centers else {})


def test_attention(name):
    case = Case("new", "", state=state_of(name) | {"rows": 2, "mass": "mixed"}, options=CAUSAL)
    check_case(make_inputs(case), torch.float32, backend="torch", backward=True, grad_lse=True)
    query, key, value, state, _ = make_inputs(case)
    token = query[:, :, -1:]
    torch.testing.assert_close(
        ntk_attention_decode(token, key, value, None, state), reference.ntk_attention(token, key, value, state)
    )


def test_low_rank_merge_and_stack(name):
    states = [
        make_inputs(Case("new", "", state=state_of(name) | {"rank": 2, "dtype": F64}), seed=seed)[3]
        for seed in range(2)
    ]
    query, key, value = (tensor.double() for tensor in make_inputs(Case("new", "", state=None))[:3])
    out = [reference.ntk_attention(query, key, value, state, return_lse=True) for state in states]
    stack, index = PrefixState.stack(states), torch.tensor([1, 0])
    stacked = ntk_attention(query, key, value, stack, state_index=index)
    torch.testing.assert_close(stacked, torch.stack([out[1][0][0], out[0][0][1]]))
    if not states[0].num_centers > 1:
        states[1] = states[0]
    merged = states[0].merge(states[1])
    assert merged.num_centers == (6 if REGISTRY[name].several_centers else 1)
    over_keys = reference.ntk_attention(query, key, value, return_lse=True)[1]
    of_states = [reference.ntk_attention(query, key, value, s, return_lse=True)[1] for s in states]
    total = torch.stack([lse.exp() for lse in of_states]).sum(0) - over_keys.exp()
    ours = ntk_attention(query, key, value, merged, return_lse=True)[1]
    positive = torch.stack(of_states).gt(over_keys).all(0)  # M of both states: elsewhere the clamp acts
    assert positive.float().mean() > 0.2
    torch.testing.assert_close(ours[positive], total.log()[positive])


def test_other_centres_are_refused(name):
    around = [prefix_to_state(*torch.randn(2, 2, 9, 8), name, centers=torch.randn(2, 1, 8)) for _ in range(2)]
    if REGISTRY[name].several_centers:
        assert around[0].merge(around[1]).num_centers == 2
        return
    with pytest.raises(ValueError, match="same centres, as several go with 'taylor1' only, got feature_map='softplus'"):
        around[0].merge(around[1])
    for call in (
        lambda: prefix_to_state(*torch.randn(2, 2, 9, 8), name, centers=torch.zeros(2, 2, 8)),
        lambda: PrefixAccumulator(2, 8, 8, name, centers=torch.zeros(2, 2, 8)),
        lambda: NTKPrefix(2, 8, name, centers=2),
    ):
        with pytest.raises(ValueError, match=r"`centers` must hold one centre \(C=1\) with feature_map='softplus'"):
            call()


def test_files(name, tmp_path):
    state = prefix_to_state(*torch.randn(2, 2, 9, 8), name)
    state.save(tmp_path / "state")
    again = PrefixState.load(tmp_path / "state")
    assert again.feature_map == name and torch.equal(again.z, state.z)
    assert (again.head_dim, again.k.shape[-1]) == (8, feature_dim(name, 8))
    with pytest.raises(ValueError, match=f"must end in r = feature_dim\\('{name}', D\\) for some D, got r=0"):
        PrefixState(torch.zeros(2, 0, 8), torch.zeros(2, 0), name)


@pytest.mark.parametrize("centers", [None, 1, 5])
def test_sums(name, centers):
    check(a_prefix(centers=centers, weighted=True), name, "torch")


def test_closed_form_and_accumulator(name):
    keys, values = torch.randn(2, 3, 40, 6)
    around = keys.mean(-2, keepdim=True)
    state = prefix_to_state(keys, values, name)
    exact, eager = (
        reference.prefix_to_state(*(t.to(dtype) for t in (keys, values)), name, centers=around.to(dtype))
        for dtype in (F64, torch.float32)
    )
    for part, expected in exact.items():
        assert_as_accurate(part, getattr(state, part), eager[part], expected, torch.float32)
    is_polynomial = REGISTRY[name].is_polynomial
    if not is_polynomial:
        with pytest.raises(ValueError, match="whose sums cannot be moved to a mean that is not known yet, got 'mean'"):
            PrefixAccumulator(3, 6, 6, name)
    sums = PrefixAccumulator(3, 6, 6, name, centers="mean" if is_polynomial else around)
    for rows in (slice(0, 11), slice(11, 40)):
        sums.update(keys[:, rows], values[:, rows])
    for part, tensor in sums.state().tensors().items():
        torch.testing.assert_close(tensor, getattr(state, part))


@pytest.mark.parametrize("method", ["least_squares", "gradient"])
def test_fits(name, method, monkeypatch):
    monkeypatch.setattr(gradient, "_STEPS", 100)
    sample = Sample()
    centers = 2 if REGISTRY[name].several_centers else "mean"
    state, report = sample.convert(name, centers=centers, method=method)
    assert state.feature_map == name
    assert (report.error < 0.8 * report.closed_form_error).all() and (report.error < report.no_prefix_error).all()
    held_out = sample.errors(state, slice(3, None))
    torch.testing.assert_close(report.error.double(), held_out, rtol=1e-4, atol=0)


def test_a_budget_tries_it_too(name):
    _, report = Sample().convert(budget=45, method="least_squares")
    expected = {
        "softplus": ["softplus + 37 rows"],
        "diagonal": ["diagonal + 28 rows", "diagonal around 2 centres + 11 rows"],
    }
    assert [made_of for made_of in report.tried if name in made_of] == expected[name]


@pytest.mark.parametrize("scale_by_k", [False, True])
def test_training(name, scale_by_k):
    """A start that changes next to nothing, gradients for all parameters, and the way from and to a state."""
    prefix = NTKPrefix(2, 8, name, scale_by_k=scale_by_k, init_mass=1e-3, dtype=F64)
    query, key, value = torch.randn(3, 2, 2, 9, 8, dtype=F64)
    out, without = (ntk_attention(query, key, value, state, return_lse=True) for state in (prefix(), None))
    mass = (out[1].exp() - without[1].exp()).mean().item()
    assert 3e-4 < mass < 3e-3
    out[0].square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in prefix.parameters())
    state = prefix_to_state(*torch.randn(2, 2, 9, 8, dtype=F64), name, centers=None)
    again = NTKPrefix.from_state(state, positive="softplus", scale_by_k=scale_by_k)()
    for part, tensor in state.tensors().items():
        torch.testing.assert_close(getattr(again, part), tensor)


def compared_names(path: Path) -> list[str]:
    """Where a file asks for a feature map by its name: in comparisons, keys of dictionaries and patterns."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        elif isinstance(node, ast.Dict):
            asked = [key for key in node.keys if key is not None]
        elif isinstance(node, ast.MatchValue):
            asked = [node.value]
        else:
            continue
        constants = (part for each in asked for part in ast.walk(each) if isinstance(part, ast.Constant))
        found += [f"{path.name}:{part.lineno}: {part.value!r}" for part in constants if part.value in REGISTRY]
    return found


def test_names_of_maps_are_asked_for_nowhere_else():
    package = Path(ntk_kernels.__file__).parent
    own = {package / "feature_maps.py", package / "reference" / "feature_maps.py"}
    files = {*package.rglob("*.py"), *(package / "reference").glob("*.py")} - own  # rglob may not follow links
    files = {path for path in files if package / "kernels" not in path.parents}
    assert len(files) > 40
    assert [line for path in sorted(files) for line in compared_names(path)] == []
    assert compared_names(package / "reference" / "feature_maps.py")  # a dictionary: it does find them
