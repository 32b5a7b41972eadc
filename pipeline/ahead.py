"""Do slow things (requests) in threads, a bounded number ahead of who takes the results."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

THREADS = 16


def map_ahead(function: Callable[[A], B], items: Iterable[A], *, threads: int = THREADS) -> Iterator[B]:
    """function(item) of each item, in the items' order; at most 2 x `threads` results wait to be taken.

    The items are read by the caller's thread. An error comes where its result would; what has not begun is left.
    """
    waiting: deque[Future[B]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
