"""Tests of kinds of calls and of plans: sizes, grids, constants, compiled kernels. In the interpreter."""

import ast
import importlib
import inspect
import pkgutil
import textwrap

import decode_cases
import pytest
import torch
import triton
import triton.language as tl
from cases import case_named, make_inputs, served_by
from decode_cases import CALLS

from ntk_kernels import ntk_attention

if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU", allow_module_level=True)

from ntk_kernels import kernels
from ntk_kernels.inputs import Inputs, StateTensors
from ntk_kernels.kernels import backward_delta, forward
from ntk_kernels.kernels.host import configs, launch
from ntk_kernels.kernels.host.configs import TileConfig
from ntk_kernels.kernels.jit.dims import Dims, dims_for


def test_launches_are_remembered_by_the_kind_of_call():
    """Other tensors of the same kind share a kind; calls that are compiled or counted differently do not."""
    query, key, value, state, _ = make_inputs(case_named("elu"))

    def call(query, **options):
        tensors = StateTensors(z=state.z[None, :, None], k=state.k[None, :, None])
        return launch.prepare(Inputs(query, key, value, tensors, feature_map="elu", **options))

    first = call(query)
    assert call(query.clone()).kind is first.kind
    assert call(query.clone()).query.ptr is not first.query.ptr
    for other in (
        call(query[:, :, 1:]),
        call(query, scale=2.0),
        call(query.to(torch.bfloat16)),
        call(query, window_right=0),
    ):
        assert other.kind is not first.kind


def kinds(tensors):
    """The facts that a kernel is compiled for, of tensors and tuples of them."""
    if isinstance(tensors, tuple):
        return tuple(map(kinds, tensors))
    return tensors.dtype if isinstance(tensors, torch.Tensor) else tensors


def values(scalars):
    """Scalars and constants as plain numbers, strings and dtypes, which compare."""
    if isinstance(scalars, tuple):
        return tuple(map(values, scalars))
    return scalars.value if isinstance(scalars, tl.constexpr) else scalars


def test_a_remembered_plan_is_what_would_be_made_anew(monkeypatch):
    """Plans of every call of the option tables, whatever gradients are asked for, have the grid, scalars and constants that
    would be made anew, and tensors of the kind that the kernel is compiled for."""
    of_plan = {}
    original = launch.Kind.launch

    def checked(self, kernel, tensors, config, describe, *details):
        result = original(self, kernel, tensors, config, describe, *details)
        grid, scalars, constants = describe()
        assert (result.grid, values(result.plan.scalars)) == (
            grid,
            values((*scalars, dims_for(kernel, **constants))),
        ), kernel
        plan, seen = of_plan.setdefault(id(result.plan), (result.plan, kinds(tensors)))
        assert plan is result.plan and seen == kinds(tensors), kernel
        return result

    monkeypatch.setattr(launch.Kind, "launch", checked)
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

    @triton.jit
    def kernel(x, pair, n, dims):
        tl.store(x, dims.BLOCK_M + dims.STAGES)

    def launched(grid):
        def compile_and_run(*args, **options):
            calls.append(("triton", grid, args, options))
            return Compiled()

        return compile_and_run

    monkeypatch.setattr(triton.compiler, "CompiledKernel", Compiled)
    monkeypatch.setattr(type(kernel), "__getitem__", lambda self, grid: launched(grid))
    query, key, value, *_ = make_inputs(case_named("plain"))
    kind, config = launch.prepare(Inputs(query, key, value)).kind, TileConfig(32, 32, 4, 1)
    constants = {"BLOCK_M": 2, "STAGES": 1, "BLOCK_N": 3}

    def run(x):
        kind.launch(kernel, (x, (x, None)), config, lambda: ((7, 2), (5,), constants), "details")()

    aligned = torch.empty(64)
    assert aligned.data_ptr() % 16 == 0
    between, other = aligned[1:], torch.empty(64)
    for x in (between, aligned, other, between):
        run(x)
    names = [name for name, *_ in calls]
    assert names == ["triton", "triton", "compiled", "triton"]
    of_call = Dims(BLOCK_M=2, STAGES=1)  # and none that the kernel does not read
    assert calls[1][2][:2] == (aligned, (aligned, None)) and values(calls[1][2][2:]) == (5, tuple(of_call))
    assert calls[1][3] == launch.options_of(config)
    assert calls[2][1] == (7, 2, 1)
    assert calls[2][2][0] is other and calls[2][2][1][0] is other and values(calls[2][2][2:]) == (5, tuple(of_call))


def jit_functions():
    """Every jit function of the package, by name."""
    functions = {}
    for module in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if hasattr(value, "fn") and callable(value.fn):
                functions[name] = value.fn
    return functions


@pytest.mark.parametrize("name", jit_functions())
def test_arguments_of_jit_functions(name):
    """At most 24, and each is used."""
    function = jit_functions()[name]
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    arguments = [argument.arg for argument in definition.args.args]
    assert len(arguments) <= 24
    used = {node.id for statement in definition.body for node in ast.walk(statement) if isinstance(node, ast.Name)}
    assert used >= set(arguments), sorted(set(arguments) - used)


def test_a_kernel_of_a_pass_is_a_record(monkeypatch):
    """The first that serves a call runs, with tiles of its own; others go on to the next."""
    monkeypatch.setitem(configs.TABLES, "forward of one row", None)  # taken back after the test
    launched = []

    def launch_of_ours(call, out, lse, config):
        launched.append(config)
        return forward.fwd_launch(call, out, lse, config)

    kernel = launch.Kernel(
        "forward of one row", launch_of_ours, lambda call: call.kind.seq_q == 1,
        tiles={"sm90": {"plain": {64: (TileConfig(64, 64, 4, 2),)}}},
    )  # fmt: skip
    monkeypatch.setattr(forward, "FORWARD", (kernel, *forward.FORWARD))
    query, key, value = torch.randn(3, 2, 5, 8)
    for rows in (1, 5):
        out = ntk_attention(query[None, :, :rows], key[None], value[None], backend="triton")
        torch.testing.assert_close(out, ntk_attention(query[None, :, :rows], key[None], value[None], backend="torch"))
    assert len(launched) == 1
    blocks = configs.blocks("sm90", 64, 64)
    assert configs.candidates("forward of one row", "sm90", blocks, torch.float16, None)[0] == TileConfig(64, 64, 4, 2)
    assert not configs.has_tiles("forward of one row", "sm80", blocks, torch.float16, None)


def test_a_constant_that_is_not_given_is_named():
    with pytest.raises(
        TypeError, match=r"_ntk_bwd_delta_kernel reads \['BLOCK_DV', 'BLOCK_M', .*\], which its launcher"
    ):
        dims_for(backward_delta._ntk_bwd_delta_kernel, FEATURE_MAP="elu")
