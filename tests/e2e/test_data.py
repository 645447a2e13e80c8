"""The data commands as their users meet them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Result, rows, write

Cli = Callable[..., Result]


def emoji_chats() -> list[dict[str, Any]]:
    """526 conversations, 474 of them marked as augmented: the shape of a real conversion."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Ask {i}?"},
                {"role": "assistant", "content": f"Say {i}. " + "💻" * (i % 9)},
            ],
            "metadata": {"tree_id": str(i), "augmented": i >= 52},
        }
        for i in range(526)
    ]


def test_check_in_words_and_json(tmp_path: Path, cli: Cli) -> None:
    items = [
        *rows(60),
        {"prompt": "x", "completion": ""},
        {"prompt": "y", "completion": "use sk-abcdefghij1234567890xyz"},
    ]
    data = write(tmp_path / "d.jsonl", items)
    plain = cli("data", "check", data)
    assert plain.code == 3 and "grade: unusable (1 error:" in plain.out and "sk-abcd…" not in plain.err
    found = cli("data", "check", data, "--json").json()
    assert (found["rows"], found["usable"], found["errors"], found["grade"]) == (62, 61, 1, "unusable")
    first = found["issues"][0]
    assert {k: first[k] for k in ("code", "severity", "file", "line")} == {
        "code": "empty-answer", "severity": "error", "file": str(data), "line": 61,
    }  # fmt: skip
    assert first["message"] and first["fix"]
    assert {"secret": "warning"}.items() <= {i["code"]: i["severity"] for i in found["issues"]}.items()
    hosted = cli("data", "check", data, "--provider", "openai", "--json").json()
    assert {"secret": "error"}.items() <= {i["code"]: i["severity"] for i in hosted["issues"]}.items()
    fast = cli("data", "check", data, "--structure-only", "--json").json()
    assert set(fast["counts"]) == {"empty-answer", "some-rows"}
    assert cli("data", "check", data, data, "--json").json()["rows"] == 124


def test_what_is_not_listed_is_counted(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "d.jsonl").write_text("x\n" * 10_050)
    found = cli("data", "check", tmp_path / "d.jsonl", "--json").json()
    assert (found["counts"]["not-json"], found["not_listed"]) == (10_050, 50)
    assert sum(i["code"] == "not-json" for i in found["issues"]) == 10_000


def test_outputs_are_refused_before_the_work(tmp_path: Path, cli: Cli) -> None:
    data = write(tmp_path / "d.jsonl", rows(20))
    for option, name in (
        ("--fix", "none/f.jsonl"),
        ("--fix", "f.csv"),
        ("--report", "none/r.html"),
        ("--fix", "d.jsonl"),
    ):
        done = cli("data", "check", data, option, name)
        assert (done.code, done.out) == (2, "") and done.err.count("\n") == 1
    assert cli("data", "check", data, "--fix", "x.jsonl", "--report", "x.jsonl").code == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.jsonl"]


def test_metadata_groups_before_it_is_stripped(tmp_path: Path, cli: Cli) -> None:
    """426 and 48 of 474, trees whole, nothing but messages written: a whole conversion in one command."""
    data = write(tmp_path / "c.jsonl", emoji_chats())
    done = cli(
        "data", "split", data, "--where", "metadata.augmented == true", "--group-by", "metadata.tree_id",
        "--strip-metadata", "--method", "shuffle", "-o", "datasets/emogpt", "--json",
    ).json()  # fmt: skip
    assert done["rows"] == {"train": 426, "valid": 48} and done["leaks"] == []
    written = [json.loads(line) for line in (tmp_path / "datasets" / "emogpt_val.jsonl").read_text().splitlines()]
    assert {tuple(row) for row in written} == {("messages",)}


