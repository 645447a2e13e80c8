"""What an evaluation says: the structs of `evaluation/result.json`."""

from __future__ import annotations

from typing import Literal

import msgspec

from tunesmith.evaluation.judgement import Judgement
from tunesmith.evaluation.rowreport import RowReport
from tunesmith.evaluation.stats import Comparison

Severity = Literal["error", "warning", "info"]


class Sample(msgspec.Struct, frozen=True):
    """A prompt with the answers of both models, and the reference where there is one. `source`: the row's place."""

    prompt: str
    base: str
    tuned: str
    reference: str = ""
    source: str = ""


class Persona(msgspec.Struct, frozen=True):
    """How many identity probes each model answers with the name, without a system prompt."""

    name: str
    probes: int
    base: int
    tuned: int
    answers: list[Sample]


class Canary(msgspec.Struct, frozen=True):
    """What the models knew before: loss on general text and on the starter's held-out questions, and answers to some of these."""

    metrics: list[Comparison]
    answers: list[Sample]


class Diagnosis(msgspec.Struct, frozen=True):
    """A pitfall by name, what shows it, and the command to try next."""

    name: str
    severity: Severity
    evidence: str
    fix: str


class Evaluation(msgspec.Struct, frozen=True):
    """The outcome. `verdict`: better, worse or cannot tell (the tuned model, against the base), by `rule`: that of the first of
    the metrics. `answered`: rows whose prompts both models answered."""

    verdict: str
    rule: str
    base: str
    tuned: str
    task: str
    dataset: str
    rows: int
    answered: int
    tokens: int
    metrics: list[Comparison]
    about: dict[str, str]  # what each metric is, its range and source
    persona: Persona | None = None
    canary: Canary | None = None
    diagnoses: list[Diagnosis] = []
    training_rows: RowReport | None = None
    judge: Judgement | None = None
    samples: list[Sample] = []
    unavailable: str = ""  # what cannot be had of these models, and why
    options: dict[str, str | int] = {}  # as they were given, where they are not the defaults
    report: str | None = None
    better: dict[str, Literal["lower", "higher"]] = {}  # which way each metric is better

    def metric(self, name: str) -> Comparison | None:
        """The comparison of that name, where it was made."""
        return next((m for m in self.metrics if m.metric == name), None)
