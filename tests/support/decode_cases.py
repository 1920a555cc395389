"""The option table of decode: every call is run by every backend, against the float64 reference."""

import math

import torch
from cases import BF16, F32, F64, HALF, make_state
from oracle import assert_as_accurate, run, runs_in_float32

from ntk_kernels import ntk_attention_decode, reference

LENGTHS = (75, 1, 37, 0)
SIZE = 80  # keys that there is room for
TAYLOR1, TAYLOR2 = {"feature_map": "taylor1"}, {"feature_map": "taylor2"}
ALL_PARTS = TAYLOR1 | {"centers": 2, "rows": 3, "log_scale": True, "rank": 2}
# state, options of the call, sizes
CALLS = {
    "plain": (None, {}, {}),
    "elu": ({}, {}, {}),
    "taylor1": (TAYLOR1, {}, {}),
    "taylor2": (TAYLOR2, {}, {}),
    "one_query": ({}, {}, {"rows": 1}),
    "sixteen": (TAYLOR1, {}, {"rows": 16}),
    "full": ({}, {"is_causal": False}, {}),
    "low_rank_elu": ({"rank": 3}, {}, {}),
    "low_rank_taylor1": (TAYLOR1 | {"rank": 3}, {}, {}),
    "low_rank_taylor2": (TAYLOR2 | {"rank": 3}, {}, {}),
    "centres": (TAYLOR1 | {"centers": 3, "log_scale": True}, {}, {}),
    "rows": ({"rows": 5}, {}, {}),
    "rows_only": ({"rows": 4, "feature_map": None}, {}, {}),
    "all_parts": (ALL_PARTS, {}, {}),
    "state_per_query_head": ({"heads": 8, "rows": 2}, {}, {}),
    "all_parts_per_query_head": (ALL_PARTS | {"heads": 8}, {}, {"rows": 3}),
    "no_mass": ({"mass": "none"}, {}, {}),
    "no_mass_low_rank": ({"mass": "none", "rank": 2} | TAYLOR2, {}, {"rows": 1}),
    "no_mass_per_query_head": ({"mass": "none", "heads": 8}, {}, {}),
    "clamped_taylor2": (TAYLOR2 | {"mass": "mixed"}, {}, {}),
    # a sequence without keys, or with a single one of small weight, would divide by a mass that has cancelled out
    "clamped": (TAYLOR1 | {"mass": "mixed"}, {}, {"lengths": (75, 20, 37, 9)}),
    "clamped_centres": (TAYLOR1 | {"mass": "mixed", "centers": 4, "log_scale": True}, {}, {"lengths": (75, 1, 37, 9)}),
    "index": (ALL_PARTS | {"stack": 3}, {"state_index": (2, 0, -1, 2)}, {}),
    "window": ({}, {"window": (20, 0)}, {}),
    "window_one_query": ({}, {"window": (20, 0)}, {"rows": 1}),
    "window_both_sides": ({}, {"window": (9, 2), "is_causal": False}, {"rows": 5}),
    "window_narrow": (None, {"window": (0, 0)}, {}),
    "key_start": ({}, {"key_start": (3, 0, 40, 0)}, {}),
    "key_start_window": (None, {"key_start": (70, 1, -5, 0), "window": (30, 0)}, {}),
    "softcap": ({"rows": 2}, {"softcap": 1.5}, {}),
    "scale": ({}, {"scale": 0.7}, {}),
    "negative_scale": (None, {"scale": -0.7}, {}),
    "ungrouped": ({}, {}, {"kv_heads": 8}),
    "multi_query": ({}, {}, {"kv_heads": 1, "rows": 16}),
    "value_wider": (TAYLOR1, {}, {"value_dim": 24}),
    "value_narrower": ({}, {}, {"value_dim": 5}),
    "d80": (TAYLOR2, {}, {"head_dim": 80, "kv_heads": 4}),
    "huge_logits": ({}, {"scale": 1000.0}, {}),
    "bf16": ({}, {}, {"dtype": BF16}),
    "bf16_taylor2": (TAYLOR2 | {"dtype": BF16}, {}, {"dtype": BF16}),
    "bf16_all_parts": (ALL_PARTS, {}, {"dtype": BF16}),
    "half": ({"rows": 2}, {}, {"dtype": HALF}),
    "half_low_rank": ({"rank": 3}, {}, {"dtype": HALF}),
    "f64": (ALL_PARTS | {"dtype": F64}, {}, {"dtype": F64}),
    "blhd": ({}, {}, {"layout": "BLHD"}),
    "bhdl": ({}, {}, {"layout": "BHDL"}),
}  # fmt: skip


