"""What a run's event log says, in the protocol's words: job events, checkpoints, and the result file."""

from __future__ import annotations

import csv
import io
from typing import Any

import msgspec

from tunesmith.runs import Event, Run

CHECKPOINTS = 3  # the newest, which stay


class Told(msgspec.Struct, frozen=True):
    """An event of a job. `name`: what it is about, so that none is told twice. `checkpoint`: step and metrics of the one that
    it announces."""

    name: str
    message: str
    type: str = "message"
    level: str = "info"
    data: dict[str, Any] = {}
    time: int = 0
    checkpoint: tuple[int, dict[str, float]] | None = None
    left: float | None = None  # seconds until the last step, at the pace so far


def translate(run: Run, job: dict[str, Any], offset: int, over: bool = False) -> tuple[list[Told], int]:
    """Events of a run from a byte of its log on, and the byte to go on from.

    A step is told together with the validation and the checkpoint that follow it; until another step comes, or the end, it
    waits. Where the worker was lost in between, the step is done again after a resume, and told then. `over`: nothing comes.
    """
    told: list[Told] = []
    steps = run.manifest()["plan"]["steps"]
    found: list[Event] = []
    waiting = offset
    for event, upto in run.events_with_offsets(offset):
        if event["type"] == "resumed":  # what was half told is done again
            found = [e for e in found if e.get("step", 0) <= event["step"]]
        if event["type"] == "step" or event["type"] == "done":
            told += _step(found, steps, job["model"])
            found, waiting = [], offset
        found.append(event)
        offset = upto
    if over or not any(event["type"] == "step" for event in found):
        return told + _step(found, steps, job["model"]), offset
    return told, waiting


def _step(events: list[Event], steps: int, model: str) -> list[Told]:
    """The words for one step and what belongs to it."""
    told: list[Told] = []
    step = next((e for e in events if e["type"] == "step"), None)
    valid = next((e for e in events if e["type"] == "eval"), None)
    metrics: dict[str, Any] = {}
    if step:
        metrics = measured(step, valid)
        words = f"Step {step['step']}/{steps}: training loss={step['loss']:.2f}"
        if valid:
            words += f", full validation loss={valid['loss']:.2f}"
        data = {**metrics, "total_steps": steps}
        left = step.get("seconds", 0.0) / step["step"] * (steps - step["step"])
        told.append(Told(f"step-{step['step']}", words, "metrics", data=data, time=int(step["time"]), left=left))
    for event in events:
        when = int(event["time"])
        if event["type"] == "state" and event["state"] == "running":
            told.append(Told("started", "Fine-tuning job started", time=when))
        elif event["type"] == "eval" and event["step"] == 0:
            told.append(Told("base", f"Validation loss of the base model: {event['loss']:.2f}", time=when))
        elif event["type"] in ("warning", "overfitting"):
            told.append(Told(f"{event['type']} {event['message']}", event["message"], level="warn", time=when))
        elif event["type"] == "checkpoint" and event.get("regular"):
            last = event["step"] == steps
            name = f"{model}:ckpt-step-{event['step']}"
            words = f"Checkpoint created at step {event['step']} with Snapshot ID: {model if last else name}"
            told.append(Told(f"checkpoint-{event['step']}", words, time=when, checkpoint=(event["step"], metrics)))
    return told


def measured(step: Event, valid: Event | None) -> dict[str, Any]:
    """A step's figures under the protocol's names."""
    found = {"step": step["step"], "train_loss": step["loss"], "train_mean_token_accuracy": step.get("accuracy")}
    if valid:
        found |= {"full_valid_loss": valid["loss"], "full_valid_mean_token_accuracy": valid.get("accuracy")}
    return {name: value for name, value in found.items() if value is not None}


def results(run: Run) -> bytes:
    """The result file: a line for each step; the cells of validation are empty where there was none."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"])
    valid = {event["step"]: event for event in run.metrics("eval")}
    for step in run.metrics("step"):
        seen = valid.get(step["step"], {})
        cells = (step["loss"], step.get("accuracy"), seen.get("loss"), seen.get("accuracy"))
        table.writerow([step["step"], *("" if cell is None else round(cell, 5) for cell in cells)])
    return out.getvalue().encode()
