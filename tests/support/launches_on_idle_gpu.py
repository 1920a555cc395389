"""Prints, for some calls, whether their replays launch what the long way launches; run in a process of its own.

Nothing is computed on the idle GPU, so launches are compared: kernels, grids, numbers, and the memory that each argument
is in. Memory of the call's own tensors is known by name, other memory by the order in which a call first uses it.
"""

import json
import sys

from bench import idle_gpu

idle_gpu.turn_on(sys.argv[1])

import torch  # noqa: E402
from triton.backends.nvidia import driver  # noqa: E402

from ntk_kernels import PrefixState, ntk_attention, ntk_attention_decode, ntk_attention_varlen, replay  # noqa: E402

launched = []
original = driver.CudaLauncher.__call__


def logged(self, grid_x, grid_y, grid_z, stream, function, metadata, launch_metadata, enter, leave, *args):
    launched.append(((grid_x, grid_y, grid_z), function, args))
    return original(self, grid_x, grid_y, grid_z, stream, function, metadata, launch_metadata, enter, leave, *args)


driver.CudaLauncher.__call__ = logged


def flat(args):
    for x in args:
        if isinstance(x, tuple | list):
            yield from flat(x)
        else:
            yield x.data_ptr() if isinstance(x, torch.Tensor) else getattr(x, "value", x)


def what_it_does(call, tensors):
    """The launches and results of a call, with names for memory."""
    names = {tensor.data_ptr(): name for name, tensor in tensors.items()}
    launched.clear()
    results = call()

    def named(x):
        is_address = type(x) is int and x > 2**32
        return names.setdefault(x, f"memory {len(names)}") if is_address else str(x)

    launches = [[grid, function, [named(x) for x in flat(args)]] for grid, function, args in launched]
    return launches, [named(x.data_ptr()) for x in results if x is not None]


def tensor(*shape, dtype=torch.bfloat16, needs_grad=False):
    return torch.empty(shape, dtype=dtype, device="cuda").requires_grad_(needs_grad)


def calls():
    """Name, function and tensors of calls with grouped heads and an odd length."""

    def training(state, dim, **options):
        qkv = [tensor(2, heads, 300, dim, needs_grad=True) for heads in (8, 2, 2)]
        leaves = dict(zip(("query", "key", "value"), qkv, strict=True)) | ({} if state is None else state.tensors())
        grad = tensor(2, 8, 300, dim)

        def call():
            out = ntk_attention(*qkv, state, backend="triton", **options)
            return out, *torch.autograd.grad(out, list(leaves.values()), grad, allow_unused=True)

        return call, leaves | {"grad": grad}

    def float32(*shape):
        return tensor(*shape, dtype=torch.float32, needs_grad=True)

    yield "plain", *training(None, 64, is_causal=True)
    yield "elu", *training(PrefixState(float32(2, 64, 64), float32(2, 64), "elu"), 64, is_causal=True)
    rows = {"keys": float32(2, 5, 64), "values": float32(2, 5, 64), "bias": float32(2, 5)}
    centers = {"centers": float32(2, 2, 64), "log_scale": float32(2, 2)}
    yield (
        "centres and rows",
        *training(
            PrefixState(float32(2, 2, 65, 64), float32(2, 2, 65), "taylor1", **centers, **rows), 64, window=(20, 0)
        ),
    )
    yield "D=256", *training(None, 256)
    state = PrefixState(tensor(2, 64, 64, dtype=torch.float32), tensor(2, 64, dtype=torch.float32), "elu")
    token, key, value = tensor(1, 8, 1, 64), tensor(1, 2, 2048, 64), tensor(1, 2, 2048, 64)
    lengths = torch.full((1,), 2000, dtype=torch.int32, device="cuda")
    given = {"query": token, "key": key, "value": value, "lengths": lengths} | state.tensors()
    yield (
        "decode in splits",
        lambda: ntk_attention_decode(token, key, value, lengths, state, return_lse=True, backend="triton"),
        given,
    )
    packed = [tensor(300, heads, 64) for heads in (8, 2, 2)]
    bounds = torch.tensor([0, 100, 300], dtype=torch.int32).to("cuda")
    given = dict(zip(("query", "key", "value"), packed, strict=True)) | {"bounds": bounds} | state.tensors()
    yield (
        "packed",
        lambda: ntk_attention_varlen(*packed, bounds, bounds, 200, 200, state, return_lse=True, backend="triton"),
        given,
    )


replays = 0
written = replay.program._Writer.function


def counting(self):
    inner = written(self)

    def counted(*tensors):
        global replays
        replays += 1
        return inner(*tensors)

    return counted


replay.program._Writer.function = counting
idle_gpu.reuse_memory(False)
figures = {}
with torch.autograd.set_multithreading_enabled(False):
    for name, call, tensors in calls():
        by_long_way = [what_it_does(call, tensors) for _ in range(2)]
        before = replays
        by_replay = what_it_does(call, tensors)
        figures[name] = {
            "replays": replays - before, "launches": len(by_replay[0]),
            "differs": None if by_replay in by_long_way else [by_long_way[0], by_replay],
        }  # fmt: skip
print(json.dumps(figures))
