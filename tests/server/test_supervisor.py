"""The supervisor and the processes that it starts, without a server around them."""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from serving import chats
from tunesmith import api
from tunesmith.backends import get
from tunesmith.errors import DataError, UsageError
from tunesmith.local import backend
from tunesmith.local.backend import LocalBackend
from tunesmith.runs import Run
from tunesmith.server import store as db
from tunesmith.server import supervisor
from tunesmith.server.jobs import create_job, delete_model
from tunesmith.server.leftovers import free_deleted
from tunesmith.server.prepare import Order, Prepared, prepare
from tunesmith.server.protocol import NewJob, Refusal
from tunesmith.server.service import Caller, Limits, Service


def service(folder: Path, tiny: Path) -> Service:
    return Service(folder, get("huggingface"), {"tiny": tiny})


def job(made: Service, **more: Any) -> str:
    """A job that waits for its files to be checked."""
    with made.blobs.writing("file-x") as stream:
        stream.write(chats(12))
    id, request = db.new_id("ftjob-"), {"model": "tiny", "training_file": "file-x"}
    row = {"owner": "", "request": request, "seed": 1, "model": f"ft:tiny:{id}", "read": 0, "attempts": 0}
    made.store.add(db.jobs, id=id, **{"status": "validating_files", **row, **more})
    return id


