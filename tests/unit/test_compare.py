"""Runs beside one another: what differs, what can be paired and what cannot, and why."""

from __future__ import annotations

import json
import re
import xml.dom.minidom
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from conftest import Result
from tunesmith.cli.curves import between, several
from tunesmith.conversation import Conversation, Message
from tunesmith.data.write import as_row, write_json, write_jsonl
from tunesmith.errors import DataError, RunError, UsageError
from tunesmith.evaluation.compare import Entry, Table, differing, steep, table
from tunesmith.evaluation.compare_page import chart, refuse, write
from tunesmith.evaluation.stats import Comparison, compare
from tunesmith.runs import Run

Cli = Callable[..., Result]
ROWS = [Conversation((Message("user", f"Q{i}"), Message("assistant", f"A{'é' * i}"))) for i in range(12)]
LOSSES = [
    [10.0, 4],
    [21.0, 6],
    [12.5, 5],
    [8.0, 4],
    [30.0, 9],
    [11.0, 4],
    [9.0, 3],
    [16.0, 5],
    [7.0, 2],
    [13.0, 4],
    [5.0, 2],
]
LOSSES += [[6.0, 2]]


def made(path: Path, evals: Any = ((0, 5.0), (10, 4.0), (20, 4.5)), state: str = "succeeded", **recipe: Any) -> Run:
    """A run directory as training leaves it."""
    (path / "data").mkdir(parents=True)
    (path / "evaluation").mkdir()
    known = {"model": "starter", "method": "full", "lora_rank": 8, "task": "chat", "learning_rate": 1e-3, **recipe}
    write_json(
        path / "run.json",
        {
            "provider": recipe.pop("provider", "huggingface"),
            "created": "2025-01-01",
            "recipe": {**known, "output_dir": str(path)},
            "origin": {"epochs": "preset quick_test", "seed": "preset quick_test", "model": "flag"},
            "plan": {"steps": 20, "rows": {"train": 50}},
            "model": {"parameters": 6_524_160},
            "data_hashes": {"train": "0123456789abcdef"},
        },
    )
    run = Run(path)
    for step, loss in evals:
        run.append("step", step=step + 1, loss=loss)
        run.append("eval", step=step, loss=loss, best=False)
    run.append("state", state=state)
    write_jsonl(path / "data" / "test.jsonl", (as_row(row) for row in ROWS))
    return run


def evaluated(run: Run, losses: Any = LOSSES, rows: list[Conversation] = ROWS, digests: bool = True) -> Run:
    """Its evaluation as it is kept: rows.jsonl and result.json."""
    sides = [{"loss": loss, "tokens": tokens, "right": 1} for loss, tokens in losses]
    known = [{"digest": row.digest()} if digests else {} for row in rows]
    lines = [
        {"source": "s", **d, "base": {"loss": 1.0, "tokens": 1}, "tuned": side}
        for d, side in zip(known, sides, strict=True)
    ]
    write_jsonl(run / "evaluation" / "rows.jsonl", lines)
    metrics = [
        Comparison("loss (nats per token)", 3.5, 3.0, -0.5, -0.6, -0.4, 0.001, "better", 12),
        Comparison("perplexity of all", 9.0, 8.0, -1.0),
    ]
    result = {"verdict": "better", "base": "starter", "rows": 12, "metrics": metrics, "tokens": 50, "another": {"x": 1}}
    write_json(run / "evaluation" / "result.json", result)
    return run


def test_settings_that_differ(tmp_path: Path) -> None:
    one = made(tmp_path / "a")
    two = made(tmp_path / "b", learning_rate=1e-4, method="lora", task="chat")
    two.append("changed", settings={"save_steps": 7})
    found = table([one, two])
    assert found.settings == {"learning_rate": [1e-3, 1e-4], "method": ["full", "lora"]}
    assert [(e.letter, e.method, e.rank, e.preset, e.parameters) for e in found.runs] == [
        ("A", "full", None, "quick_test", 6_524_160),
        ("B", "lora", 8, "quick_test", 6_524_160),
    ]
    manifest = json.loads((two / "run.json").read_bytes())
    write_json(two / "run.json", {**manifest, "data_hashes": {"train": "fedcba9876"}})
    assert table([one, two]).settings["training rows"] == ["50 (01234567)", "50 (fedcba98)"]
    two.append("changed", settings={"learning_rate": 1e-3})
    assert "learning_rate" not in table([one, two]).settings  # it was gone on with at another rate
    # known of two, not of the one that is damaged or older: no difference
    assert differing([{"a": 1, "b": 1}, {"a": 1, "b": 2}, {}]) == {"b": [1, 2, None]}
    assert differing([{"a": [1]}, {"a": [1]}]) == {}


