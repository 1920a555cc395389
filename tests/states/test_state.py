"""`PrefixState`: properties, files, casts, refused arguments."""

import math

import pytest
import torch
from safetensors.torch import save_file
from state_cases import a_state

from ntk_kernels import PrefixState, ntk_attention

RECIPES = {
    "elu": {},
    "taylor2": {"feature_map": "taylor2", "log_scale": True},
    "centres": {"feature_map": "taylor1", "centers": 3, "log_scale": True},
    "low_rank": {"rank": 2},
    "rows_only": {"feature_map": None, "rows": 3},
    "all_parts": {"feature_map": "taylor1", "centers": 2, "rank": 2, "rows": 3, "feature_scale": 0.3},
    "stack": {"stack": 4, "rows": 2},
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def assert_same(a, b):
    assert (a.feature_map, a.feature_scale) == (b.feature_map, b.feature_scale)
    assert a.tensors().keys() == b.tensors().keys()
    for name, tensor in a.tensors().items():
        assert tensor.dtype == b.tensors()[name].dtype
        assert torch.equal(tensor, b.tensors()[name]), name


def test_what_it_says_of_itself():
    state = a_state(**RECIPES["all_parts"])
    assert (state.is_stack, state.num_states, state.num_heads) == (False, 1, 2)
    assert (state.head_dim, state.value_dim, state.num_centers, state.num_rows, state.rank) == (4, 6, 2, 3, 2)
    assert state.nbytes == 4 * 2 * (2 * (5 + 5 * 2 + 2 * 6 + 4) + 3 * (4 + 6 + 1))
    assert repr(state) == (
        "PrefixState(feature_map='taylor1', feature_scale=0.3, k=[2, 2, 5], z_a=[2, 2, 5, 2], z_b=[2, 2, 2, 6], "
        "centers=[2, 2, 4], keys=[2, 3, 4], values=[2, 3, 6], bias=[2, 3], dtype=torch.float32, device='cpu')"
    )
    stack = a_state(**RECIPES["stack"])
    assert (stack.is_stack, stack.num_states, stack.num_heads, stack.rank, stack.num_centers) == (True, 4, 2, None, 1)
    rows = a_state(**RECIPES["rows_only"])
    assert (rows.is_stack, rows.head_dim, rows.value_dim, rows.num_centers, rows.full_z) == (False, 4, 6, 0, None)


@every_recipe
def test_save_and_load(recipe, tmp_path):
    state = a_state(**recipe)
    state.save(tmp_path / "state.safetensors")
    assert_same(PrefixState.load(tmp_path / "state.safetensors"), state)


def test_load_to_a_device_and_save_to_a_folder(tmp_path):
    a_state().save(tmp_path / "state.safetensors")
    assert PrefixState.load(tmp_path / "state.safetensors", device="meta").device.type == "meta"
    with pytest.raises(FileNotFoundError, match="`path` must be in a folder that exists"):
        a_state().save(tmp_path / "missing" / "state.safetensors")


def test_save_trained_and_strided_tensors(tmp_path):
    state = PrefixState(torch.rand(6, 4, 2).permute(2, 1, 0).requires_grad_(), torch.rand(2, 4).requires_grad_(), "elu")
    state.save(tmp_path / "state.safetensors")
    assert_same(PrefixState.load(tmp_path / "state.safetensors"), state.detach())


def test_save_tensors_that_share_memory(tmp_path):
    rows = torch.rand(2, 3, 4)
    PrefixState(keys=rows, values=rows).save(tmp_path / "state.safetensors")
    assert_same(PrefixState.load(tmp_path / "state.safetensors"), PrefixState(keys=rows, values=rows))


def write(path, *, metadata=None, **tensors):
    if metadata is None:
        metadata = {"format": "ntk-kernels prefix state", "version": "1",
                    "state": '{"feature_map": "elu", "feature_scale": null}'}  # fmt: skip
    save_file(tensors, str(path), metadata=metadata)


def test_load_refuses_foreign_files(tmp_path):
    path = tmp_path / "state.safetensors"
    with pytest.raises(FileNotFoundError, match="`path`.*is no file"):
        PrefixState.load(path)
    with pytest.raises(FileNotFoundError, match="`path`.*is no file"):
        PrefixState.load(tmp_path)
    path.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00garbage!")
    with pytest.raises(ValueError, match="`path` must be a safetensors file"):
        PrefixState.load(path)
    with pytest.raises(ValueError, match="`device` must be a torch.device or its name, .*, got 'nowhere'"):
        PrefixState.load(path, device="nowhere")
    z, k = torch.rand(2, 4, 6), torch.rand(2, 4)
    write(path, metadata={}, z=z, k=k)
    with pytest.raises(ValueError, match=r"written by PrefixState\.save.*format None"):
        PrefixState.load(path)
    write(path, metadata={"format": "ntk-kernels prefix state", "version": "2", "state": "{}"}, z=z, k=k)
    with pytest.raises(ValueError, match="with version '1', got .* with version '2'"):
        PrefixState.load(path)
    write(path, z=z, k=torch.rand(2, 5))
    with pytest.raises(ValueError, match=r"valid prefix state.*`z` must have shape \[Hs=2, r=5, Dv\], got \[2, 4, 6\]"):
        PrefixState.load(path)
    write(path, z=z, k=k, extra=k.clone())
    with pytest.raises(ValueError, match=r"unknown tensors \['extra'\]"):
        PrefixState.load(path)
    write(path, z=z, k=k, metadata={"format": "ntk-kernels prefix state", "version": "1"})
    with pytest.raises(ValueError, match="valid prefix state"):
        PrefixState.load(path)
    for text in ("[" * 100_000 + "]" * 100_000, '{"feature_map": "elu", "feature_scale": 1' + 400 * "0" + "}", "null"):
        write(path, z=z, k=k, metadata={"format": "ntk-kernels prefix state", "version": "1", "state": text})
        with pytest.raises(ValueError, match="valid prefix state"):
            PrefixState.load(path)
    for dtype in (torch.int64, torch.complex64, torch.float8_e5m2):
        write(path, z=z, k=k.to(dtype))
        with pytest.raises(ValueError, match="`k` must be float16, bfloat16, float32 or float64, got"):
            PrefixState.load(path)
    a_state().save(path)
    with pytest.raises(ValueError, match="`device` must be .* that this PyTorch has, got 'cuda:63'"):
        PrefixState.load(path, device="cuda:63")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="`path` must be a safetensors file"):
        PrefixState.load(path)