def until(done: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def order(tmp_path: Path, tiny: Path) -> Order:
    (tmp_path / "training_file.jsonl").write_bytes(chats(12))
    settings = {"model": str(tiny), "valid_fraction": 0.0, "test_fraction": 0.0}
    return Order(str(tmp_path / "training_file.jsonl"), None, None, settings, 1.0, 0)


def test_files_are_checked_by_one_process_which_ends_with_its_server(tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tunesmith.server.prepare", str(tmp_path)]

    def start() -> subprocess.Popen[bytes]:
        made = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        assert made.stdin
        made.stdin.write(msgspec.json.encode(order(tmp_path, tiny)) + b"\n")
        made.stdin.flush()
        return made

    with (tmp_path / ".prepare.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        orphan, successor = start(), start()
        time.sleep(3)
        assert orphan.stdin
        orphan.stdin.close()
        assert orphan.wait(30) == -signal.SIGKILL and successor.poll() is None
        assert not (tmp_path / "prepared.json").exists()  # the other waits for the folder
    assert successor.wait(60) == 0
    successor.communicate()
    assert msgspec.json.decode((tmp_path / "prepared.json").read_bytes(), type=Prepared).error is None


@pytest.mark.parametrize(
    ("kind", "code", "param"),
    [(DataError, "invalid_training_file", "training_file"), (UsageError, "server_error", None)],
)
def test_what_is_wrong_is_said_without_the_servers_places(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], code: str, param: str | None
) -> None:
    wanted = order(tmp_path, tiny)

    def fail(**_: Any) -> None:
        raise kind(f"{wanted.training_file} and {tiny}/config.json and {tmp_path}/run")

    monkeypatch.setattr(api, "prepare", fail)
    found = prepare(wanted, tmp_path).error
    words = "<training file> and <model>/config.json and <job>/run"
    assert found == {"code": code, "message": words, "param": param}


def test_a_check_that_takes_too_long_fails_its_job(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = service(tmp_path / "data", tiny)
    id = job(made)
    made.supervisor.look()
    (process,) = made.supervisor._preparing.values()
    made.supervisor.look()
    assert process.poll() is None
    monkeypatch.setattr(supervisor, "PREPARING", 0)
    made.supervisor.look()
    row = made.store.get(db.jobs, id, None)
    assert row and row["status"] == "failed" and "took longer than 0 seconds" in row["error"]["message"]
    assert process.returncode == -signal.SIGKILL and not made.supervisor._preparing


def test_cancelling_ends_the_check_of_the_files(tiny: Path, tmp_path: Path) -> None:
    made = service(tmp_path / "data", tiny)
    id = job(made)
    made.supervisor.look()
    (process,) = made.supervisor._preparing.values()
    made.store.change(db.jobs, id, status="cancelled")
    made.supervisor.look()
    assert process.returncode == -signal.SIGKILL


class Deaf:
    """A backend whose workers end only when they are killed."""

    def __init__(self) -> None:
        self.working: set[str] = set()
        self.asked: list[bool] = []

    def resume(self, run: Run, step: int | None = None) -> None:
        self.working.add(str(run))

    def poll(self, run: Run) -> str:
        return "running" if str(run) in self.working else "cancelled"

    def cancel(self, run: Run, at_once: bool = False) -> None:
        self.asked.append(at_once)
        if at_once:
            self.working.discard(str(run))


def test_a_worker_counts_until_it_is_gone_and_is_killed_when_it_does_not_go(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = service(tmp_path / "data", tiny)
    deaf: Any = Deaf()
    made.supervisor._backend = deaf
    first, second = (job(made, status="queued", prepared=True) for _ in range(2))
    manifest = {"provider": "x", "recipe": {}, "plan": {"steps": 2}, "created": ""}
    for id in (first, second):
        folder = tmp_path / "data" / "jobs" / id / "run"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(manifest))
    for _ in range(2):
        made.supervisor.look()
    assert [Path(run).parent.name for run in deaf.working] == [first]
    made.store.change(db.jobs, first, status="paused")
    for _ in range(3):
        made.supervisor.look()
    assert status(made, second) == "queued" and deaf.asked and not any(deaf.asked)
    made.store.change(db.jobs, first, status="queued")  # it waits for its own old worker too
    monkeypatch.setattr(supervisor, "PATIENCE", 0.0)
    made.supervisor.look()
    assert deaf.asked[-1] is True and status(made, first) == status(made, second) == "queued"
    for _ in range(2):
        made.supervisor.look()
    assert sorted((status(made, first), status(made, second))) == ["queued", "running"] and len(deaf.working) == 1


def status(made: Service, id: str) -> str:
    row = made.store.get(db.jobs, id, None)
    assert row
    return str(row["status"])


def test_an_end_at_once_takes_all_that_a_worker_has_started(tmp_path: Path) -> None:
    code = "import signal, subprocess, time; signal.signal(15, signal.SIG_IGN); p = subprocess.Popen(['sleep', '60'])"
    code += "; print(p.pid, flush=True); time.sleep(60)"
    made = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert made.stdout
    child = Path("/proc") / made.stdout.readline().decode().strip()
    run = Run(tmp_path)
    backend._workers[str(run)] = made
    local = LocalBackend()
    local.cancel(run)
    time.sleep(0.2)
    assert made.poll() is None
    local.cancel(run, at_once=True)
    assert made.wait(10) == -signal.SIGKILL
    made.stdout.close()
    del backend._workers[str(run)]
    until(lambda: not child.exists() or ") Z " in (child / "stat").read_text(), 10)


@pytest.mark.parametrize(
    ("ended", "kept"),
    [("succeeded", [2, 4, 6, 7]), ("failed", [2, 6]), ("cancelled", [2, 6]), ("paused", [2, 4, 6, 7])],
)
def test_an_ended_job_keeps_only_what_somebody_can_use(tiny: Path, tmp_path: Path, ended: str, kept: list[int]) -> None:
    made = service(tmp_path / "data", tiny)
    finished = None if ended == "paused" else int(time.time())
    id = job(made, status=ended, prepared=True, finished_at=finished)
    run = tmp_path / "data" / "jobs" / id / "run"
    for step in (2, 4, 6, 7):  # the last one was made because the worker had to end
        folder = run / "checkpoints" / f"checkpoint-step-{step}"
        folder.mkdir(parents=True)
        for name in ("model.safetensors", "optimizer.safetensors"):
            (folder / name).write_bytes(b"x")
        if step < 7:
            made.store.add(db.checkpoints, id=f"c{step}", job_id=id, step=step, model=f"ft:m{step}", metrics={})
            made.store.add(db.models, id=f"ft:m{step}", owner="", job_id=id, folder=str(folder))
    (run / "best_model").mkdir()
    (run / "best_model" / "model.safetensors").write_bytes(b"x")
    user = {"model": "ft:m2", "training_file": "file-x"}
    job(made, status="paused", request=user)  # it begins from the first
    made.supervisor.look()
    left = sorted(int(p.name.rpartition("-")[2]) for p in (run / "checkpoints").iterdir())
    assert left == kept
    assert bool(list(run.glob("checkpoints/*/optimizer.safetensors"))) == (ended == "paused")
    assert (run / "best_model").exists() == (ended in ("succeeded", "paused"))
    rows, _ = made.store.page(db.models, [], None, 10, False)
    assert [int(row["id"][-1]) for row in rows] == [step for step in kept if step < 7]
    other = job(made, status="cancelled", finished_at=int(time.time()))  # ends later
    late = tmp_path / "data" / "jobs" / other / "run" / "checkpoints" / "checkpoint-step-1"
    late.mkdir(parents=True)
    made.supervisor.look()
    assert not late.exists()


def test_a_job_needs_room_on_the_disk(tiny: Path, tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    made = Service(tmp_path / "data", get("fake"), {"tiny": tiny}, limits=Limits(free_bytes=10 * free))
    call: Any = SimpleNamespace(service=made, caller=Caller("", True), store=made.store)
    with pytest.raises(Refusal) as error:
        create_job(call, NewJob("tiny", "file-x"))
    assert (error.value.status, error.value.code) == (507, "disk_full")
    assert error.value.headers == {"x-should-retry": "false"}


class Mortal(Deaf):
    """A backend whose workers are killed again and again, at the test's word."""

    word = "running"

    def resume(self, run: Run, step: int | None = None) -> None:
        self.word = "running"
        run.append("state", state="running")

    def poll(self, run: Run) -> str:
        return self.word


def mortal(tiny: Path, tmp_path: Path) -> tuple[Service, Mortal, str, Run]:
    """A service with one running job, whose run is laid out."""
    made, backend = service(tmp_path / "data", tiny), Mortal()
    made.supervisor._backend = backend  # type: ignore[assignment]
    id = job(made, status="running", prepared=True)
    run = Run(tmp_path / "data" / "jobs" / id / "run")
    run.path.mkdir(parents=True)
    manifest = {"provider": "x", "recipe": {}, "plan": {"steps": 1000}, "created": ""}
    (run / "run.json").write_text(json.dumps(manifest))
    return made, backend, id, run


@pytest.mark.parametrize("gets_on", [True, False])
def test_a_worker_may_be_lost_as_often_as_it_gets_on(gets_on: bool, tiny: Path, tmp_path: Path) -> None:
    made, backend, id, run = mortal(tiny, tmp_path)
    step = 0
    for _ in range(2 * supervisor.ATTEMPTS):
        made.supervisor.look()
        for _ in range(3 if gets_on else 0):  # each is told in a look of its own
            step += 1
            run.append("step", step=step, loss=1.0, seconds=1.0)
            made.supervisor.look()
        run.append("error", message="killed", lost=True)
        run.append("state", state="failed")
        backend.word = "failed"
        made.supervisor.look()
    row = made.store.get(db.jobs, id, None)
    assert row and row["status"] == ("running" if gets_on else "failed")
    assert row["attempts"] == (1 if gets_on else supervisor.ATTEMPTS)


def test_the_servers_own_errors_are_waited_out_and_stop_nothing_else(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _, id, run = mortal(tiny, tmp_path)
    other, now = job(made), [0.0]
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: now[0])
    broken = [True]

    def translate(*_: Any) -> Any:
        if broken[0]:
            raise OSError(24, "Too many open files")
        return [], run.log_size()

    monkeypatch.setattr(supervisor, "translate", translate)
    monkeypatch.setattr(supervisor, "tidy", lambda *_: 1 / 0)
    job(made, status="succeeded", finished_at=int(time.time()))
    assert [made.supervisor.look() for _ in range(20)] == [False] * 20
    monkeypatch.setattr(supervisor, "tidy", lambda *_: None)
    assert made.supervisor.look() and status(made, id) == "running"  # waits before it looks at this job again
    assert made.supervisor._preparing.keys() == {other} and made.supervisor._errors.keys() == {id}
    made.supervisor._end_preparing(other)
    made.store.change(db.jobs, other, status="cancelled")
    broken[0], now[0] = False, 2.0
    made.supervisor.look()
    assert not made.supervisor._errors  # it has passed
    broken[0] = True
    assert 15 * 60 < sum(2.0**n for n in range(supervisor.ERRORS - 1)) < 20 * 60  # seconds from the first to the last
    for n in range(supervisor.ERRORS):
        assert status(made, id) == "running"
        now[0] += 2.0**n
        made.supervisor.look()
    row = made.store.get(db.jobs, id, None)
    assert row and row["status"] == "failed" and row["error"]["message"].endswith("with this job: OSError")


def test_what_is_trained_is_not_lost_to_the_servers_own_errors(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, backend, id, run = mortal(tiny, tmp_path)
    now = [0.0]
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(supervisor, "results", lambda _: 1 / 0)
    run.append("state", state="succeeded")
    backend.word = "succeeded"
    for _ in range(2 * supervisor.ERRORS):
        made.supervisor.look()
        now[0] += 2.0**supervisor.ERRORS
    assert status(made, id) == "running" and made.supervisor._errors[id][0] == 2 * supervisor.ERRORS


def test_weights_stay_while_another_job_needs_them(tiny: Path, tmp_path: Path) -> None:
    made = service(tmp_path / "data", tiny)

    def ended(parent: str, state: str = "succeeded") -> tuple[str, Path]:
        id = job(made, status=state, request={"model": parent, "training_file": "file-x"})
        name = f"ft:tiny:{id}"
        weights = tmp_path / "data" / "jobs" / id / "run" / "final_model" / "model.safetensors"
        weights.parent.mkdir(parents=True)
        weights.write_bytes(b"x")
        if state == "succeeded":
            made.store.add(db.models, id=name, owner="", job_id=id, folder=f"jobs/{id}/run/final_model")
        return name, weights

    def forget(name: str) -> None:
        call: Any = SimpleNamespace(service=made, caller=Caller("", True), store=made.store, path={"model": name})
        assert delete_model(call).deleted

    first, weights = ended("tiny")
    second, of_second = ended(f"{first}:ckpt-step-3")
    third, of_third = ended(second, "paused")
    forget(first)
    forget(second)
    assert weights.exists() and of_second.exists()  # the third resumes from the second, which may stand on the first
    made.store.change(db.jobs, third.removeprefix("ft:tiny:"), status="cancelled")
    free_deleted(made.store, tmp_path / "data")  # as when the server starts
    assert not weights.exists() and not of_second.exists() and not of_third.exists()
    alone, of_alone = ended("tiny")
    forget(alone)
    assert not of_alone.exists()
