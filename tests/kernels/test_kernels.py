"""Tests of the Triton kernels alone: tiles, addresses, slices, other number formats. In the interpreter."""

from dataclasses import replace

import pytest
import torch
from cases import case_named, make_inputs
from oracle import check_case

from ntk_kernels import PrefixState, ntk_attention

if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU", allow_module_level=True)

from ntk_kernels.backends.torch import implementation as torch_backend
from ntk_kernels.backends.triton import implementation as triton_backend
from ntk_kernels.feature_maps import REGISTRY
from ntk_kernels.inputs import Inputs, StateTensors
from ntk_kernels.kernels import backward_state, forward
from ntk_kernels.kernels.backward_state import StateGrads
from ntk_kernels.kernels.host import configs, launch
from ntk_kernels.kernels.host.configs import TileConfig
from ntk_kernels.kernels.host.sections import SECTIONS, num_features
from ntk_kernels.kernels.jit.row_terms import RowTerms


@pytest.mark.parametrize("name", ["elu", "all_parts", "window", "more_keys", "bf16", "index_none", "key_range"])
@pytest.mark.parametrize(
    "config",
    [TileConfig(16, 16, 4, 1), TileConfig(16, 64, 4, 1), TileConfig(128, 64, 4, 1), TileConfig(64, 16, 4, 1)],
    ids=lambda config: str(config),
)
def test_tile_sizes(name, config, monkeypatch):
    """Results do not depend on how rows and keys fall into tiles."""
    monkeypatch.setattr(configs, "candidates", lambda *args: (config,))
    case = case_named(name)
    check_case(make_inputs(case), case.dtype, backend="triton", backward=True)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"window": (24, 20)}], ids=str)
def test_where_a_band_meets_the_tiles(options, monkeypatch):
    """Wherever its edges fall in a tile, whole tiles that skip masks hold visible keys only."""
    monkeypatch.setattr(configs, "candidates", lambda *args: (TileConfig(16, 16, 4, 1),))
    query, key, value, grad = torch.randn(4, 1, 1, 70, 8)
    for offset in range(-9, 7):
        results = {}
        for backend in ("triton", "reference"):
            leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
            out = ntk_attention(*leaves, **options, causal_offset=offset, backend=backend)
            results[backend] = out, *torch.autograd.grad(out, leaves, grad)
        torch.testing.assert_close(results["triton"], results["reference"], rtol=1e-4, atol=1e-5, msg=f"{offset=}")


@pytest.mark.parametrize("name", ["d40", "d80", "value_wider", "bf16", "bf16_mask"])
@pytest.mark.parametrize("slices", [2, 4])
def test_key_gradients_in_slices(name, slices, monkeypatch):
    """Columns of dK and dV shared among programs, as for wide heads."""
    monkeypatch.setattr(configs, "candidates", lambda *args: (TileConfig(32, 32, 4, 1, slices=slices),))
    case = case_named(name)
    check_case(make_inputs(case), case.dtype, backend="triton", backward=True)


@pytest.mark.parametrize("name", ["elu", "taylor2", "all_parts", "index_shared", "index_none", "no_batch", "rows_many"])
@pytest.mark.parametrize("multiprocessors", [1, 1000])
def test_sums_over_rows_split_among_programs(name, multiprocessors, monkeypatch):
    """The sums come in one piece, and in as many as there are tiles of rows."""
    monkeypatch.setattr(configs, "multiprocessors", lambda device: multiprocessors)
    case = case_named(name)
    check_case(make_inputs(case), case.dtype, backend="triton", backward=True)


@pytest.mark.parametrize("name", ["elu", "fewer_keys", "window", "index_shared", "bf16", "value_wider", "long", "blhd"])
def test_descriptors(name, monkeypatch):
    """K and V through tensor maps, as TMA reads them."""
    described = []
    original = forward.TensorDescriptor

    def describe(*args):
        described.append(args)
        return original(*args)

    monkeypatch.setattr(forward, "TensorDescriptor", describe)
    monkeypatch.setattr(configs, "candidates", lambda *args: (TileConfig(32, 16, 4, 1, use_descriptors=True),))
    case = case_named(name)
    check_case(make_inputs(case), case.dtype, backend="triton")
    assert described


def test_what_no_descriptor_can_describe_goes_through_pointers(monkeypatch):
    monkeypatch.setattr(configs, "candidates", lambda *args: (TileConfig(32, 16, 4, 1, use_descriptors=True),))
    query, key, value = torch.randn(3, 1, 2, 40, 17)[..., 1:].unbind()  # rows of 68 bytes that begin at byte 4
    out = ntk_attention(query, key, value, is_causal=True, backend="triton")
    torch.testing.assert_close(out, ntk_attention(query, key, value, is_causal=True, backend="torch"))


