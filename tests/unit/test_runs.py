"""The run directory under odd circumstances: half lines, two takers, missing parts."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from training import fit, made
from tunesmith import api
from tunesmith.cli import main
from tunesmith.errors import Interrupted, RunError, TunesmithError, UsageError
from tunesmith.hosted import OPENAI, same
from tunesmith.layout import create, output_path
from tunesmith.local import backend
from tunesmith.local.loop import train
from tunesmith.recipe import Recipe
from tunesmith.render import TEMPLATES
from tunesmith.runs import Run, run_of, standing
from tunesmith.settings import changes


def test_an_event_after_a_half_line_is_read_and_the_half_line_is_not(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.append("state", state="running")
    with (tmp_path / "events.jsonl").open("ab") as log:
        log.write(b'{"type":"step","st')
    assert len(list(run.events())) == 1
    run.append("state", state="failed")
    assert [e["state"] for e in run.events()] == ["running", "failed"] and run.state() == "failed"
    assert all(json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines())  # for any reader


def test_events_of_many_are_all_kept(tmp_path: Path) -> None:
    """Also where one of them finds half a line, however long, that another process has left."""
    with (tmp_path / "events.jsonl").open("ab") as log:
        log.write(b'{"type":"a"}\n{"type":"step","note":"' + b"x" * 10_000)
    threads = [threading.Thread(target=lambda: [Run(tmp_path).append("b", n=i) for i in range(100)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [line["type"] for line in lines] == ["a"] + ["b"] * 400


def test_events_are_read_from_an_offset(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.events_from(0) == ([], 0) and run.log_size() == 0
    run.append("a")
    first, offset = run.events_from(0)
    run.append("b")
    assert [e["type"] for e in first] == ["a"] and [e["type"] for e in run.events_from(offset)[0]] == ["b"]


def test_only_one_process_takes_a_directory(tmp_path: Path) -> None:
    with create(tmp_path / "run", {}) as run:
        assert not (run / "run.json").exists()  # written last: until then it is no run
        with pytest.raises(RunError, match="not empty"), create(tmp_path / "run", {}):
            raise AssertionError
    assert (run / "run.json").exists() and run.state() == "queued"


def test_a_failed_lay_out_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), create(tmp_path / "run", {}):
        raise OSError("full")
    assert not (tmp_path / "run").exists()


def test_missing_tokens_are_an_error_not_a_run_without_validation(tiny: Path, tmp_path: Path, data: Path) -> None:
    run = fit(tmp_path / "run", data, tiny, max_steps=1)
    (run / "data" / "valid.starts.npy").unlink()
    with pytest.raises(RunError, match="valid tokens cannot be read"):
        train(run, lambda: False)


def test_the_best_step_is_the_best_models(tiny: Path, tmp_path: Path, data: Path) -> None:
    """Not the base model's, when training only made it worse; and not one that min_gain did not count."""
    run = fit(tmp_path / "run", data, tiny, epochs=3, min_gain=100.0, patience=0)
    summary = run.summary()
    assert summary["best_step"] == 12 == next(e["step"] for e in run.metrics("eval") if e["best"])
    assert json.loads((run / "model_info.json").read_text())["best_step"] == 12
    worse = fit(tmp_path / "worse", data, tiny, epochs=1, learning_rate=3.0, patience=0)
    assert worse.summary()["best_step"] == 12 and worse.metrics("eval")[0]["loss"] < worse.summary()["best_valid_loss"]


def test_training_goes_on_from_a_lora_run(tiny: Path, tmp_path: Path, data: Path) -> None:
    lora = fit(tmp_path / "lora", data, tiny, method="lora", epochs=2, learning_rate=1e-2)
    further = fit(tmp_path / "full", data, lora / "best_model", max_steps=2)
    start = further.metrics("eval")[0]["loss"]
    assert start == pytest.approx(lora.summary()["best_valid_loss"], rel=1e-4)  # it begins where the other ended
    with pytest.raises(UsageError, match="an adapter cannot stand on another"):
        api.plan(data, model=str(lora / "best_model"), method="lora")


