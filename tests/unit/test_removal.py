"""`runs rm`: weights go, the record stays; who is refused, what a kill leaves, what is said of a removed run."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from training import fit, made
from tunesmith import api, removal
from tunesmith.cli import main
from tunesmith.errors import ModelError, RunError, UsageError
from tunesmith.models import find
from tunesmith.runs import Run

RECORD = ("run.json", "events.jsonl", "model_info.json", "README.md", "row_losses.npy", "report.html")


@pytest.fixture
def run(tiny: Path, tmp_path: Path, data: Path) -> Run:
    return fit(tmp_path / "run", data, tiny, epochs=2, save_steps=4)


def taken(folder: Path) -> int:
    """Bytes of all files, each once."""
    stats = [file.lstat() for file in folder.rglob("*") if file.is_file()]
    return sum({stat.st_ino: stat.st_size for stat in stats}.values())


def loadable(run: Run) -> list[str]:
    """Files that belong to a model."""
    names = ("*.safetensors*", "*config.json", "tokenizer*", "*.npy", "chat_template.jinja")
    found = (file.relative_to(run) for name in names for file in run.path.rglob(name))
    return sorted(str(file) for file in found if str(file) not in ("row_losses.npy", "data/chat_template.jinja"))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_record_stays_and_nothing_can_be_loaded(method: str, tiny: Path, tmp_path: Path, data: Path) -> None:
    run = fit(tmp_path / "run", data, tiny, epochs=2, save_steps=4, method=method, chat_template="chat")
    for name in ("report.html", "evaluation/result.json", "notes.txt"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("kept")
    AutoModelForCausalLM.from_pretrained(run)
    before, loss = taken(run.path), run.summary()["best_valid_loss"]
    kept = [run / "events.jsonl", run / ".lock"]  # which are written to
    size = sum(path.stat().st_size for path in kept)
    freed = removal.remove(run)
    assert freed == before - taken(run.path) + sum(path.stat().st_size for path in kept) - size > 0
    assert loadable(run) == []
    assert all((run / name).exists() for name in (*RECORD, "evaluation/result.json", "notes.txt", "data/test.jsonl"))
    assert list((run / "logs").iterdir()) and run.template()
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(run)
    with pytest.raises(ModelError):
        find(str(run))
    assert (run.removed(), run.state(), run.summary()["best_valid_loss"]) == (True, "succeeded", loss)


def test_whoever_wants_its_model_is_told_that_it_is_gone(run: Run, data: Path, tmp_path: Path) -> None:
    removal.remove(run)
    gone: list[Callable[[], object]] = [
        lambda: api.resume(run),
        lambda: api.resume(run / "checkpoints" / "checkpoint-step-4"),
        lambda: api.evaluate(run),
        lambda: api.evaluate(model="starter", against=str(run), dataset=str(data)),
        lambda: api.completer(str(run)),
        lambda: api.completer(str(run / "best_model")),
        lambda: api.plan(data, model=str(run / "final_model")),
    ]
    for use in gone:
        with pytest.raises(
            RunError, match=r"run: its weights were removed on \d{4}-\d\d-\d\d -- train anew; .* runs show"
        ):
            use()
    assert api.find_run(run).summary()["status"] == "succeeded"  # what was is still told


def test_a_base_that_is_gone_is_named_where_its_child_is_evaluated(run: Run, data: Path, tmp_path: Path) -> None:
    child = fit(tmp_path / "child", data, run / "best_model", max_steps=1)
    removal.remove(run, force=True)
    with pytest.raises(RunError, match="run: its weights were removed"):
        api.evaluate(child)


def test_what_a_kill_cuts_off_is_ended_by_doing_it_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any of its deletions: the run is known as removed, and cannot be gone on with."""
    real, whole = shutil.rmtree, run.path.with_name("whole")
    shutil.copytree(run, whole)
    for deletions in range(3):  # best_model, final_model, checkpoints
        left = iter(range(deletions))

        def cut(path: Path, left: object = left) -> None:
            if next(left, None) is None:  # type: ignore[call-overload]
                raise KeyboardInterrupt
            real(path)

        monkeypatch.setattr(removal.shutil, "rmtree", cut)
        with pytest.raises(KeyboardInterrupt):
            removal.remove(run)
        monkeypatch.undo()
        assert run.removed() and not run.busy() and loadable(run) != []
        with pytest.raises(RunError, match="weights were removed"):
            api.resume(run)
        assert removal.remove(run) > 0 and loadable(run) == []
        assert [e["type"] for e in run.events()].count("removed") == 1 and removal.remove(run) == 0
        real(run)
        shutil.copytree(whole, run)


def test_a_run_in_use_is_refused(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    with run.lock(), pytest.raises(RunError, match=r"a process is at work on this run -- tunesmith runs cancel"):
        removal.remove(run)
    assert not run.removed()
    hosted = made(tmp_path / "hosted", provider="openai")
    with pytest.raises(UsageError, match="the weights of this run are at a service"):
        removal.remove(hosted, force=True)


def test_a_run_that_others_began_from_is_refused_without_force(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    children = [made(tmp_path / name, run.path.resolve() / "best_model") for name in ("one", "two")]
    made(tmp_path / "other")
    with pytest.raises(RunError, match=r"needed by (one, two|two, one), which began from it -- remove those first, or"):
        removal.remove(run)
    removal.remove(children[0])
    with pytest.raises(RunError, match="needed by two,"):
        removal.remove(run)
    removal.remove(run, force=True)
    assert run.removed()


def test_bytes_count_once_and_only_where_no_other_name_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "shared", "outside"):
        (folder / name).write_bytes(b"x" * 100)
    os.link(folder / "shared", tmp_path / "second")
    os.link(folder / "outside", tmp_path / "kept")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    assert removal.delete([folder, tmp_path / "second", tmp_path / "link", tmp_path / "none"]) == 200 + len(
        os.fsencode(tmp_path / "kept")
    )
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_command_asks_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(tmp_path / "run")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert main(["runs", "rm", str(run)]) == 2
    assert capsys.readouterr().err.endswith("nobody can be asked here -- add --yes\n")
    monkeypatch.setattr(sys, "stdin", Terminal("\n"))
    assert main(["runs", "rm", str(run)]) == 130 and not run.removed()
    assert "for good? [y/N]" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert main(["runs", "rm", str(run)]) == 0 and run.removed()
    assert capsys.readouterr().out == f"{run}  weights removed, 0 bytes freed; the record stays\n"


def test_the_command_says_what_it_freed_and_the_list_that_weights_are_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(tmp_path / "run")
    child = made(tmp_path / "child", run.path)
    run.append("state", state="succeeded")
    (run / "model.safetensors").write_bytes(b"x" * 1234)
    assert main(["runs", "rm", str(run), "--yes"]) == 2 and "needed by child" in capsys.readouterr().err
    assert main(["runs", "rm", str(run), "--yes", "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"run": str(run), "freed_bytes": 1234}
    assert main(["runs", "list", "--runs-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [("weights removed" in line) for line in lines if str(child) in line or str(run) in line].count(True) == 1
    assert any(line.startswith(f"{run} ") and "succeeded, weights removed" in line for line in lines)
    assert main(["runs", "list", "--runs-dir", str(tmp_path), "--json"]) == 0
    assert {(r["status"], r["removed"]) for r in json.loads(capsys.readouterr().out) if r["run"] == str(run)} == {
        ("succeeded", True)
    }
    assert main(["runs", "show", str(run)]) == 0 and "removed" in capsys.readouterr().out
