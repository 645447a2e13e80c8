"""Help within six times a bare interpreter: the budget of the design."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

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
