"""The reference against the formula written as loops over numbers, and its gradients against differences."""

import math

import pytest
import torch
from cases import CASES, make_inputs

from ntk_kernels import FEATURE_MAPS, feature_dim, reference

F64 = torch.float64
LOOPED = [
    "plain", "elu", "taylor1", "taylor2", "feature_scale", "log_scale", "centres", "clamped_centres", "low_rank",
    "rows", "all_parts", "state_per_query_head", "index_none", "more_keys", "offset_negative", "window_offset",
    "mask_bool_causal", "mask_additive", "softcap", "scale",
]  # fmt: skip


def by_loops(case, query, key, value, state, options):
    """Computes out and lse of a few rows by the definition, one number at a time."""
    _, heads, seq_q, dim = query.shape
    seq_k = key.shape[2]
    scale = options.get("scale", dim**-0.5)
    offset = options.get("causal_offset", seq_k - seq_q)
    left, right = options.get("window", (-1, -1))
    mask = options.get("attn_mask")
    softcap = options.get("softcap")
    mask = None if mask is None else mask.expand(query.shape[0], heads, seq_q, seq_k)

    def exp_dot(a, b, plus=0.0):
        return math.exp(scale * sum(x * y for x, y in zip(a, b, strict=True)) + plus)

    for b, h, i in ((0, 0, 0), (0, 3, 3), (1, 1, seq_q - 1), (1, 2, 7)):
        q = query[b, h, i].tolist()
        group = h // (heads // key.shape[1])
        numerator, denominator = torch.zeros(value.shape[3], dtype=F64), 0.0
        for j in range(seq_k):
            if options.get("is_causal") and j > i + offset:
                continue
            if (left >= 0 and j < i + offset - left) or (right >= 0 and j > i + offset + right):
                continue
            s = scale * sum(x * y for x, y in zip(q, key[b, group, j].tolist(), strict=True))
            s = s if softcap is None else softcap * math.tanh(s / softcap)
            if mask is not None and mask.dtype == torch.bool:
                s = s if mask[b, h, i, j] else -math.inf
            elif mask is not None:
                s += mask[b, h, i, j].item()
            numerator += math.exp(s) * value[b, group, j]
            denominator += math.exp(s)
        n = 0 if "state_index" not in options else int(options["state_index"][b])
        if state is not None and n >= 0:
            g = h // (heads // state.num_heads)
            part = {name: t[n, g] if state.is_stack else t[g] for name, t in state.tensors().items()}
            for j in range(state.num_rows):
                bias = part["bias"][j].item() if "bias" in part else 0.0
                weight = exp_dot(q, part["keys"][j].tolist(), bias)
                numerator += weight * part["values"][j]
                denominator += weight
            feature_scale = math.sqrt(scale) if state.feature_scale is None else state.feature_scale
            phi = features_by_loops([feature_scale * x for x in q], state.feature_map)
            z = part["z"] if "z" in part else part["z_a"] @ part["z_b"]
            centers = part["centers"].tolist() if "centers" in part else [[0.0] * dim]
            mass = 0.0
            for c, center in enumerate(centers):
                where = (c,) if "centers" in part else ()
                beta = part["log_scale"][where].item() if "log_scale" in part else 0.0
                weight = exp_dot(q, center, beta)
                numerator += weight * sum(f * row for f, row in zip(phi, z[where], strict=True))
                mass += weight * sum(f * k for f, k in zip(phi, part["k"][where].tolist(), strict=True))
            denominator += max(0.0, mass)
        if denominator == 0:
            yield (b, h, i), torch.zeros_like(numerator), -math.inf
        else:
            yield (b, h, i), numerator / denominator, math.log(denominator)


def features_by_loops(x, name):
    if name == "elu":
        return [v + 1 if v > 0 else math.exp(v) for v in x]
    features = [1.0, *x]
    if name == "taylor2":
        features += [x[a] * x[b] for a in range(len(x)) for b in range(a + 1, len(x))]
        features += [v * v / math.sqrt(2) for v in x]
    return features


