"""An ordered map over a stream, in this process or in several, that never runs far ahead of its consumer."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

Mapper = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
"""A map(function, items) that yields the results in the order of the items."""

_BATCHES_PER_PROCESS = 3


@contextmanager
def build_mapper(num_proc: int, preload: str) -> Iterator[Mapper]:
    """A mapper on `num_proc` processes; plain `map` for one.

    Args:
        preload: a module that is slow to import; it is imported once, and the processes start with it.
    """
    if num_proc <= 1:
        yield map
        return
    # Forked from a server process without threads: forking this one could copy a lock that is held.
    context = get_context("forkserver")
    context.set_forkserver_preload([preload])
    with ProcessPoolExecutor(num_proc, context, initializer=_keep_to_one_thread) as pool:

        def pooled(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
            waiting: deque[Future[Any]] = deque()
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= num_proc * _BATCHES_PER_PROCESS:
                    yield waiting.popleft().result()
            for future in waiting:
                yield future.result()

        yield pooled


def _keep_to_one_thread() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
