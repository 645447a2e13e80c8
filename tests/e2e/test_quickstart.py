"""The promise of the README: one command, offline, ends in a proven persona."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

from conftest import Result


def test_quickstart(tmp_path: Path, cli: Callable[..., Result]) -> None:
    done = cli("quickstart", "--output-dir", "quick", "--json")
    assert done.code == 0, done.err
    found = done.json()
    assert found["evaluation"]["verdict"] == "better"
    loss = found["evaluation"]["metrics"][0]
    assert loss["high"] < 0  # the interval excludes zero
    persona = found["evaluation"]["persona"]
    assert persona["name"] == "Deep Tree Echo" and persona["tuned"] >= persona["probes"] // 2 > 0 == persona["base"]
    assert (tmp_path / found["evaluation"]["report"]).exists()
    assert len(found["evaluation"]["samples"]) == 12
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2 * 2**20  # KB: under 2 GB for every process so far

    again = cli("quickstart", "--output-dir", "quick")  # the second time it shows what is there
    assert again.code == 0 and "verdict: better" in again.out and "showing it" in again.err