@pytest.mark.parametrize(
    "strides",
    [(2**31, 640, 16, 1), (2**16, 2**31, 2**31 // 40, 1), (16, 32, 2**23 + 1, 1)],
    ids=["batches", "heads", "rows"],
)
def test_offsets_beyond_two_to_the_31(strides):
    """Address space only: pages that nobody touches take no memory."""
    small = torch.randn(2, 1, 300 if strides[2] == 2**23 + 1 else 40, 16).half()
    storage = torch.empty(2**31 + 2**29, dtype=torch.float16)
    far = storage.as_strided(small.shape, strides).copy_(small)
    state = PrefixState(torch.rand(1, 16, 16), torch.rand(1, 16), "elu")

    def results(query, key, value, grad_out):
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        out = ntk_attention(*leaves, state, window=(20, 0), backend="triton")
        return [out, *torch.autograd.grad(out, leaves, grad_out)]

    expected = results(small, small, small, small)
    for tensors in ((small, far, far, small), (far, small, small, far)):
        for ours, near in zip(results(*tensors), expected, strict=True):
            assert torch.equal(ours, near)


@pytest.mark.parametrize("expand", ["batch", "heads", "rows"])
def test_expanded_tensors(expand):
    """Stride 0, as of one key for the whole batch, or of the gradient of a sum."""
    query, key, value = torch.randn(3, 2, 4, 20, 8).unbind()
    axis = ["batch", "heads", "rows"].index(expand)
    key, value, grad_out = (tensor.narrow(axis, 0, 1).expand_as(tensor) for tensor in (key, value, value))
    results = []
    for backend in ("triton", "torch"):
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        out = ntk_attention(*leaves, is_causal=True, backend=backend)
        results.append([out, *torch.autograd.grad(out, leaves, grad_out)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("asked", ["query", "key", "value", "z", "k", "log_scale", "keys", "values", "bias"])
def test_only_the_passes_that_are_needed_run(asked, monkeypatch):
    ran = []
    original = launch.Launch.__call__

    def record(self):
        ran.append(self.kernel.__name__.removeprefix("_ntk_").removesuffix("_kernel"))
        original(self)

    monkeypatch.setattr(launch.Launch, "__call__", record)
    query, key, value, state, options = make_inputs(case_named("index_none"))
    tensors = {"query": query, "key": key, "value": value} | state.tensors()
    leaves = {name: tensor.clone().requires_grad_(name == asked) for name, tensor in tensors.items()}
    of_state = {name: leaf for name, leaf in leaves.items() if name not in ("query", "key", "value")}
    qkv = (leaves[name] for name in ("query", "key", "value"))
    ntk_attention(*qkv, PrefixState(**of_state, feature_map="elu"), **options, backend="triton").sum().backward()
    expected = {
        "query": ["bwd_dq"], "key": ["bwd_dkdv"], "value": ["bwd_dkdv"], "log_scale": ["bwd_dq", "bwd_state"],
        "z": ["bwd_state"], "k": ["bwd_state"], "keys": ["bwd_rows"], "values": ["bwd_rows"], "bias": ["bwd_rows"],
    }  # fmt: skip
    assert ran == ["fwd", "bwd_delta", *expected[asked]]


@pytest.mark.parametrize("strides", ["transposed", "expanded", "sliced", "far"])
def test_masks_of_any_strides(strides):
    query, key, value = torch.randn(3, 2, 4, 20, 8).unbind()
    mask = {
        "transposed": torch.randn(2, 4, 20, 20).mT,
        "expanded": torch.randn(20).expand(2, 4, 20, 20),
        "sliced": torch.randn(2, 4, 40, 40)[:, :, ::2, 1::2],
        "far": torch.empty(2**31 + 2**29, dtype=torch.bool).as_strided((20, 20), (1, 2**27)).fill_(True).tril_(),
    }[strides]
    out = ntk_attention(query, key, value, attn_mask=mask, backend="triton")
    torch.testing.assert_close(out, ntk_attention(query, key, value, attn_mask=mask, backend="torch"))


def test_float16_models_take_states_beyond_float16():
    query, key, value = (tensor.half() for tensor in torch.randn(3, 1, 2, 20, 16).unbind())
    keys, values = torch.randn(2, 2, 3, 16).unbind()
    keys[0, 0, 0], values[0, 1, 4] = 7e4, 7e4
    state = PrefixState(torch.rand(2, 16, 16), torch.rand(2, 16), "elu", keys=keys, values=values,
                        bias=torch.full((2, 3), -8.0))  # fmt: skip
    small = query * 1e-4
    out = ntk_attention(small, key, value, state, backend="triton")
    torch.testing.assert_close(out, ntk_attention(small, key, value, state, backend="reference"), rtol=2e-3, atol=2e-3)


def test_small_gradients_survive_float16():
    """dS keeps its size until dQ is summed up: times scale, it would lose digits below 6e-5."""
    query, key, value, grad_out = (tensor.half() for tensor in torch.randn(4, 1, 2, 64, 64).unbind())
    grad_out = grad_out * 1e-3
    exact = [tensor.double().requires_grad_() for tensor in (query, key, value)]
    (expected,) = torch.autograd.grad(ntk_attention(*exact, backend="reference"), exact[0], grad_out.double())
    errors = {}
    for backend in ("triton", "torch"):
        leaf = query.clone().requires_grad_()
        (grad,) = torch.autograd.grad(ntk_attention(leaf, key, value, backend=backend), leaf, grad_out)
        errors[backend] = (grad - expected).norm() / expected.norm()
    assert errors["triton"] < 2 * errors["torch"]


def test_stacks_of_more_heads_than_a_grid_has_rows():
    """65,535 programs along the second axis of a grid is all that CUDA allows."""
    query, key, value = torch.empty(3, 1, 32, 16, 64, dtype=torch.bfloat16, device="meta").unbind()
    k, z = (torch.empty(4096, 32, 1, *shape, device="meta") for shape in ((64,), (64, 64)))
    index = torch.empty(1, dtype=torch.int64, device="meta")
    inputs = Inputs(query, key, value, StateTensors(z=z, k=k, state_index=index), feature_map="elu")
    call = launch.prepare(inputs, "sm90")
    terms = RowTerms(*(torch.empty(1, 32, 16, device="meta"),) * 3, torch.empty(1, 32, 1, 16, device="meta"))
    sums = StateGrads(z[None], k[None], *[None] * 5)
    config = call.kind.candidates("state")[0]
    assert max(backward_state.state_launch(call, query, terms, None, sums, 1, "elu", config).grid[1:]) < 65536


@pytest.mark.parametrize(
    "name",
    ["elu", "taylor2", "all_parts", "index_none", "no_mass", "rows_only", "window_causal_cache", "bhdl",
     "value_wider", "low_rank_taylor2", "fewer_keys", "bf16", "taylor1", "log_scale", "feature_scale", "one_centre_elu",
     "clamped", "index", "long", "mask_nothing", "mask_bool", "offset_far_negative", "state_per_query_head"],
)  # fmt: skip
def test_prefix_added_to_another_attention(name, monkeypatch):
    """The torch backend on a GPU: PyTorch's attention over the keys, the kernels for the prefix."""
    monkeypatch.setattr(torch_backend, "_kernels_for", lambda inputs: triton_backend)
    case = case_named(name)
    check_case(
        make_inputs(case), case.dtype, backend="torch", backward=True, grad_lse=name in ("elu", "taylor1", "all_parts")
    )


@pytest.mark.parametrize("asked", ["query", "key", "z", "k", "keys"])
def test_one_gradient_alone_of_a_prefix_added_to_another_attention(asked, monkeypatch):
    monkeypatch.setattr(torch_backend, "_kernels_for", lambda inputs: triton_backend)
    query, key, value, state, options = make_inputs(replace(case_named("rows"), seq_q=9, seq_k=9))

    def gradient(*names):
        inputs = {"query": query, "key": key} | state.tensors()
        inputs = {name: tensor.detach().requires_grad_(name in names) for name, tensor in inputs.items()}
        q, k = inputs.pop("query"), inputs.pop("key")
        out = ntk_attention(q, k, value, PrefixState(**inputs, feature_map="taylor1"), **options, backend="torch")
        leaves = {"query": q, "key": k} | inputs
        return torch.autograd.grad(out.square().sum(), [leaves[name] for name in names])[0]

    torch.testing.assert_close(gradient(asked), gradient(asked, "query", "key", "z", "k", "keys"), rtol=0, atol=0)


def test_kernels_and_feature_maps_agree():
    """The kernels have the sections of every map in its packing order, and tiles of the kind that it names."""
    for name, feature_map in REGISTRY.items():
        assert SECTIONS[name] == tuple(section.name for section in feature_map.sections)
        assert {s: num_features(s, 24) for s in SECTIONS[name]} == feature_map.section_dims(24)
        assert configs.kinds_of(torch.bfloat16, name) == (feature_map.tiles,)
        assert feature_map.several_centers == (name == "taylor1")  # what `add_left_out` counts on
