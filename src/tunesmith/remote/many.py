"""Many requests at a time, none of which is waited for once nobody wants its answer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")
AT_ONCE = 8  # requests


def many(ask: Callable[[S], T], items: Iterable[S], most: int = AT_ONCE) -> Iterator[tuple[S, T | Exception]]:
    """Each item with what `ask` makes of it, or what it raises, as they come; an item is taken when there is a thread for it.

    The threads are daemons: a process that ends at Ctrl-C waits for none of them, as it would for those of an executor.
    """
    left, running = iter(items), 0
    found: queue.SimpleQueue[tuple[S, T | Exception]] = queue.SimpleQueue()

    def work(item: S) -> None:
        try:
            found.put((item, ask(item)))
        except Exception as error:
            found.put((item, error))

    while True:
        for item in islice(left, most - running):
            threading.Thread(target=work, args=(item,), daemon=True).start()
            running += 1
        if not running:
            return
        yield _next(found)
        running -= 1


def _next(found: queue.SimpleQueue[T]) -> T:
    """The next one. A signal that comes just before the wait is seen only after it: so no wait is long."""
    while True:
        with suppress(queue.Empty):
            return found.get(timeout=0.5)