def test_load_refuses_flipped_bits_and_reads_files_without_a_checksum(tmp_path):
    """Every bit of the tensors counts, and what the metadata say; 0.1.0 wrote no checksum."""
    path, state = tmp_path / "state.safetensors", a_state(rows=1, dtype=torch.bfloat16)
    state.save(path)
    assert_same(PrefixState.load(path), state)
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    for place in (header, (header + len(good)) // 2, len(good) - 1):
        for bit in (0, 7):
            flipped = bytearray(good)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(
                ValueError, match=r"as PrefixState\.save wrote it, .*, whose contents do not have its checksum"
            ):
                PrefixState.load(path)
    path.write_bytes(good.replace(b'\\"feature_scale\\": null', b'\\"feature_scale\\": 1e-9'))
    with pytest.raises(ValueError, match="checksum"):
        PrefixState.load(path)
    write(path, z=torch.ones(2, 4, 6), k=torch.ones(2, 4))
    assert PrefixState.load(path).feature_map == "elu"


def test_load_refuses_numbers_that_are_not_finite(tmp_path):
    path = tmp_path / "state.safetensors"
    tensors = a_state(feature_map="taylor1", centers=2, log_scale=True, rows=2).tensors()
    for name, tensor in tensors.items():
        for number in (math.nan, math.inf, -math.inf):
            changed = tensor.clone()
            changed.view(-1)[1] = number
            PrefixState(**tensors | {name: changed}, feature_map="taylor1").save(path)
            if name in ("bias", "log_scale") and number < 0:  # switched off
                PrefixState.load(path)
                continue
            with pytest.raises(ValueError, match=rf"`{name}` in .* must be finite, got -?(nan|inf) \(1 such numbers\)"):
                PrefixState.load(path)


@every_recipe
def test_to_casts_every_tensor(recipe):
    state = a_state(**recipe).to(torch.bfloat16)
    assert {tensor.dtype for tensor in state.tensors().values()} == {torch.bfloat16}


def test_a_million_rows_fit_float16():
    state = a_state(feature_map="taylor1")
    long = PrefixState(state.z, state.k, "taylor1", log_scale=torch.full((2,), math.log(1e6)))
    query, key, value = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 6)
    expected = ntk_attention(query, key, value, PrefixState(state.z * 1e6, state.k * 1e6, "taylor1"))
    torch.testing.assert_close(ntk_attention(query, key, value, long), expected)
    half = ntk_attention(query, key, value, long.to(torch.float16))
    assert torch.allclose(half, expected, rtol=0, atol=2**-10 * expected.abs().max().item() * 4)


def test_low_rank_pair_is_multiplied_in_float32():
    state = a_state(rank=2, dtype=torch.bfloat16)
    torch.testing.assert_close(state.full_z, state.z_a.float() @ state.z_b.float())


