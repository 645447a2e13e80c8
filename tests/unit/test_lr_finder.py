"""The learning-rate search: its trials are real runs, and its advice says how sure it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Result
from training import fit
from tunesmith import api
from tunesmith.errors import DataError
from tunesmith.evaluation.rates import advise, chart
from tunesmith.local.lr_finder import Trial, search


def trial(rate: float, *losses: float) -> Trial:
    return Trial(rate, 8, list(losses), [10] * len(losses))


def test_a_trial_is_a_run_of_its_own(tiny: Path, tmp_path: Path, data: Path) -> None:
    """The loss after it is that of a run with the same settings; what was tried before leaves no trace."""
    common = {"model": str(tiny), "batch_size": 4, "learning_rate": 1e-3, "threads": 1}
    seen: list[Trial] = []
    rounds = search(api.prepare(data, **common), 3, seen.append)
    assert [(len(trials), {t.steps for t in trials}) for trials in rounds] == [(7, {3}), (4, {6}), (2, {12})]
    assert len(seen) == 13 and all(trials == sorted(trials, key=Trial.loss) for trials in rounds)
    assert {t.rate for t in rounds[0]} == {1e-3 * x for x in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)}
    for last in rounds[2]:
        run = fit(tmp_path / f"{last.rate}", data, tiny, learning_rate=last.rate, max_steps=12, patience=0)
        assert run.metrics("eval")[-1]["loss"] == pytest.approx(last.loss(), rel=1e-6)


def test_advice_is_certain_only_where_the_rows_say_so() -> None:
    rates = [trial(rate, 9.0) for rate in (5e-4, 1e-3, 2e-3)]
    lead = [trial(1e-3, *[20.0 + i % 3 for i in range(20)]), trial(2e-3, *[25.0 + i % 3 for i in range(20)])]
    clear = advise([rates, lead])
    assert clear.certain and clear.rate == 1e-3
    for tried, edge in ((rates[1:], "lowest"), (rates[:2], "highest")):
        found = advise([tried, lead])
        assert not found.certain and found.rate == 1e-3 and found.reason.startswith(f"the {edge} that was tried")
    close = advise(
        [[trial(2e-3, *[20.0 + i % 7 for i in range(20)]), trial(1e-3, *[20.1 + (i * 3) % 7 for i in range(20)])]]
    )
    assert not close.certain and close.rate == 1e-3 and "cannot tell" in close.reason  # the lower one
    few = advise([[trial(2e-3, 1.0, 1.0), trial(1e-3, 9.0, 9.0)]])
    assert not few.certain
    wild = advise([[trial(1e-3, *[20.0] * 9), trial(2e-3, *[math.inf] * 9)]])
    assert not wild.certain and wild.rate == 1e-3 and "diverged" in wild.reason and wild.rounds[0][1][2] is None
    none = advise([[trial(1e-3, math.inf), trial(2e-3, math.inf)]])
    assert not none.certain and none.rate < 1e-3 and chart(none).startswith("<svg")


def test_the_command(tiny: Path, tmp_path: Path, data: Path, cli: Callable[..., Result]) -> None:
    arguments = ("lr-find", "--dataset", data, "--model", tiny, "--trial-steps", 1, "--batch-size", 8)
    found = cli(*arguments, "--json", "--plot", tmp_path / "lr.svg").json()
    assert [len(trials) for trials in found["rounds"]] == [7, 4, 2] and found["rate"] > 0
    picture = (tmp_path / "lr.svg").read_text()
    assert picture.count("<polyline") == 3 and picture.count("<circle") == 13
    assert cli(*arguments, "--plot", tmp_path / "lr.svg").code == 2
    with pytest.raises(DataError, match="no validation rows"):
        api.lr_find(1, dataset=str(data), model=str(tiny), valid_fraction=0.0)
