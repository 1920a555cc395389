"""The option table: every row is run forward and backward, by every backend, against the float64 reference."""

import math
from dataclasses import dataclass, field

import torch

from ntk_kernels import PrefixState, feature_dim, reference

HALF, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    """One call. Defaults are the simplest that still have B > 1, grouped heads and lengths that divide nothing."""

    id: str
    reason: str
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    seq_q: int = 37
    seq_k: int = 37
    head_dim: int = 16
    value_dim: int | None = None
    dtype: torch.dtype = F32
    magnitude: float = 1.0  # standard deviation of queries and keys
    layout: str = "BHLD"
    mask: str | None = None
    state: dict | None = field(default_factory=dict)  # arguments of `make_state`
    state_index: tuple | None = None
    key_start: tuple | None = None
    key_stop: tuple | None = None
    options: dict = field(default_factory=dict)  # arguments of `ntk_attention`
    roundings: int = 1  # eps of its size that a gradient may err by


def make_state(
    generator, *, head_dim, value_dim, heads, feature_map="elu", stack=None, centers=None, rank=None, rows=0,
    empty_rows=False, bias=True, log_scale=False, feature_scale=None, dtype=F32, mass="positive", center_magnitude=1.0,
):  # fmt: skip
    """Returns a random state. `mass`: "positive" (k is a sum of features, as of a real prefix), "mixed" (any sign, so
    that the clamp acts on some rows), "constant" (k has the constant feature only) or "none" (k = 0)."""

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    lead = (heads,) if stack is None else (stack, heads)
    tensors = {}
    if feature_map is not None:
        mid = () if centers is None else (centers,)
        r = feature_dim(feature_map, head_dim)
        k = rand(*lead, *mid, r)
        if mass == "positive":
            small = 0.1 if feature_map == "taylor1" else 1.0  # 1 + x·y is positive for small y only
            k = reference.feature_map(small * rand(*lead, *mid, 6, head_dim), feature_map).mean(-2)
        elif mass == "constant":
            k[..., 0] = k[..., 0].abs()
            k[..., 1:] = 0
        elif mass == "none":
            k = torch.zeros_like(k)
        tensors["k"] = k
        if rank is None:
            tensors["z"] = rand(*lead, *mid, r, value_dim)
        else:
            tensors["z_a"], tensors["z_b"] = rand(*lead, *mid, r, rank), rand(*lead, *mid, rank, value_dim)
        if centers is not None:
            tensors["centers"] = center_magnitude * rand(*lead, centers, head_dim)
        if log_scale:
            tensors["log_scale"] = rand(*lead, *mid) - 1
    if rows or empty_rows:
        tensors["keys"], tensors["values"] = rand(*lead, rows, head_dim), rand(*lead, rows, value_dim)
        if bias:
            tensors["bias"] = rand(*lead, rows)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return PrefixState(**tensors, feature_map=feature_map, feature_scale=feature_scale)


def make_mask(kind, case, generator):
    if kind is None:
        return None
    full = (case.batch, case.heads, case.seq_q, case.seq_k)
    keep = torch.rand(full, generator=generator) < 0.7
    if kind == "bool":
        keep[:, :, 3] = False  # a row that sees no key
        return keep
    if kind == "additive":
        return torch.randn(full, generator=generator).masked_fill(~keep, -math.inf).to(case.dtype)
    if kind == "additive_float32":
        return torch.randn(full, generator=generator).masked_fill(~keep, -math.inf)
    if kind == "padding":  # left padding, as tokenizers make it
        lengths = torch.tensor([case.seq_k - 5, case.seq_k])
        return (torch.arange(case.seq_k) >= case.seq_k - lengths[:, None])[:, None, None, :]
    if kind == "two_dimensional":
        return keep[0, 0]
    if kind == "three_dimensional":
        return keep[0]
    if kind == "per_head":
        return keep[:1, :, :, :1] | keep[:1, :, :1, :]
    if kind == "rows":
        return keep[:, :1, :, :1]
    if kind == "nothing":
        return torch.zeros(case.batch, 1, 1, case.seq_k, dtype=torch.bool)
    raise AssertionError(kind)


