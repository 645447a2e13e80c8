"""`tunesmith train` under a launcher: every process trains, the first alone prepares the run, watches and speaks."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

from tunesmith.errors import TunesmithError
from tunesmith.local import worker
from tunesmith.local.world import join
from tunesmith.runs import Run


def together(begin: Callable[[], tuple[Run, int | None]], follow: Callable[[Run, Callable[[], str]], Run]) -> Run:
    """Train the run that `begin` gives (with the step to go on from), called in the first process only.

    `follow` is called there too, in a thread: it passes on events until its second argument says that the run has ended,
    and gives the run or raises what went wrong. In the other processes the run that is returned is silent.
    """
    world = join()
    if world.rank:
        path, step = world.first(("", None))
        if not path:  # the first process says why
            sys.exit(0)
        status = worker.main(path, False, step)
        if status:  # so that the launcher sees it and ends the others
            sys.exit(status)
        return Run(path, silent=True)
    try:
        run, step = begin()
    except BaseException:
        world.first(("", None))
        raise
    world.first((str(run), step))
    ended = threading.Event()
    result: list[Run | BaseException] = []

    def watch() -> None:
        try:
            result.append(follow(run, lambda: run.state() if ended.is_set() else "running"))
        except BaseException as error:
            result.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        worker.main(str(run), False, step)
    except Exception as error:
        raise TunesmithError(f"{type(error).__name__}: {error}", where=str(run), fix="this is a defect") from error
    finally:
        ended.set()
        watcher.join()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]