def test_a_relative_model_path_is_found_from_anywhere(
    tiny: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.parent)
    assert api.plan(data, model="tiny").recipe.model == str(tiny.resolve())


def test_a_run_in_the_current_folder(tiny: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = fit(Path(), data, tiny, max_steps=1)
    assert (run / "config.json").exists() and not list(Path().glob(".publish*"))


def test_a_validation_loss_that_is_no_number_is_an_error(tiny: Path, tmp_path: Path, data: Path) -> None:
    with pytest.raises(TunesmithError, match="became nan"):
        fit(tmp_path / "run", data, tiny, learning_rate=1e30, warmup_steps=0, eval_steps=1)


def test_a_checkpoint_that_is_not_there_and_a_file_for_a_folder(tiny: Path, tmp_path: Path, data: Path) -> None:
    run = fit(tmp_path / "run", data, tiny, max_steps=2)
    with pytest.raises(RunError, match=r"no such checkpoint -- there are: checkpoint-step-2$"):
        api.resume(run / "checkpoints" / "checkpoint-step-99")
    with pytest.raises(RunError, match="the output directory is a file"):
        api.prepare(data, model=str(tiny), output_dir=str(data))
    assert api.state_of(run) == "succeeded" and api.state_of(tmp_path) == ""


def test_a_run_that_has_succeeded_stays_so(tiny: Path, tmp_path: Path, data: Path) -> None:
    """Also where a signal ends its process after the last word."""
    run = fit(tmp_path / "run", data, tiny, max_steps=2)
    process = subprocess.Popen(["sleep", "60"])
    process.terminate()
    process.wait()
    backend._workers[str(run)] = process
    assert backend.LocalBackend().poll(run) == "succeeded" == run.state()


def interrupted(after: int) -> Callable[..., Any]:
    """In the place of a method: the method, and a Ctrl-C after it; or before it, where `after` is 0."""

    def instead(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if after:
                method(*arguments, **named)
            raise KeyboardInterrupt

        return call

    return instead


@pytest.mark.parametrize(
    ("place", "name", "after"),
    [
        (Run, "append", 0),  # its first word, while it is laid out
        (Run, "append", 1),
        (backend.LocalBackend, "submit", 0),
        (backend.LocalBackend, "submit", 1),
        (backend.LocalBackend, "resume", 0),
        (backend.LocalBackend, "resume", 1),
        (backend.subprocess, "Popen", 0),
        (backend.LocalBackend, "poll", 0),  # again and again: the first is heard, the second ends it at once
        (backend.LocalBackend, "poll", 1),
    ],
)
def test_ctrl_c_at_any_moment_says_how_to_go_on(
    place: Any, name: str, after: int, tiny: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or leaves nothing, where the run was not laid out yet."""
    path, method = tmp_path / "run", getattr(place, name)
    monkeypatch.setattr(place, name, interrupted(after)(method))
    laid_out = name != "append" and (name, after) != ("submit", 0)
    with pytest.raises(Interrupted if laid_out else KeyboardInterrupt) as error:
        api.train(data, model=str(tiny), output_dir=str(path), max_steps=2)
    if laid_out:
        assert re.search("stopped before its first step -- go on with: tunesmith train --resume ", str(error.value))
        assert Run(path).last("state")["state"] == "cancelled"
    assert path.exists() == laid_out and not backend._workers
    monkeypatch.undo()
    if laid_out:
        assert api.resume(path).state() == "succeeded"


def test_commands_in_messages_can_be_pasted(tmp_path: Path) -> None:
    run = Run("a folder/it's")
    assert f"{run}" == "a folder/it's" and f"{run:>15}" == "  a folder/it's"
    assert shlex.split(f"tunesmith runs watch {run:q}") == ["tunesmith", "runs", "watch", "a folder/it's"]


# ---- tags and lineage


def test_tags_are_events_and_the_log_is_only_added_to(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    before = (run / "events.jsonl").read_bytes()
    run.tag("good", "v1.0_a-b", "good")
    run.tag("good")  # again: no error, and no event
    assert run.tags() == ["good", "v1.0_a-b"]
    run.untag("good")
    assert Run(run).tags() == ["v1.0_a-b"] and (run / "events.jsonl").read_bytes().startswith(before)
    assert [e["type"] for e in run.events()][-2:] == ["tagged", "untagged"]
    for wrong in ("two words", "", "a/b", "x" * 65):
        with pytest.raises(UsageError, match="is no tag -- letters, digits"):
            run.tag("fine", wrong)
    with pytest.raises(RunError, match=r'no tag "good" -- it has: v1\.0_a-b'):
        run.untag("v1.0_a-b", "good")
    assert run.tags() == ["v1.0_a-b"]  # all or nothing


@pytest.mark.parametrize("part", [".", "best_model", "final_model", "checkpoints/checkpoint-step-2"])
def test_a_run_descends_from_the_one_whose_folder_it_began_from(part: str, tmp_path: Path) -> None:
    first = made(tmp_path / "first")
    (first / part).mkdir(parents=True, exist_ok=True)
    second = made(tmp_path / "second", (first / part).resolve())
    third = made(tmp_path / "third", tmp_path / "second" / "best_model")  # a folder that is gone
    assert [r.version() for r in (first, second, third)] == [1, 2, 3]
    assert [Path(step["run"]).name for step in third.lineage()] == ["third", "second", "first"]
    last = third.lineage()[-1]
    assert last == {
        "version": 1,
        "run": str(first),
        "model": "starter",
        "dataset": "rows.jsonl",
        "data_hash": "a1" * 32,
        "method": "lora",
        "best_valid_loss": 0.5,
    }


def test_lineage_ends_where_a_forebear_is_damaged_or_was_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made(tmp_path / "first")
    second = made(tmp_path / "second", first.path)
    (first / "run.json").write_text("{")
    assert second.version() == 1 == len(second.lineage())
    shutil.rmtree(first)
    again = made(tmp_path / "first", second.path)  # each seems to have begun from the other
    assert (again.version(), second.version()) == (2, 2)
    monkeypatch.chdir(tmp_path)
    assert made(tmp_path / "hub", "first").version() == 1  # a Hub model that is called as a folder here


def test_the_run_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path / "run")
    (run / "best_model").mkdir()
    for inside in ("", "best_model", "data", "final_model", "checkpoints/checkpoint-step-9"):
        assert str(run_of(tmp_path / "run" / inside)) == str(run)
    assert run_of(tmp_path) is None and run_of(tmp_path / "run" / "nothing") is None
    monkeypatch.chdir(run / "best_model")
    assert run_of(".") is not None and run_of("some/model") is None


def test_the_commands_show_tags_versions_and_lineage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: object) -> str:
        assert main([*map(str, words)]) == 0
        return capsys.readouterr().out

    first = made(tmp_path / "first")
    plain = said("runs", "list", "--runs-dir", tmp_path)
    assert plain.splitlines()[0].endswith("best valid loss") and "\nlineage\n" not in said("runs", "show", first)
    second = made(tmp_path / "second", first.path)
    assert said("runs", "tag", second, "good", "for-web") == f"{second}  good for-web\n"
    assert json.loads(said("runs", "tag", first, "old", "--json")) == {"run": str(first), "tags": ["old"]}
    header, *lines = said("runs", "list", "--runs-dir", tmp_path).splitlines()
    assert header.endswith("version  tags") and {line.split("  ", 1)[0] for line in lines} == {str(first), str(second)}
    assert any(re.search(r" 2  good for-web$", line) for line in lines)
    found = json.loads(said("runs", "list", "--runs-dir", tmp_path, "--tag", "good", "--json"))
    assert [(r["run"], r["tags"], r["version"], r["removed"]) for r in found] == [
        (str(second), ["good", "for-web"], 2, False)
    ]
    assert said("runs", "list", "--runs-dir", tmp_path, "--tag", "bad") == ""
    shown = said("runs", "show", second)
    assert "tags" in shown and re.search(rf"lineage\n  version .*\n +2  {second} .*\n +1  {first} +starter ", shown)
    told = json.loads(said("runs", "show", second, "--json"))
    assert (told["version"], told["tags"], told["lineage"]) == (2, ["good", "for-web"], second.lineage())
    assert said("runs", "tag", second, "good", "for-web", "--remove") == f"{second}  (no tags)\n"


def test_runs_are_listed_from_their_usual_folder_and_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path / "here")
    made(tmp_path / "fine_tuned_models/there")
    monkeypatch.chdir(tmp_path)
    for words, expected in (([], {"here", "fine_tuned_models/there"}), (["--runs-dir", "."], {"here"})):
        assert main(["runs", "list", "--json", *words]) == 0
        assert {run["run"] for run in json.loads(capsys.readouterr().out)} == expected


def test_a_small_learning_rate_is_told_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(tmp_path / "run")
    run.append("step", step=1, loss=2.5, lr=2e-5, grad_norm=0.0, seconds=1234.5)
    assert main(["runs", "events", str(run)]) == 0
    assert "step 1  loss 2.5000  lr 2e-05  grad_norm 0.0000  seconds 1234.5000" in capsys.readouterr().out


# ---- how it stands, and what a kill leaves


def test_a_run_whose_process_is_gone(tmp_path: Path) -> None:
    """Queued for a minute without a process is not a run that will begin; a service's own word stands."""
    old = {"time": time.time() - 61}
    assert standing({"state": "queued", "time": time.time()}, busy=False) == "queued"
    assert standing({"state": "queued", **old}, busy=False) == "interrupted"
    assert standing({"state": "queued", **old}, busy=True) == standing(
        {"state": "queued", "at": "service", **old}, False
    )
    assert standing({"state": "running", **old}, busy=False) == "interrupted" and standing({}, False) == "unknown"


def test_only_lines_of_the_kind_are_read(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.append("step", step=1, note="state")
    run.append("state", state="step")
    with (tmp_path / "events.jsonl").open("ab") as log:
        log.write(b'{"type":"step","st\n')
    run.append("step", step=2)
    assert [e["type"] for e in run.events("state")] == ["state"] and run.last("state")["state"] == "step"
    assert [e["step"] for e in run.events("step")] == [1, 2] and len(list(run.events("step", "state"))) == 3
    assert run.last("none") == {}


def test_a_directory_that_was_not_laid_out_whole_is_taken_again(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from typing import Any
from tunesmith.layout import create
with create(Path({str(tmp_path / "run")!r}), {{}}) as run:
    (run / "data" / "train.jsonl").write_text("x")
    import os; os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert (tmp_path / "run" / "data" / "train.jsonl").exists()
    unnamed = Recipe(dataset="run.jsonl", runs_dir=str(tmp_path))
    (tmp_path / "run").rename(tmp_path / "chat_run")
    assert output_path(unnamed) == tmp_path / "chat_run"  # also where nobody names it again
    with create(tmp_path / "chat_run", {}) as run:
        assert not list((run / "data").iterdir())
    assert output_path(unnamed) == tmp_path / "chat_run-2"


@pytest.mark.parametrize(
    "there",
    [
        {".lock": '["host", 1]', "data/mine.jsonl": "x"},  # the user's own
        {".lock": '["host", 1]', "data/train.jsonl": "x", "best_model/model.safetensors": "x"},
        {".lock": '["host", 1]', "events.jsonl": '{"type":"state"}\n{"type":"state"}\n'},  # it had begun
        {".lock": '["host", 1]', "remote.json": '{"job": "ftjob-1"}'},
        {".lock": '["host", 1]', "remote.json": '{"asked": 1}'},
        {".lock": "of another program"},
        {".lock": "", "data/train.jsonl": "x"},
    ],
)
def test_a_directory_that_holds_more_is_nobodys_to_delete(there: dict[str, str], tmp_path: Path) -> None:
    for name, text in there.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(text)
    with pytest.raises(RunError, match="is not empty"), create(tmp_path / "run", {}):
        raise AssertionError
    assert all((tmp_path / "run" / name).read_text() == text for name, text in there.items())


def test_what_a_claim_leaves_is_taken_and_a_link_is_not(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()  # killed before the first word
    with create(tmp_path / "run", {}):
        pass
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".lock").write_text('["host", 1]')
    (tmp_path / "other" / "data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="is not empty"), create(tmp_path / "other", {}):
        raise AssertionError


def test_a_lock_on_a_file_that_is_gone_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking another process may have failed and deleted it, and a third have made a new one."""
    run, flock, calls = Run(tmp_path), fcntl.flock, list[int]()

    def late(stream: Any, how: int) -> None:
        if not calls:
            (tmp_path / ".lock").unlink()
            (tmp_path / ".lock").touch()
        calls.append(how)
        flock(stream, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with run.lock() as held:
        assert os.fstat(held.fileno()).st_ino == (tmp_path / ".lock").stat().st_ino and len(calls) == 2
        assert run.busy()


def test_a_finished_run_is_read_without_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    run.append("state", state="running")
    assert run.state() == "interrupted"

    def ends(_: Run) -> bool:
        run.append("state", state="succeeded")  # after the log was read, and before the lock is asked
        return False

    monkeypatch.setattr(Run, "busy", ends)
    assert run.state() == "succeeded"
    monkeypatch.setattr(Run, "busy", lambda _: 1 / 0)  # a disk that knows no locks
    assert run.state() == "succeeded"


def test_a_record_of_another_version_is_one_line(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    known = json.loads((run / "run.json").read_text())
    known["recipe"]["threads"] = 8192
    (run / "run.json").write_text(json.dumps(known))
    with pytest.raises(RunError, match=r"of another version: .*threads"):
        run.recipe()


def test_resume_refuses_before_it_writes_and_knows_the_same_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.jinja").write_text(TEMPLATES["chat"].read_text())
    given = {"chat_template": "t.jinja", "max_steps": 2}
    run = api.train("echo", provider="fake", output_dir="r", **given)
    before = run.log_size()
    with pytest.raises(UsageError, match="until job: only a service"):
        api.resume("r", until="job", save_total_limit=5)
    assert run.log_size() == before
    monkeypatch.setattr(api.planning, "prepare", lambda *_: 1 / 0)
    with pytest.raises(UsageError, match="until job: only a service"):  # before any row is read
        api.train("echo", provider="fake", until="job")
    assert str(api.resume("r", dataset="echo", **given)) == "r"
    assert not list(run.events("changed"))


@pytest.mark.parametrize(
    ("url", "model", "given", "alike"),
    [
        (OPENAI, "gpt-4o-mini-2024-07-18", {"model": "gpt-4o-mini", "base_url": f"{OPENAI}/"}, True),
        (OPENAI, "gpt-4o-mini-2024-07-18", {"model": "gpt-4.1"}, False),
        (OPENAI, "gpt-4o-mini-2024-07-18", {"model": "gpt-4x-mine"}, False),
        ("http://localhost:8000/v1", "gpt-4o-mini", {"model": "gpt-4o-mini"}, True),  # as it has the name
        (
            "http://localhost:8000/v1",
            "gpt-4x-mine",
            {"model": "gpt-4x-mine", "base_url": "http://localhost:8000/v1/"},
            True,
        ),
        ("http://localhost:8000/v1", "gpt-4x-mine", {"base_url": "http://localhost:9000/v1"}, False),
    ],
)
def test_a_services_names_are_those_of_the_run(
    url: str, model: str, given: dict[str, str], alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address of now is no part of it."""
    monkeypatch.setenv("OPENAI_BASE_URL", "not an address")
    recipe = Recipe(provider="openai", model=model, base_url=url)
    assert changes(recipe, {}, None, same) == {}
    if alike:
        assert changes(recipe, given, None, same) == {}
    else:
        with pytest.raises(UsageError, match="is not the run's"):
            changes(recipe, given, None, same)
