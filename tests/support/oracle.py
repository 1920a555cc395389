"""Accuracy is judged against float64: a call of attention may err twice as much as the plain formula in float32 does
(the largest entry three times), plus one eps of the dtype. Half precisions are thus allowed the rounding of their
result, and little more. How much the formula errs is taken over several runs, from inputs that differ by a rounding:
in a single one it may be lucky."""

import functools
import math

import torch
from cases import make_state

from ntk_kernels import PrefixState, ntk_attention, reference
from ntk_kernels.arguments import state_tensors
from ntk_kernels.inputs import Inputs

F64 = torch.float64


def leaves(query, key, value, state, dtype=None):
    """Returns every differentiable input by name, as fresh leaves (in `dtype`), and the state made of them."""
    inputs = {"query": query, "key": key, "value": value}
    if state is not None:
        inputs |= {f"state.{name}": tensor for name, tensor in state.tensors().items()}
    # .clone() keeps the strides of dense tensors: layouts are part of what is tested
    inputs = {
        name: (tensor.detach().clone() if dtype is None else tensor.detach().to(dtype)).requires_grad_()
        for name, tensor in inputs.items()
    }
    if state is not None:
        tensors = {name.removeprefix("state."): tensor for name, tensor in inputs.items() if name.startswith("state.")}
        state = PrefixState(**tensors, feature_map=state.feature_map, feature_scale=state.feature_scale)
    return inputs, state


def op_inputs(query, key, value, state, options, backend):
    """Returns the inputs that `ntk_attention` calls the op with, but for the scales."""
    left, right = options.get("window", (-1, -1))
    mask = options.get("attn_mask")
    return Inputs(
        query, key, value, state_tensors(state, options.get("state_index")),
        attn_mask=mask, key_start=options.get("key_start"),
        key_stop=options.get("key_stop"), feature_map=None if state is None else state.feature_map, feature_scale=0.5,
        scale=0.25, window_left=left, window_right=0 if options.get("is_causal") else right,
        causal_offset=options.get("causal_offset", key.shape[2] - query.shape[2]), backend=backend,
    )  # fmt: skip


def run(attention, query, key, value, state, options, *, grad_out=None, grad_lse=None, dtype=None, device="cpu"):
    """Returns {"out", "lse"} and, given grad_out (and grad_lse), the gradient of every input, all on the CPU."""
    query, key, value = (tensor.to(device) for tensor in (query, key, value))
    state = None if state is None else state.to(device)
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    inputs, state = leaves(query, key, value, state, dtype)
    if dtype is not None and "attn_mask" in options and options["attn_mask"].is_floating_point():
        options = options | {"attn_mask": options["attn_mask"].to(dtype)}
    with torch.set_grad_enabled(grad_out is not None):
        out, lse = attention(inputs["query"], inputs["key"], inputs["value"], state, **options, return_lse=True)
    results = {"out": out.detach(), "lse": lse.detach()}
    if grad_out is not None:
        outputs, grads = [out], [grad_out.to(out)]
        if grad_lse is not None:  # lse = -inf has no gradient, and a loss that uses it has none either
            outputs.append(lse)
            grads.append(grad_lse.to(lse))
        gradients = torch.autograd.grad(outputs, list(inputs.values()), grads, allow_unused=True)
        for (name, tensor), gradient in zip(inputs.items(), gradients, strict=True):
            results[f"grad {name}"] = torch.zeros_like(tensor) if gradient is None else gradient
    return {name: tensor.cpu() for name, tensor in results.items()}


def nudged(tensor, dtype, generator):
    """Returns `tensor` with each entry changed by up to half an eps of `dtype` and rounded again."""
    change = torch.rand(tensor.shape, generator=generator, dtype=F64) - 0.5
    return (tensor * (1 + torch.finfo(dtype).eps * change)).to(tensor.dtype)


