"""A prefix for tests of sums of features, and the check against the reference."""

import torch
from oracle import assert_as_accurate

from ntk_kernels import library, reference
from ntk_kernels.inputs import SumInputs

F64 = torch.float64


def a_prefix(heads=2, rows=40, head_dim=3, value_dim=2, centers=None, weighted=False, dtype=torch.float32):
    """Returns keys, values, weights and centres, the last of which, if there are several, is far from every key."""
    keys, values = torch.randn(heads, rows, head_dim), torch.randn(heads, rows, value_dim)
    weights = torch.randn(heads, rows) if weighted else None
    mu = None if centers is None else 0.5 * torch.randn(heads, centers, head_dim)
    if centers is not None and centers > 1:
        mu[:, -1] = 30
        keys, mu = keys.to(dtype), mu.to(dtype)
        nearest = torch.cdist(keys.double(), mu.double()).topk(2, largest=False).values
        between = nearest[..., 1] - nearest[..., 0] < 1e-2  # two centres: rounding would decide for one
        keys = torch.where(between[..., None], mu[:, :1], keys)
    return [None if tensor is None else tensor.to(dtype) for tensor in (keys, values, weights, mu)]


def by_reference(prefix, feature_map, key_scale, dtype=F64):
    keys, values, weights, mu = (None if tensor is None else tensor.to(dtype) for tensor in prefix)
    return reference.sum_features(keys, values, feature_map, key_scale=key_scale, centers=mu, weights=weights)


def results(function, prefix, *options):
    """Returns the sums, and the gradients of keys, values and centres for fixed gradients of the sums."""
    tensors = [t.detach().clone().requires_grad_() if i != 2 and t is not None else t for i, t in enumerate(prefix)]
    z, k, count = function(tensors, *options)
    generator = torch.Generator().manual_seed(1)
    outputs = [z, k]
    grads = [torch.randn(t.shape, generator=generator, dtype=F64).to(t) for t in outputs]  # terms of sums that cancel
    names = [name for name, t in zip(("keys", "values", "", "centers"), tensors, strict=True) if name and t is not None]
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    gradients = torch.autograd.grad(outputs, leaves, grads)
    found = {"z": z.detach(), "k": k.detach(), "count": count}
    return found | {f"grad {name}": grad for name, grad in zip(names, gradients, strict=True)}


def by_op(tensors, feature_map, key_scale, backend):
    return library.sum_features(SumInputs(*tensors, feature_map, key_scale, backend))


def check(prefix, feature_map, backend, key_scale=0.7, *, device="cpu", roundings=4, **tolerance):
    dtype = prefix[0].dtype
    accumulation = F64 if dtype == F64 else torch.float32
    there = [None if tensor is None else tensor.to(device) for tensor in prefix]
    ours = {name: t.cpu() for name, t in results(by_op, there, feature_map, key_scale, backend).items()}
    wide = [None if tensor is None else tensor.to(accumulation) for tensor in prefix]
    eager = results(by_reference, wide, feature_map, key_scale, torch.float32)
    exact = results(by_reference, [None if t is None else t.to(F64) for t in prefix], feature_map, key_scale)
    for name, expected in exact.items():
        if name.startswith("grad"):
            assert ours[name].dtype == dtype
            assert_as_accurate(name, ours[name], eager[name], expected, dtype, roundings=roundings, **tolerance)
        else:
            assert ours[name].dtype == accumulation
            bits = 18 if backend == "triton" and dtype.itemsize == 2 else 24
            of_parts = roundings * 2 ** (24 - bits)  # features of half precision rows have two of 8 bits
            assert_as_accurate(name, ours[name], eager[name], expected, accumulation, roundings=of_parts, **tolerance)
