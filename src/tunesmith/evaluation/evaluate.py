"""Base against tuned on rows that neither was trained on: paired, with intervals, in one of three words.

The verdict is that of the loss (nats per token of the reference answers): *better* or *worse* when the
95 % interval of the difference excludes zero, else *cannot tell*. Everything shown can be recomputed from
`evaluation/rows.jsonl` and `evaluation/result.json` in the run.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tunesmith import backends
from tunesmith.conversation import Conversation, Message
from tunesmith.data.check import load
from tunesmith.data.scan import conversations
from tunesmith.data.split import prompt_key
from tunesmith.data.write import write_json, write_jsonl
from tunesmith.errors import DataError, UsageError
from tunesmith.evaluation.stats import Comparison, compare
from tunesmith.hosted import effective
from tunesmith.models import find
from tunesmith.recipe import FACTS
from tunesmith.render import own_template
from tunesmith.runs import Run

SAMPLE_TOKENS = 120


class Sample(msgspec.Struct, frozen=True):
    """A prompt with the answers of both models, and the reference where there is one."""

    prompt: str
    base: str
    tuned: str
    reference: str = ""


class Persona(msgspec.Struct, frozen=True):
    """How many identity probes each model answers with the name, without a system prompt."""

    name: str
    probes: int
    base: int
    tuned: int
    answers: list[Sample]


class Evaluation(msgspec.Struct, frozen=True):
    """The outcome. `verdict`: better, worse or cannot tell (the tuned model, against the base)."""

    verdict: str
    base: str
    tuned: str
    dataset: str
    rows: int
    tokens: int
    metrics: list[Comparison]
    persona: Persona | None
    samples: list[Sample]
    report: str | None = None
    unavailable: str = ""  # metrics that cannot be had of these models, and why


def evaluate(
    run: Run | None = None,
    *,
    model: str | None = None,
    against: str | None = None,
    dataset: str | None = None,
    columns: dict[str, str] | None = None,
    samples: int = 6,
    persona: str | None = None,
    seed: int = 0,
    base_url: str | None = None,
    api_key_file: str | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Compare a run's best model with its base, or `model` with `against`, on held-out rows.

    Without `dataset` the run's own test split is used. Rows that one of the two is known to be trained on, or that ask
    the same, are refused (DataError). What is kept: the run's own evaluation in evaluation/ and report.html, any other
    (another model, base or data set) in a folder of its own beside it.

    A model that a service keeps (of a run at a service, or named "ft:…") is judged by its answers: see
    `tunesmith.evaluation.answers`. `base_url` and `api_key_file`: of the service, where the run is not one of it.
    """
    say = on_progress or (lambda _: None)
    tuned, base, rows, name = _sides(run, model, against, dataset, columns)
    sides = Models(run, base_url, api_key_file)
    base_scores: Any
    tuned_scores: Any
    by_answers = sides.hosted(base) or sides.hosted(tuned)
    if by_answers:
        from tunesmith.evaluation import answers

        rows = answers.asked(rows, seed)
        say(f"asking {base} {len(rows)} held-out prompts")
        base_scores = answers.answered(rows, sides.completer(base), seed)
        say(f"asking {tuned} {len(rows)} held-out prompts")
        tuned_scores = answers.answered(rows, sides.completer(tuned), seed)
        metrics = answers.metrics(base_scores, tuned_scores, seed)
    else:
        say(f"scoring {len(rows)} held-out rows with {base}")
        base_scores = _score(base, rows, run)
        say(f"scoring {len(rows)} held-out rows with {tuned}")
        tuned_scores = _score(tuned, rows, run)
        metrics = _metrics(rows, base_scores, tuned_scores, seed)
    who = persona or (str(run.recipe().persona) if run else "none")
    probes = _probes(run) if who not in ("none", "auto") else []
    chosen = list({prompt_key(r): r for r in rows if r.prompt()}.values())[:samples]
    questions = probes + [Conversation(r.prompt(), tools=r.tools) for r in chosen]
    say(f"answering {len(questions)} prompts with {base}")
    base_answers = _answers(base, questions, seed, sides)
    say(f"answering {len(questions)} prompts with {tuned}")
    tuned_answers = _answers(tuned, questions, seed, sides)
    asked = [q.messages[-1].content for q in questions]
    n = len(probes)
    shown = [
        Sample(*s, reference=r.answer())
        for s, r in zip(zip(asked[n:], base_answers[n:], tuned_answers[n:], strict=True), chosen, strict=True)
    ]
    identity = None
    if probes:
        heard = [Sample(*s) for s in zip(asked[:n], base_answers[:n], tuned_answers[:n], strict=True)]
        base_named, tuned_named = (sum(_names(who, getattr(s, side)) for s in heard) for side in ("base", "tuned"))
        identity = Persona(who, n, base_named, tuned_named, heard)
    tokens = 0 if by_answers else sum(int(s.tokens) for s in tuned_scores)
    result = Evaluation(metrics[0].verdict, base, tuned, name, len(rows), tokens, metrics, identity, shown)
    if by_answers:
        result = msgspec.structs.replace(result, unavailable=answers.UNAVAILABLE)
    named = (("model", model), ("against", against), ("on", dataset))
    other = [f"{k}-" + re.sub(r"[^\w.-]+", "-", Path(v).name) for k, v in named if v]
    return _keep(run, "-".join(other), result, rows, base_scores, tuned_scores) if run else result


