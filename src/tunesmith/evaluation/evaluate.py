"""Base against tuned on rows that neither was trained on: paired, with intervals, in one of three words.

The verdict is that of one metric, said beforehand: the user's own where one was given, else the loss (nats per token of the
reference answers), else, where a service has a model and tells no likelihoods, the chrF of the answers. The other metrics explain
it; each has its own error, three percent, so of thirty that measure nothing one may look like something.

Everything shown can be recomputed from `evaluation/` in the run: `rows.jsonl` (what both models did with each row),
`canary.jsonl`, `suspects.jsonl`, `held.jsonl`, `facts.json` and, of training, `events.jsonl` and `row_losses.npy`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from tunesmith.card import write_card
from tunesmith.conversation import Conversation
from tunesmith.data.convert import sample
from tunesmith.data.scan import Progress
from tunesmith.data.split import prompt_key
from tunesmith.data.write import refuse_unwritable, write_json, write_jsonl
from tunesmith.errors import DataError, ServiceError, UsageError, did_you_mean
from tunesmith.evaluation import code, likelihood, persona, rowreport, tasks
from tunesmith.evaluation.asking import Asked, Options, asking, trained
from tunesmith.evaluation.custom import metric_from
from tunesmith.evaluation.diagnosis import ANSWERS, Evidence, diagnose
from tunesmith.evaluation.domain import mine_terms
from tunesmith.evaluation.judge import greet, judged
from tunesmith.evaluation.judgement import Judgement, figures, preferred
from tunesmith.evaluation.metric import Facts, Heard, Metric, Said, measure
from tunesmith.evaluation.observe import Observed, prompt_of
from tunesmith.evaluation.result import Canary, Evaluation, Persona, Sample
from tunesmith.evaluation.sides import Models, Sides, sides
from tunesmith.evaluation.stats import Comparison
from tunesmith.runs import Run

SHOWN = 12  # prompts whose answers the report shows side by side
LEARNT_FROM = 2000  # training answers that terms and words are mined from
RULE = (
    "The verdict is that of {}: better or worse where the 95 % interval of the difference excludes zero and a paired permutation "
    "test agrees (p at most 0.03); else it cannot be told."
)
NEVER = "loss, perplexity, token accuracy: a service does not say how likely a reference is to its model"


def evaluate(
    run: Run | None = None,
    *,
    model: str | None = None,
    against: str | None = None,
    dataset: str | None = None,
    columns: dict[str, str] | None = None,
    base_url: str | None = None,
    api_key_file: str | None = None,
    on_progress: Progress | None = None,
    **options: Any,
) -> Evaluation:
    """Compare a run's best model with its base, or `model` with `against`, on held-out rows: see `api.evaluate`. Options: those
    of `asking.Options`."""
    how = msgspec.convert(options, Options, strict=True)
    task = _task(how.task, run)
    tasks.refuse_known(how.metric or "")
    own = tasks.named_apart(metric_from(how.metric)) if how.metric else None
    how.check()
    pair = sides(run, model, against, dataset, columns)
    models, progress = Models(run, base_url, api_key_file), on_progress or (lambda *_: None)
    if (base_url or api_key_file) and not (models.hosted(pair.base) or models.hosted(pair.tuned)):
        where = "--base-url" if base_url else "--api-key-file"
        raise UsageError(
            "neither model is a service's", where=where, fix="leave it out; a judge's are --judge, --judge-key-file"
        )
    other = "-".join(_other(model, against, dataset, how.task, how.metric))
    places = [run / "evaluation" / other, *([] if other else [run.path])] if run else []
    for place in places:
        refuse_unwritable(place, "evaluate as the user whose run it is, or a copy of it")
    scored = not (models.hosted(pair.base) or models.hosted(pair.tuned))

    of_run = run if run and not dataset and not against and _within(pair.tuned, run) else None
    asked = asking(run, pair, how, scored, of_run is not None)
    if how.judge and how.judge_model:
        greet(how.judge, how.judge_model, how.judge_key_file, progress)
    notes = [] if scored else [NEVER]
    if len(asked.base.answered) < ANSWERS:
        notes.append(f"what answers show of pitfalls: there are {len(asked.base.answered)}, and {ANSWERS} are needed")
    if run is None and task in ("domain", "persona"):
        notes.append("terms, words and style: they are mined from the training rows of a run, and none is named")
    base, tuned = (
        _tested(pair.rows, models.observe(name, ask, progress), progress, notes)
        for name, ask in ((pair.base, asked.base), (pair.tuned, asked.tuned))
    )
    base, tuned = _comparable(base, tuned, notes)
    facts = _facts(run, task, asked, base, how.seed)
    chosen = tasks.metrics(
        task,
        same_tokens=[h.tokens for h in base.heard] == [h.tokens for h in tuned.heard],
        scored=scored,
        with_persona=bool(asked.probes),
        compressed=tasks.is_compressed(pair.rows),
        own=own,
    )
    metrics = measured(chosen, pair.rows, base.heard, tuned.heard, facts, how.seed)
    if not metrics or metrics[0].metric != chosen[0].name:
        raise DataError(
            f"nothing to compare by {chosen[0].name}{''.join(f' ({note})' for note in notes)}",
            where=pair.dataset,
            fix="evaluate on rows with answers that both models have room for",
        )
    canary = _canary(asked, base, tuned, how.seed) if scored else None
    found = asked.candidates
    rows = rowreport.report(run, found, base.gains, tuned.gains, tuned.recited) if run and found else None
    evidence = Evidence(
        verdict=metrics[0].verdict,
        metrics={m.metric: m for m in metrics},
        steps=of_run.metrics("step") if of_run else [],
        evals=of_run.metrics("eval") if of_run else [],
        rows=pair.rows,
        base=base.heard,
        tuned=tuned.heard,
        canary=canary,
        training_rows=rows,
        stopped_early=bool(of_run and of_run.last("done").get("stopped_early")),
        epochs=_epochs(of_run) if of_run else None,
        run=f"{run:q}" if run else "RUN",
    )
    result = Evaluation(
        verdict=metrics[0].verdict,
        rule=RULE.format(metrics[0].metric),
        base=pair.base,
        tuned=pair.tuned,
        task=task,
        dataset=pair.dataset,
        rows=len(pair.rows),
        answered=len(asked.base.answered),
        tokens=sum(h.tokens for h in tuned.heard),
        metrics=metrics,
        about={m.name: f"{m.about} Range: {m.span}. Source: {m.source}." for m in chosen},
        persona=_persona(asked, base, tuned),
        canary=canary,
        diagnoses=diagnose(evidence),
        training_rows=rows,
        samples=_samples(pair.rows, asked.base.answered, base.heard, tuned.heard),
        unavailable="; ".join(notes),
        options={k: v for k, v in msgspec.to_builtins(how).items() if v != getattr(Options(), k)},
        better={m.name: m.better for m in chosen},
    )
    folder = run / "evaluation" / other if run else None
    if how.judge:
        judgement = _judgement(how, pair, asked, base, tuned, folder, progress)
        result = msgspec.structs.replace(result, judge=judgement)
    return _keep(run, folder, result, asked, base, tuned, facts) if run and folder else result


def _epochs(run: Run) -> float | None:
    """The epochs that the user asked for."""
    manifest = run.manifest()
    chosen = str(manifest["origin"].get("epochs", "")).endswith(("flag", ".toml", ".json"))
    return manifest["recipe"]["epochs"] if chosen else None


def _within(model: str, run: Run) -> bool:
    """Whether a model is one of a run's own."""
    return Path(model).resolve().is_relative_to(run.path.resolve())


