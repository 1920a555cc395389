"""Sums of features over the rows of each centre: the op behind the closed form of `prefix_to_state`."""

from contextlib import nullcontext

import pytest
import torch
from backends import FUSED, fused_backends, triton_only
from sums_cases import F64, a_prefix, by_op, by_reference, check, results
from torch.autograd import forward_ad

from ntk_kernels import FEATURE_MAPS, dispatch, library, prefix_to_state
from ntk_kernels.backends import centers as backend_centers
from ntk_kernels.inputs import SumInputs

DTYPES = [torch.float16, torch.bfloat16, torch.float32, F64]
sum_features = torch.ops.ntk_kernels.sum_features.default
sum_features_backward = torch.ops.ntk_kernels.sum_features_backward.default
served = pytest.mark.parametrize(
    "backend, dtype",
    [(backend, dtype) for backend in FUSED for dtype in DTYPES if (backend, dtype) != ("triton", F64)],
    ids=lambda x: str(x).removeprefix("torch."),
)
all_maps = pytest.mark.parametrize("feature_map", FEATURE_MAPS)
all_centers = pytest.mark.parametrize("centers", [None, 1, 5], ids=lambda number: f"C={number}")


@served
@all_maps
@all_centers
@pytest.mark.parametrize("weighted", [False, True], ids=["rows", "weights"])
def test_is_the_reference_s(feature_map, centers, weighted, backend, dtype):
    check(a_prefix(centers=centers, weighted=weighted, dtype=dtype), feature_map, backend)


@fused_backends
@pytest.mark.parametrize("centers", [None, 3])
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_few_rows(rows, centers, backend):
    prefix = a_prefix(rows=rows, centers=centers)
    if rows:
        check(prefix, "taylor1", backend)
    else:
        for tensor in results(by_op, prefix, "taylor1", 0.7, backend).values():
            assert not tensor.any()


@fused_backends
@all_maps
@pytest.mark.parametrize("head_dim, value_dim", [(33, 17), (8, 40), (1, 9)])
def test_head_dimensions(head_dim, value_dim, feature_map, backend):
    check(a_prefix(1, 20, head_dim, value_dim, centers=1), feature_map, backend, key_scale=0.3)


@fused_backends
@pytest.mark.parametrize("centers", [1, 3])
def test_strides(centers, backend):
    """Strided inputs give the same: [m, H, D] seen as [H, m, D], slices of wider rows, weights and centres expanded
    over the heads."""
    keys, values, _, mu = a_prefix(3, centers=centers)
    far = [tensor.new_zeros(40, 3, 16) for tensor in (keys, values)]
    views = [wide[..., : t.shape[2]].transpose(0, 1) for wide, t in zip(far, (keys, values), strict=True)]
    for view, tensor in zip(views, (keys, values), strict=True):
        view.copy_(tensor)
    weights, mu = torch.randn(40).expand(3, -1), mu[:1].expand(3, -1, -1)
    expected = sum_features(keys, values, weights.contiguous(), mu.contiguous(), "elu", 0.7, backend)
    columns = [tensor.mT.contiguous().mT for tensor in views]
    for tensors in (views, columns):
        for ours, same in zip(sum_features(*tensors, weights, mu, "elu", 0.7, backend), expected, strict=True):
            torch.testing.assert_close(ours, same)


@fused_backends
@pytest.mark.parametrize("centers", [None, 1, 3])
def test_nan_stays_in_its_head(centers, backend):
    prefix = a_prefix(3, centers=centers)
    clean = results(by_op, prefix, "elu", 0.7, backend)
    prefix[0][1, 5, 2] = torch.nan
    prefix[1][1, 7, 1] = torch.nan
    for name, tensor in results(by_op, prefix, "elu", 0.7, backend).items():
        assert torch.equal(tensor[0], clean[name][0]) and torch.equal(tensor[2], clean[name][2])
        assert name == "count" or tensor[1].isnan().any()


