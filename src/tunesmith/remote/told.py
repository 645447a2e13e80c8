"""What a job tells becomes the run's own events: each once, in the order in which it was told."""

from __future__ import annotations

import math
import shlex
import time
from typing import Any

from tunesmith.remote.objects import Job, number
from tunesmith.remote.service import Service
from tunesmith.runs import Run

ENOUGH = 20  # events in a row that are known: what is older is known too
MENDED = {  # code of a failed job: what helps
    "invalid_training_file": "see the findings: tunesmith data check {dataset} --provider openai",
    "invalid_validation_file": "see the findings: tunesmith data check {dataset} --provider openai",
    "invalid_file_format": "see the findings: tunesmith data check {dataset} --provider openai",
    "invalid_n_examples": "add rows",
    "exceeded_quota": "see the account's billing page",
}


class Told:
    """What of a job's words stands in its run's log: the log itself says it, so that nothing is told twice after a crash."""

    def __init__(self, run: Run) -> None:
        self._run, self._offset = run, 0
        self._known: set[str] = set()
        self._valid: dict[int, float] = {}  # loss by step

    def take(self, service: Service, job: Job) -> int:
        """Add what is new of a job's events; how many that were."""
        self._read()
        new: dict[str, dict[str, Any]] = {}
        known = 0
        for event in service.events(job.id):
            if event["id"] in self._known:
                known += 1
                if known == ENOUGH:
                    break
                continue
            known = 0
            new.setdefault(event["id"], event)
        for id, event in reversed(new.items()):
            self._add(service, job, event)
            self._known.add(id)  # not before it is in the log
        return len(new)

    def _read(self) -> None:
        """Catch up with the log: another process may have followed the job meanwhile."""
        events, self._offset = self._run.events_from(self._offset)
        for event in events:
            if id := event.get("event"):
                self._known.add(id)
            if event["type"] == "eval":
                self._valid[event["step"]] = event["loss"]

    def _add(self, service: Service, job: Job, event: dict[str, Any]) -> None:
        run = self._run
        data: dict[str, Any] = event["data"] if isinstance(event.get("data"), dict) else {}
        about = {"event": event["id"], "time": number(event.get("created_at")) or job.created_at or time.time()}
        said = service.hidden(event.get("message") or "")
        found = measured(job, data) if event.get("type") == "metrics" else {}
        if not {"step", "loss"} <= set(found):
            run.append("warning" if event.get("level") in ("warn", "error") else "message", message=said, **about)
            return
        loss = number(data.get("full_valid_loss"))
        if (
            loss is not None and found["step"] not in self._valid
        ):  # first: the step, which bears the event's id, ends it
            best = loss < min(self._valid.values(), default=math.inf)
            accuracy = number(data.get("full_valid_mean_token_accuracy"))
            run.append("eval", step=found["step"], loss=loss, accuracy=accuracy, best=best, time=about["time"])
            self._valid[found["step"]] = loss
        run.append("step", **found, **about)

    def failed(self, job: Job, service: Service) -> None:
        """A failed job's last word."""
        error, manifest = job.failure(), self._run.manifest()
        code = service.hidden(error.get("code", ""))
        fix = MENDED.get(code, "see: tunesmith runs events {run:q}")
        self._run.append(
            "error",
            message=service.hidden(f"the job failed: {error.get('message', 'the service does not say why')}")
            + (f" [{code}]" if code else ""),
            where=service.hidden(error.get("param", job.id)),
            fix=fix.format(dataset=shlex.quote(str(manifest["recipe"]["dataset"])), run=self._run),
            exit_status=3 if code.startswith("invalid") else 1,
        )


def measured(job: Job, data: dict[str, Any]) -> dict[str, Any]:
    """A step's figures under a run's own names. Loss in nats per token; of a batch of the validation file: `valid_loss`."""
    step, total, epochs = (
        number(n) for n in (data.get("step"), data.get("total_steps"), job.resolved().get("n_epochs"))
    )
    found = {
        "step": step if isinstance(step, int) and step > 0 else None,
        "epoch": step * epochs / total if step and epochs and total else None,
        "loss": number(data.get("train_loss")),
        "accuracy": number(data.get("train_mean_token_accuracy")),
        "valid_loss": number(data.get("valid_loss")),
        "total_steps": total if isinstance(total, int) and total > 0 else None,
    }
    return {name: value for name, value in found.items() if value is not None}
