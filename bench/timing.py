"""Times side by side: what is compared is run in turns, so that a noisy machine is noisy for all."""

import random
import statistics
import time
from collections.abc import Callable

import torch


def measure(functions: dict[str, Callable], device: str, *, seconds: float, min_rounds: int = 5) -> dict[str, dict]:
    """Calls every function once a round, for about `seconds` in all (not counting one warm-up round).

    The order changes from round to round: who comes after a large function finds cold caches.

    Returns, by name, {"ms": median, "low": lower quartile, "high": upper quartile, "rounds": number of calls}.
    """
    # Once a large block has been freed, glibc keeps freed pages, as in any process that runs a model. Before, every
    # call pays for fresh ones.
    torch.zeros(30 * 2**20, dtype=torch.uint8)
    synchronize = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    for function in functions.values():
        function()
    synchronize()
    times = {name: [] for name in functions}
    order, shuffler = list(functions), random.Random(0)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[order[0]]) < min_rounds:
        shuffler.shuffle(order)
        for name in order:
            start = time.perf_counter()
            functions[name]()
            synchronize()
            times[name].append((time.perf_counter() - start) * 1e3)
    results = {}
    for name, samples in times.items():
        low, median, high = statistics.quantiles(samples, n=4)
        results[name] = {"ms": median, "low": low, "high": high, "rounds": len(samples)}
    return results
