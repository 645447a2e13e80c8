"""kill -9 at any moment, then --resume: the final weights are those of an uninterrupted run, byte for byte."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Result, rows, write
from training import weights

KILLS = int(os.environ.get("TUNESMITH_KILLS", 2))  # times that one run is killed


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tunesmith", *map(str, arguments)]


def settings(tiny: Path, data: Path, method: str) -> list[object]:
    extra = {
        "full": [],
        "lora": ["--lora", "--lora-rank", 4, "--lora-dropout", 0.1],
        "qlora": ["--method", "qlora", "--lora-rank", 4, "--optimizer", "adamw_8bit"],
        "accumulate": ["--gradient-accumulation-steps", 2, "--freeze-ratio", 0.5],
    }
    return [
        "train",
        "--dataset",
        data,
        "--model",
        tiny,
        "--epochs",
        5,
        "--batch-size",
        2,
        "--save-steps",
        7,
        "--patience",
        3,
        "--learning-rate",
        "1e-3",
        *extra[method],
    ]


def start(arguments: list[object], cwd: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(*arguments), cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def steps(run: Path) -> int:
    """Steps in the log so far."""
    log = run / "events.jsonl"
    return log.read_bytes().count(b'"type":"step"') if log.exists() else 0


def wait_for(done: Callable[[], bool], process: subprocess.Popen[bytes], limit: float = 120) -> None:
    deadline = time.monotonic() + limit
    while not done() and process.poll() is None:
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.005)


def worker_of(run: Path) -> int | None:
    """Pid of the process that holds the run's lock."""
    found = subprocess.run(["pgrep", "-f", f"local.worker {run}"], capture_output=True, text=True).stdout.split()
    return int(found[0]) if found else None


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "accumulate"])
def test_killed_and_resumed_equals_uninterrupted(
    method: str, tiny: Path, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    data = write(tmp_path / "data.jsonl", rows(60))
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert cli(*settings(tiny, data, method), "--output-dir", whole).code == 0
    planned = json.loads((whole / "run.json").read_text())["plan"]["steps"]
    rng, killed = random.Random(method), 0
    process = start([*settings(tiny, data, method), "--output-dir", run], tmp_path)
    for _ in range(KILLS):
        target = steps(run) + rng.randint(1, max(2, planned // KILLS - 2))
        wait_for(lambda target=target: steps(run) >= target, process)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.1))  # also in the middle of a step or of a save, which takes some 50 ms
        if process.poll() is not None:
            break
        victim = rng.choice([process.pid, worker_of(run) or process.pid])
        os.kill(victim, signal.SIGKILL)
        process.wait()
        killed += 1
        process = start(["train", "--resume", run], tmp_path)
    process.wait(120)
    assert killed >= KILLS - 1
    final = cli("train", "--resume", run)  # of a finished run: says so and does nothing
    assert final.code == 0, final.err
    for name in ("final_model", "best_model"):
        assert weights(run / name) == weights(whole / name)
    log = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert any(e["type"] == "resumed" for e in log)
    assert sorted({e["step"] for e in log if e["type"] == "step"}) == list(
        range(1, max(e["step"] for e in log if e["type"] == "step") + 1)
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_checkpoints_and_says_how_to_go_on(number: int, tiny: Path, tmp_path: Path) -> None:
    data, run = write(tmp_path / "data.jsonl", rows(60)), tmp_path / "run"
    process = subprocess.Popen(
        command(*settings(tiny, data, "full"), "--epochs", 50, "--patience", 0, "--output-dir", run),
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # who runs us may have it ignored
    )
    wait_for(lambda: steps(run) >= 5, process)  # type: ignore[arg-type]
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err and f"tunesmith train --resume {run}" in err and "its checkpoints are kept" in err
    last = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert last[-1]["state"] == "paused" and last[-2]["type"] == "checkpoint" and last[-3]["step"] == last[-2]["step"]


@pytest.mark.parametrize("after", [0.0, 0.1, 0.4, 0.8])
def test_a_worker_that_does_not_listen_yet_is_ended(after: float, tiny: Path, tmp_path: Path) -> None:
    """It takes seconds to load its libraries: a Ctrl-C then is an end like any other."""
    data, run = write(tmp_path / "data.jsonl", rows(60)), tmp_path / "run"
    process = subprocess.Popen(
        command(*settings(tiny, data, "full"), "--output-dir", run),
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = run / "events.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count('"queued"') > 1, process)  # type: ignore[arg-type]
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped before its first step -- go on with: " in err, err
    assert json.loads(log.read_text().splitlines()[-1])["state"] == "cancelled"


def test_a_run_that_is_being_trained_is_left_alone(tiny: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    data, run = write(tmp_path / "data.jsonl", rows(60)), tmp_path / "run"
    process = start([*settings(tiny, data, "full"), "--epochs", 300, "--patience", 0, "--output-dir", run], tmp_path)
    try:
        wait_for(lambda: steps(run) >= 1, process)
        second = cli("train", "--resume", run)
        assert second.code == 2 and "another process is training this run" in second.err
        listed = cli("runs", "show", run, "--json").json()
        assert listed["status"] == "running"
        watcher = subprocess.Popen(
            command("runs", "watch", run), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        time.sleep(3)
        assert watcher.poll() is None  # follows for as long as the run goes on
    finally:
        process.kill()
        process.wait()
    out, err = watcher.communicate(timeout=60)
    assert watcher.returncode == 1 and out == f"{run}  interrupted\n" and "base model: validation loss" in err


def test_a_half_written_log_line_is_mended(tiny: Path, tmp_path: Path, cli: Callable[..., Result]) -> None:
    data, run = write(tmp_path / "data.jsonl", rows(40)), tmp_path / "run"
    process = start([*settings(tiny, data, "full"), "--output-dir", run], tmp_path)
    wait_for(lambda: steps(run) >= 8, process)
    process.kill()
    process.wait()
    time.sleep(0.5)
    with (run / "events.jsonl").open("ab") as log:
        log.write(b'{"type":"step","st')
    assert cli("runs", "show", run).code == 0
    assert cli("train", "--resume", run).code == 0
    assert all(json.loads(line) for line in (run / "events.jsonl").read_text().splitlines())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_stops_cleanly_and_the_run_goes_on_later(
    tiny: Path, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    disk, data = tmp_path / "disk", write(tmp_path / "data.jsonl", rows(60))
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        run = disk / "run"
        full = cli(*settings(tiny, data, "full"), "--output-dir", run, "--save-total-limit", 50)
        assert full.code == 1 and "No space left" in full.err, full.err
        assert list((run / "checkpoints").glob("checkpoint-step-*"))
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        assert cli("train", "--resume", run).code == 0
        whole = tmp_path / "whole"
        assert cli(*settings(tiny, data, "full"), "--output-dir", whole, "--save-total-limit", 50).code == 0
        assert weights(run / "final_model") == weights(whole / "final_model")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