def _task(task: str | None, run: Run | None) -> str:
    known = list(tasks.TASKS)
    if task and task not in known:
        raise UsageError(
            f'no task "{task}"{did_you_mean(task, known)}', where="--task", fix=f"known: {', '.join(known)}"
        )
    return task or (run.recipe().task if run else "chat")


def _other(
    model: str | None, against: str | None, dataset: str | None, task: str | None, metric: str | None
) -> list[str]:
    """The name of the folder of an evaluation that is not the run's own, in parts."""
    named = (("model", model), ("against", against), ("on", dataset), ("task", task), ("metric", metric))
    parts = [f"{k}-" + re.sub(r"[^\w.-]+", "-", Path(v).name)[:60] for k, v in named if v]
    whole = [str(Path(v).resolve()) if v and Path(v).exists() else v for _, v in named]
    return [*parts, hashlib.sha256(repr(whole).encode()).hexdigest()[:6]] if parts else []  # two files may share a name


# ---- what comes of it


def measured(
    chosen: Sequence[Metric],
    rows: Sequence[Conversation],
    base: Sequence[Heard],
    tuned: Sequence[Heard],
    facts: Facts,
    seed: int,
) -> list[Comparison]:
    """All metrics that the rows have something to say of."""
    found = (measure(metric, rows, base, tuned, facts, seed) for metric in chosen)
    return [each for each in found if each is not None]


