"""What an evaluation says: the structs of `evaluation/result.json`."""

from __future__ import annotations

from typing import Literal

import msgspec

from tunesmith.evaluation.judgement import Judgement
from tunesmith.evaluation.rowreport import RowReport
from tunesmith.evaluation.stats import Comparison

Severity = Literal["error", "warning", "info"]


class Sample(msgspec.Struct, frozen=True):
    """A prompt with the answers of both models."""

    prompt: str  # its last message
    base: str  # the base's answer
    tuned: str  # the tuned model's
    reference: str = ""  # the row's own answer, "" where it has none
    source: str = ""  # the row's place, "file:line"


class Persona(msgspec.Struct, frozen=True):
    """How many identity probes each model answers with the name, without a system prompt."""

    name: str  # who it is trained to be
    probes: int  # questions that were asked, without a system prompt
    base: int  # of them answered with the name by the base
    tuned: int  # by the tuned model
    answers: list[Sample]  # both models' answers to each


class Canary(msgspec.Struct, frozen=True):
    """What the models knew before: loss on general text and on the starter's held-out questions, and answers to some of these."""

    metrics: list[Comparison]  # loss on general text and on the starter's held-out questions
    answers: list[Sample]  # both models' answers to some of these


class Diagnosis(msgspec.Struct, frozen=True):
    """A pitfall by name, what shows it, and the command to try next."""

    name: str  # of metrics.md, Diagnoses
    severity: Severity  # info: worth knowing, no fault
    evidence: str  # the figures that show it
    fix: str  # the command to try next


class Evaluation(msgspec.Struct, frozen=True):
    """The outcome of an evaluation."""

    verdict: str  # "better", "worse" or "cannot tell": the tuned model, against the base
    rule: str  # why it says so, in a sentence
    base: str  # name of the model compared with
    tuned: str  # name of the model that is judged
    task: str  # whose metrics these are
    dataset: str  # where the rows come from
    rows: int  # held-out rows
    answered: int  # of them, those whose prompts both models answered
    tokens: int  # answer tokens over which the loss is a mean
    metrics: list[Comparison]  # the first decides the verdict
    about: dict[str, str]  # what each metric is, its range and source
    persona: Persona | None = None  # None where there is no persona
    canary: Canary | None = None  # what was forgotten; None where it cannot be had
    diagnoses: list[Diagnosis] = []  # pitfalls that were found
    training_rows: RowReport | None = None  # rows that deserve a second look; None without a run
    judge: Judgement | None = None  # None without --judge
    samples: list[Sample] = []  # answers side by side
    unavailable: str = ""  # what cannot be had of these models, and why
    options: dict[str, str | int] = {}  # as they were given, where they are not the defaults
    report: str | None = None  # path of the page, None where none was written
    better: dict[str, Literal["lower", "higher"]] = {}  # which way each metric is better

    def metric(self, name: str) -> Comparison | None:
        """The comparison of that name, where it was made."""
        return next((m for m in self.metrics if m.metric == name), None)
