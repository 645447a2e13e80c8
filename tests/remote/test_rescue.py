"""Rescue: everything an account holds becomes run directories, at whatever it was stopped; and the same job again here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from conftest import Result, rows, write
from hostile import KEY, Hostile, step
from tunesmith import api
from tunesmith.data.write import safe_name
from tunesmith.errors import TunesmithError, UsageError
from tunesmith.remote import backend, service
from tunesmith.remote.rescue import as_local, find
from tunesmith.runs import Run, listing


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hostile]:
    """A service with two jobs that went well, one that failed, one that runs; a file with a bad name and one that is gone."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for place, name, value in ((service, "FIRST", 0.01), (service, "PATIENCE", 2.0), (backend, "NEAR", 0.01)):
        monkeypatch.setattr(place, name, value)
    made = Hostile()
    data = write(tmp_path / "rows.jsonl", rows(60))
    for number in range(2):
        api.train(
            data, provider="openai", model="base", base_url=made.url, output_dir=tmp_path / f"run{number}", epochs=2
        )
    made.jobs["ftjob-001"]["hyperparameters"] = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1.8}
    made.jobs["ftjob-001"]["method"] = None
    failed = made._create({"model": "base", "training_file": "file-gone", "metadata": None})["id"]
    running = made._create({"model": "base", "training_file": "file-000", "metadata": None})["id"]
    made.jobs[failed] |= {
        "status": "failed",
        "error": {"code": "invalid_training_file", "message": "row 3", "param": "training_file"},
    }
    made.jobs[failed]["looks"] = 9
    made.events[failed] = [
        {"id": "ftevent-f", "created_at": 1, "level": "info", "type": "message", "message": "m", "data": {}}
    ]
    made.jobs[running]["status"] = "running"
    evil = {"id": "../../evil", "object": "file", "bytes": 3, "created_at": 1, "purpose": "fine-tune"}
    made.files["../../evil"] = {**evil, "filename": "../../../etc/passwd\n"}
    made.files["file-lost"] = {**evil, "id": "file-lost", "filename": "a.jsonl"}
    made.asked.clear()

    def on(job: dict[str, Any]) -> None:  # only the running one says something new, at the third look
        if job["id"] == running:
            job["looks"] += 1
            if job["looks"] == 3:
                made.events[running].append({"id": "ftevent-r", "created_at": 5, "level": "info", **step(1, 1)})
                job |= {"status": "succeeded", "fine_tuned_model": "ft:base:org::run", "finished_at": 9}

    made._on = on  # type: ignore[method-assign]
    yield made
    made.close()


def test_everything_becomes_runs_and_twice_changes_nothing(account: Hostile, tmp_path: Path) -> None:
    folder = tmp_path / "rescued"
    found = api.rescue(folder, account.url)
    assert (found.files, found.fetched) == (6, 4)
    assert found.jobs == {
        "ftjob-000": "succeeded",
        "ftjob-001": "succeeded",
        "ftjob-002": "failed",
        "ftjob-003": "running",
    }
    assert found.models == ["ft:base:org::000", "ft:base:org::001"]
    missing = " | ".join(found.missing)
    assert (
        "file file-lost (a.jsonl)" in missing
        and "../../evil" in missing
        and "training file file-gone of job ftjob-002" in missing
    )
    assert len(listing(folder)) == 4 and len(found.missing) == 3
    outside = [p for p in tmp_path.rglob("*passwd*") if folder not in p.parents]
    assert not outside and not (tmp_path.parent / "evil").exists()
    run = Run(folder / "ftjob-000")
    first = Run(tmp_path / "run0")
    assert (run / "data" / "train.jsonl").read_bytes() == (first / "upload" / "train.jsonl").read_bytes()
    assert [e["step"] for e in run.metrics("step")] == [1, 2, 3]
    assert json.loads((run / "model_info.json").read_bytes())["fine_tuned_model"] == "ft:base:org::000"
    assert run.manifest()["recipe"]["epochs"] == 2 and run.manifest()["plan"]["rows"]["train"] > 40
    failure = Run(folder / "ftjob-002").last("error")
    assert "row 3" in failure["message"] and failure["where"] == "training_file"
    before = {
        p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in ("account.json", "file.json")
    }
    assert not [p for p, text in before.items() if KEY.encode() in text]
    account.asked.clear()
    again = api.rescue(folder, account.url)
    assert again.fetched == 0 and again.jobs["ftjob-000"] == "succeeded"
    assert account.count("GET /files/file-000/content") == 0 and account.count("GET /fine_tuning/jobs/ftjob-000") == 0
    assert {p: p.read_bytes() for p in before if "ftjob-003" not in str(p)} == {
        p: text for p, text in before.items() if "ftjob-003" not in str(p)
    }
    assert (
        api.rescue(folder, account.url).jobs["ftjob-003"] == "succeeded"
    )  # what has ended since is brought to its end


