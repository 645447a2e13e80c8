"""The folder in which an export is made, beside the one that it becomes: whole or absent, by one process at a time."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunesmith.data.write import abandoned, begun, publish
from tunesmith.errors import UsageError

YOUNG = 10.0  # seconds in which a folder may have no lock yet


@contextmanager
def built(target: Path) -> Iterator[Path]:
    """A new folder that becomes the target where all goes well, and is gone where it does not.

    It is locked as long as its process lives, so that one left by a kill is known for what it is: a process's number says
    nothing where the killed one ran on another host, or in a container. UsageError where another process makes the target.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = begun(target)
    shutil.rmtree(folder, ignore_errors=True)  # of this very number: that process is gone
    try:
        folder.mkdir()
        lock = os.open(folder, os.O_RDONLY)
        try:
            _lock(lock)
            _refuse_others(folder, target)
            yield folder
            publish(folder, target)
        finally:
            os.close(lock)
    except OSError as error:
        if not error.filename or str(error.filename).startswith(str(folder)):  # a full disk does not say where
            error.filename = str(target)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def refuse_disk(need: int, folder: Path) -> None:
    """UsageError where the disk has no room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if need > free:
        short = f"{need / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free"
        raise UsageError(short, where=str(folder), fix="choose another -o")


def _refuse_others(folder: Path, target: Path) -> None:
    """Otherwise it would be found out at the end. What nobody works on any more is removed."""
    for other in target.parent.glob(f"{glob.escape(target.name)}.*.tmp"):
        if other == folder:
            continue
        if _in_work(other):
            process = other.name.removesuffix(".tmp").rpartition("-")[2]
            fix = f"wait, or choose another -o; if that process is gone, delete {other}"
            raise UsageError(f"process {process} is exporting to it", where=str(target), fix=fix)
        shutil.rmtree(other, ignore_errors=True)


def _in_work(folder: Path) -> bool:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        free = _lock(handle)
        young = time.time() - os.fstat(handle).st_mtime < YOUNG
        return not free or young and not abandoned(folder.name)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    """Lock a folder until its handle is closed. False where another has it, or where the disk knows no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
