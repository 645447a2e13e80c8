"""kill -9 of the server, a worker, or both at any moment: all jobs end well, to the same bytes, no event lost or doubled."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from serving import Server, chats, kill, worker
from training import weights

KILLS = int(os.environ.get("TUNESMITH_KILLS", 4))  # times that something is killed
JOBS = int(os.environ.get("TUNESMITH_JOBS", 3))


def submit(server: Server) -> list[str]:
    """Jobs of different seeds, the last of them with validation."""
    file, valid = (server.upload(chats(n, first)).json()["id"] for n, first in ((40, 0), (10, 500)))
    made = []
    for seed in range(JOBS):
        order: dict[str, Any] = {"model": "tiny", "training_file": file, "seed": seed}
        order["hyperparameters"] = {"n_epochs": 6, "batch_size": 2}
        order |= {"validation_file": valid} if seed == JOBS - 1 else {}
        made.append(server.ask("POST", "/fine_tuning/jobs", order).json()["id"])
    return made


def result(server: Server, job: str) -> tuple[str, list[dict[str, Any]]]:
    """The weights and the metrics of a job that has ended well."""
    found = server.job(job, seconds=240)
    assert found["status"] == "succeeded", found
    folder = server.folder / "jobs" / job / "run"
    assert (
        server.ask("POST", "/completions", {"model": found["fine_tuned_model"], "prompt": "a", "max_tokens": 1}).status
        == 200
    )
    return weights(folder / "final_model"), [e["data"] for e in server.events(job) if e["type"] == "metrics"]


def test_killed_at_any_moment_nothing_is_lost(tiny: Path, tmp_path: Path) -> None:
    allow = ("--allow-model", f"tiny={tiny}", "--max-jobs", 2)
    calm = Server(tmp_path / "calm", *allow)
    want = [result(calm, job) for job in submit(calm)]
    assert calm.stop() == 0
    rng = random.Random(int(os.environ.get("TUNESMITH_SEED", time.time())))
    server = Server(tmp_path / "wild", *allow)
    jobs = submit(server)
    for number in range(KILLS):
        time.sleep(rng.uniform(0.5, 6))
        target = ("worker", "server", "both")[number % 3]
        if target != "server":
            pids = [pid for pid in map(worker, jobs) if pid]
            if pids:
                kill(rng.choice(pids))
        if target != "worker":
            server.stop(signal.SIGKILL)
            server.start()
    for job, (bytes_then, metrics_then) in zip(jobs, want, strict=True):
        bytes_now, metrics_now = result(server, job)
        assert bytes_now == bytes_then and metrics_now == metrics_then
        told = [e["message"] for e in server.events(job)]
        assert (
            len(told) == len(set(told))
            and told[0].startswith("Created")
            and told[-1].endswith("successfully completed")
        )
    assert server.stop() == 0


def test_an_end_in_peace_lets_jobs_go_on_where_they_were(tiny: Path, tmp_path: Path) -> None:
    server = Server(tmp_path / "data", "--allow-model", f"tiny={tiny}")
    file = server.upload(chats(100)).json()["id"]
    hyper = {"n_epochs": 20, "batch_size": 1}
    job = server.ask(
        "POST", "/fine_tuning/jobs", {"model": "tiny", "training_file": file, "hyperparameters": hyper}
    ).json()["id"]
    server.wait_until(lambda: sum(e["type"] == "metrics" for e in server.events(job)) > 20)
    assert server.stop() == 0 and worker(job) is None
    kept = list((server.folder / "jobs" / job / "run" / "checkpoints").glob("checkpoint-step-*"))
    assert kept  # made at its end: the first regular one is after a hundred steps
    server.start()
    assert server.job(job, "running")["status"] == "running"
    first = max(int(k.name.rpartition("-")[2]) for k in kept)
    server.wait_until(lambda: sum(e["type"] == "metrics" for e in server.events(job)) > first)
    resumed = (server.folder / "jobs" / job / "run" / "events.jsonl").read_text()
    assert '"type":"resumed"' in resumed and server.ask("POST", f"/fine_tuning/jobs/{job}/cancel").status == 200
    server.stop()


@pytest.mark.parametrize("moment", ["prepare", "start"])
def test_a_server_killed_at_once_knows_its_job(tiny: Path, tmp_path: Path, moment: str) -> None:
    server = Server(tmp_path / "data", "--allow-model", f"tiny={tiny}")
    file = server.upload(chats(12)).json()["id"]
    job = server.ask(
        "POST", "/fine_tuning/jobs", {"model": "tiny", "training_file": file, "hyperparameters": {"n_epochs": 1}}
    )
    assert job.status == 200
    if moment == "start":
        server.job(job.json()["id"], "running", "succeeded")
    server.stop(signal.SIGKILL)
    (server.folder / "files" / "file-nobodys").write_bytes(b"half a request")
    server.start()
    assert server.job(job.json()["id"])["status"] == "succeeded"
    assert not (server.folder / "files" / "file-nobodys").exists()
    assert server.upload(b"x").status == 200
    server.stop()
