"""Work in threads, in order and in bounded memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], *, num_ahead: int
) -> Iterator[Result]:
    """Map in threads, in order, at most `num_ahead` results ahead of the consumer."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > num_ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def mapped(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_threads: int
) -> Iterator[Iterator[Result]]:
    """Map as `ahead` does, in threads of its own. What has not begun at the end of the block is dropped."""
    pool = ThreadPoolExecutor(num_threads)
    try:
        yield ahead(pool, function, items, num_ahead=num_threads)
    finally:
        pool.shutdown(cancel_futures=True)