def make_inputs(case, seed=0):
    """Returns query, key, value, state and the options of the call."""
    generator = torch.Generator().manual_seed(seed)
    value_dim = case.head_dim if case.value_dim is None else case.value_dim

    def rand(heads, length, dim, magnitude=1.0):
        shape = {"BHLD": (0, 1, 2, 3), "BLHD": (0, 2, 1, 3), "BHDL": (0, 1, 3, 2)}[case.layout]
        sizes = [(case.batch, heads, length, dim)[axis] for axis in shape]
        tensor = magnitude * torch.randn(*sizes, generator=generator, dtype=F64)
        return tensor.permute(*shape).to(case.dtype)  # each of these permutations is its own inverse

    query = rand(case.heads, case.seq_q, case.head_dim, case.magnitude)
    key = rand(case.kv_heads, case.seq_k, case.head_dim, case.magnitude)
    value = rand(case.kv_heads, case.seq_k, value_dim)
    state = None
    if case.state is not None:
        recipe = {"heads": case.kv_heads, "head_dim": case.head_dim, "value_dim": value_dim} | case.state
        state = make_state(generator, **recipe)
    options = dict(case.options)
    if (mask := make_mask(case.mask, case, generator)) is not None:
        options["attn_mask"] = mask
    for name in ("state_index", "key_start", "key_stop"):
        if getattr(case, name) is not None:
            options[name] = torch.tensor(getattr(case, name))
    return query, key, value, state, options


CAUSAL = {"is_causal": True}
TAYLOR1 = {"feature_map": "taylor1"}
TAYLOR2 = {"feature_map": "taylor2"}

