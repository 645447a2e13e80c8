"""A function over parts of a data set in several processes, with the results in order.

Processes are forked, so that the function may be a closure and `hash` means the same in all of them; where forking is not
safe (macOS, Windows) everything runs in this one.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tunesmith.errors import DataError

Part = TypeVar("Part")
Result = TypeVar("Result")
AHEAD = 2  # parts that wait for each process: what bounds the memory
_function: Callable[[Any], Any]  # of a process that was begun here


def spread(
    function: Callable[[Part], Result], parts: Iterable[Part], processes: int, here: Callable[[Part], bool]
) -> Iterator[Result]:
    """`function` of each part, in order. `here`: parts that are cheaper to work on than to send to a process."""
    if processes < 2 or not can_fork():
        yield from map(function, parts)
        return
    from concurrent.futures import Future, ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    waiting: deque[Future[Result]] = deque()
    with ProcessPoolExecutor(processes, get_context("fork"), _begin, (function,)) as pool:
        try:
            for part in parts:
                if here(part):
                    done: Future[Result] = Future()
                    done.set_result(function(part))
                    waiting.append(done)
                else:
                    with _held_back():  # the first one forks
                        waiting.append(pool.submit(_call, part))
                while len(waiting) > AHEAD * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                "a process that was checking it was killed",
                where="data check",
                fix="is there enough memory? --num-workers 1 takes less",
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def can_fork() -> bool:
    return sys.platform == "linux"


@contextmanager
def _held_back() -> Iterator[None]:
    """Ctrl-C waits: what it raises in a callback of a fork is dropped, and in a process that has just begun it ends that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if heard:
            signal.raise_signal(signal.SIGINT)


def _begin(function: Callable[[Any], Any]) -> None:
    """In a new process, which inherits the function: Ctrl-C is the parent's to answer, which then ends this one."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _call(part: Any) -> Any:
    return _function(part)
