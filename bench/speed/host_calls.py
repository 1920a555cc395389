"""The calls of `host.py`, in a process that believes in a GPU: prints their figures as JSON."""

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator

from .. import idle_gpu

if __name__ == "__main__":
    idle_gpu.turn_on(sys.argv[1])

import torch

from ntk_kernels import NTKPrefix, PrefixState, ntk_attention, ntk_attention_decode
from ntk_kernels.backends.torch import fused

_HEADS, _DIM, _LENGTH, _CACHE = 16, 64, 512, 2048


def _tensor(*shape: int, needs_grad: bool = False, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda").requires_grad_(needs_grad)


def _state(needs_grad: bool = False) -> PrefixState:
    z = _tensor(_HEADS, _DIM, _DIM, needs_grad=needs_grad, dtype=torch.float32)
    return PrefixState(z, _tensor(_HEADS, _DIM, needs_grad=needs_grad, dtype=torch.float32), "elu")


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yields names and functions; a function that is called again makes a call of the same kind, but for those whose
    lengths grow."""
    frozen, trained = _state(), _state(needs_grad=True)
    query, key, value = (_tensor(2, _HEADS, _LENGTH, _DIM) for _ in range(3))
    leaves = [_tensor(2, _HEADS, _LENGTH, _DIM, needs_grad=True) for _ in range(3)]
    grad_out = torch.ones_like(query)

    def attend(query, key, value, state, backend="triton"):
        return ntk_attention(query, key, value, state, is_causal=True, backend=backend)

    def train(state, wanted):
        return lambda: torch.autograd.grad(attend(*leaves, state), wanted, grad_out)

    yield "forward, no state", lambda: attend(query, key, value, None)
    yield "forward, elu", lambda: attend(query, key, value, frozen)
    yield "forward, gradients wanted", lambda: attend(*leaves, frozen)
    yield "forward and backward, no state", train(None, leaves)
    yield "forward and backward, frozen state", train(frozen, leaves)
    yield "forward and backward, all gradients", train(trained, [*leaves, trained.z, trained.k])
    token, keys, values = _tensor(8, _HEADS, 1, _DIM), *(_tensor(8, _HEADS, _CACHE, _DIM) for _ in range(2))
    lengths = torch.full((8,), 2000, dtype=torch.int32, device="cuda")

    def decode(batch, state):
        tensors = (x[:batch] for x in (token, keys, values, lengths))
        query, key, value, seqlens = (x.clone() for x in tensors)
        return lambda: ntk_attention_decode(query, key, value, seqlens, state, backend="triton")

    yield "decode, no state", decode(8, None)
    yield "decode, elu", decode(8, frozen)
    yield "decode, elu, in splits", decode(1, frozen)
    yield "decode, a cache that grows", _growing(token, frozen)
    fused._op = lambda *arguments: fused._Cudnn  # as on a Hopper GPU
    yield "cuDNN and prefix, forward", lambda: attend(query, key, value, frozen, "torch")
    yield (
        "cuDNN and prefix, forward and backward",
        lambda: torch.autograd.grad(attend(*leaves, trained, "torch"), [*leaves, trained.z, trained.k], grad_out),
    )
    compiled = torch.compile(attend, fullgraph=True)
    yield "in torch.compile, forward", lambda: compiled(query, key, value, frozen)
    prefix = NTKPrefix(_HEADS, _DIM, "elu", device="cuda")
    yield "NTKPrefix()", prefix


def _growing(token, state):
    """Each call has a key more, at the end of the same memory."""
    room = torch.empty(2, 8, _HEADS, 20_000, _DIM, dtype=torch.bfloat16, device="cuda")
    length = 1000

    def step():
        nonlocal length
        length += 1
        key, value = room[:, :, :, :length].unbind()
        return ntk_attention_decode(token, key, value, None, state, is_causal=False, backend="triton")

    return step


def functions_of(function: Callable) -> int:
    """Returns the number of functions, of Python and of C, that a call enters."""
    count = 0

    def seen(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count - 1  # without that of setprofile


def counts_of(function: Callable) -> dict[str, int]:
    """Returns the functions and launches of a call of a known kind."""
    for _ in range(20):
        function()
    before = idle_gpu.launches()
    function()
    launches = idle_gpu.launches() - before
    with torch.autograd.set_multithreading_enabled(False):
        return {"functions": functions_of(function), "launches": launches}


def times_of(functions: dict[str, Callable], blocks: int) -> dict[str, list[float]]:
    """Returns microseconds of a call, for blocks of ten of them, in turns with those of the other functions."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(blocks):
        gc.collect()
        gc.disable()
        for name, function in functions.items():
            function()  # what the others have put out of the processor's caches
            start = time.process_time_ns()
            for _ in range(10):
                function()
            times[name].append((time.process_time_ns() - start) / 1e4)
        gc.enable()
    return times


def main() -> None:
    blocks = int(sys.argv[2])
    torch.set_num_threads(1)
    functions = dict(calls())
    counts = {name: counts_of(function) for name, function in functions.items()}
    times = times_of(functions, blocks)
    print(
        json.dumps(
            {name: {"low_us": min(x), "median_us": statistics.median(x)} | counts[name] for name, x in times.items()}
        )
    )


if __name__ == "__main__":
    main()