def runs_in_float32(attention, query, key, value, state, options, *, count=3, **grads):
    """`attention` in float32: a list of results for each name, of the inputs as they are and of inputs nudged `count`
    times. Nudged by a rounding of float32, those of half precision would be what they were.
    """
    generator = torch.Generator().manual_seed(5)
    results = []
    for i in range(1 + (count if query.dtype.itemsize >= 4 else 0)):
        inputs, fresh = leaves(query, key, value, state)
        if i > 0:
            with torch.no_grad():
                for tensor in inputs.values():
                    tensor.copy_(nudged(tensor, torch.float32, generator))
        tensors = [inputs[name] for name in ("query", "key", "value")]
        in_float32 = functools.partial(attention, compute_dtype=torch.float32)
        results.append(run(in_float32, *tensors, fresh, options, **grads))
    return {name: [result[name] for result in results] for name in results[0]}


def assert_as_accurate(name, ours, eager, exact, dtype, *, lse_size=0.0, roundings=1, float32_bits=24, amplified=1):
    """Asserts |ours - exact| <= 2 |eager - exact| + band for the root mean square over the entries, and
    <= 3 |eager - exact| + band for the largest entry: it is luck which entry that is, and processors differ in it.

    `eager` is the formula in float32, or a list of its results with several roundings, over which the root mean square
    of their errors is taken. For float64 results its error is scaled down, and counted once more because the oracle has
    it too. Where products of float32 keep `float32_bits`, it is as many times more, and `amplified` times more where a
    stack of layers amplifies roundings. The band is one eps of `dtype` (or as many as there are `roundings`) and, since
    fused attention normalises by e^-lse, the rounding of an lse of `lse_size`, both relative to the size of the result.
    """
    assert ours.shape == exact.shape, f"{name}: shape {list(ours.shape)}, expected {list(exact.shape)}"
    if not ours.numel():
        return
    ours, finite = ours.to(F64), exact.isfinite()
    assert torch.equal(ours.isfinite(), finite), f"{name}: not finite where the reference is, or vice versa"
    assert torch.equal(ours[~finite], exact[~finite]), f"{name}: another infinity than the reference"
    error, size = (tensor.abs().masked_fill(~finite, 0) for tensor in (ours - exact, exact))
    runs = eager if isinstance(eager, list) else [eager]
    errors_of_eager = [(run.to(F64) - exact).abs().masked_fill(~finite, 0) for run in runs]
    eps, lse_eps = torch.finfo(dtype).eps, torch.finfo(F64 if dtype == F64 else torch.float32).eps
    scale, of_rms = (eps / torch.finfo(torch.float32).eps, 3) if dtype == F64 else (amplified, 2)
    if dtype == torch.float32:
        scale *= 2 ** (24 - float32_bits)
    for kind, factor, norm in (("max", 3, lambda t: t.max()), ("rms", of_rms, lambda t: t.square().mean().sqrt())):
        norms = torch.stack([norm(errors) for errors in errors_of_eager])
        largest = norms.max().clamp(min=torch.finfo(F64).tiny)  # squares of norms below 1e-154 would be 0
        allowed = largest * (norms / largest).square().mean().sqrt()
        bound = scale * factor * allowed + (roundings * eps + lse_eps * lse_size) * norm(size)
        worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        assert norm(error) <= bound, (
            f"{name}: {kind} error {norm(error):.3g} exceeds {bound:.3g} (plain PyTorch: {allowed:.3g}); "
            f"worst at {worst}: {ours[worst]:.6g} instead of {exact[worst]:.6g}"
        )


def close(ours, expected):
    """Asserts that two computations of a model in float64 agree, whatever a stack of layers makes of their roundings.

    They differ by 1e-14 or so, and by up to 1e-7 if a norm or a router, which round to float32 in every model, round to
    the other side.
    """
    assert ours.dtype == expected.dtype == F64
    assert (ours - expected).norm() < 1e-6 * expected.norm()


