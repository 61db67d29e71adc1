"""Work on many cases on all processors; the workers are gone when it returns."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """What `work` gives for each item, in order, from forked workers. Raises what the first one
    that failed raised.

    Both have to be picklable. What the caller has computed, its caches too, is there in each
    worker.
    """
    processors = len(os.sched_getaffinity(0))
    if processors == 1:
        return [work(item) for item in items]
    with ProcessPoolExecutor(processors, mp_context=get_context("fork")) as pool:
        return list(pool.map(work, items))


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The same for work that is done by processes which it starts and waits for itself."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(work, items))
