"""Work on a CPU in as many threads as PyTorch would use, each of which runs its operations by itself."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch


def each(function: Callable, items: Iterable) -> Iterator[tuple]:
    """Gives (item, function(item)) for each item, in the order in which they are done; items start in theirs.

    For many small operations this takes less time than operations that are split between threads, which wait for each
    other after every one, on a busy machine for longer than they work.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads)
    try:
        futures = {pool.submit(function, item): item for item in items}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
