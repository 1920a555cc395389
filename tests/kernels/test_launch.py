"""Tests of kinds of calls and of plans: sizes, grids, constants, compiled kernels. In the interpreter."""

import ast
import importlib
import inspect
import pkgutil
import textwrap
from types import SimpleNamespace

import decode_cases
import pytest
import torch
import triton
import triton.language as tl
from cases import case_named, make_inputs, served_by
from decode_cases import CALLS
from triton.runtime.jit import JITFunction

from ntk_kernels import ntk_attention

if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU", allow_module_level=True)

from bench.upkeep import aot
from ntk_kernels import kernels
from ntk_kernels.inputs import Inputs, StateTensors
from ntk_kernels.kernels import backward_delta, forward
from ntk_kernels.kernels.host import configs, launch
from ntk_kernels.kernels.host.configs import TileConfig
from ntk_kernels.kernels.jit.dims import Dims, dims_for


def test_kinds_are_shared_whatever_the_lengths():
    query, key, value, state, _ = make_inputs(case_named("elu"))

    def call(query, **options):
        tensors = StateTensors(z=state.z[None, :, None], k=state.k[None, :, None])
        return launch.prepare(Inputs(query, key, value, tensors, feature_map="elu", **options))

    first = call(query)
    for other in (query.clone(), query[:, :, 1:], query[:1], query.transpose(1, 2).contiguous().transpose(1, 2)):
        assert call(other).kind is first.kind and call(other).query.ptr is other
        assert call(other).sizes[:2] == (other.shape[0], other.shape[2])
    for other in (
        call(query, scale=2.0),
        call(query.to(torch.bfloat16)),
        call(query, window_right=0),
        call(query[:, :2]),
    ):
        assert other.kind is not first.kind


def values(scalars):
    """Scalars and constants as plain numbers, strings and dtypes, which compare."""
    if isinstance(scalars, tuple):
        return tuple(map(values, scalars))
    return scalars.value if isinstance(scalars, tl.constexpr) else scalars


def test_plans_share_what_launches_have_in_common(monkeypatch):
    """In every call of the option tables, whatever gradients are asked for, a plan has the constants that would be made
    anew, and arguments with the same facts are those that Triton compiles the same code for."""
    compiled_for = {}
    original = launch.Kind.launch

    def checked(self, kernel, grid, tensors, scalars, config, **constants):
        result = original(self, kernel, grid, tensors, scalars, config, **constants)
        assert values(result.plan.dims) == values(dims_for(kernel, **self.constants | constants)), kernel
        facts = []
        launch._collect_facts((*result.tensors, *result.scalars[:-1]), facts)
        compiled = SimpleNamespace(kernel=JITFunction(kernel.fn, **kernel.kwargs), args=result.args)
        specialisation = repr(aot.specialisation(compiled))
        assert compiled_for.setdefault((result.plan, *facts), specialisation) == specialisation, kernel
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
            for results in ([out], [out, lse]) if asked == "everything" else ([out],):
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
    assert len(compiled_for) > 400


def test_compiled_code_is_run_directly(monkeypatch):
    """With the arguments in their order; not for tensors that begin between multiples of 16 bytes, other classes of
    integers or other dtypes, for which it is not compiled."""
    calls = []

    class Compiled:
        function, packed_metadata = "function", "metadata"

        def run(self, *args):
            calls.append(("compiled", args))

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
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: "stream", raising=False)
    query, key, value, *_ = make_inputs(case_named("plain"))
    kind, config = launch.prepare(Inputs(query, key, value)).kind, TileConfig(32, 32, 4, 1)

    def run(x, n=5):
        kind.launch(kernel, (7, 2), (x, (x, None)), (n,), config, BLOCK_M=2, STAGES=1, BLOCK_N=3)()

    aligned = torch.empty(64)
    assert aligned.data_ptr() % 16 == 0
    between, other = aligned[1:], torch.empty(64)
    for x, n in ((between, 5), (aligned, 5), (other, 7), (between, 5), (other, 1), (other, 16), (other.double(), 5)):
        run(x, n)
    names = [name for name, *_ in calls]
    assert names == ["triton", "triton", "compiled", "triton", "triton", "triton", "triton"]
    of_call = tuple(Dims(BLOCK_M=2, STAGES=1))  # and none that the kernel does not read
    assert calls[1][2][:2] == (aligned, (aligned, None)) and values(calls[1][2][2:]) == (5, of_call)
    assert calls[1][3] == launch.options_of(config)
    *start, x, pair, n, dims = calls[2][1]
    assert start == [7, 2, 1, "stream", "function", "metadata", None, None, None]
    assert x is other and pair[0] is other and (n, values(dims)) == (7, of_call)
    monkeypatch.setattr(launch, "_has_hooks", lambda: True)
    run(other, 7)
    assert calls[-1][0] == "triton"


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
        "forward of one row", launch_of_ours, lambda call: call.sizes.seq_q == 1,
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