def test_curves_and_the_best_step(tmp_path: Path) -> None:
    one = made(tmp_path / "a", [(0, 5.0), (10, 4.0), (20, None), (30, 4.5)])
    two = made(tmp_path / "b", [])
    found = table([one, two])
    assert found.runs[0].curve == [(0, 5.0), (10, 4.0), (30, 4.5)]
    assert (found.runs[0].best_step, found.runs[0].best_loss, found.runs[0].steps) == (10, 4.0, 31)
    assert (found.runs[1].best_step, found.runs[1].best_loss, found.runs[1].curve) == (None, None, [])


def test_the_same_rows_are_paired_whatever_their_order(tmp_path: Path) -> None:
    """Each run against the first, by the tuned losses: the mean of the differences by hand, the interval that of stats."""
    one, two = evaluated(made(tmp_path / "a")), made(tmp_path / "b")
    better = [[loss - 0.5 * n, n] for loss, n in LOSSES]  # half a nat a token
    evaluated(two, better[::-1], ROWS[::-1])
    found = table([one, two, evaluated(made(tmp_path / "c"))], seed=3)
    first, second = (pair.comparison for pair in found.pairs)
    assert first and second
    # the losses add up to 148.5 nats, the tokens to 50
    assert (first.base, first.tuned) == (pytest.approx(148.5 / 50), pytest.approx(148.5 / 50 - 0.5))
    assert first.verdict == "better" and (first.metric, first.rows) == ("loss (nats per token)", 12)
    order = sorted(range(12), key=lambda i: ROWS[i].digest())
    want = compare("loss (nats per token)", np.array(LOSSES)[order], np.array(better)[order], True, seed=3)
    assert first == want
    assert second.difference == 0 and second.verdict == "cannot tell"
    assert table([two, one]).pairs[0].comparison.verdict == "worse"  # type: ignore[union-attr]


def test_the_seed_is_that_of_the_interval(tmp_path: Path) -> None:
    other = [[loss * 0.9 + i % 3, n] for i, (loss, n) in enumerate(LOSSES)]
    one, two = evaluated(made(tmp_path / "a")), evaluated(made(tmp_path / "b"), other)
    p = [table([one, two], seed).pairs[0].comparison.p for seed in (0, 0, 1)]  # type: ignore[union-attr]
    assert p[0] == p[1] != p[2]


def test_other_tokenizers_are_compared_by_byte(tmp_path: Path) -> None:
    one = evaluated(made(tmp_path / "a"))
    two = evaluated(made(tmp_path / "b"), [[loss, n + 1] for loss, n in LOSSES])
    found = table([one, two]).pairs[0].comparison
    # the answers are "A" and i times "é", two bytes: 12 + 2 * (0 + 1 + … + 11) = 144 bytes
    assert found and found.metric == "loss (nats per byte)" and found.base == found.tuned == pytest.approx(148.5 / 144)
    (one / "data" / "test.jsonl").write_text("")
    assert "not in data/test.jsonl" in table([one, two]).pairs[0].reason


def test_why_they_cannot_be_paired(tmp_path: Path) -> None:
    one = evaluated(made(tmp_path / "a"))
    other = [*ROWS[:9], *(Conversation((Message("user", f"X{i}"), Message("assistant", "Y"))) for i in range(3))]
    cases = {
        "judged on other rows: 9 of 12 and 12 are the same": evaluated(made(tmp_path / "b"), rows=other),
        "judged on other rows: 5 of 12 and 5 are the same": evaluated(made(tmp_path / "c"), LOSSES[:5], ROWS[:5]),
        "D has no evaluated rows": made(tmp_path / "d"),
        "of E does not say which rows": evaluated(made(tmp_path / "e"), digests=False),
        "a service does not say": evaluated(made(tmp_path / "f"), [(None, 0)] * 12),
        "2 of 12 rows have no loss: they are longer": evaluated(made(tmp_path / "g"), [(None, 0)] * 2 + LOSSES[2:]),
    }
    found = table([one, *cases.values()])
    for pair, reason in zip(found.pairs, cases, strict=True):
        assert pair.comparison is None and reason in pair.reason, pair
    assert "A has no evaluated rows" not in found.pairs[0].reason
    assert "D has no evaluated rows" in table([one, one, one, cases["D has no evaluated rows"]]).pairs[2].reason


