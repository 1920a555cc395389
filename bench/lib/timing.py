"""Time and memory of functions that are compared: they run in turns, so that a noisy machine is noisy for all."""

import functools
import json
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

_FLUSHED_BYTES = 2**30  # written before each timed call on a GPU, many times its L2 cache


def measure(functions: dict[str, Callable], device: str, *, seconds: float, min_rounds: int = 5) -> dict[str, dict]:
    """Calls every function once per round, for about `seconds` in total after a warm-up round.

    The order changes from round to round, since a function after a large one finds cold caches. On a GPU, the time is
    that between two events around the call, with a cold L2 cache. The cache is flushed as many times as it takes Python
    to queue the call, so that Python's time does not count (`host_time` measures it).

    Returns, by name, {"ms": median, "low": lower quartile, "high": upper quartile, "rounds": number of calls}.
    """
    on_gpu = torch.device(device).type == "cuda"
    if not on_gpu:
        # Once a large block has been freed, glibc keeps freed pages, as in any process that runs a model. Before that,
        # every call pays for fresh pages.
        torch.zeros(30 * 2**20, dtype=torch.uint8)
    for function in functions.values():
        function()
    if on_gpu:
        timed = {
            name: functools.partial(_gpu_time, call, device, _flushes(call, device)) for name, call in functions.items()
        }
    else:
        timed = {name: functools.partial(_cpu_time, call) for name, call in functions.items()}
    times = {name: [] for name in functions}
    order, shuffler = list(functions), random.Random(0)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[order[0]]) < min_rounds:
        shuffler.shuffle(order)
        for name, elapsed in [(name, timed[name]()) for name in order]:
            times[name].append(elapsed())
    return {name: _summary(samples) for name, samples in times.items()}


def host_time(function: Callable, device: str, calls: int = 10, repeats: int = 9) -> float:
    """Returns the microseconds for which a call keeps Python busy, when calls are queued one after the other."""
    samples = []
    for _ in range(repeats):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        samples.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize(device)
    return statistics.median(samples)


def peak_bytes(function: Callable, device: str) -> int:
    """Returns the peak allocation of a call in bytes, with its results, beyond what was allocated before it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The CPU's allocator keeps no counts but reports to the profiler, whose public result is a trace.
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function()
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    held = peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def crossing(sizes: list[int], gains: list[float]) -> float | None:
    """Returns the size above which the gain stays positive, interpolated between two sizes.

    Returns 0 if the gain is positive at every size, None if it is not at the last.
    """
    lost = [i for i, gain in enumerate(gains) if gain <= 0]
    if not lost:
        return 0
    i = lost[-1]
    if i == len(sizes) - 1:
        return None
    return sizes[i] + (sizes[i + 1] - sizes[i]) * -gains[i] / (gains[i + 1] - gains[i])


def _cpu_time(function: Callable) -> Callable[[], float]:
    start = time.perf_counter()
    function()
    elapsed = (time.perf_counter() - start) * 1e3
    return lambda: elapsed


def _gpu_time(function: Callable, device: str, flushes: int) -> Callable[[], float]:
    """Queues a call. Returns a function that waits for it and returns its milliseconds."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        for _ in range(flushes):
            _flushed(device).zero_()
        start.record()
        function()
        end.record()

    def elapsed():
        end.synchronize()
        return start.elapsed_time(end)

    return elapsed


def _flushes(function: Callable, device: str) -> int:
    """Returns how many flushes of the cache take longer than Python needs to queue the call."""
    flush = _gpu_time(_flushed(device).zero_, device, flushes=1)()
    host = []
    for _ in range(3):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        host.append((time.perf_counter() - start) * 1e3)
    torch.cuda.synchronize(device)
    return 1 + int(max(host) / flush)


@functools.cache
def _flushed(device: str) -> torch.Tensor:
    return torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=device)


def _summary(samples: list[float]) -> dict:
    low, median, high = statistics.quantiles(samples, n=4)
    return {"ms": median, "low": low, "high": high, "rounds": len(samples)}