def _names(who: str, answer: str) -> bool:
    return who.casefold() in answer.casefold()


def _sides(
    run: Run | None, model: str | None, against: str | None, dataset: str | None, columns: dict[str, str] | None
) -> tuple[str, str, list[Conversation], str]:
    """(tuned, base, held-out rows, their name)."""
    if run is None:
        if not (model and against and dataset):
            raise UsageError(
                "needs a run, or two models and a data set",
                fix="tunesmith evaluate RUN, or --model A --against B --dataset D",
            )
        rows = load(dataset, columns).require().conversations
        for name in (model, against):
            _refuse_seen(rows, name)
        return model, against, rows, dataset
    manifest = run.manifest()
    there = run.last("done").get("model") if manifest["provider"] == "openai" else str(run / "best_model")
    if not there or manifest["provider"] != "openai" and not Path(there).is_dir():
        raise UsageError(
            f"this run has no model yet (it is {run.state()})",
            where=str(run),
            fix=f"see: tunesmith runs events {run:q}; go on with: tunesmith train --resume {run:q}",
        )
    tuned, base = model or there, against or manifest["recipe"]["model"]
    own = run / "data" / "test.jsonl"
    if dataset is None and not own.exists():
        raise UsageError(
            "this run kept no test rows", where=str(run), fix="give rows it was not trained on: --dataset FILE"
        )
    rows = load(dataset or str(own), columns).require().conversations
    for name in (tuned, base, str(run)):
        _refuse_seen(rows, name)
    return tuned, base, rows, dataset or str(own)


def _refuse_seen(rows: list[Conversation], model: str) -> None:
    """DataError where rows ask what the run that made `model` was trained or chosen on (its train and valid rows)."""
    path = Path(model)
    folder = next((f for f in (path, *list(path.parents)[:2]) if (f / "run.json").exists()), None)
    if folder is None:
        return
    asked = _asked(folder, ("train", "valid"), set(map(prompt_key, rows)))
    seen = [row for row in rows if prompt_key(row) in asked]
    if seen:
        raise DataError(
            f"{len(seen)} of {len(rows)} rows ask what {folder} was trained on",
            where=seen[0].source,
            fix="evaluate on rows that it has not seen, such as its own data/test.jsonl",
        )


def _asked(run: Path, sides: tuple[str, ...], keys: set[str]) -> set[str]:
    """Those of some prompts' keys that rows of a run ask. The rows are gone through: there may be more than memory holds."""
    files = [run / "data" / f"{side}.jsonl" for side in sides]
    read = (prompt_key(row) for file in files if file.exists() for row in conversations(str(file)))
    return {key for key in read if key in keys}


def _template(name: str, run: Run | None) -> str | None:
    """The run's chat template for a model that has none: a base is judged on the form in which it was tuned."""
    return run.template() if run and own_template(find(name)) is None else None