def test_a_hub_data_set_from_the_cache(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache as `datasets` leaves it; what is not in it is said with the command that fetches it."""
    import datasets

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "made" / "numbers").mkdir(parents=True)
    write(tmp_path / "made" / "numbers" / "data.jsonl", rows(60))
    cache = tmp_path / "home" / "datasets"
    datasets.load_dataset(str(tmp_path / "made" / "numbers"), cache_dir=str(cache))
    (cache / "numbers").rename(cache / "someone___numbers")
    found = cli("data", "check", "someone/numbers", "--json")
    assert (found.json()["rows"], found.json()["errors"], found.err) == (60, 0, "")
    issues = cli("data", "check", "someone/numbers", "--provider", "openai", "--json").json()["issues"]
    assert {i["file"] for i in issues if i["line"] is None} == {"someone/numbers"}
    missing = cli("data", "check", "someone/absent")
    assert missing.code == 3 and "hf download --repo-type dataset someone/absent" in missing.err


def test_severity_depends_on_the_task(tmp_path: Path, cli: Cli) -> None:
    data = write(
        tmp_path / "d.jsonl", [*rows(60), {"prompt": "Question number 1?", "completion": "Something else altogether."}]
    )
    for task, severity in (("chat", "info"), ("instruct", "warning")):
        issues = cli("data", "check", data, "--task", task, "--json").json()["issues"]
        assert {i["severity"] for i in issues if i["code"] == "contradiction"} == {severity}


def test_too_long_for_a_model(tmp_path: Path, tiny: Path, cli: Cli) -> None:
    data = write(tmp_path / "d.jsonl", [*rows(60), {"prompt": "x", "completion": "word " * 600}])
    found = cli("data", "check", data, "--model", tiny, "--json")
    assert found.code == 3
    over = [i for i in found.json()["issues"] if i["code"] == "over-long"]
    assert [i["line"] for i in over] == [61] and "more than the model's context" in over[0]["message"]


def test_fix_and_report(tmp_path: Path, cli: Cli) -> None:
    data = write(tmp_path / "d.jsonl", [*rows(60), {"prompt": "x ", "completion": "na\u00c3\u00afve"}])
    before = data.read_bytes()
    done = cli("data", "check", data, "--fix", "fixed.jsonl", "--report", "check.html")
    assert done.code == 0 and "fixed.jsonl: 61 rows, 2 changes" in done.out and data.read_bytes() == before
    assert json.loads((tmp_path / "fixed.jsonl").read_text().splitlines()[-1]) == {"prompt": "x", "completion": "naïve"}
    page = (tmp_path / "check.html").read_text()
    assert "mojibake" in page and "<script" not in page and "http" not in page.replace("http-equiv", "")
    again = cli("data", "check", data, "--fix", "fixed.jsonl")
    assert again.code == 2 and "exists already" in again.err
    assert cli("data", "check", "fixed.jsonl", "--json").json()["counts"].keys() <= {"some-rows", "near-duplicate"}


def test_a_secret_is_not_repeated(tmp_path: Path, cli: Cli) -> None:
    secret = "sk-abcdefghij1234567890xyz0123"
    data = write(tmp_path / "d.jsonl", [{"prompt": "x", "completion": secret}])
    for arguments in (["--json"], ["--report", "r.html"]):
        done = cli("data", "check", data, *arguments)
        assert secret not in done.out + done.err
    assert secret not in (tmp_path / "r.html").read_text()


def test_the_conversion_of_a_guide(tmp_path: Path, cli: Cli) -> None:
    """426 and 48 of 474 augmented rows, under the guide's names, messages only."""
    data = write(tmp_path / "conversations.jsonl", emoji_chats())
    done = cli(
        "data", "split", data, "--where", "metadata.augmented == true", "--method", "shuffle", "--strip-metadata",
        "-o", "datasets/emogpt_train", "--json",
    )  # fmt: skip
    assert done.json()["rows"] == {"train": 426, "valid": 48}
    for name, count in (("train", 426), ("val", 48)):
        lines = (tmp_path / "datasets" / f"emogpt_train_{name}.jsonl").read_text().splitlines()
        assert len(lines) == count and all(set(json.loads(line)) == {"messages"} for line in lines)


def test_convert(tmp_path: Path, cli: Cli) -> None:
    data = write(tmp_path / "c.jsonl", emoji_chats())
    done = cli("data", "convert", data, "--to", "prompt-completion", "--max-emoji", 5, "-o", "out.csv", "--json")
    assert done.json() == {"file": "out.csv", "rows": 352, "left_out": 0, "lost": {}}
    with_system = cli("data", "convert", data, "--system", "Be brief.", "-o", "s.jsonl")
    assert with_system.code == 0
    refused = cli("data", "convert", "s.jsonl", "--to", "prompt-completion", "-o", "p.jsonl")
    assert (
        refused.code == 3
        and "cannot hold the messages of system" in refused.err
        and not (tmp_path / "p.jsonl").exists()
    )
    lossy = cli("data", "convert", "s.jsonl", "--to", "prompt-completion", "--lossy", "-o", "p.jsonl")
    assert lossy.code == 0 and "in 526 rows" in lossy.err
    cli("data", "convert", "s.jsonl", "--system-how", "strip", "-o", "bare.jsonl")
    assert json.loads((tmp_path / "bare.jsonl").read_text().splitlines()[0])["messages"][0]["role"] == "user"
    mixed = cli("data", "convert", data, "echo", "--weights", "0.1,2", "--sample", 100, "-o", "m.jsonl", "--json")
    assert mixed.json()["rows"] == 100
    short = cli(
        "data", "convert", data, "--max-tokens", 60, "--where", "metadata.tree_id == '3'", "-o", "t.jsonl", "--json"
    )
    assert short.code == 0 and short.json()["rows"] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--where", "open('x')", "-o", "x.jsonl"], 2, "not part of the language"),
        (["--where", "turns > 99", "-o", "x.jsonl"], 3, "no row is left"),
        (["--to", "sharegtp", "-o", "x.jsonl"], 2, 'did you mean "sharegpt"'),
        (["-o", "x.txt"], 2, "no container of that name"),
        (["--weights", "1,2", "-o", "x.jsonl"], 2, "2 weights for 1 data sets"),
        (["--weights", "a", "-o", "x.jsonl"], 2, "cannot read"),
        (["--sample", "0", "-o", "x.jsonl"], 2, "a sample of 0"),
        (["--sample", "inf", "-o", "x.jsonl"], 2, "a sample of inf"),
        (["--system", " ", "-o", "x.jsonl"], 2, "an empty system message"),
        (["--weights", "nan", "-o", "x.jsonl"], 2, "a weight is from 0 up to 1000"),
        (["--system-how", "add", "-o", "x.jsonl"], 2, "do not go together"),
        (["-o", "c.jsonl"], 2, "exists already"),
    ],
)
def test_mistakes(arguments: list[str], code: int, words: str, tmp_path: Path, cli: Cli) -> None:
    data = write(tmp_path / "c.jsonl", rows(20))
    done = cli("data", "convert", data, *arguments)
    assert (done.code, done.out) == (code, "") and words in done.err and done.err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c.jsonl"]