DAMAGE: dict[str, Callable[[Run], object]] = {
    "run.json": lambda run: (run / "run.json").write_text("{"),
    "no recipe": lambda run: (run / "run.json").write_text('{"provider": 1, "recipe": [], "plan": 2, "created": 3}'),
    "odd values": lambda run: (run / "run.json").write_text(
        '{"provider": "x", "recipe": {"model": 1, "method": null, "lora_rank": "y"}, "plan": {}, "created": 3, "model": 5}'
    ),
    "events": lambda run: (run / "events.jsonl").write_text('[1]\n{"type": "eval"}\n{"x": 1}\n'),
    "result": lambda run: (run / "evaluation" / "result.json").write_text('{"metrics": 5}'),
    "rows": lambda run: (run / "evaluation" / "rows.jsonl").write_bytes(b"\xff\n{"),
    "nothing": lambda run: (run / "events.jsonl").unlink(),
    "deep": lambda run: (run / "evaluation" / "result.json").write_text('{"x":' * 20_000),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_is_shown_with_what_it_has(damage: str, tmp_path: Path) -> None:
    one, two = evaluated(made(tmp_path / "a")), evaluated(made(tmp_path / "b", learning_rate=1.0))
    DAMAGE[damage](two)
    found = table([one, two])
    assert msgspec.json.encode(found)
    entry = found.runs[1]
    assert bool(entry.problems) == (damage not in ("rows", "nothing"))
    if damage == "run.json":
        assert entry.problems[0].startswith("run.json is damaged") and entry.curve == found.runs[0].curve
        assert found.pairs[0].comparison is not None and found.settings == {} and len(entry.metrics) == 2
    if damage in ("rows", "nothing"):
        assert found.settings == {"learning_rate": [1e-3, 1.0]} and entry.verdict == "better"
    write(found, tmp_path / "page.html")


def test_runs_of_other_kinds(tmp_path: Path) -> None:
    """Failed, still running, of a service, and one of the fake backend, which evaluates nothing."""
    one = evaluated(made(tmp_path / "a"))
    failed = made(tmp_path / "b", state="failed")
    failed.append("error", message="the loss is not a number")
    hosted = made(tmp_path / "c", [(20, 3.0)], provider="openai")
    found = table([one, failed, hosted])
    assert [(e.status, e.problems) for e in found.runs] == [
        ("succeeded", []),
        ("failed", ["failed: the loss is not a number", "not evaluated"]),
        ("succeeded", [f"not evaluated: tunesmith evaluate {hosted}"]),
    ]
    assert found.runs[2].method == "supervised" and found.runs[2].rank is None


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    one = made(tmp_path / "a")
    with pytest.raises(UsageError, match="runs show"):
        table([one])
    with pytest.raises(UsageError, match="27 runs"):
        table([one] * 27)
    with pytest.raises(RunError, match="not a run"):
        table([one, Run(tmp_path / "typo")])


# ---- pictures


def test_a_chart_of_several_curves() -> None:
    lines = several([[(0, 4.0), (10, 2.0)], [(0, 4.0), (10, 3.0)], []], "ABC", 21, 5)
    assert lines[0].startswith("4 ┤*") and lines[4].startswith("2 ┤") and lines[4].endswith("A")
    assert lines[2].endswith("B") and len(lines) == 7 and not any("C" in line for line in lines)
    first, last = (line.index(mark) for line, mark in ((lines[0], "*"), (lines[4], "A")))
    assert last - first == 20
    middle = lines[2].partition("┤")[2]
    assert 0x2800 < ord(middle[10]) < 0x2900  # A's line is half way down there
    assert several([[(5, 1.0)], []], "AB") == several([], "") == []
    assert between([(0, 0), (4, 8)], 4) == [(0, 0), (1, 2), (2, 4), (3, 6), (4, 8)]


def test_a_run_that_diverged_does_not_flatten_the_others() -> None:
    low, high = [(0, 4.0), (10, 2.0)], [(0, 4.0), (10, 2000.0)]
    assert steep([low, high]) and not steep([low]) and not steep([]) and not steep([[(0, 0.0), (1, 50.0)]])
    flat, seen = (several([low, high], "AB", 21, 10, steep=s) for s in (False, True))
    assert [i for i, line in enumerate(flat) if "*" in line] == [9] == [i for i, line in enumerate(flat) if "A" in line]
    assert [i for i, line in enumerate(seen) if "*" in line] == [8] and "A" in seen[9]  # log 2 of log 1000: a tenth up
    drawn = chart(Table([Entry("r", "A", curve=low), Entry("s", "B", curve=high)], {}, []))
    labels = [label for _, label in drawn["y_ticks"]]
    assert drawn["steep"] and labels == ["2", "5", "10", "20", "50", "100", "200", "500", "1000", "2000"]


def test_the_picture_stands_where_the_numbers_are(tmp_path: Path) -> None:
    runs = [made(tmp_path / "a", [(0, 5.0), (10, 4.0)]), made(tmp_path / "b&<c>", [(0, 5.0), (20, 3.0)])]
    found = table(runs)
    drawn = chart(found)
    assert drawn["left"] == drawn["lines"][0]["points"][0][0] and drawn["right"] == drawn["lines"][1]["points"][-1][0]
    # losses from 3 to 5 with a twentieth of it above and below: 4 stands in the middle, (22 + 300) / 2
    assert drawn["lines"][0]["points"][1][1] == 161.0
    write(found, tmp_path / "o.svg")
    svg = (tmp_path / "o.svg").read_text()
    page = xml.dom.minidom.parseString(svg)
    assert len(page.getElementsByTagName("polyline")) == 2 and len(page.getElementsByTagName("circle")) == 4
    texts = [
        "".join(n.data for n in t.childNodes if n.nodeType == n.TEXT_NODE) for t in page.getElementsByTagName("text")
    ]
    assert any("b&<c> · 3.0000 at step 20" in text for text in texts)
    assert "prefers-color-scheme: dark" in svg and not re.search(r"https?://(?!www\.w3\.org/2000/svg)", svg)


def test_the_page(tmp_path: Path) -> None:
    runs = [
        evaluated(made(tmp_path / "a")),
        evaluated(made(tmp_path / "<b>", learning_rate=1e-4)),
        made(tmp_path / "c", []),
    ]
    write(table(runs), tmp_path / "o.html")
    page = (tmp_path / "o.html").read_text()
    assert "<svg" in page and "<b>/" not in page and "&lt;b&gt;" in page
    assert "learning_rate" in page and "0.0001" in page and "-0.6000 … -0.4000" in page and "perplexity of all" in page
    assert "C has no evaluated rows" in page and "cannot tell" in page
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page) and "<script" not in page
    write(table([runs[2], runs[2]]), tmp_path / "none.html")
    assert "None of the runs has two validations" in (tmp_path / "none.html").read_text()
    with pytest.raises(DataError, match=r"no curve.*\.html"):
        write(table([runs[2], runs[2]]), tmp_path / "none.svg")
    with pytest.raises(UsageError, match="exists already"):
        refuse(tmp_path / "o.html")
    with pytest.raises(UsageError, match=r"\.html or \.svg"):
        refuse(tmp_path / "o.png")