@fused_backends
@all_maps
def test_runs_agree_bit_for_bit(feature_map, backend):
    prefix = a_prefix(rows=70, centers=3, weighted=True)
    first, second = (results(by_op, prefix, feature_map, 0.7, backend) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@all_maps
@all_centers
@pytest.mark.parametrize("weighted", [False, True], ids=["rows", "weights"])
def test_gradcheck(feature_map, centers, weighted):
    keys, values, weights, mu = a_prefix(1, 9, 3, 2, centers=centers, weighted=weighted, dtype=F64)
    tensors = [tensor.requires_grad_() for tensor in (keys, values, mu) if tensor is not None]

    def function(keys, values, mu=None):
        return library.sum_features(SumInputs(keys, values, weights, mu, feature_map, 0.7, "torch"))[:2]

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("elements", [1, 300])
@pytest.mark.parametrize("centers", [None, 1, 4])
@all_maps
def test_pieces_give_the_same(feature_map, centers, elements, monkeypatch):
    prefix = a_prefix(3, 50, centers=centers, weighted=True, dtype=F64)
    whole = results(by_op, prefix, feature_map, 0.7, "torch")
    monkeypatch.setattr(backend_centers, "_CHUNK_ELEMENTS", {"cpu": elements})
    for name, tensor in results(by_op, prefix, feature_map, 0.7, "torch").items():
        torch.testing.assert_close(tensor, whole[name])


@triton_only
@pytest.mark.parametrize("multiprocessors, most", [(1, 2**15), (1, 32), (1000, 2**15)])
@pytest.mark.parametrize("centers", [1, 3])
def test_rows_split_among_programs(centers, multiprocessors, most, monkeypatch):
    """The rows are in one part, in as many as there may be rows, or in as many as there are tiles."""
    from ntk_kernels.kernels import sums as convert
    from ntk_kernels.kernels.host import configs

    monkeypatch.setattr(configs, "multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(convert, "_MAX_ROWS_OF_SPLIT", most)
    check(a_prefix(1, 100, centers=centers, weighted=True), "taylor1", "triton")


@triton_only
@pytest.mark.parametrize("centers", [None, 3])
@pytest.mark.parametrize("strides", [(2**31, 8, 1), (16, 2**31 // 35, 1)], ids=["heads", "rows"])
def test_offsets_beyond_two_to_the_31(strides, centers):
    """The tensors take address space only: untouched pages take no memory."""
    keys, values, _, mu = a_prefix(centers=centers, dtype=torch.float16)
    storage = torch.empty(2**31 + 2**29, dtype=torch.float16)
    expected = sum_features(keys, values, None, mu, "taylor1", 0.7, "triton")
    for near in (keys, values):
        far = storage.as_strided(near.shape, strides).copy_(near)
        prefix = (far, values) if near is keys else (keys, far)
        for ours, same in zip(sum_features(*prefix, None, mu, "taylor1", 0.7, "triton"), expected, strict=True):
            assert torch.equal(ours, same)


@fused_backends
def test_rows_that_are_taken_away(backend):
    """Rows that come once with weight 1 and once with -1 leave nothing."""
    keys, values, _, mu = a_prefix(centers=2)
    twice = [torch.cat([tensor, tensor], 1) for tensor in (keys, values)]
    weights = torch.ones(2, 80)
    weights[:, 40:] = -1
    for tensor in sum_features(*twice, weights, mu, "taylor1", 0.7, backend):
        torch.testing.assert_close(tensor, torch.zeros_like(tensor), rtol=0, atol=1e-4)


def test_a_hundred_thousand_rows_in_float16():
    prefix = a_prefix(1, 100_000, 8, 8, centers=1, dtype=torch.float16)
    exact = by_reference(prefix, "elu", 0.5)
    for ours, expected in zip(sum_features(*prefix, "elu", 0.5, "torch"), exact, strict=True):
        assert (ours - expected).norm() < 1e-6 * expected.norm()


@fused_backends
@pytest.mark.parametrize("asked", ["keys", "values", "centers"])
def test_one_gradient_alone(asked, backend):
    prefix = a_prefix(centers=3, weighted=True)
    everything = results(by_op, prefix, "taylor1", 0.7, backend)
    names = ("keys", "values", "weights", "centers")
    leaves = {name: t.clone().requires_grad_(name == asked) for name, t in zip(names, prefix, strict=True)}
    outputs = library.sum_features(SumInputs(*leaves.values(), "taylor1", 0.7, backend))
    assert not outputs[2].requires_grad
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator, dtype=F64).to(t) for t in outputs[:2]]
    (grad,) = torch.autograd.grad(outputs[:2], leaves[asked], grads)
    assert torch.equal(grad, everything[f"grad {asked}"])


@fused_backends
def test_autocast_changes_nothing(backend):
    prefix = a_prefix(centers=1)
    for context in (nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            z = sum_features(*prefix, "taylor1", 0.7, backend)[0]
        assert torch.equal(z, sum_features(*prefix, "taylor1", 0.7, backend)[0])


@fused_backends
@pytest.mark.parametrize("centers, weighted", [(None, False), (1, True), (3, True)])
def test_opcheck(centers, weighted, backend):
    keys, values, weights, mu = a_prefix(centers=centers, weighted=weighted)
    options = ("taylor1", 0.7, backend)
    leaves = [None if tensor is None else tensor.clone().requires_grad_() for tensor in (keys, values, mu)]
    torch.library.opcheck(sum_features, (leaves[0], leaves[1], weights, leaves[2], *options))
    z, k, _ = sum_features(keys, values, weights, mu, *options)
    for needs in ([True, True, mu is not None], [False, True, False]):
        torch.library.opcheck(
            sum_features_backward, (z, k, keys, values, weights, mu, *options, needs),
            # There is no second derivative; the next test checks the error.
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


@fused_backends
def test_double_backward_is_refused(backend):
    keys, values, _, _ = a_prefix()
    z, _, _ = library.sum_features(SumInputs(keys.requires_grad_(), values, None, None, "elu", 0.7, backend))
    (grad,) = torch.autograd.grad(z.sum(), keys, create_graph=True)
    with pytest.raises(NotImplementedError, match="reference.prefix_to_state"):
        torch.autograd.grad(grad.sum(), keys)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # raised inside PyTorch
@fused_backends
def test_forward_mode_is_refused(backend):
    keys, values, _, _ = a_prefix()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(keys, torch.ones_like(keys))
        with pytest.raises(NotImplementedError, match="no forward-mode derivatives.*reference.prefix_to_state"):
            library.sum_features(SumInputs(dual, values, None, None, "elu", 0.7, backend))


@fused_backends
@all_maps
@pytest.mark.parametrize("centers", ["mean", "given"])
def test_conversion_compiles_without_graph_breaks(centers, feature_map, backend, monkeypatch):
    monkeypatch.setenv("NTK_KERNELS_BACKEND", backend)
    torch._dynamo.reset()

    def loss(keys, values):
        state = prefix_to_state(2 * keys, values, feature_map, centers=around)
        return state.z.sin().sum() + state.k.sin().sum() + state.log_scale.sum()

    keys, values, _, _ = a_prefix()
    around = "mean" if centers == "mean" else keys[:, :1].detach().clone()
    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.clone().requires_grad_() for tensor in (keys, values)]
        value = function(*leaves)
        found.append([value, *torch.autograd.grad(value, leaves)])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("backend", [None, "torch", "triton", "reference"])
def test_backend_of_the_environment(backend, monkeypatch):
    if backend is not None:
        monkeypatch.setenv("NTK_KERNELS_BACKEND", backend)
    keys, values, _, _ = a_prefix()
    expected = "triton" if backend == "triton" and "triton" in FUSED else "torch"
    assert dispatch.sums_backend(keys, values) == expected
    assert dispatch.sums_backend(keys.double(), values.double()) == "torch"


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    keys, values, _, mu = a_prefix(2, 70, 6, 5, centers=3)
    with FlopCounterMode(display=False) as counter:
        z, k, _ = library.sum_features(SumInputs(keys.requires_grad_(), values, None, mu, "taylor1", 0.7, "torch"))
        assert counter.get_total_flops() == 2 * 2 * 70 * (7 * 6 + 3 * 6)
        (z.sum() + k.sum()).backward()
    assert counter.get_total_flops() == 2 * 2 * 70 * (3 * 7 * 6 + 2 * 3 * 6)