def check_case(case_inputs, dtype, *, backend, backward=False, grad_lse=False, device="cpu", **tolerance):
    """Runs a call by `backend`, by the reference in float32 and in float64, and compares them."""
    query, key, value, state, options = case_inputs
    generator = torch.Generator().manual_seed(1)
    out_shape = (*query.shape[:3], value.shape[3])
    grads = {}
    if backward:
        grads["grad_out"] = torch.randn(out_shape, generator=generator, dtype=F64).to(dtype)
        if grad_lse:
            grads["grad_lse"] = torch.randn(out_shape[:3], generator=generator, dtype=F64).to(dtype)

    def attention(*args, **kwargs):
        return ntk_attention(*args, **kwargs, backend=backend)

    ours = run(attention, query, key, value, state, options, **grads, device=device)
    eager = runs_in_float32(reference.ntk_attention, *case_inputs, **grads)
    exact = run(reference.ntk_attention, query, key, value, state, options, **grads, dtype=F64)
    lse = exact["lse"][exact["lse"].isfinite()]
    lse_size = lse.abs().max().item() if lse.numel() else 0.0
    assert ours["out"].dtype == dtype
    for name in ours:
        assert_as_accurate(name, ours[name], eager[name], exact[name], dtype, lse_size=lse_size, **tolerance)


NAN_STATES = {
    "elu": {"centers": 1, "log_scale": True},
    "elu and rows": {"rows": 2},
    "taylor1": {"feature_map": "taylor1", "centers": 2, "log_scale": True, "mass": "mixed"},
    "taylor1, one centre": {"feature_map": "taylor1", "centers": 1, "log_scale": True, "mass": "mixed"},
    "taylor2": {"feature_map": "taylor2", "centers": 1, "log_scale": True},
}


def check_nan(recipe, seq_k, backend, device="cpu", head_dim=8, dtype=torch.float32):
    """Asserts that NaN in a query, a mask or a state is neither hidden, where the reference has it, nor spread to other
    heads."""

    def inputs():
        generator = torch.Generator().manual_seed(0)
        state = make_state(generator, head_dim=head_dim, value_dim=head_dim, heads=2, **recipe)
        query = torch.randn(2, 4, 21, head_dim, generator=generator).to(dtype)
        key, value = torch.randn(2, 2, 2, seq_k, head_dim, generator=generator).to(dtype).unbind()
        mask = torch.zeros(21, seq_k, dtype=dtype)
        return {"query": query, "key": key, "value": value, "attn_mask": mask}, state.tensors(), state

    for name in ("query", "attn_mask", *inputs()[1]):
        tensors, of_state, state = inputs()
        if name in ("query", "attn_mask"):
            if tensors[name].numel() == 0:
                continue
            tensors[name][..., 3, 1] = math.nan
        else:
            of_state[name][1].view(-1)[0] = math.nan
            del tensors["attn_mask"]
        state = PrefixState(**of_state, feature_map=state.feature_map)
        ours = ntk_attention(
            *(tensor.to(device) for tensor in list(tensors.values())[:3]), state.to(device), return_lse=True,
            attn_mask=tensors["attn_mask"].to(device) if name == "attn_mask" else None, backend=backend,
        )  # fmt: skip
        exact = reference.ntk_attention(
            *(tensor.double() for tensor in list(tensors.values())[:3]), state.to(torch.float64), return_lse=True,
            attn_mask=tensors["attn_mask"].double() if name == "attn_mask" else None,
        )  # fmt: skip
        assert exact[0].isnan().any(), name
        for result, expected in zip(ours, exact, strict=True):
            result = result.cpu()
            assert not (expected.isnan() & ~result.isnan()).any(), f"NaN in {name} is hidden"
            unspoilt = result[:, :, :3] if name in ("query", "attn_mask") else result[:, :2]
            assert not unspoilt.isnan().any(), f"NaN in {name} is spread"
