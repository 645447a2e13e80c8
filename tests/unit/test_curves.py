"""Losses as pictures: what is drawn stands where the numbers are."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tunesmith.cli import progress
from tunesmith.cli.curves import BARS, chart, of_run, sparkline
from tunesmith.data.write import write_json
from tunesmith.runs import Run


def test_sparkline() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8) == BARS[::-1]
    assert sparkline([2, 2, 1, 1], 2) == "█▁" and sparkline([3.0] * 5, 5) == "▁▁▁▁▁"
    assert len(sparkline(range(1000), 24)) == 24 and sparkline([1, 2], 24) == "▁█"
    assert sparkline([], 5) == sparkline([1], 0) == ""


def test_chart() -> None:
    training = [(step, 8 - step / 10) for step in range(1, 61)]
    lines = chart(training, [(0, 8.0), (30, 5.0), (60, 5.5)], 30, 6)
    assert len(lines) == 8 and {len(line) for line in lines[:6]} <= set(range(3, 35))
    assert lines[0].startswith("8 ┤○") and lines[5].startswith("2 ┤") and lines[-1].split() == ["0", "step", "60"]
    (ring,) = [line for line in lines if "●" in line]
    assert (
        lines.index(ring) == 2 and ring.index("●") - ring.index("┤") - 1 == 14
    )  # 30 of 60 across, 5.0 between 8 and 2
    drawn = [[0x2800 < ord(c) < 0x2900 for c in line.partition("┤")[2]] for line in lines[:6]]
    first = [row.index(True) for row in drawn if any(row)]
    assert first == sorted(first) and first[0] < 3 and len(first) == 6  # it falls from the left to the right


def test_too_little_to_see() -> None:
    assert chart([], []) == chart([(1, 2.0)], []) == of_run([{"step": 1, "loss": 2.0}], []) == []
    flat = chart([(1, 2.0), (2, 2.0)], [])
    assert len(flat) == 12
    assert of_run([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], [])[0] == "loss: ⠢ training"


def test_the_curve_gives_way_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["loss 2.0000", "100 tokens/s", "ETA 0:10"]
    lengths = {}
    for columns in (40, 80, 90, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        line = progress.fit(0.5, "step 5/10", "epoch 0.5", words, [9, 8, 7, 6, 5, 4, 3, 2, 1])
        assert len(line) < columns
        lengths[columns] = sum(c in BARS[:7] for c in line)
    assert lengths[40] == 0 and lengths[120] == 8 and lengths[120] >= lengths[90]


def test_no_time_is_told_before_there_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "run.json", {"plan": {"steps": 10}, "provider": "", "recipe": {}, "created": ""})
    told, run = progress.Progress(), Run(tmp_path)
    for step in (1, 10):
        told._last_line = -math.inf
        told(run, {"type": "step", "step": step, "time": 2.0 * step, "loss": 1.0})
    lines = capsys.readouterr().err.splitlines()[1:]
    assert "ETA" not in lines[0] and lines[1].endswith("ETA 0:00")
