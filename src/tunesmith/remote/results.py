"""What a finished job leaves: result files, checkpoints, model_info.json and the model card, all in the run."""

from __future__ import annotations

import base64
import binascii
import csv
import io
import time
from pathlib import Path
from typing import Any

from tunesmith.data.write import write_bytes, write_json
from tunesmith.errors import TunesmithError
from tunesmith.remote.service import Job, Service
from tunesmith.runs import Run


def fetch(run: Run, service: Service, job: Job, files: dict[str, str]) -> None:
    """Fill the run with what a job that succeeded has made. Done again, it does the same again. What cannot be had any more is
    a warning: the model is there all the same."""
    tables = []
    for id in job.result_files:
        path = run / "results" / f"{Path(id).name}.csv"
        path.parent.mkdir(exist_ok=True)
        try:
            if not path.exists():
                service.content(id, path)
                write_bytes(path, plain(path.read_bytes()))
            tables.append(path)
        except TunesmithError as error:
            run.append("warning", message=str(error))
    for table in tables:
        _missing_steps(run, job, table.read_bytes())
    checkpoints: list[dict[str, Any]] = []
    try:
        checkpoints = service.checkpoints(job.id)
    except TunesmithError as error:
        run.append("warning", message=str(error))
    write_json(run / "checkpoints.json", checkpoints)
    info = model_info(run, job, files, checkpoints)
    write_json(run / "model_info.json", info)
    write_bytes(run / "README.md", _card(run, info).encode())
    summary = run.summary()
    run.append(
        "done",
        step=summary["steps"],
        best_step=summary["best_step"] or summary["steps"],
        stopped_early=False,
        seconds=(job.finished_at or job.created_at) - job.created_at,
        model=job.fine_tuned_model,
        tokens=job.trained_tokens,
    )


def plain(data: bytes) -> bytes:
    """A result file's text: services were seen to send it in base64."""
    if not data.startswith(b"step,"):
        try:
            found = base64.b64decode(data, validate=True)
        except binascii.Error:
            return data
        return found if found.startswith(b"step,") else data
    return data


def _missing_steps(run: Run, job: Job, table: bytes) -> None:
    """Steps that the result file has and the events had not: they are lost where a service keeps few of them."""
    known = {event["step"] for event in run.metrics("step")}
    for row in csv.DictReader(io.StringIO(table.decode("utf-8", "replace"))):
        try:
            step, loss = int(row["step"]), float(row["train_loss"])
        except (KeyError, TypeError, ValueError):
            continue
        if step not in known:
            accuracy = {"accuracy": float(row["train_accuracy"])} if _is_number(row.get("train_accuracy")) else {}
            run.append("step", step=step, loss=loss, **accuracy, time=job.finished_at or time.time())


def _is_number(text: str | None) -> bool:
    try:
        return bool(text) and float(str(text)) is not None
    except ValueError:
        return False


def model_info(run: Run, job: Job, files: dict[str, str], checkpoints: list[dict[str, Any]]) -> dict[str, Any]:
    """model_info.json: what is to be known of the model when the service is no longer there to be asked."""
    manifest = run.manifest()
    rows = manifest["plan"]["rows"]
    return {
        "fine_tuned_model": job.fine_tuned_model,
        "base_model": job.model,
        "base_url": manifest["recipe"].get("base_url"),
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "job_id": job.id,
        "training_examples": rows["train"],
        "validation_examples": rows["valid"],
        "test_examples": rows["test"],
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "trained_tokens": job.trained_tokens,
        "billed_tokens_estimated": (manifest["plan"].get("bill") or {}).get("billed_tokens"),
        "hyperparameters": job.resolved(),
        "seed": job.seed,
        "result_files": job.result_files,
        "checkpoints": [c.get("fine_tuned_model_checkpoint") for c in checkpoints],
        "data_hashes": manifest["data_hashes"],
        "files": files,
    }


def _card(run: Run, info: dict[str, Any]) -> str:
    summary, hyper = run.summary(), info["hyperparameters"]
    best = summary["best_valid_loss"]
    loss = "not measured" if best is None else f"{best:.4f} (nats per token, step {summary['best_step']})"
    return f"""# {info["fine_tuned_model"]}

{info["base_model"]}, fine-tuned on {summary["dataset"]} by the service at {info["base_url"]}.

| | |
|---|---|
| job | {info["job_id"]} |
| hyperparameters | {", ".join(f"{k} {v}" for k, v in hyper.items())}, seed {info["seed"]} |
| data | {info["training_examples"]} training rows, {info["validation_examples"]} validation, {info["test_examples"]} test |
| trained tokens | {info["trained_tokens"]} |
| lowest validation loss | {loss} |

```python
from openai import OpenAI

client = OpenAI(base_url="{info["base_url"]}")
client.chat.completions.create(model="{info["fine_tuned_model"]}", messages=[{{"role": "user", "content": "Hello"}}])
```

`tunesmith evaluate` writes the verdict against the base model into `report.html`.
Every setting, and where it came from, is in `run.json`.
"""