def test_stopped_in_between_it_goes_on(account: Hostile, tmp_path: Path) -> None:
    account.fault("GET /fine_tuning/jobs/ftjob-001/events", "status", 999, status=500)
    account.fault("GET /files/file-001/content", "half", 2)
    found = api.rescue(tmp_path / "rescued", account.url)
    assert any("job ftjob-001" in line for line in found.missing) and found.jobs["ftjob-000"] == "succeeded"
    size = account.files["file-001"]["bytes"]
    assert [p.stat().st_size for p in (tmp_path / "rescued/files/file-001").glob("*.jsonl")] == [size]
    account.faults.clear()
    found = api.rescue(tmp_path / "rescued", account.url)
    assert found.jobs["ftjob-001"] == "succeeded" and not any("ftjob-001" in line for line in found.missing)
    account.close()
    with pytest.raises(TunesmithError, match="not reached"):
        api.rescue(tmp_path / "rescued", account.url)
    assert len(listing(tmp_path / "rescued")) == 4


def test_the_same_job_again_here(account: Hostile, tmp_path: Path) -> None:
    folder = tmp_path / "rescued"
    api.rescue(folder, account.url)
    settings = as_local(find(folder, "ft:base:org::001"), "starter")
    assert (settings["epochs"], settings["batch_size"], settings["model"]) == (2, 4, "starter")
    assert settings["test_dataset"].endswith("ftjob-001/data/valid.jsonl") and settings["valid_fraction"] == 0.0
    plan = api.plan(**settings)
    rescued = Run(folder / "ftjob-001").manifest()["plan"]["rows"]
    assert (
        plan.rows == {"train": rescued["train"], "valid": 0, "test": rescued["valid"]}
        and plan.recipe.learning_rate != "auto"
    )
    assert find(folder, "ftjob-001").path == find(folder, "ft:base:org::001").path
    with pytest.raises(UsageError, match="did you mean"):
        find(folder, "ft:base:org::0001")
    with pytest.raises(UsageError, match="lost"):
        as_local(Run(folder / "ftjob-002"), "starter")


def test_the_command(account: Hostile, tmp_path: Path, tiny: Path, cli: Callable[..., Result]) -> None:
    account.models["ft:base:org::001"] = {}
    account.answer = lambda body: "word1 word1."
    words = ["--base-url", account.url, "--model", tiny, "--retrain", "ft:base:org::001", "--json"]
    done = cli("rescue", *words)
    assert done.code == 1, done.err  # a training file is lost, and two that were never there
    found = done.json()
    assert found["rescued"]["files"] == 6 and (tmp_path / found["run"] / "best_model").is_dir()
    compared = found["compared"]
    assert compared["base"] == "ft:base:org::001" and compared["rows"] >= 10
    assert compared["verdict"] in ("better", "worse", "cannot tell") and "chrF" in compared["metrics"][0]["metric"]
    place = tmp_path / Path(compared["report"]).parent
    assert place.name.startswith("against-ft-base-org-001-")
    kept = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    assert len(kept) == compared["rows"] and kept[0]["base"]["said"]["text"] == "word1 word1."
    bad = cli("rescue", "--base-url", account.url, "--model", tiny)
    assert bad.code == 2 and "--retrain" in bad.err


def test_names_from_outside(tmp_path: Path) -> None:
    names = [
        "../x",
        "a/b",
        "..",
        ".",
        "",
        "file.json",
        "a" * 300,
        "\u6587" * 90,
        "a\nb",
        "a\ud800",
        "ä.jsonl",
        "-rf",
        "file-1",
    ]
    made = {safe_name(name, "file.json") for name in names}
    assert len(made) == len(names) and safe_name("file-1") == "file-1"
    for name in made:
        assert (
            (tmp_path / name).parent == tmp_path
            and "/" not in name
            and len(name.encode()) < 140
            and name not in (".", "..")
        )
        (tmp_path / f".{name}.{1 << 22}.tmp").write_text("x")  # as it is called while it is written
        assert name != "file.json"
    assert msgspec.json.encode(sorted(made))
