"""Several processes that train one run: the same result as one, also when they are killed or their number changes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import Result
from training import fit, losses, weights
from tunesmith import api
from tunesmith.errors import TunesmithError
from tunesmith.runs import Run

METHODS: dict[str, dict[str, Any]] = {
    "full": {"gradient_accumulation_steps": 3},
    "lora": {"method": "lora", "lora_rank": 4},
    "freeze": {"freeze_ratio": 0.5},
    "full, spread": {"sharding": "fsdp2", "gradient_accumulation_steps": 3},
    "lora, spread": {"sharding": "fsdp2", "method": "lora", "lora_rank": 4},
}


def train(path: Path, data: Path, tiny: Path, **settings: Any) -> Run:
    """By way of a worker of its own, as a user does."""
    common: dict[str, Any] = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "threads": 1}
    return api.train(str(data), model=str(tiny), output_dir=str(path), **{**common, **settings})


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_learn_what_one_does(method: str, tiny: Path, tmp_path: Path, data: Path) -> None:
    """The last step of an epoch has fewer rows than there are processes: one takes part with nothing."""
    settings = {**METHODS[method], "batch_size": 3, "patience": 0}
    one = fit(tmp_path / "one", data, tiny, epochs=2, **{"threads": 1, **settings})
    two = train(tmp_path / "two", data, tiny, nproc=2, **settings)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5) and len(losses(one)) >= 12
    for kind, fields in (("step", ("tokens", "total_supervised_tokens", "lr")), ("eval", ("step", "best"))):
        for name in fields:
            assert [e[name] for e in two.metrics(kind)] == [e[name] for e in one.metrics(kind)]
    norms = [[e["grad_norm"] for e in run.metrics("step")] for run in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert [e["loss"] for e in two.metrics("eval")] == pytest.approx([e["loss"] for e in one.metrics("eval")], rel=1e-5)
    assert next(e for e in two.events() if e.get("state") == "running")["processes"] == 2
    saved = [
        {k: v for f in sorted((run / "best_model").glob("*.safetensors")) for k, v in load_file(f).items()}
        for run in (one, two)
    ]
    assert saved[0].keys() == saved[1].keys()
    for name, weight in saved[0].items():
        torch.testing.assert_close(saved[1][name], weight, rtol=1e-3, atol=1e-5)


def test_killed_and_resumed(tiny: Path, tmp_path: Path, data: Path) -> None:
    """The second of two processes is killed: the run ends at once, says so, and goes on to the same bytes."""
    settings = {"nproc": 2, "sharding": "fsdp2", "method": "lora", "lora_dropout": 0.2, "epochs": 2, "save_steps": 5}
    whole = train(tmp_path / "whole", data, tiny, **settings)

    def kill(run: Run, event: dict[str, Any]) -> None:
        if event["type"] == "step" and event["step"] == 13:
            found = subprocess.run(["pgrep", "-f", f"local.worker {run}"], capture_output=True, text=True).stdout
            os.kill(max(map(int, found.split())), signal.SIGKILL)

    with pytest.raises(TunesmithError, match="process 1 of 2 ended with signal 9"):
        train(tmp_path / "run", data, tiny, on_event=kill, **settings)
    run = api.resume(tmp_path / "run")
    assert any(e["type"] == "resumed" for e in run.events())
    assert weights(run / "final_model") == weights(whole / "final_model")


def test_the_number_of_processes_may_change(tiny: Path, tmp_path: Path, data: Path) -> None:
    """A checkpoint of one process is gone on with by two, started by a launcher: the losses are the same."""
    one = fit(tmp_path / "one", data, tiny, epochs=4, threads=1, patience=0)
    half = fit(tmp_path / "half", data, tiny, epochs=4, threads=1, patience=0, save_steps=6, save_total_limit=9)
    (half / "checkpoints" / "checkpoint-step-12").rename(tmp_path / "kept")
    for later in (half / "checkpoints").iterdir():
        subprocess.run(["rm", "-r", str(later)], check=True)
    (tmp_path / "kept").rename(half / "checkpoints" / "checkpoint-step-12")
    half.append("state", state="paused")
    done = torchrun("train", "--resume", half, "--json")
    assert done.returncode == 0, done.stderr
    assert [e["step"] for e in half.events() if e["type"] == "resumed"] == [12]
    assert losses(half) == pytest.approx(losses(one), rel=1e-5)


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "tunesmith"]
        + [str(a) for a in arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
    )


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers(launcher: str, tiny: Path, tmp_path: Path, data: Path) -> None:
    """One run, one summary on stdout, one line of progress, whoever starts the processes; mistakes are said once."""
    settings = ["--model", tiny, "--epochs", 1, "--batch-size", 4, "--learning-rate", "1e-3", "--threads", 1]
    arguments = ["train", "--dataset", data, *settings, "--output-dir", tmp_path / "run", "--json"]
    if launcher == "torchrun":
        done = torchrun(*arguments)
    else:
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",  # with --cpu it starts one, whatever the number; the backend without a GPU is gloo all the same
            "--num_processes",
            "2",
            "-m",
            "tunesmith",
        ]
        done = subprocess.run(
            [*command, *map(str, arguments)], capture_output=True, text=True, timeout=300, env={**os.environ}
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "succeeded" and done.stderr.count("rows, ") == 1
    run = Run(tmp_path / "run")
    assert [event["processes"] for event in run.events() if "processes" in event] == [2]
    one = fit(tmp_path / "one", data, tiny, threads=1)
    assert losses(run) == pytest.approx(losses(one), rel=1e-5)


def test_a_mistake_is_said_once(tmp_path: Path, tiny: Path) -> None:
    done = torchrun("train", "--dataset", tmp_path / "no.jsonl", "--model", tiny)
    assert done.returncode != 0 and done.stderr.count("error: ") == 1 and "no such file" in done.stderr


def test_plan_shares_the_cores(
    tiny: Path, data: Path, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        cli("plan", "--dataset", data, "--model", tiny, "--no-probe", "--json").json()["origin"]["threads"]
        == "auto: OMP_NUM_THREADS"
    )
    monkeypatch.delenv("OMP_NUM_THREADS")
    plan = cli("plan", "--dataset", data, "--model", tiny, "--nproc", 2, "--no-probe", "--json").json()
    assert plan["recipe"]["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)
    assert plan["origin"]["threads"].startswith("auto: every core")