@pytest.mark.parametrize("name", LOOPED)
def test_against_loops(name):
    case = next(case for case in CASES if case.id == name)
    query, key, value, state, options = make_inputs(case)
    query, key, value = (tensor.to(F64) for tensor in (query, key, value))
    state = None if state is None else state.to(F64)
    out, lse = reference.ntk_attention(query, key, value, state, **options, return_lse=True)
    for where, expected_out, expected_lse in by_loops(case, query, key, value, state, options):
        torch.testing.assert_close(out[where], expected_out)
        assert lse[where].item() == pytest.approx(expected_lse, rel=1e-9)


@pytest.mark.parametrize(
    "name", ["elu", "taylor2", "clamped_centres", "all_parts", "mask_bool_causal", "index_none", "softcap"]
)
def test_gradients_against_differences(name):
    case = next(case for case in CASES if case.id == name)
    query, key, value, state, options = make_inputs(case)
    tensors = {"query": query[..., :6, :4], "key": key[..., :6, :4], "value": value[..., :6, :3]}
    if state is not None:
        r = 4 if case.state.get("feature_map", "elu") == "elu" else feature_dim(state.feature_map, 4)
        cut = {"z": (r, 3), "k": (r,), "z_a": (r, 2), "z_b": (2, 3), "centers": (2, 4), "log_scale": (2,),
               "keys": (2, 4), "values": (2, 3), "bias": (2,)}  # fmt: skip
        if state.centers is None:
            cut["log_scale"] = ()
        for field, tensor in state.tensors().items():
            sizes = cut[field]
            if state.centers is not None and field in ("z", "k", "z_a", "z_b"):
                sizes = (2, *sizes)
            slices = tuple(slice(0, size) for size in sizes)
            tensors[field] = tensor[(..., *slices)] if slices else tensor
    options = dict(options)
    if "attn_mask" in options:
        options["attn_mask"] = options["attn_mask"][..., :6, :6]
    names = list(tensors)
    leaves = [tensor.to(F64).clone().requires_grad_() for tensor in tensors.values()]

    def attend(*leaves):
        tensors = dict(zip(names, leaves, strict=True))
        qkv = [tensors.pop(name) for name in ("query", "key", "value")]
        fresh = None if state is None else type(state)(**tensors, feature_map=state.feature_map)
        out, lse = reference.ntk_attention(*qkv, fresh, **options, return_lse=True)
        return out, lse.masked_fill(lse == -math.inf, 0)

    assert torch.autograd.gradcheck(attend, leaves)


def test_feature_maps_against_loops():
    x = torch.randn(5, 7, dtype=F64)
    for name in FEATURE_MAPS:
        expected = torch.tensor([features_by_loops(row, name) for row in x.tolist()], dtype=F64)
        torch.testing.assert_close(reference.feature_map(x, name), expected)


def test_what_the_taylor_maps_expand():
    x, y = torch.randn(2, 5, 7, dtype=F64)
    t = (x * y).sum(-1)
    for name, expected in (("taylor1", 1 + t), ("taylor2", 1 + t + t**2 / 2)):
        product = (reference.feature_map(x, name) * reference.feature_map(y, name)).sum(-1)
        torch.testing.assert_close(product, expected)


def test_prefix_attention_is_attention_over_both():
    query, key, value = torch.randn(3, 2, 4, 5, 8, dtype=F64)
    prefix_key, prefix_value = torch.randn(2, 2, 4, 9, 8, dtype=F64)
    visible = torch.cat([torch.ones(5, 9, dtype=torch.bool), torch.ones(5, 5, dtype=torch.bool).tril()], dim=1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, torch.cat([prefix_key, key], 2), torch.cat([prefix_value, value], 2), attn_mask=visible
    )
    out = reference.prefix_attention(query, key, value, prefix_key, prefix_value, is_causal=True)
    torch.testing.assert_close(out, expected)
    one = reference.prefix_attention(query[:1], key[:1], value[:1], prefix_key[0], prefix_value[0], is_causal=True)
    torch.testing.assert_close(one, expected[:1])