CASES = [
    # feature maps and parts of a state
    Case("plain", "no state: scaled_dot_product_attention", state=None, options=CAUSAL),
    Case("elu", "the authors' map", options=CAUSAL),
    Case("taylor1", "first order", state=TAYLOR1, options=CAUSAL),
    Case("taylor2", "second order, packed pairs", state=TAYLOR2, options=CAUSAL),
    Case("taylor2_d1", "no pair exists at D=1", head_dim=1, state=TAYLOR2),
    Case("feature_scale", "a state trained with another scale inside φ", state={"feature_scale": 0.5}),
    Case("log_scale", "β without centres", state={"log_scale": True} | TAYLOR1, options=CAUSAL),
    Case("one_centre", "the mean key, any map", state={"centers": 1, "log_scale": True} | TAYLOR2),
    Case("one_centre_elu", "the mean key with elu", state={"centers": 1}),
    Case("centres", "several, each with its weight", state={"centers": 5, "log_scale": True} | TAYLOR1, options=CAUSAL),
    Case("centres_unscaled", "several without log_scale", state={"centers": 3} | TAYLOR1),
    Case("clamped", "mass negative on some rows: M = 0 there", state={"mass": "mixed"} | TAYLOR1, options=CAUSAL),
    Case("clamped_centres", "the clamp is on the sum over centres", state={"mass": "mixed", "centers": 4} | TAYLOR1),
    Case("no_mass", "k = 0: the prefix adds to the numerator only", state={"mass": "none"}, options=CAUSAL),
    Case("low_rank", "z_a @ z_b", state={"rank": 3} | TAYLOR1, options=CAUSAL),
    Case("low_rank_taylor2", "kernels may leave it a pair", state={"rank": 3} | TAYLOR2, options=CAUSAL),
    Case("low_rank_taylor2_index", "stacked pairs", state={"rank": 2, "stack": 2, "centers": 1, "log_scale": True} | TAYLOR2,
         state_index=(1, -1)),
    Case("low_rank_wide", "a pair of higher rank than Dv", state={"rank": 7} | TAYLOR2, value_dim=5),
    Case("low_rank_zero", "a pair of rank 0", state={"rank": 0} | TAYLOR2),
    Case("low_rank_centres", "a pair for each centre", state={"rank": 2, "centers": 3} | TAYLOR1),
    Case("rows", "exact rows beside the expansion", state={"rows": 5} | TAYLOR1, options=CAUSAL),
    Case("rows_unbiased", "exact rows, bias 0", state={"rows": 3, "bias": False}),
    Case("rows_many", "more than one tile of rows", state={"rows": 70} | TAYLOR1, seq_q=5, batch=1),
    Case("rows_zero", "R = 0", state={"rows": 0, "empty_rows": True}),
    Case("rows_only", "no expansion at all", state={"rows": 4, "feature_map": None}, options=CAUSAL),
    Case("all_parts", "everything at once", state={"rows": 3, "centers": 2, "rank": 2, "log_scale": True} | TAYLOR1),
    Case("state_per_query_head", "Hs = Hq", state={"heads": 4, "rows": 2, "centers": 2} | TAYLOR1, options=CAUSAL),
    Case("state_f64", "a state wider than the model", state={"dtype": F64}, options=CAUSAL),
    # many states in one batch
    Case("index", "each batch row its own", state={"stack": 3}, state_index=(2, 0), options=CAUSAL),
    Case("index_shared", "two batch rows share one", batch=3, state={"stack": 2, "rows": 2, "centers": 2} | TAYLOR1,
         state_index=(1, 0, 1)),
    Case("index_none", "-1: no state", batch=3, state={"stack": 2, "rows": 2, "log_scale": True}, state_index=(-1, 1, 0),
         options=CAUSAL),
    Case("index_none_centres", "-1 with centres", state={"stack": 2, "centers": 2} | TAYLOR1, state_index=(-1, 1)),
    Case("index_none_unbiased", "-1 with rows of bias 0", state={"stack": 2, "rows": 2, "bias": False}, state_index=(-1, 1)),
    Case("index_single", "a single state, switched off for one row", state={"rows": 2}, state_index=(0, -1)),
    # lengths and the diagonal
    Case("full", "no causality"),
    Case("one_row", "Lq = 1, a decode step", seq_q=1, seq_k=63, options=CAUSAL),
    Case("one_key", "Lk = 1", seq_q=5, seq_k=1),
    Case("long", "several chunks and tiles", batch=1, heads=2, kv_heads=1, seq_q=257, seq_k=300, options=CAUSAL),
    Case("cross", "Lq < Lk without causality", seq_q=10, seq_k=63),
    Case("fewer_keys", "bottom-right causality hides all keys from the first rows", seq_q=40, seq_k=23, options=CAUSAL),
    Case("fewer_keys_plain", "rows that see nothing at all", seq_q=40, seq_k=23, state=None, options=CAUSAL),
    Case("more_keys", "a cache before the input", seq_q=19, seq_k=63, options=CAUSAL),
    Case("offset_zero", "top-left causality, as SDPA", seq_q=19, seq_k=63, options=CAUSAL | {"causal_offset": 0}),
    Case("offset_negative", "the first rows see no key", options=CAUSAL | {"causal_offset": -5}),
    Case("offset_large", "everything is visible", options=CAUSAL | {"causal_offset": 100}),
    Case("offset_far_negative", "nothing is visible", options=CAUSAL | {"causal_offset": -100}),
    Case("no_keys", "Lk = 0: the prefix alone", seq_k=0),
    Case("no_keys_no_state", "Lk = 0 and no prefix: zeros", seq_k=0, state=None),
    Case("no_rows", "Lq = 0", seq_q=0, state={"rows": 2}),
    Case("no_batch", "B = 0", batch=0, state={"rows": 2, "centers": 2} | TAYLOR1),
    # windows
    Case("window", "left and right", seq_q=300, seq_k=300, heads=2, kv_heads=1, batch=1, options={"window": (20, 10)}),
    Case("window_causal", "sliding window", options=CAUSAL | {"window": (7, -1)}),
    Case("window_causal_cache", "sliding window over a cache", seq_q=19, seq_k=63, options=CAUSAL | {"window": (9, 0)}),
    Case("window_causal_right", "causality cuts the right side", options=CAUSAL | {"window": (3, 5)}),
    Case("window_right", "left unbounded", options={"window": (-1, 4)}),
    Case("window_offset", "window around a moved diagonal", options={"window": (3, 2), "causal_offset": -30}),
    Case("window_unbounded", "(-1, -1) is no window", options={"window": (-1, -1)}),
    # masks
    Case("mask_bool", "with a row that sees no key", mask="bool"),
    Case("mask_bool_causal", "mask and causality", mask="bool", options=CAUSAL),
    Case("mask_additive", "-inf among finite numbers", mask="additive"),
    Case("mask_additive_causal", "several tiles", mask="additive", seq_q=260, seq_k=270, batch=1, heads=2, kv_heads=1,
         options=CAUSAL),
    Case("mask_padding", "left padding of a batch", mask="padding"),
    Case("mask_padding_causal", "left padding of a decoder", mask="padding", options=CAUSAL),
    Case("mask_padding_plain", "padding rows see nothing: 0", mask="padding", state=None, options=CAUSAL),
    Case("mask_2d", "[Lq, Lk]", mask="two_dimensional"),
    Case("mask_per_head", "[1, Hq, Lq, 1] against [1, Hq, 1, Lk]", mask="per_head"),
    Case("mask_window", "mask and window", mask="bool", options={"window": (9, 9)}),
    Case("mask_3d", "[Hq, Lq, Lk]", mask="three_dimensional"),
    Case("mask_window_tiles", "mask columns of a tile that does not start at key 0", mask="bool", seq_q=300, seq_k=300,
         heads=2, kv_heads=1, options={"window": (20, 10)}),
    Case("mask_padding_window", "the same with [B, 1, 1, Lk]", mask="padding", seq_q=300, seq_k=300, heads=2, kv_heads=1,
         options=CAUSAL | {"window": (20, 0)}),
    Case("mask_nothing", "every key hidden: the prefix alone", mask="nothing"),
    Case("mask_nothing_plain", "every key hidden, no prefix: 0", mask="nothing", state=None),
    Case("mask_wide", "a float32 mask on bfloat16 tensors", mask="additive_float32", dtype=BF16, state=TAYLOR1),
    Case("mask_columns", "[1, 1, Lq, 1]: rows that see everything or nothing", mask="rows"),
    # the first and last visible key of each batch row
    Case("key_start", "left padding", key_start=(0, 5), options=CAUSAL),
    Case("key_stop", "per-row lengths", key_stop=(20, 37)),
    Case("key_range", "both, over several tiles, in a window", key_start=(3, 70), key_stop=(200, 300), seq_q=300, seq_k=300,
         heads=2, kv_heads=1, options={"window": (40, 10)}),
    Case("key_range_empty", "a row without keys: the prefix alone, or 0", key_start=(9, 0), key_stop=(9, -3)),
    Case("key_range_empty_plain", "", key_start=(9, 0), key_stop=(3, 40), state=None),
    Case("key_range_beyond", "bounds outside of the keys hide nothing", key_start=(-4, 0), key_stop=(99, 37)),
    Case("key_range_far", "int64 beyond int32", key_start=(2**63 - 1, 2**32), key_stop=(2**63 - 1, -(2**32) + 5)),
    Case("key_range_mask", "with a mask", key_start=(2, 0), key_stop=(37, 30), mask="bool", options=CAUSAL),
    Case("key_range_additive", "with a mask to be added", key_start=(2, 0), key_stop=(37, 30), mask="additive"),
    # heads, dimensions, layouts, scale
    Case("ungrouped", "Hq = Hkv", kv_heads=4, options=CAUSAL),
    Case("multi_query", "Hkv = 1", kv_heads=1, options=CAUSAL),
    Case("value_wider", "Dv > D", value_dim=24, state=TAYLOR1, options=CAUSAL),
    Case("value_narrower", "Dv < D", value_dim=5, state={"rows": 2}, options=CAUSAL),
    Case("odd_dim", "D = 13", head_dim=13, state=TAYLOR2, options=CAUSAL),
    Case("d40", "Stable Diffusion's head dimension", head_dim=40, batch=1),
    Case("d80", "no power of two", head_dim=80, batch=1, seq_q=9, state=TAYLOR1),
    Case("d96", "", head_dim=96, batch=1, seq_q=9, options=CAUSAL),
    Case("d112", "", head_dim=112, batch=1, seq_q=9, options=CAUSAL),
    Case("d80_taylor2", "pairs beyond one tile of features", head_dim=80, batch=1, heads=2, kv_heads=1, seq_q=9,
         state=TAYLOR2),
    Case("d128_taylor2_low_rank", "", head_dim=128, batch=1, heads=2, kv_heads=1, seq_q=9, state={"rank": 4} | TAYLOR2),
    Case("d128", "", head_dim=128, batch=1, options=CAUSAL),
    Case("d80_rows", "rows and centres beyond one tile of columns", head_dim=80, value_dim=96, seq_q=9, seq_k=9,
         state={"rows": 3, "centers": 2, "stack": 2} | TAYLOR1, state_index=(1, 0), options=CAUSAL),
    Case("taylor2_wide_values", "Z read in steps of columns", value_dim=200, batch=1, heads=2, kv_heads=1, seq_q=9,
         seq_k=5, state=TAYLOR2, options=CAUSAL),
    Case("d130_taylor2", "pairs of wide heads", head_dim=130, value_dim=70, batch=1, heads=2, kv_heads=1, seq_q=9, seq_k=5,
         state=TAYLOR2, options=CAUSAL),
    Case("bf16_d130", "Z of taylor1 in two parts", head_dim=130, batch=1, heads=2, kv_heads=1, seq_q=9, seq_k=5, dtype=BF16,
         state=TAYLOR1, options=CAUSAL),
    Case("bf16_d192", "wide heads that are no powers of two", head_dim=192, value_dim=136, batch=1, heads=2, kv_heads=1,
         seq_q=70, seq_k=70, dtype=BF16, state=TAYLOR1, options=CAUSAL),
    Case("d256", "", head_dim=256, batch=1, state=TAYLOR1, options=CAUSAL),
    Case("blhd", "views of [B, L, H, D]", layout="BLHD", options=CAUSAL),
    Case("blhd_cache", "views of [B, L, H, D], several ranges", layout="BLHD", seq_q=19, seq_k=63, options=CAUSAL),
    Case("bhdl", "last stride is not 1", layout="BHDL", options=CAUSAL),
    Case("scale", "OPT pre-scales its queries", options=CAUSAL | {"scale": 1.0}),
    Case("scale_zero", "every visible key weighs the same", options=CAUSAL | {"scale": 0.0}),
    Case("scale_negative", "", options=CAUSAL | {"scale": -0.5}, state={"feature_scale": 0.5}),
    # logits of about ±1000
    Case("huge_plain", "", magnitude=30, state=None, options=CAUSAL),
    Case("huge_elu", "", magnitude=30, options=CAUSAL),
    Case("huge_taylor1", "the mass is clamped on about half of the rows", magnitude=30, state=TAYLOR1),
    Case("huge_taylor2", "", magnitude=30, state=TAYLOR2, options=CAUSAL),
    Case("huge_centres", "weights e^±1000", magnitude=30, options=CAUSAL,
         state={"centers": 3, "log_scale": True, "center_magnitude": 30, "mass": "constant"} | TAYLOR1),
    Case("huge_rows", "rows and keys far apart", magnitude=30, state={"rows": 4}, options=CAUSAL),
    Case("huge_cache", "ranges far apart", magnitude=30, seq_q=19, seq_k=63, options=CAUSAL),
    # dP - Δ cancels where softmax is one-hot, and Δ has the rounding of out
    Case("huge_bf16", "", magnitude=30, dtype=BF16, options=CAUSAL, roundings=2),
    # precision
    Case("f64", "double", dtype=F64, state={"dtype": F64}, options=CAUSAL),
    Case("f64_all_parts", "double", dtype=F64, options=CAUSAL,
         state={"dtype": F64, "rows": 3, "centers": 2, "rank": 2, "log_scale": True} | TAYLOR1),
    Case("bf16", "float32 state under a bfloat16 model", dtype=BF16, head_dim=64, options=CAUSAL),
    Case("bf16_state", "bfloat16 state", dtype=BF16, head_dim=64, state={"dtype": BF16} | TAYLOR1, options=CAUSAL),
    Case("bf16_centres", "", dtype=BF16, state={"centers": 4, "log_scale": True, "rows": 3} | TAYLOR1, options=CAUSAL),
    Case("bf16_taylor2", "", dtype=BF16, state=TAYLOR2, options=CAUSAL),
    Case("bf16_cache", "several ranges", dtype=BF16, seq_q=19, seq_k=63, options=CAUSAL),
    Case("bf16_mask", "", dtype=BF16, mask="bool", options=CAUSAL),
    Case("bf16_tiles", "sums over many tiles", dtype=BF16, batch=1, heads=1, kv_heads=1, seq_q=1100, seq_k=1100,
         options=CAUSAL | {"window": (1100, 0)}),
    Case("f16", "float32 state under a float16 model", dtype=HALF, head_dim=64, options=CAUSAL),
    Case("f16_rows", "float32 rows under a float16 model", dtype=HALF, state={"rows": 5}, options=CAUSAL),
    Case("f16_state", "float16 state", dtype=HALF, state={"dtype": HALF, "rows": 2} | TAYLOR1, options=CAUSAL),
    # soft-capped scores
    Case("softcap", "scores of the input's keys only", state={"rows": 2}, options=CAUSAL | {"softcap": 2.0}),
    Case("softcap_plain", "", state=None, options={"softcap": 0.5, "window": (9, 9)}),
    Case("softcap_50", "Gemma's cap", state=None, options={"softcap": 50.0}),
    Case("softcap_1000", "next to none", state=None, options={"softcap": 1000.0}),
    Case("softcap_mask", "before the mask", mask="additive", options={"softcap": 1.0}),
    Case("softcap_scale_negative", "", state=None, options={"softcap": 1.0, "scale": -0.5}),
    Case("softcap_huge", "logits far beyond the cap", magnitude=30, options=CAUSAL | {"softcap": 30.0}),
    Case("softcap_bf16", "", dtype=BF16, head_dim=64, options=CAUSAL | {"softcap": 20.0}),
]  # fmt: skip
assert len({case.id for case in CASES}) == len(CASES)


def served_by(backend):
    """Returns the cases that a backend computes itself."""
    return [
        case
        for case in CASES
        if not (backend == "triton" and case.dtype == F64) and not ("softcap" in case.options and backend == "torch")
    ]


def case_named(name):
    return next(case for case in CASES if case.id == name)
