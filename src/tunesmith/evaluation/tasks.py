"""Which metrics a task has. The first one of a list gives the verdict."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.conversation import Conversation
from tunesmith.data.convert import emoji_in
from tunesmith.errors import UsageError
from tunesmith.evaluation import chat, code, compression, domain, instruct, likelihood, persona
from tunesmith.evaluation.metric import Metric

CHRF = next(m for m in instruct.METRICS if m.name == "chrF")
TASKS: dict[str, tuple[Metric, ...]] = {
    "chat": chat.METRICS,
    "code": code.METRICS,
    "instruct": instruct.METRICS,
    "domain": (*domain.METRICS, CHRF),
    "persona": persona.METRICS,
    "compression": compression.METRICS,
    "custom": (),
}
EMOJI = 0.5  # a reference answer, from which on compression is measured too: seed-like data sets have one to five


def metrics(
    task: str, *, same_tokens: bool, scored: bool, with_persona: bool, compressed: bool, own: Metric | None
) -> list[Metric]:
    """All metrics of a task, the one that decides first: the user's own, else the loss, else chrF.

    `same_tokens`: both models count the rows' tokens alike; `scored`: likelihoods can be had of both.
    """
    first = [own] if own else []
    if scored:
        first += likelihood.METRICS if same_tokens else [likelihood.PER_BYTE]
    found = [*first, CHRF, *TASKS[task]]
    found += persona.METRICS if with_persona else ()
    found += compression.METRICS if compressed else ()
    if not same_tokens:  # nats a token of two tokenizers say nothing of one another
        found = [metric for metric in found if metric.columns is not chat.turn_coherence]
    return list({metric.name: metric for metric in found}.values())


def named_apart(own: Metric) -> Metric:
    """The user's own metric. Raises UsageError where one of those here has its name: one of the two would be lost."""
    known = {m.name for m in (*likelihood.METRICS, likelihood.PER_BYTE, *(m for task in TASKS.values() for m in task))}
    if own.name in known:
        raise UsageError(
            f'there is a metric "{own.name}" already', where="--metric", fix="give the function another name"
        )
    return own


def refuse_known(spec: str) -> None:
    """UsageError where a metric of one's own is called as one that is measured here."""
    for task, known in {"": (*likelihood.METRICS, CHRF), **TASKS}.items():
        for metric in known:
            if spec.lower() == metric.name.lower().partition(" (")[0]:
                where = f"by --task {task}" if task else "in every task"
                fix = "--metric is for one of your own: FILE.py:FUNCTION, or re:PATTERN"
                raise UsageError(f"{metric.name} is measured {where}, without it", where=f"--metric {spec}", fix=fix)


def is_compressed(rows: Sequence[Conversation]) -> bool:
    """Whether rows teach brevity by emoji, as of the emoji guide: that many a reference, or their lengths before."""
    if any("original_tokens" in row.metadata for row in rows):
        return True
    return bool(rows) and sum(emoji_in(row.answer()) for row in rows) / len(rows) >= EMOJI
