"""The process that trains one run: `python -m tunesmith.local.worker RUN [--attached] [--step N]`.

It takes the run's lock, trains, and writes all it has to say into the run's event log. SIGINT or SIGTERM:
a checkpoint, then exit 130. With --attached it ends at once when its parent does (its standard input closes),
so that killing `tunesmith train` kills the training.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from tunesmith.errors import Interrupted, RunError, TunesmithError
from tunesmith.local import load
from tunesmith.runs import Run

LOCKED = 75  # exit status when another worker holds the run (EX_TEMPFAIL of sysexits.h)


def main(path: str, attached: bool, step: int | None = None) -> int:
    follows = int(os.environ.get("RANK", 0)) > 0  # one of several processes, and not the first
    run = Run(path, silent=follows)
    stopping = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while the libraries load either just ends it: nothing is lost
    if attached:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        held = contextlib.nullcontext() if follows else run.lock()
    except RunError as error:  # the log belongs to who holds the lock: not a word in it
        print(f"error: {error}", file=sys.stderr)
        return LOCKED
    others: list[subprocess.Popen[bytes]] = []
    try:
        if not follows:
            others = _start_others(run, step)
        load(run.recipe())
        from tunesmith.local.loop import train
        from tunesmith.local.machine import tune

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopping.set())
        tune()
        train(run, stopping.is_set, step)
    except Interrupted as error:
        return error.exit_status
    except BaseException as error:
        if known := failure(error, str(run)):
            return _failed(run, known)
        lost = _lost(run, others, time.monotonic() + 2) if isinstance(error, RuntimeError) else None
        if lost:  # a sum with it was waited for in vain
            return _failed(run, lost)
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
        with held:
            pass
    return 0


def failure(error: BaseException, where: str) -> TunesmithError | None:
    """What to tell the user of an error that is none of the program's; None of any other."""
    from tunesmith.local.step import out_of_memory

    if isinstance(error, TunesmithError):
        return error
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and out_of_memory(error):
        fix = "`tunesmith plan` shows what would fit: --micro-batch-tokens, --gradient-checkpointing, --lora, a smaller model"
        return TunesmithError("out of memory", where=where, fix=fix)
    full = "No space left on device" in str(error)  # safetensors has an error of its own for it
    if isinstance(error, OSError) or full:
        what = "No space left on device" if full else getattr(error, "strerror", None) or str(error)
        place = getattr(error, "filename", None) or where
        return TunesmithError(
            what, where=str(place), fix=f"mend that, then go on with: tunesmith train --resume {shlex.quote(where)}"
        )
    return None


def _start_others(run: Run, step: int | None) -> list[subprocess.Popen[bytes]]:
    """Where the recipe wants several processes on this machine, and no launcher has made them: start the others."""
    count = run.recipe().nproc
    if count < 2 or "RANK" in os.environ:
        return []
    from tunesmith.local.world import launch

    command = [sys.executable, "-m", "tunesmith.local.worker", str(run), "--attached"]
    others = launch(command + ([] if step is None else ["--step", str(step)]), count)
    threading.Thread(target=_watch_over, args=(run, others), daemon=True).start()
    return others


def _watch_over(run: Run, others: list[subprocess.Popen[bytes]]) -> None:
    """End the run when another process is killed, where waiting for it does not end by itself (NCCL waits ten minutes)."""
    lost = _lost(run, others)
    time.sleep(5)  # mostly it does, and then this process says so
    if lost:
        os._exit(_failed(run, lost))


def _lost(run: Run, others: list[subprocess.Popen[bytes]], until: float = math.inf) -> TunesmithError | None:
    """Wait for the end of a process that was killed or failed: what to say of it, or None after the time `until`."""
    while others and time.monotonic() < until:
        for rank, other in enumerate(others, 1):
            code = other.poll()
            if code not in (None, 0, Interrupted.exit_status):
                how = f"signal {-code}" if code < 0 else f"status {code}: see worker.log"
                return TunesmithError(
                    f"process {rank} of {len(others) + 1} ended with {how}",
                    where=str(run),
                    fix=f"go on with: tunesmith train --resume {run:q}",
                )
        time.sleep(0.1)
    return None


def _failed(run: Run, error: TunesmithError) -> int:
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