def _score(name: str, rows: list[Conversation], run: Run | None) -> Any:
    from tunesmith.local.score import score

    return score(name, rows, _template(name, run))


class Models:
    """Where the models of an evaluation are to be asked: here, or at a service."""

    def __init__(self, run: Run | None, base_url: str | None, api_key_file: str | None) -> None:
        self._run, self._base_url, self._key_file = run, base_url, api_key_file
        self._remote = run is not None and run.manifest()["provider"] == "openai"

    def hosted(self, name: str) -> bool:
        """Whether a service has the model: what is no folder here, for a run at a service; for others "ft:…"."""
        return not Path(name).is_dir() and (self._remote or name.startswith("ft:"))

    def completer(self, name: str) -> backends.Completer:
        if not self.hosted(name):
            return backends.get("huggingface").completer(name, _template(name, None if self._remote else self._run))
        from tunesmith.remote.answers import Answers
        from tunesmith.remote.backend import connect
        from tunesmith.remote.service import Service

        if self._remote and self._run and not self._base_url:
            return Answers(connect(self._run, self._key_file), name)
        return Answers(Service(effective(self._base_url)[0], self._key_file), name)


def _answers(name: str, questions: list[Conversation], seed: int, sides: Models) -> list[str]:
    if not questions:
        return []
    return sides.completer(name)(questions, max_tokens=SAMPLE_TOKENS, temperature=0.0, seed=seed)


def _probes(run: Run | None) -> list[Conversation]:
    """The identity probes that no training row asks word for word."""
    with (FACTS / "probes.toml").open("rb") as stream:
        texts = tomllib.load(stream)["identity"]
    probes = {
        prompt_key(Conversation((Message("user", text), Message("assistant", "-")))): Conversation(
            (Message("user", text),)
        )
        for text in texts
    }
    trained = _asked(run.path, ("train",), set(probes)) if run else set()
    return [probe for key, probe in probes.items() if key not in trained]


def _metrics(rows: list[Conversation], base: Any, tuned: Any, seed: int) -> list[Comparison]:
    """Loss first (the verdict is its), then perplexity and token accuracy. Two tokenizers are compared per byte of answer."""

    def column(scores: Any, field: str) -> Any:
        return np.array([getattr(s, field) for s in scores], np.float64)

    same = [s.tokens for s in base] == [s.tokens for s in tuned]
    weight = column(base, "tokens") if same else np.array([_learnt_bytes(r) for r in rows], np.float64)
    if not weight.sum():
        raise DataError("nothing to score: the rows have no answers", fix="evaluate on rows with answers")
    loss = compare(
        "loss (nats per token)" if same else "loss (nats per byte)",
        column(base, "loss"),
        column(tuned, "loss"),
        weight,
        True,
        seed,
    )
    metrics = [loss]
    if same:
        metrics.append(
            compare("perplexity", column(base, "loss"), column(tuned, "loss"), weight, True, seed, shape=np.exp)
        )
        metrics.append(compare("token accuracy", column(base, "right"), column(tuned, "right"), weight, False, seed))
    return metrics


def _learnt_bytes(row: Conversation) -> int:
    """UTF-8 bytes of all that a model is scored on in this row."""
    return sum(len(m.content.encode()) for m in row.messages if m.role in ("assistant", "text") and m.weight != 0)


def _keep(run: Run, other: str, result: Evaluation, rows: list[Conversation], base: Any, tuned: Any) -> Evaluation:
    """Write rows, result and report; where it is not the run's own evaluation, under the name `other`."""
    from tunesmith.evaluation.report import write_report

    folder = run / "evaluation" / other
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(
        folder / "rows.jsonl",
        ({"source": r.source, "base": b, "tuned": t} for r, b, t in zip(rows, base, tuned, strict=True)),
    )
    report = folder / "report.html" if other else run / "report.html"
    result = msgspec.structs.replace(result, report=str(report))
    write_json(folder / "result.json", result)
    write_report(run, result, report)
    return result


def kept(run: Run) -> Evaluation | None:
    """The run's last evaluation, None when it has none."""
    path = run / "evaluation" / "result.json"
    return msgspec.json.decode(path.read_bytes(), type=Evaluation) if path.exists() else None
