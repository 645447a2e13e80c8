"""The process that trains one run: `python -m tunesmith.local.worker RUN [--attached] [--step N]`.

It takes the run's lock, trains, and writes all it has to say into the run's event log. SIGINT or SIGTERM:
a checkpoint, then exit 130. With --attached it ends at once when its parent does (its standard input closes),
so that killing `tunesmith train` kills the training.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

from tunesmith.errors import Interrupted, RunError, TunesmithError
from tunesmith.runs import Run

LOCKED = 75  # exit status when another worker holds the run (EX_TEMPFAIL of sysexits.h)


def main(path: str, attached: bool, step: int | None = None) -> int:
    run = Run(path)
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    if attached:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        held = run.lock()
    except RunError as error:  # the log belongs to who holds the lock: not a word in it
        print(f"error: {error}", file=sys.stderr)
        return LOCKED
    try:
        run.mend_log()
        from tunesmith.local.loop import train

        train(run, stopping.is_set, step)
    except Interrupted as error:
        return error.exit_status
    except TunesmithError as error:
        return _failed(run, error)
    except MemoryError:
        return _failed(
            run, TunesmithError("out of memory", fix="halve --batch-size and double --gradient-accumulation-steps")
        )
    except OSError as error:
        return _failed(
            run,
            TunesmithError(
                f"{error.strerror or error}",
                where=str(error.filename or run),
                fix=f"then go on with: tunesmith train --resume {run}",
            ),
        )
    except BaseException as error:
        _failed(
            run,
            TunesmithError(
                f"{type(error).__name__}: {error}",
                where=str(run),
                fix="this is a defect; the traceback is in worker.log",
            ),
        )
        raise
    finally:
        held.close()
    return 0


def _failed(run: Run, error: TunesmithError) -> int:
    import contextlib

    with contextlib.suppress(OSError):  # a full disk takes no event either; the exit status still says it
        run.append("error", message=error.message, where=error.where, fix=error.fix, exit_status=error.exit_status)
        run.append("state", state="failed")
    print(f"error: {error}", file=sys.stderr)
    return error.exit_status


def _end_with_parent(*_: Any) -> None:
    os.read(sys.stdin.fileno(), 1)  # nothing is ever written to it: this returns when the parent's end closes
    os._exit(137)


if __name__ == "__main__":
    words = sys.argv[2:]
    sys.exit(main(sys.argv[1], "--attached" in words, int(words[-1]) if "--step" in words else None))