def _facts(run: Run | None, task: str, asked: Asked, base: Observed, seed: int) -> Facts:
    """What is learnt from the training rows: the terms of a domain; the words and the style of a persona."""
    if run is None or not (task == "domain" or asked.taught):
        return Facts()
    rows = trained(run)
    answers = [row.answer() for row in (sample(rows, LEARNT_FROM, seed) if len(rows) > LEARNT_FROM else rows)]
    terms = mine_terms(answers) if task == "domain" else []
    if not asked.taught:
        return Facts(terms=terms)
    said = [s.text for s in base.recited]
    weights, _ = persona.learn_style([row.answer() for row in asked.taught], said, seed)
    return Facts(terms, persona.mine_vocabulary(answers, said), weights)


def _tested(rows: Sequence[Conversation], heard: Observed, progress: Progress, notes: list[str]) -> Observed:
    """What was heard, with the outcome of the rows' tests where they have some."""

    def told(done: int, of: int) -> None:
        progress(len(rows), done / of, "running the rows' tests")

    judged = code.judge(rows, heard.heard, progress=told)
    if judged.note and judged.note not in notes:
        notes.append(judged.note)
    return msgspec.structs.replace(heard, heard=judged.heard)


def _comparable(base: Observed, tuned: Observed, notes: list[str]) -> tuple[Observed, Observed]:
    """Both without the likelihoods of rows that one model could not read to the end while the other read more."""
    unlike = [
        {i for i, (b, t) in enumerate(zip(*pair, strict=True)) if b.tokens != t.tokens and (b.cut or t.cut)}
        for pair in ((base.heard, tuned.heard), (base.canary, tuned.canary))
    ]
    if not any(unlike):
        return base, tuned
    if unlike[0]:
        notes.append(f"the loss on {len(unlike[0])} rows: they are longer than the context of one of the models")

    def without(heard: list[Heard], rows: set[int]) -> list[Heard]:
        nothing: dict[str, Any] = {"loss": None, "tokens": 0, "right": 0, "bins": [], "context": None}
        return [msgspec.structs.replace(h, **nothing) if i in rows else h for i, h in enumerate(heard)]

    first, second = (
        msgspec.structs.replace(side, heard=without(side.heard, unlike[0]), canary=without(side.canary, unlike[1]))
        for side in (base, tuned)
    )
    return first, second


def _canary(asked: Asked, base: Observed, tuned: Observed, seed: int) -> Canary:
    names = ("loss on general text (nats per token)", "loss on the starter's questions (nats per token)")
    cuts = (slice(0, asked.general), slice(asked.general, None))
    same = [h.tokens for h in base.canary] == [h.tokens for h in tuned.canary]
    found = []
    for name, cut in zip(names, cuts, strict=True):
        rows = asked.base.canary[cut]
        metric = msgspec.structs.replace(
            likelihood.LOSS if same else likelihood.PER_BYTE, name=name if same else name.replace("token", "byte")
        )
        if one := measure(metric, rows, base.canary[cut], tuned.canary[cut], Facts(), seed):
            found.append(msgspec.structs.replace(one, rows_needed=None))  # nobody can give it more
    n = len(asked.probes)
    answers = [
        Sample(row.prompt()[-1].content, b.text, t.text, row.answer())
        for row, b, t in zip(asked.starter, base.questions[n:], tuned.questions[n:], strict=True)
    ]
    return Canary(found, answers)


