"""What is remembered of a call for those like it: sizes, grids, constants, compiled kernels. In the interpreter."""

import decode_cases
import pytest
import torch
import triton
from cases import case_named, make_inputs, served_by
from decode_cases import CALLS

from ntk_kernels import ntk_attention

if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU", allow_module_level=True)

from ntk_kernels.kernels.host import launch
from ntk_kernels.kernels.host.configs import TileConfig


def test_launches_are_remembered_by_the_kind_of_call():
    """The same for other tensors of the same kind; another for what is compiled or counted differently."""
    query, key, value, state, _ = make_inputs(case_named("elu"))

    def call(query, **options):
        arguments = {"z": state.z[None, :, None], "k": state.k[None, :, None], "feature_map": "elu"} | options
        return launch.prepare(query, key, value, **arguments)

    first = call(query)
    assert call(query.clone()).plans is first.plans
    assert call(query.clone()).query is not first.query
    for other in (
        call(query[:, :, 1:]),
        call(query, scale=2.0),
        call(query.to(torch.bfloat16)),
        call(query, window_right=0),
    ):
        assert other.plans is not first.plans


def kinds(tensors):
    """Of tensors and tuples of them: what a kernel is compiled for."""
    if isinstance(tensors, tuple):
        return tuple(map(kinds, tensors))
    return tensors.dtype if isinstance(tensors, torch.Tensor) else tensors


def test_a_remembered_plan_is_what_would_be_made_anew(monkeypatch):
    """For every call of the option tables, whatever gradients are asked for: grid, scalars, constants, and what of each
    tensor a kernel is compiled for."""
    of_plan = {}
    original = launch.Call.launch

    def checked(self, kernel, tensors, config, describe, *details):
        result = original(self, kernel, tensors, config, describe, *details)
        assert (result.grid, result.plan.scalars, result.constants) == describe(), kernel
        plan, seen = of_plan.setdefault(id(result.plan), (result.plan, kinds(tensors)))
        assert plan is result.plan and seen == kinds(tensors), kernel
        return result

    monkeypatch.setattr(launch.Call, "launch", checked)
    monkeypatch.setattr(launch.Launch, "__call__", lambda self: None)
    for case in served_by("triton"):
        query, key, value, state, options = make_inputs(case)
        inputs = {"query": query, "key": key, "value": value} | ({} if state is None else state.tensors())
        for asked in ("everything", *inputs):
            for name, tensor in inputs.items():
                tensor.requires_grad_(asked in ("everything", name))
            wanted = [tensor for tensor in inputs.values() if tensor.requires_grad]
            out, lse = ntk_attention(query, key, value, state, **options, return_lse=True, backend="triton")
            for results in ([out], [out, lse], [lse]):
                grads = [torch.ones_like(result) for result in results]
                torch.autograd.grad(results, wanted, grads, retain_graph=True, allow_unused=True)
    for name in CALLS:
        if decode_cases.served(name, "triton"):
            query, *caches, state, options = decode_cases.make_call(name)
            *pages, table = decode_cases.in_pages(*caches, options["cache_seqlens"], 16)
            for splits in (None, 1, 5):
                decode_cases.decode_by("triton", num_splits=splits)(query, *caches, state, **options)
                for of_dtype in (torch.int32, torch.int64):
                    decode = decode_cases.decode_by("triton", num_splits=splits, block_table=table.to(of_dtype))
                    decode(query, *pages, state, **options)
    assert len(of_plan) > 500


def test_a_remembered_launch_gets_what_the_first_got(monkeypatch):
    """A kernel that is compiled is called directly, with its arguments in their order; not for tensors that begin
    between multiples of 16 bytes, for which it is not compiled."""
    calls = []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *args: calls.append(("compiled", grid, args))

    class Kernel:
        __name__ = "kernel"
        arg_names = ("x", "pair", "n", "A", "B")

        def __getitem__(self, grid):
            def compile_and_run(*args, **keywords):
                calls.append(("triton", grid, args, keywords))
                return Compiled()

            return compile_and_run

    monkeypatch.setattr(triton.compiler, "CompiledKernel", Compiled)
    query, key, value, *_ = make_inputs(case_named("plain"))
    call, kernel, config = launch.prepare(query, key, value), Kernel(), TileConfig(32, 32, 4, 1)

    def run(x):
        call.launch(kernel, (x, (x, None)), config, lambda: ((7, 2), (5,), {"B": 2, "A": 1}), "details")()

    aligned = torch.empty(64)
    assert aligned.data_ptr() % 16 == 0
    between, other = aligned[1:], torch.empty(64)
    for x in (between, aligned, other, between):
        run(x)
    names = [name for name, *_ in calls]
    assert names == ["triton", "triton", "compiled", "triton"]
    assert calls[1][2:] == ((aligned, (aligned, None), 5), {"A": 1, "B": 2} | launch.options_of(config))
    assert calls[2][1] == (7, 2, 1)
    assert calls[2][2][0] is other and calls[2][2][1][0] is other and calls[2][2][2:] == (5, 1, 2)