z, k = torch.rand(2, 4, 6), torch.rand(2, 4)
REFUSED = {
    "nothing": ({}, ValueError, "`k` must be given"),
    "z_alone": (dict(z=z, feature_map="elu"), ValueError, "`k` must be given"),
    "k_alone": (dict(k=k, feature_map="elu"), ValueError, "`z`, or both `z_a` and `z_b`, must come with `k`"),
    "half_a_pair": (dict(k=k, z_a=z, feature_map="elu"), ValueError, "`z`, or both `z_a` and `z_b`"),
    "z_and_pair": (dict(z=z, k=k, z_a=z, z_b=z, feature_map="elu"), ValueError, "`z` must not be given together"),
    "pair_ranks": (dict(k=k, z_a=torch.rand(2, 4, 3), z_b=torch.rand(2, 2, 6), feature_map="elu"), ValueError,
                   r"`z_b` must have shape \[Hs=2, s=3, Dv\], got \[2, 2, 6\]"),
    "no_map": (dict(z=z, k=k), ValueError, "`feature_map` must be one of 'elu', 'taylor1', 'taylor2', got None"),
    "unknown_map": (dict(z=z, k=k, feature_map="relu"), ValueError, "`feature_map` must be one of .* got 'relu'"),
    "z_shape": (dict(z=z[:, :3], k=k, feature_map="elu"), ValueError, r"`z` must have shape \[Hs=2, r=4, Dv\]"),
    "no_such_dim": (dict(z=z, k=k, feature_map="taylor2"), ValueError, r"`k` must end in r = feature_dim\('taylor2', D"),
    "k_rank": (dict(z=z, k=k[None, None], feature_map="elu"), ValueError, "`k` must have 2 or 3 dimensions"),
    "integers": (dict(z=z.long(), k=k, feature_map="elu"), TypeError, "`z` must be float16, .* got torch.int64"),
    "list": (dict(z=z.tolist(), k=k, feature_map="elu"), TypeError, "`z` must be a torch.Tensor, got list"),
    "feature_scale": (dict(z=z, k=k, feature_map="elu", feature_scale=math.nan), ValueError,
                      "`feature_scale` must be finite, got nan"),
    "many_centres": (dict(z=z[:, None].expand(-1, 2, -1, -1), k=k[:, None].expand(-1, 2, -1),
                          centers=torch.rand(2, 2, 4), feature_map="elu"), ValueError, "got C=2"),
    "centre_rank": (dict(z=z, k=k, centers=torch.rand(4), feature_map="elu"), ValueError, r"`centers` must have 3 or 4 dimensions"),
    "no_heads": (dict(z=z[:0], k=k[:0], feature_map="elu"), ValueError, "`k` must have at least one state and head"),
    "float8": (dict(z=z.to(torch.float8_e5m2), k=k, feature_map="elu"), TypeError, "`z` must be float16, .*float8"),
    "centre_dim": (dict(z=z[:, None], k=k[:, None], centers=torch.rand(2, 1, 5), feature_map="elu"), ValueError,
                   r"`centers` must have shape \[Hs=2, C, D=4\], got \[2, 1, 5\]"),
    "log_scale": (dict(z=z, k=k, log_scale=torch.rand(3), feature_map="elu"), ValueError,
                  r"`log_scale` must have shape \[Hs=2\], got \[3\]"),
    "keys_alone": (dict(keys=torch.rand(2, 3, 4)), ValueError, "`values` must come with `keys`"),
    "values_alone": (dict(z=z, k=k, feature_map="elu", values=torch.rand(2, 3, 4)), ValueError,
                     "`values` must come with `keys`"),
    "keys_dim": (dict(z=z, k=k, feature_map="elu", keys=torch.rand(2, 3, 5), values=torch.rand(2, 3, 6)), ValueError,
                 r"`keys` must have shape \[Hs=2, R, D=4\], got \[2, 3, 5\]"),
    "values_rows": (dict(keys=torch.rand(2, 3, 4), values=torch.rand(2, 2, 6)), ValueError,
                    r"`values` must have shape \[Hs=2, R=3, Dv\], got \[2, 2, 6\]"),
    "bias": (dict(keys=torch.rand(2, 3, 4), values=torch.rand(2, 3, 6), bias=torch.rand(2, 2)), ValueError,
             r"`bias` must have shape \[Hs=2, R=3\], got \[2, 2\]"),
    "map_without_features": (dict(keys=torch.rand(2, 3, 4), values=torch.rand(2, 3, 6), feature_map="elu"), ValueError,
                             "`feature_map` must come with `k`"),
    "devices": (dict(z=z.to("meta"), k=k, feature_map="elu"), ValueError, "`z` must be on the device of the other"),
}  # fmt: skip


@pytest.mark.parametrize("arguments, error, message", REFUSED.values(), ids=REFUSED)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        PrefixState(**arguments)


def test_pytree_round_trip():
    from torch.utils import _pytree as pytree

    state = a_state(**RECIPES["all_parts"])
    doubled = pytree.tree_map(lambda tensor: tensor * 2, state)
    assert isinstance(doubled, PrefixState)
    assert torch.equal(doubled.z_a, state.z_a * 2)
    assert (doubled.z, doubled.feature_map, doubled.feature_scale) == (None, "taylor1", 0.3)
