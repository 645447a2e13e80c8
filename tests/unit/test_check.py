"""What the checks say of a data set as a whole: counts, grades, severities, and what is found before training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Result, write
from tunesmith import api
from tunesmith.data.check import grade, load
from tunesmith.errors import DataError

Cli = Callable[..., Result]


def distinct(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{i} {i * 7919 % 997}?", "completion": f"{i * 104729 % 99991}."} for i in range(count)]


def test_a_row_with_two_warnings_is_one_warned_row(tmp_path: Path) -> None:
    bad = {"prompt": "Zoë’s caf\ufffd", "completion": "As an AI language model, I have none."}
    found = load(str(write(tmp_path / "d.jsonl", [*distinct(198), bad, bad])))
    assert (found.usable, found.warned, found.counts["refusal"], found.counts["duplicate"]) == (200, 2, 2, 1)


@pytest.mark.parametrize(
    ("count", "warned", "word"),
    [(40, 0, "weak"), (60, 0, "fair"), (300, 0, "good"), (300, 14, "good"), (300, 30, "fair"), (300, 80, "weak")],
)
def test_the_grade(count: int, warned: int, word: str, tmp_path: Path) -> None:
    items = distinct(count)
    for row in items[:warned]:
        row["completion"] += "\ufffd"
    found = load(str(write(tmp_path / "d.jsonl", items)))
    assert grade(found)[0] == word and (found.warned, found.usable) == (warned, count)
    items[0]["completion"] = ""
    assert grade(load(str(write(tmp_path / "d.jsonl", items))))[0] == "unusable"


def test_a_provider_has_the_last_word_on_a_severity(tmp_path: Path) -> None:
    path = str(write(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b <|im_end|>"}]))
    for task, provider, severity in (("code", "openai", "error"), ("code", "huggingface", "warning")):
        issues = load(path, task=task, provider=provider).issues
        assert {i.severity for i in issues if i.code == "special-token"} == {severity}
    assert {"extra-field", "too-few-rows"} <= load(path, provider="openai").counts.keys()
    assert "extra-field" not in load(path).counts


def test_what_train_converts_for_a_service_is_no_error(tmp_path: Path) -> None:
    path = str(write(tmp_path / "d.jsonl", [{**row, "note": "x"} for row in distinct(60)]))
    found = load(path, provider="openai")
    assert {i.severity for i in found.issues if i.code == "extra-field"} == {"warning"} and not found.errors()
    assert api.plan(path, provider="openai", model="gpt-4o-mini-2024-07-18").rows["train"]


def test_columns_that_are_not_used_are_named_once(tmp_path: Path) -> None:
    items = [{"question": f"{i}?", "context": "c", "answer": str(i)} for i in range(30)]
    found = load(str(write(tmp_path / "d.jsonl", items)))
    said = [i for i in found.issues if i.code == "unused-column"]
    assert len(said) == 1 and said[0].message == '"context" is not trained on (30 rows)'
    assert found.conversations[0].metadata == {"context": "c"}
    mapped = load(str(tmp_path / "d.jsonl"), {"prompt": "context", "completion": "answer"})
    assert "unused-column" not in mapped.counts


def test_nothing_of_a_row_is_lost_unsaid(tmp_path: Path) -> None:
    turn = {"from": "gpt", "value": "b", "weight": 0}
    items = [
        {"prompt": "a", "completion": "b", "metadata": "a note", "system": ["x"]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "id": 3, "tags": ["t"]},
        {
            "conversations": [
                {"from": "human", "value": "a"},
                turn,
                {"from": "human", "value": "c"},
                {**turn, "weight": 1},
            ]
        },
    ]
    found = load(str(write(tmp_path / "d.jsonl", items))).conversations
    assert [c.metadata for c in found] == [{"metadata": "a note", "system": ["x"]}, {"id": 3, "tags": ["t"]}, {}]
    assert [m.weight for m in found[2].messages] == [None, 0, None, 1]


def test_a_full_stop_makes_no_other_answer(tmp_path: Path) -> None:
    items = [{"prompt": "2+2?", "completion": answer} for answer in ("four", "Four.", "five")]
    found = load(str(write(tmp_path / "d.jsonl", items)))
    assert [i.where.rpartition(":")[2] for i in found.issues if i.code == "contradiction"] == ["3"]


def test_a_template_is_one_finding(tmp_path: Path) -> None:
    text = "Please sort this ticket into one of the usual kinds for our desk, and be quick about it: number "
    items = [*distinct(100), *({"prompt": f"{text}{i}", "completion": f"kind {i % 3}"} for i in range(60))]
    found = load(str(write(tmp_path / "d.jsonl", items)))
    assert (found.counts.get("template"), found.counts.get("near-duplicate"), found.warned) == (1, None, 0)
    assert "60 rows are this one" in next(i.message for i in found.issues if i.code == "template")


def test_no_rows_are_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("prompt,completion\n")
    with pytest.raises(DataError, match="no rows in it"):
        load(str(tmp_path / "d.csv"))


def test_a_csv_goes_on_after_a_bad_row(tmp_path: Path) -> None:
    good = b"".join(b"q%d,a%d\n" % (i, i) for i in range(3))
    (tmp_path / "d.csv").write_bytes(b"prompt,completion\n" + good + b'"two\nlines",x\nb\xe9,c\n' + good + b"one\n")
    found = load(str(tmp_path / "d.csv"))
    assert (found.rows_in, found.usable) == (9, 7)
    assert [(i.code, i.where.rpartition(":")[2]) for i in found.errors()] == [("not-utf8", "7"), ("csv-columns", "11")]
    assert found.conversations[3].source.endswith(":5")  # where the row begins


def test_a_pipe_is_read_whole(tmp_path: Path, cli: Cli) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in distinct(3000))
    found = cli("data", "check", "/dev/stdin", "--json", stdin=lines).json()
    assert (found["rows"], found["usable"], found["errors"]) == (3000, 3000, 0)
    array = json.dumps(distinct(50))
    assert cli("data", "check", "/dev/stdin", "--json", stdin=array).json()["rows"] == 50


def test_text_of_a_row_does_not_steer_the_terminal(tmp_path: Path, cli: Cli) -> None:
    found = cli("data", "check", write(tmp_path / "d.jsonl", [{"a\x1b[31m\nb\x07": 1}]))
    assert "\x1b" not in found.out and "\x07" not in found.out and "a␛[31m␊b␇" in found.out


def plan_codes(path: Path, **settings: Any) -> dict[str, str]:
    return {i.code: i.message for i in api.plan(str(path), model="starter", **settings).issues}


def test_training_is_told_of_near_duplicates_on_two_sides(tmp_path: Path) -> None:
    text = " ".join(f"word{i * 31 % 101}" for i in range(40))
    write(tmp_path / "train.jsonl", [*distinct(40), {"prompt": "Say it.", "completion": text}])
    write(tmp_path / "valid.jsonl", [*({"prompt": f"v{i}", "completion": f"{i}"} for i in range(9)),
                                     {"prompt": "Say it again.", "completion": text.replace("word0", "other")}])  # fmt: skip
    codes = plan_codes(tmp_path / "train.jsonl", valid_dataset=str(tmp_path / "valid.jsonl"), test_fraction=0.0)
    assert "1 rows are nearly the same on two sides" in codes["leak"]
    assert "leak" not in plan_codes(tmp_path / "train.jsonl")


def test_tool_calls_that_the_template_leaves_out_stop_the_run(tmp_path: Path, cli: Cli) -> None:
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": "{}"}}],
    }
    items = [{"messages": [{"role": "user", "content": f"{i}?"}, call]} for i in range(30)]
    path = write(tmp_path / "d.jsonl", items)
    with pytest.raises(DataError, match='leaves out the call of "add"'):
        api.plan(str(path), model="starter")
    assert cli("data", "check", path, "--model", "starter", "--json").json()["counts"]["tool-calls-lost"] == 30
