"""What a job tells becomes the run's own events: each once, in the order in which it was told."""

from __future__ import annotations

from typing import Any

from tunesmith.remote.service import Job, Service
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
        self._best = float("inf")

    def take(self, service: Service, job: Job) -> int:
        """Add what is new of a job's events; how many that were."""
        self._read()
        new: list[dict[str, Any]] = []
        known = 0
        for event in service.events(job.id):
            if event["id"] in self._known:
                known += 1
                if known == ENOUGH:
                    break
                continue
            known = 0
            self._known.add(event["id"])
            new.append(event)
        for event in reversed(new):
            self._add(service, job, event)
        return len(new)

    def _read(self) -> None:
        """Catch up with the log: another process may have followed the job meanwhile."""
        events, self._offset = self._run.events_from(self._offset)
        for event in events:
            if id := event.get("event"):
                self._known.add(id)
            if event["type"] == "eval":
                self._best = min(self._best, event["loss"])

    def _add(self, service: Service, job: Job, event: dict[str, Any]) -> None:
        run, data = self._run, event.get("data") or {}
        about = {"event": event["id"], "time": event.get("created_at") or job.created_at}
        said = service.hidden(str(event.get("message") or ""))
        step = data.get("step")
        if event.get("type") != "metrics" or not isinstance(step, int) or not _number(data.get("train_loss")):
            kind = {"warn": "warning", "error": "warning"}.get(str(event.get("level")), "message")
            run.append(kind, message=said, **about)
            return
        if _number(data.get("full_valid_loss")):  # first: the step, which bears the event's id, ends it
            self.valid(step, data["full_valid_loss"], data.get("full_valid_mean_token_accuracy"), about["time"])
        run.append("step", **measured(job, data), **about)

    def valid(self, step: int, loss: float, accuracy: Any, time: float) -> None:
        """A validation of the whole file."""
        best = loss < self._best
        self._best = min(loss, self._best)
        self._run.append("eval", step=step, loss=loss, accuracy=accuracy, best=best, time=time)

    def failed(self, job: Job, service: Service) -> None:
        """A failed job's last word, once."""
        error, manifest = job.failure(), self._run.manifest()
        code = error.get("code")
        fix = MENDED.get(str(code), "see: tunesmith runs events {run}")
        self._run.append(
            "error",
            message=service.hidden(f"the job failed: {error.get('message') or 'the service does not say why'}")
            + (f" [{code}]" if code else ""),
            where=error.get("param") or job.id,
            fix=fix.format(dataset=manifest["recipe"]["dataset"], run=self._run),
            exit_status=3 if str(code).startswith("invalid") else 1,
        )


def measured(job: Job, data: dict[str, Any]) -> dict[str, Any]:
    """A step's figures under a run's own names. Loss in nats per token; of a batch of the validation file: `valid_loss`."""
    total, epochs = data.get("total_steps"), job.resolved().get("n_epochs")
    found = {
        "step": data["step"],
        "epoch": data["step"] * epochs / total if _number(epochs) and _number(total) and total else None,
        "loss": data["train_loss"],
        "accuracy": data.get("train_mean_token_accuracy"),
        "valid_loss": data.get("valid_loss"),
        "total_steps": total,
    }
    return {name: value for name, value in found.items() if value is not None}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