def _persona(asked: Asked, base: Observed, tuned: Observed) -> Persona | None:
    if not asked.probes:
        return None
    n = len(asked.probes)
    answers = [
        Sample(probe.messages[-1].content, b.text, t.text)
        for probe, b, t in zip(asked.probes, base.questions[:n], tuned.questions[:n], strict=True)
    ]
    before, after = (
        sum(asked.name.casefold() in s.text.casefold() for s in side.questions[:n]) for side in (base, tuned)
    )
    return Persona(asked.name, n, before, after, answers)


def _samples(
    rows: Sequence[Conversation], answered: Sequence[int], base: Sequence[Heard], tuned: Sequence[Heard]
) -> list[Sample]:
    """The first prompts that were answered, different ones: chosen by the seed, not by the result."""
    chosen = list({prompt_key(rows[i]): i for i in reversed(answered)}.values())[::-1][:SHOWN]

    def text(said: Said | None) -> str:
        return said.text if said else ""

    return [
        Sample(rows[i].prompt()[-1].content, text(base[i].said), text(tuned[i].said), rows[i].answer(), rows[i].source)
        for i in chosen
    ]


def _judgement(
    how: Options, pair: Sides, asked: Asked, base: Observed, tuned: Observed, folder: Path | None, progress: Progress
) -> Judgement:
    """What a third model thinks of the answers; every reply is in judge.jsonl. Where it fails, why: the rest stands without."""
    assert how.judge and how.judge_model
    answered = asked.base.answered
    rows = [pair.rows[i] for i in answered]
    try:
        found = judged(
            [prompt_of(row) for row in rows],
            [row.answer() for row in rows],
            *([said.text for i in answered if (said := side.heard[i].said)] for side in (base, tuned)),
            url=how.judge,
            model=how.judge_model,
            key_file=how.judge_key_file,
            automatic=[preferred(row, base.heard[i], tuned.heard[i]) for row, i in zip(rows, answered, strict=True)],
            path=folder / "judge.jsonl" if folder else None,
            seed=how.seed,
            progress=progress,
        )
    except ServiceError as error:
        return figures([], len(rows), how.judge_model, service=how.judge, failure=str(error))
    return msgspec.structs.replace(found, transcripts=[])


# ---- what is kept


def _keep(
    run: Run, folder: Path, result: Evaluation, asked: Asked, base: Observed, tuned: Observed, facts: Facts
) -> Evaluation:
    """Write all that the figures come from, the result and the report; the run's own report is in the run itself."""
    from tunesmith.evaluation.report import write_report

    folder.mkdir(parents=True, exist_ok=True)
    for name, rows, before, after in (
        ("rows", asked.base.rows, base.heard, tuned.heard),
        ("canary", asked.base.canary, base.canary, tuned.canary),
    ):
        write_jsonl(
            folder / f"{name}.jsonl",
            (
                {"source": r.source, "digest": r.digest(), "base": b, "tuned": t}
                for r, b, t in zip(rows, before, after, strict=bool(before))
            ),
        )
    write_json(folder / "facts.json", facts)
    for name, part, values in (
        ("suspects", asked.base.suspects, base.gains),
        ("held", asked.tuned.suspects, tuned.gains),
        ("recited", asked.tuned.recited, tuned.recited),
        ("taught", asked.base.recited, base.recited),
    ):
        path = folder / f"{name}.jsonl"
        if not part:
            path.unlink(missing_ok=True)  # of an evaluation before, with other figures
        else:
            write_jsonl(
                path,
                ({"source": r.source, "digest": r.digest(), name: v} for r, v in zip(part, values, strict=True)),
            )
    report = (run if folder == run / "evaluation" else folder) / "report.html"
    result = msgspec.structs.replace(result, report=str(report))
    write_json(folder / "result.json", result)
    write_report(run, result, report)
    if (
        folder == run / "evaluation" and run.manifest()["provider"] != "openai"
    ):  # a service's run has a card of its own kind
        write_card(run)
    return result


def kept(run: Run) -> Evaluation | None:
    """The run's last evaluation, None when it has none, or one of an older form, or damaged."""
    path = run / "evaluation" / "result.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Evaluation) if path.exists() else None
    except (OSError, msgspec.DecodeError):
        return None


def refresh_report(run: Run) -> None:
    """Write the report of an evaluated run again: what it says of the run's exports has changed."""
    from tunesmith.evaluation.report import write_report

    if result := kept(run):
        write_report(run, result, run / "report.html")