def test_many_runs_have_lines_of_their_own(tmp_path: Path) -> None:
    drawn = chart(table([made(tmp_path / str(i)) for i in range(20)]))
    looks = {(line["colour"], line["dash"]) for line in drawn["lines"]}
    assert len(looks) == 20 and drawn["height"] > drawn["lines"][-1]["legend"]


def test_the_command(tmp_path: Path, cli: Cli) -> None:
    evaluated(made(tmp_path / "one"))
    better = [[loss - 0.5 * n, n] for loss, n in LOSSES]
    evaluated(made(tmp_path / "two", [(0, 5.0), (20, 3.0)], learning_rate=1e-4), better)
    (made(tmp_path / "bad") / "run.json").write_text("{")
    result = cli("runs", "compare", "one", "two", "bad", "-o", "out.svg")
    assert result.code == 0, result.err
    for words in (
        r"A  one +succeeded  starter  6,524,160   full    - +quick_test +21  4.0000 at 10",
        r"C: run.json is damaged",
        r"learning_rate  0.001  0.0001  -\n",
        r"validation loss \(nats per token\)\n *5 ┤\*",
        r"loss \(nats per token\)  A  3.5000  3.0000  -0.5000     -0.6000 … -0.4000  better\n +B",
        r"perplexity of all +A  9.0000  8.0000  -1.0000     - +-\n",
        r"B  loss \(nats per token\): -0.5000, 95 % interval -0.5000 … -0.5000, on 12 rows: better\n",
        r"C  cannot be paired: C has no evaluated rows",
        r"written: out.svg",
    ):
        assert re.search(words, result.out), (words, result.out)
    assert (tmp_path / "out.svg").read_text().startswith("<svg")
    found = cli("runs", "compare", "one", "two", "--json", "--seed", 4).json()
    assert found["pairs"][0]["comparison"]["verdict"] == "better" and found["settings"] == {
        "learning_rate": [1e-3, 1e-4]
    }
    assert found["runs"][1]["curve"] == [[0, 5.0], [20, 3.0]]
    for arguments in (["one"], ["one", "typo"], ["one", "two", "-o", "out.svg"], ["one", "two", "-o", "x.png"], []):
        wrong = cli("runs", "compare", *arguments)
        assert wrong.code == 2 and len(wrong.err.strip().splitlines()) == 1 and " -- " in wrong.err, wrong.err
    assert cli("runs", "compare", "two", "two", "--json").json()["settings"] == {}