def test_stats(tmp_path: Path, cli: Cli) -> None:
    found = cli("data", "stats", "emoji", "--report", "s.html", "--json").json()
    assert found["rows"] == 60 and found["roles"] == {"user": 72, "assistant": 72} and found["languages"] == {"en": 60}
    assert found["emoji"]["emoji"] == 133 and found["tokens"]["quantiles"][-1] == max(found["tokens"]["edges"])
    assert sum(found["tokens"]["bars"]) == 60 and "<svg" in (tmp_path / "s.html").read_text()
    shown = cli("data", "stats", "echo", "--model", "gpt-4o-mini", "--price", 3).out
    assert "tokens x 3 epochs" in shown and "$" in shown and "distinct-2" in shown
    assert "only a hosted model" in cli("data", "stats", "echo", "--price", 3).err


def test_preview_shows_what_it_can(tmp_path: Path, cli: Cli) -> None:
    data = write(tmp_path / "d.jsonl", [*rows(3), {"prompt": "no answer", "completion": " "}])
    shown = cli("data", "preview", data)
    assert shown.code == 0 and f"{data}:2:" in shown.out and "1 errors; see: tunesmith data check" in shown.err
    assert cli("data", "preview", write(tmp_path / "bad.jsonl", [{"prompt": "a"}])).code == 3


def test_preview_of_the_worst(tmp_path: Path, cli: Cli) -> None:
    data = write(tmp_path / "d.jsonl", [*rows(20), {"prompt": "long", "completion": "word " * 90}])
    shown = cli("data", "preview", data, "--worst", "long", "--rows", 1, "--max-length", 40, "--html", "p.html").out
    assert shown.startswith(f"{data}:21:") and "cut after 40" in shown and "✂" in shown
    assert 'class="beyond"' in (tmp_path / "p.html").read_text()
    first = cli("data", "preview", data, "--worst", "short", "--rows", 1, "--json").json()[0]
    assert first["cut"] is None and len(first["ids"]) == min(
        len(r["ids"]) for r in cli("data", "preview", data, "--rows", 21, "--json").json()
    )
