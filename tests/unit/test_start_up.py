"""Help within six times a bare interpreter: the budget of the design. And what Windows is told, which lacks half of it."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tunesmith import cli

BUDGET = 6.0


def seconds(*arguments: str) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begun


def test_help_is_fast() -> None:
    commands = (["-c", "pass"], ["-m", "tunesmith", "--help"], ["-m", "tunesmith", "train", "--help"])
    times: list[list[float]] = [[], [], []]
    for _ in range(8):  # interleaved, so that a busy moment falls on all three; the first round warms the caches
        for i, command in enumerate(commands):
            times[i].append(seconds(*command))
    bare, overview, train = (statistics.median(t[1:]) for t in times)
    assert overview <= BUDGET * bare, f"--help took {overview / bare:.1f} times a bare python"
    assert train <= BUDGET * bare, f"train --help took {train / bare:.1f} times a bare python"


def test_windows_is_told_where_it_works(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Python has no locks of files there, and no figures of the machine: one line, and no traceback."""
    with monkeypatch.context() as windows:
        windows.delattr("os.sysconf")
        assert cli.main(["doctor"]) == 0
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr("tunesmith.cli.doctor.doctor", lambda words: __import__("fcntl"))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "error: Windows: this needs Linux or macOS -- run it in WSL 2, which is a Linux\n"


@pytest.mark.parametrize(("theirs", "is_set"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_threads_that_wait_are_told_to_sleep(theirs: dict[str, str], is_set: str, tmp_path: Path) -> None:
    """In every command, before torch reads it, and in workers; unless the user says otherwise."""
    code = "import os; from tunesmith import cli; from tunesmith.local import backend; cli.main(['runs', 'list'])"
    code += "; print([e.get('GOMP_SPINCOUNT') for e in (os.environ, backend._environment())])"
    others = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**others, **theirs}, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == f"['{is_set}', '{is_set}']", done.stderr


def test_the_search_for_garbage_waits_while_torch_is_loaded() -> None:
    """It goes on afterwards, and what was loaded is not looked through any more; a second time changes nothing."""
    code = """
import gc, sys
from tunesmith.local import loading
seen = []
gc.callbacks.append(lambda phase, info: seen.append(phase))
with loading():
    import torch
assert not seen and gc.isenabled() and gc.get_freeze_count() > 100_000, (seen, gc.get_freeze_count())
with loading():
    assert gc.isenabled()
gc.collect()
assert seen
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
