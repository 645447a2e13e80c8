"""Programs that a model wrote, run with their tests in a process that can harm nothing.

The kernel holds the limits (docs/decisions/0018-sandbox.md): a program is one process, with a folder of its own, no network and
no other process in reach, in so much memory and time. Each limit is tried in that process before the program starts; where one
does not hold, nothing is run unless the caller allows that very limit to be missing.
"""

from __future__ import annotations

import marshal
import math
import os
import secrets
import select
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import msgspec

from tunesmith.data.spread import cores
from tunesmith.recipe import FACTS

Status = Literal["passed", "failed", "timeout", "memory", "killed", "refused"]
ESSENTIAL = ("files", "network", "processes", "memory")
INSIDE = Path(__file__).with_name("confined.py")
REPORT = 4096  # bytes of a report that are read; an honest one has under 1,000


class Limits(msgspec.Struct, frozen=True):
    """Of one program. `seconds`: of wall time from its start on, and, with one more, of processor time over all its threads;
    `memory`: bytes of address space; `disk`: bytes of all its files; `open_files`: at a time."""

    seconds: float = 10.0
    memory: int = 512 << 20  # numpy and pandas together want over 256 MB
    disk: int = 16 << 20
    open_files: int = 64


class Result(msgspec.Struct, frozen=True):
    """How a program ended. Only "passed" is a pass: its test was run to the end.

    `error`: why it is none, in a line. `missing`: limits that did not hold for it: of ESSENTIAL only those that the caller
    allowed to be missing; "disk": no file system of its own was to be had, so it could write no file at all.
    """

    status: Status
    error: str = ""
    missing: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def run(program: str, test: str, limits: Limits | None = None, allow: Collection[str] = ()) -> Result:
    """Run a Python program and then its test, in the same namespace, in a sandbox of their own.

    `allow`: limits of ESSENTIAL that may be missing; with "processes" missing, what the program starts may outlive it. Where
    another one is missing the result is "refused" and nothing was run. On Windows, which has none of them, always.
    """
    if sys.platform == "win32":
        return Result("refused", "no limit can be set on Windows", ESSENTIAL)
    limits, token = limits or Limits(), secrets.token_hex(16).encode()
    with TemporaryDirectory(prefix="tunesmith-program-") as place:
        folder, outside = Path(place, "work").resolve(), Path(place, "outside")
        folder.mkdir()
        outside.touch()
        receive, report = os.pipe()
        with open(receive, "rb", 0) as receiving:
            with open(report, "wb", 0):
                process = _start(folder, report)
            order = {"program": _plain(program), "test": _plain(test), "token": token, "report": report}
            order |= {"folder": str(folder), "outside": str(outside), "allow": [*allow, "disk"]}
            said, late = _listen(process, marshal.dumps(order | _order(limits)), receiving.fileno(), limits.seconds)
    return _judged(said, late, process.returncode, token, limits.seconds, allow)


def run_all(
    programs: Sequence[tuple[str, str]],
    limits: Limits | None = None,
    allow: Collection[str] = (),
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Run (program, test) pairs, `workers` at a time (None: as many as there are processors for this process), in order.

    `progress(done, all)` is called in the caller's thread.
    """
    results = []
    pool = ThreadPoolExecutor(workers or cores())
    try:
        for result in pool.map(lambda pair: run(pair[0], pair[1], limits, allow), programs):
            results.append(result)
            if progress:
                progress(len(results), len(programs))
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def _plain(text: str) -> str:
    """Without half characters, which could not be handed over (and are no code)."""
    return text.encode(errors="replace").decode()


def _order(limits: Limits) -> dict[str, Any]:
    seconds = math.ceil(limits.seconds) + 1  # of all threads together; so that one thread meets the wall time first
    rlimits = {"CORE": 0, "FSIZE": limits.disk, "NOFILE": limits.open_files, "CPU": seconds, "AS": limits.memory}
    return {"rlimits": rlimits, "readable": _readable(), **_calls()}


@cache
def _calls() -> dict[str, Any]:
    with (FACTS / "syscalls.toml").open("rb") as stream:
        table = tomllib.load(stream)
    return {
        "allowed": list(table["allowed"].values()),
        "argument": [(rule["numbers"], rule["index"], rule["mask"], rule["values"]) for rule in table["argument"]],
    }


@cache
def _readable() -> list[str]:
    """Where the interpreter and its libraries are, the time zones, and sources of randomness."""
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/localtime"]
    devices = ["/etc/ld.so.cache", "/dev/zero", "/dev/random", "/dev/urandom"]
    return list(dict.fromkeys([sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, *system, *devices]))


def _start(folder: Path, report: int) -> subprocess.Popen[bytes]:
    """An interpreter with nothing of ours: no environment, no files but its own, no group of processes.

    -s -P and an empty environment are what -I is, but leave PYTHONHASHSEED: sets of strings have the same order each time.
    """
    home = str(folder)
    return subprocess.Popen(
        [sys.executable, "-s", "-P", "-B", "-X", "utf8", str(INSIDE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={"HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
        pass_fds=(report,),
        start_new_session=True,
    )


def _listen(process: subprocess.Popen[bytes], order: bytes, receive: int, seconds: float) -> tuple[bytes, bool]:
    """(what the process reported, whether it ran out of time). It has ended then, with all of its group."""
    said, end, ready = b"", time.monotonic() + seconds, select.poll()
    ready.register(receive, select.POLLIN)
    try:
        assert process.stdin
        with suppress(BrokenPipeError):  # it ended before it had read: what it reported says why
            process.stdin.write(order)
            process.stdin.close()
        while len(said) < REPORT:
            left = end - time.monotonic()
            if left <= 0 or not ready.poll(left * 1000):
                return said, True
            if not (part := os.read(receive, REPORT)):
                break
            said += part
        return said, False
    finally:
        with suppress(
            ProcessLookupError, PermissionError
        ):  # it has ended (macOS: a group that has may not be signalled)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _judged(said: bytes, late: bool, code: int, token: bytes, seconds: float, allow: Collection[str]) -> Result:
    """The result, from what was reported before the program (a line) and after its test (with the token, or it is not ours)."""
    first, started, after = said.partition(b"\n")
    if not started:
        why = first.decode(errors="replace") or "the sandbox did not start"
        return Result("refused", f"no start within {seconds:g} seconds" if late else why)
    missing = tuple(first.decode().split())
    if lacking := [name for name in ESSENTIAL if name in missing and name not in allow]:
        return Result("refused", f"this machine cannot limit: {', '.join(lacking)}", missing)
    if after.startswith(token):
        _, status, error = after.split(b" ", 2)
        return Result(msgspec.convert(status.decode(), Status), error.decode(errors="replace"), missing)
    if late:
        return Result("timeout", f"not done after {seconds:g} seconds", missing)
    if code < 0:
        return Result("killed", f"ended by {signal.Signals(-code).name}", missing)
    return Result("failed", "ended itself before its test had", missing)
