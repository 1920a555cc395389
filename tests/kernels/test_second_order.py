"""The kernels for prefixes of second order: right on every call that they take, and which these are. Interpreted."""

import pytest
import torch
from cases import BF16, CASES, CAUSAL, F32, HALF, TAYLOR2, Case, make_inputs
from oracle import NAN_STATES, check_case, check_nan, op_inputs

from ntk_kernels import ntk_attention, ntk_attention_varlen
from ntk_kernels.backends.torch import implementation as torch_backend
from ntk_kernels.backends.triton import implementation as triton_backend
from ntk_kernels.kernels import add_second_order
from ntk_kernels.kernels.host import autotune, configs, launch
from ntk_kernels.kernels.host.configs import TileConfig

ADD, ROWS = "_ntk_add_second_order_kernel", "_ntk_second_order_rows_kernel"


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that run, where these are chosen."""
    monkeypatch.setattr(torch_backend, "_kernels_for", lambda inputs: triton_backend)
    monkeypatch.setattr(add_second_order, "is_chosen", lambda call, kernel: True)
    names, original = [], launch.Launch.__call__
    monkeypatch.setattr(launch.Launch, "__call__", lambda self: (names.append(self.kernel.__name__), original(self))[1])
    return names


SMALL = {"batch": 1, "heads": 2, "kv_heads": 1, "seq_q": 9, "seq_k": 9}  # for wide heads
CENTRE = {"centers": 1, "log_scale": True} | TAYLOR2
TAKEN = [
    Case("d64", "no column is padded", head_dim=64, **SMALL, state=TAYLOR2, options=CAUSAL),
    Case("d128", "values in two parts", head_dim=128, **SMALL, state=CENTRE, options=CAUSAL),
    Case("d128_dv64", "", head_dim=128, value_dim=64, **SMALL, state=TAYLOR2),
    Case("d64_dv128", "", head_dim=64, value_dim=128, **SMALL, state=TAYLOR2),
    Case("d8", "a single block", head_dim=8, state=TAYLOR2),
    Case("d40", "five blocks of columns", head_dim=40, value_dim=24, state=TAYLOR2 | {"feature_scale": 0.3}),
    Case("d80", "a block of x that is not full", head_dim=80, value_dim=72, **SMALL, state=CENTRE),
    Case("tiles", "several tiles of several heads that share a state", seq_q=70, seq_k=70, heads=6, state=CENTRE),
    Case("one_row", "fewer rows than a tile", seq_q=1, seq_k=63, state=CENTRE, options=CAUSAL),
    Case("centre", "its logit moves with the query", state=CENTRE, options=CAUSAL),
    Case("clamped", "mass of both signs", state={"mass": "mixed"} | CENTRE, options=CAUSAL),
    Case("no_mass", "what is added is bounded by the keys alone", state={"mass": "none"} | TAYLOR2, options=CAUSAL),
    Case("no_mass_centre", "", state={"mass": "none"} | CENTRE),
    Case("nothing", "neither a key nor mass: 0 and no gradient, whatever the weight", magnitude=20.0,
         options=CAUSAL | {"causal_offset": -40},
         state={"mass": "none", "centers": 1, "center_magnitude": 20.0} | TAYLOR2),
    Case("no_key", "the prefix alone on some rows", options=CAUSAL | {"causal_offset": -9}, state=CENTRE),
    Case("huge", "logits of ±1000", magnitude=20.0, state=CENTRE),
    Case("index", "a stack, of which a batch row has none", batch=3, state={"stack": 2} | CENTRE, state_index=(1, -1, 0)),
    Case("per_query_head", "Hs = Hq", state={"heads": 4} | TAYLOR2),
    Case("low_rank", "multiplied out before", state={"rank": 3} | CENTRE),
    Case("blhd", "rows far apart", layout="BLHD", state=CENTRE),
    Case("bf16", "rounded once", dtype=BF16, **SMALL, state=CENTRE, options=CAUSAL),
]  # fmt: skip


@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.id)
def test_against_the_reference(case, launched):
    check_case(make_inputs(case), case.dtype, backend="torch")
    assert launched.count(ADD) == launched.count(ROWS) >= 1


OF_TABLE = [
    case for case in CASES
    if (case.state or {}).get("feature_map") == "taylor2" and "rows" not in case.state and case.head_dim % 8 == 0
    and max(case.head_dim, case.value_dim or 0) <= 128 and "softcap" not in case.options
    and case.dtype == F32  # bfloat16 takes a minute
]  # fmt: skip


@pytest.mark.parametrize("case", OF_TABLE, ids=lambda case: case.id)
def test_cases_of_the_table(case, launched):
    check_case(make_inputs(case), case.dtype, backend="torch")
    assert ADD in launched


@pytest.mark.parametrize("rows", [16, 64])
def test_tiles_of_any_size(rows, launched, monkeypatch):
    monkeypatch.setattr(configs, "candidates", lambda *args: (TileConfig(rows, 64, 4, 1),))
    case = Case("", "", seq_q=50, seq_k=50, state=CENTRE)
    check_case(make_inputs(case), case.dtype, backend="torch")
    assert ADD in launched


@pytest.mark.parametrize("seq_k", [0, 21])
def test_nan_is_not_hidden(seq_k, launched):
    check_nan(NAN_STATES["taylor2"], seq_k, "torch")
    assert launched


def test_packed_sequences(launched):
    """Rows of no sequence are left alone."""
    case = Case("", "", batch=1, heads=4, seq_q=60, seq_k=60, state={"stack": 3} | CENTRE)
    query, key, value, state, _ = make_inputs(case)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    offsets = torch.tensor([0, 33, 33, 52], dtype=torch.int32)
    index = torch.tensor([2, 0, -1])
    arguments = (query[:52], key[:52], value[:52], offsets, offsets, 33, 33, state)
    ours = ntk_attention_varlen(*arguments, is_causal=True, state_index=index, backend="torch")
    assert launched
    torch.testing.assert_close(
        ours, ntk_attention_varlen(*arguments, is_causal=True, state_index=index, backend="reference")
    )  # fmt: skip


def test_what_the_fused_backend_does_with_them(launched):
    """Attention without the prefix, then the prefix."""
    case = Case("", "", state=CENTRE, seq_q=40, seq_k=40, options=CAUSAL)
    check_case(make_inputs(case), case.dtype, backend="triton")
    forward = launched[: launched.index(ADD) + 1]
    assert forward == ["_ntk_fwd_kernel", "_ntk_pack_pairs_kernel", "_ntk_pack_mass_kernel", ROWS, ADD]


def test_the_constant_row_of_z_is_not_rounded(launched):
    """Half precision models take it from the state as it is."""
    case = Case("", "", dtype=BF16, seq_q=9, seq_k=0, state=TAYLOR2)
    query, key, value, state, _ = make_inputs(case)
    z = torch.zeros_like(state.z)
    z[..., 0, :] = state.z[..., 0, :] * 100
    k = torch.zeros_like(state.k)
    k[..., 0] = 1
    packed = type(state)(z, k, "taylor2")
    out = ntk_attention(query, key, value, packed, backend="torch")
    assert torch.equal(out, z[:, :1].to(BF16).repeat_interleave(2, 0).expand_as(out))


def prepared(arch="sm90", stride=None, **fields):
    case = Case("", "", **{"state": CENTRE, "head_dim": 64, "dtype": BF16} | fields)
    query, key, value, state, options = make_inputs(case)
    if stride is not None:
        query = query.new_empty(*query.shape[:3], stride)[..., : query.shape[3]]
    inputs = op_inputs(query, key, value, state, options, "torch").uniform()
    return launch.prepare_exactly(inputs.without_keys(), arch)


@pytest.mark.parametrize(
    "fields, taken",
    [
        ({}, True),
        ({"arch": "sm80"}, True),
        ({"head_dim": 128, "value_dim": 72}, True),
        ({"head_dim": 40}, True),
        ({"stride": 72}, True),
        ({"state": {"stack": 2} | TAYLOR2, "state_index": (1, -1)}, True),
        ({"state": {"feature_map": "taylor1"}}, False),
        ({"dtype": HALF}, False),
        ({"dtype": F32}, False),
        ({"head_dim": 136}, False),
        ({"value_dim": 136}, False),
        ({"head_dim": 60}, False),
        ({"stride": 68}, False),  # rows of 136 bytes
        ({"state": {"rank": 2} | TAYLOR2}, False),
        ({"state": {"rows": 2} | TAYLOR2}, False),
    ],
)
def test_which_calls_they_take(fields, taken):
    assert add_second_order.can_be_second_order(prepared(**fields)) == taken


def test_calls_that_they_do_not_take_go_the_old_way(launched):
    for fields in ({"state": {"rows": 2} | TAYLOR2}, {"head_dim": 20, "state": TAYLOR2}):
        case = Case("", "", seq_q=9, seq_k=9, **fields)
        check_case(make_inputs(case), case.dtype, backend="torch")
    assert launched == ["_ntk_add_prefix_kernel"] * 2


def test_they_are_no_default(monkeypatch, tmp_path):
    """They run where they were measured, and with NTK_KERNELS_AUTOTUNE=1."""
    monkeypatch.setattr(configs, "_TUNED", tmp_path)
    call = prepared()
    assert not add_second_order.is_second_order(call)
    monkeypatch.setenv("NTK_KERNELS_AUTOTUNE", "1")
    assert autotune.enabled() and add_second_order.is_second_order(call)
    monkeypatch.delenv("NTK_KERNELS_AUTOTUNE")
    configs.write_tuned("sm90", {configs.tuned_key("add_second_order", "taylor2", 64): TileConfig(256, 64, 8, 3, 128)})
    assert add_second_order.is_second_order(call)
    assert not add_second_order.is_second_order(prepared(head_dim=128))
    configs._read_tuned.cache_clear()
    configs.candidates.cache_clear()
