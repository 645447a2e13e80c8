"""kill -9 of the server, a worker, or both at any moment: all jobs end well, to the same bytes, no event lost or doubled."""

from __future__ import annotations

import logging
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from serving import Server, chats, kill, worker
from training import weights

KILLS = int(os.environ.get("TUNESMITH_KILLS", 2))  # times that something is killed
JOBS = int(os.environ.get("TUNESMITH_JOBS", 2))
SEED = int(os.environ.get("TUNESMITH_SEED", time.time()))


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


def test_killed_at_any_moment_nothing_is_lost(server: Server, tiny: Path, tmp_path: Path) -> None:
    want = [result(server, job) for job in submit(server)]  # of a calm one
    logging.getLogger("tests").warning("TUNESMITH_SEED=%s", SEED)  # shown where the test fails
    rng = random.Random(SEED)
    wild = Server(tmp_path / "wild", "--allow-model", f"tiny={tiny}", "--max-jobs", 2)
    jobs, killed = submit(wild), Counter[str]()
    for number in range(KILLS):
        target = ("worker", "both", "server")[number % 3]
        if not killed["worker"]:  # the first one is there to be killed, others may be done
            wild.wait_until(lambda: any(map(worker, jobs)), 120)
        time.sleep(rng.uniform(0.2, 4))
        if target != "server" and (pids := [pid for pid in map(worker, jobs) if pid]):
            kill(rng.choice(pids))
            killed["worker"] += 1
        if target != "worker":
            assert wild.stop(signal.SIGKILL) == -signal.SIGKILL
            wild.start()
            killed["server"] += 1
    assert killed["worker"] >= 1 and killed["server"] == KILLS - (KILLS + 2) // 3, killed
    for job, (bytes_then, metrics_then) in zip(jobs, want, strict=True):
        bytes_now, metrics_now = result(wild, job)
        assert bytes_now == bytes_then and metrics_now == metrics_then
        told = [e["message"] for e in wild.events(job)]
        assert (
            len(told) == len(set(told))
            and told[0].startswith("Created")
            and told[-1].endswith("successfully completed")
        )
    assert wild.stop() == 0


def test_an_end_in_peace_lets_jobs_go_on_where_they_were(tiny: Path, tmp_path: Path) -> None:
    server = Server(tmp_path / "data", "--allow-model", f"tiny={tiny}")
    file = server.upload(chats(100)).json()["id"]
    hyper = {"n_epochs": 20, "batch_size": 1}
    job = server.ask(
        "POST", "/fine_tuning/jobs", {"model": "tiny", "training_file": file, "hyperparameters": hyper}
    ).json()["id"]
    server.wait_until(lambda: any(e["type"] == "metrics" for e in server.events(job)))
    assert server.stop() == 0 and worker(job) is None
    kept = list((server.folder / "jobs" / job / "run" / "checkpoints").glob("checkpoint-step-*"))
    assert kept  # made at its end: the first regular one is after a hundred steps
    server.start()
    assert server.job(job, "running")["status"] == "running"
    log = server.folder / "jobs" / job / "run" / "events.jsonl"
    first = max(int(k.name.rpartition("-")[2]) for k in kept)
    server.wait_until(lambda: f'"step":{first + 1},' in log.read_text().partition('"type":"resumed"')[2])
    server.stop(signal.SIGKILL)


def test_a_server_killed_at_once_knows_its_jobs(tiny: Path, tmp_path: Path) -> None:
    server = Server(tmp_path / "data", "--allow-model", f"tiny={tiny}")
    file = server.upload(chats(12)).json()["id"]
    order = {"model": "tiny", "training_file": file, "hyperparameters": {"n_epochs": 1}}
    jobs = [server.ask("POST", "/fine_tuning/jobs", order).json()["id"]]
    server.job(jobs[0], "running")
    jobs.append(server.ask("POST", "/fine_tuning/jobs", order).json()["id"])  # its files are not yet checked
    server.stop(signal.SIGKILL)
    (server.folder / "files" / "file-nobodys").write_bytes(b"half a request")
    server.start()
    assert [server.job(job)["status"] for job in jobs] == ["succeeded"] * 2
    assert not (server.folder / "files" / "file-nobodys").exists()
    assert server.upload(b"x").status == 200
    server.stop(signal.SIGKILL)
