"""What a finished job leaves: result files, checkpoints, model_info.json and the model card, all in the run."""

from __future__ import annotations

import base64
import binascii
import csv
import io
import math
import time
from typing import Any

from tunesmith.data.write import safe_name, write_bytes, write_json
from tunesmith.errors import ServiceError
from tunesmith.remote.objects import Job
from tunesmith.remote.service import Service
from tunesmith.runs import Run


def fetch(run: Run, service: Service, job: Job, files: dict[str, str]) -> None:
    """Fill the run with what a job that succeeded has made. Done again, it does the same again. What the service has no longer
    is a warning: the model is there all the same. Raises ServiceError where it does not answer."""
    for id in job.result_files:
        path = run / "results" / f"{safe_name(id)}.csv"
        path.parent.mkdir(exist_ok=True)
        try:
            if not path.exists():
                service.content(id, path)
        except ServiceError as error:
            if not error.refusal():
                raise
            run.append("warning", message=str(error))
            continue
        table = path.read_bytes()
        if (found := plain_table(table)) != table:
            write_bytes(path, found)
        _missing_steps(run, job, found)
    checkpoints: list[dict[str, Any]] = []
    try:
        checkpoints = service.checkpoints(job.id)
    except ServiceError as error:
        if not error.refusal():
            raise
        run.append("warning", message=str(error))
    write_json(run / "checkpoints.json", service.clean(checkpoints))
    info = service.clean(model_info(run, job, files, checkpoints))
    write_json(run / "model_info.json", info)
    write_bytes(run / "README.md", _card(run, info).encode())
    if not run.last("done"):
        summary = run.summary()
        run.append(
            "done",
            step=summary["steps"],
            best_step=summary["best_step"],
            stopped_early=False,
            seconds=(job.finished_at or job.created_at) - job.created_at,
            model=service.hidden(job.fine_tuned_model or ""),
            tokens=job.trained_tokens,
        )


def plain_table(data: bytes) -> bytes:
    """A result file's text: services were seen to send it in base64."""
    if not data.startswith(b"step,"):
        try:
            found = base64.b64decode(b"".join(data.split()), validate=True)
        except binascii.Error:
            return data
        return found if found.startswith(b"step,") else data
    return data


def _missing_steps(run: Run, job: Job, table: bytes) -> None:
    """Steps that the result file has and the events had not: they are lost where a service keeps few of them."""
    known = {event["step"] for event in run.metrics("step")}
    for row in csv.DictReader(io.StringIO(table.decode("utf-8", "replace"))):
        step, loss, accuracy = (_read(row.get(name)) for name in ("step", "train_loss", "train_accuracy"))
        if step and loss is not None and int(step) not in known:
            more = {} if accuracy is None else {"accuracy": accuracy}
            run.append("step", step=int(step), loss=loss, **more, time=job.finished_at or time.time())


def _read(cell: Any) -> float | None:
    try:
        found = float(cell)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


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
        "validation_examples": rows["valid"] if job.validation_file else 0,
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