def make_call(name, seed=0):
    """Returns query, key_cache, value_cache, state and the options of a call; cache entries beyond a sequence's length
    are NaN."""
    recipe, options, sizes = CALLS[name]
    sizes = {"rows": 2, "kv_heads": 2, "head_dim": 16, "dtype": F32, "layout": "BHLD", "lengths": LENGTHS} | sizes
    value_dim = sizes.get("value_dim", sizes["head_dim"])
    generator = torch.Generator().manual_seed(seed)
    order = {"BHLD": (0, 1, 2, 3), "BLHD": (0, 2, 1, 3), "BHDL": (0, 1, 3, 2)}[sizes["layout"]]

    def rand(heads, length, dim):
        shape = (len(sizes["lengths"]), heads, length, dim)
        tensor = torch.randn([shape[axis] for axis in order], generator=generator, dtype=F64)
        return tensor.permute(order).to(sizes["dtype"])

    query = rand(8, sizes["rows"], sizes["head_dim"])
    caches = rand(sizes["kv_heads"], SIZE, sizes["head_dim"]), rand(sizes["kv_heads"], SIZE, value_dim)
    for cache in caches:
        for b, length in enumerate(sizes["lengths"]):
            cache[b, :, length:] = math.nan
    state = None
    if recipe is not None:
        recipe = {"heads": sizes["kv_heads"], "head_dim": sizes["head_dim"], "value_dim": value_dim} | recipe
        state = make_state(generator, **recipe)
    options = {"cache_seqlens": torch.tensor(sizes["lengths"], dtype=torch.int32)} | options
    options = {key: torch.tensor(x) if key in ("state_index", "key_start") else x for key, x in options.items()}
    return query, *caches, state, options


def in_pages(key_cache, value_cache, lengths, page_size, generator=None):
    """Returns the caches as pages in a random order, and the block table; unused entries are NaN and page number -1."""
    batch, heads, size, _ = key_cache.shape
    per_row = -(-size // page_size)
    order = torch.randperm(batch * per_row + 3, generator=generator)  # three belong to nobody
    table = order[: batch * per_row].reshape(batch, per_row).int()
    paged = []
    for cache in (key_cache, value_cache):
        pages = cache.new_full((len(order), heads, page_size, cache.shape[3]), math.nan)
        for b in range(batch):
            for i, start in enumerate(range(0, int(lengths[b]), page_size)):
                part = cache[b, :, start : min(start + page_size, int(lengths[b]))]
                pages[table[b, i], :, : part.shape[1]] = part
        paged.append(pages)
    used = torch.arange(per_row) * page_size < lengths[:, None]
    return *paged, table.masked_fill(~used, -1)


def decode_by(backend, **extra):
    def attention(query, key_cache, value_cache, state, *, cache_seqlens, **options):
        return ntk_attention_decode(query, key_cache, value_cache, cache_seqlens, state, **options, **extra,
                                    backend=backend)  # fmt: skip

    return attention


def exact(query, key_cache, value_cache, state, *, cache_seqlens, **options):
    return reference.ntk_attention_decode(query, key_cache, value_cache, cache_seqlens, state, **options)


def check(name, call, ours, dtype, **tolerance):
    eager = runs_in_float32(exact, *call)
    expected = run(exact, *call, dtype=F64)
    lse = expected["lse"][expected["lse"].isfinite()]
    for result in ours:
        assert_as_accurate(
            f"{name}: {result}", ours[result], eager[result], expected[result], dtype, lse_size=lse.abs().max().item(),
            **tolerance,
        )  # fmt: skip


def served(name, backend):
    _, options, sizes = CALLS[name]
    if backend == "torch":
        return "softcap" not in options
    return sizes.get("dtype") != F64
