"""Curves for W&B and MLflow: what arrives there is what stands in the run's log, also after a resume."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import rows, write
from training import fit
from tunesmith.errors import UsageError
from tunesmith.local import checkpoint
from tunesmith.local.loop import train
from tunesmith.runs import Run

SETTINGS: dict[str, Any] = {"epochs": 2, "save_steps": 6, "save_total_limit": 9, "patience": 0}


def resumed(run: Run, steps: int) -> Run:
    """The same run again from its checkpoint of a step."""
    run.append("state", state="paused")
    train(run, lambda: False, steps)
    return run


def wandb_records(data: bytes) -> Iterator[bytes]:
    """The records of W&B's file: a header of 7 bytes, then LevelDB's log format (blocks of 32 KB; a record's header is
    checksum, length and whether it is whole, a beginning, a middle or an end)."""
    at, held = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        held += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield held
            held = b""


def wandb_history(folder: Path) -> list[dict[str, str]]:
    """What was logged, step by step."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for data in wandb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                found.append({item.key or ".".join(item.nested_key): item.value_json for item in record.history.item})
    return found


def test_wandb_offline(tiny: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    run = fit(tmp_path / "run", data, tiny, track="wandb", **SETTINGS)
    history = wandb_history(run / "logs")
    losses = [float(item["train/loss"]) for item in history if "train/loss" in item]
    assert losses == pytest.approx([e["loss"] for e in run.metrics("step")]) and len(losses) == 24
    assert len([item for item in history if "valid/loss" in item]) == len(run.metrics("eval")) == 3
    first = (run / "logs" / "wandb.id").read_text()
    resumed(run, 18)
    assert (run / "logs" / "wandb.id").read_text() == first  # one run there too
    assert not [e for e in run.events() if e["type"] == "warning" and "no more curves" in e["message"]]


@pytest.mark.parametrize("place", ["mlruns", None])
def test_mlflow(place: str | None, tiny: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that is named, or in the run's own."""
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if place:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / place}")
    run = fit(tmp_path / "run", data, tiny, track="mlflow", **SETTINGS)
    assert not [e for e in run.events() if e["type"] == "warning" and "curves" in e["message"]]
    client = MlflowClient((tmp_path / place if place else run / "logs" / "mlruns").as_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name == "tunesmith"]
    (found,) = client.search_runs([experiment.experiment_id])
    metrics = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in metrics] == [(e["step"], pytest.approx(e["loss"])) for e in run.metrics("step")]
    assert found.info.status == "FINISHED" and found.data.params["learning_rate"] == "0.001"
    resumed(run, 18)
    assert len(client.search_runs([experiment.experiment_id])) == 1


def test_a_service_that_fails_stops_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens at that address: said once, and the run goes on."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    run = fit(tmp_path / "run", write(tmp_path / "d.jsonl", rows(20)), tiny, track="mlflow", max_steps=2)
    said = [e["message"] for e in run.events() if e["type"] == "warning"]
    assert len(said) == 1 and said[0].startswith("mlflow takes no more curves")
    assert run.state() == "succeeded" and checkpoint.existing(run)


def test_what_is_not_installed(tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith import api, preflight

    monkeypatch.setattr(preflight, "find_spec", lambda name: None if name == "wandb" else object())
    with pytest.raises(UsageError, match="track wandb needs wandb"):
        api.plan(str(data), model=str(tiny), track="wandb")
