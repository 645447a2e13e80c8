"""What went wrong, by name: the pitfalls of fine-tuning, each with its evidence and the next command to try.

Every rule compares the tuned model with its base or with the references, never with a number that only some models reach: a small
model that repeats itself is not to blame on its training. A healthy run gets none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

import msgspec

from tunesmith.conversation import Conversation
from tunesmith.data.convert import emoji_in
from tunesmith.evaluation.chat import loops
from tunesmith.evaluation.instruct import rouge_l
from tunesmith.evaluation.metric import Heard, Said
from tunesmith.evaluation.result import Canary, Diagnosis
from tunesmith.evaluation.rowreport import RowReport
from tunesmith.evaluation.stats import Comparison
from tunesmith.runs import RISE

LEVEL = 0.02  # relative change of the training loss that is none
FORGOT = 0.10  # relative rise of the loss on general text
RECITED = 0.5  # share of the best-learnt rows that are repeated word for word
REPEATS = 0.33  # of an answer's runs of four words
LOOPED = 0.5  # of the answers, and 0.2 more than of the base's: a small model loops in a third of long sums
ENDS = 0.7  # of the answers, and 0.2 fewer than of the base's
ALIKE = 0.01  # ROUGE-L: no difference
ANSWERS = 8  # fewer say nothing of habits
PITFALLS = {  # every name that a diagnosis can have, and when it is said: for docs/metrics.md
    "diverged": "The training loss of the last quarter is over 1.1 times the loss before training, and no validation was under "
    "that.",
    "worse than the base": "The verdict is worse.",
    "shuffled answers": "Prompts and their own answers have no more in common than prompts and other rows' answers (within twice "
    "the standard error, 16 rows at least), and the tuned model finds answers no likelier after their own prompt.",
    "never stops": f"It ended under {100 * ENDS:.0f} % of its answers by itself, 20 points fewer than the base; or under 10 %. "
    "Not where most answers that were cut had less room than their references. Where some end, those that are cut in a loop "
    "(the same few characters again and again) do not count: the end is learnt, and they are repetition.",
    "overfitting": f"The last two validation losses are over {RISE} times the lowest, and the training loss went on falling. "
    "Where early stopping ended the run: over the lowest at all, and more than twice as many epochs had been asked for.",
    "memorisation": f"Asked the training rows that it knows best ({ANSWERS} at least), it repeats {100 * RECITED:.0f} % and more "
    "of the answers word for word.",
    "loss of general capability": "The loss on general text or on the starter's questions is worse, by over "
    f"{100 * FORGOT:.0f} %.",
    "repetition": f"Self-repetition is worse, over {REPEATS}, and 0.05 over the base's; or over {100 * LOOPED:.0f} % of its "
    "answers are cut in a loop, 20 points more than of the base's.",
    "inconsistent outputs": f"Answers to one prompt are no more alike (ROUGE-L within {ALIKE}) than answers to different "
    "prompts, and less so than the base's by over twice the standard error. Only of prompts that were answered several times.",
    "style not learnt": "The style score is under 0.5, less than 0.2 over the base's, and not better than that.",
    "emoji absent": "The references have half an emoji each and more, the answers under a fifth of that.",
    "emoji spam": "A fifth of the answers and more have over five emoji, and over twice the share of the references.",
    "underfitting": f"The validation loss changed by less than {100 * LEVEL:.0f} % over the run; or, as a note, it was still "
    "falling by more than that at the end. Not of a run that early stopping ended.",
}


class Evidence(msgspec.Struct, frozen=True):
    """All that the rules look at. `steps` and `evals` are the run's curves, [] where there is no run."""

    verdict: str
    metrics: dict[str, Comparison]
    steps: list[dict[str, Any]] = []
    evals: list[dict[str, Any]] = []
    rows: Sequence[Conversation] = ()
    base: Sequence[Heard] = ()
    tuned: Sequence[Heard] = ()
    canary: Canary | None = None
    training_rows: RowReport | None = None
    stopped_early: bool = False
    epochs: float | None = None  # that the user asked for, None where it was left to the rules
    run: str = "RUN"


def diagnose(evidence: Evidence) -> list[Diagnosis]:
    """All that is found, the most severe first."""
    found = [each for rule in RULES for each in rule(evidence)]
    if any(d.name == "diverged" for d in found):  # all else follows from it
        found = [d for d in found if d.name in ("diverged", "worse than the base")]
    order = {"error": 0, "warning": 1, "info": 2}
    return sorted(found, key=lambda d: order[d.severity])


def curves(steps: list[dict[str, Any]], evals: list[dict[str, Any]]) -> list[Diagnosis]:
    """What the curves alone show: also of a run that failed."""
    evidence = Evidence("", {}, steps, evals)
    return [each for rule in (diverged, overfitting) for each in rule(evidence)]


def diverged(e: Evidence) -> Iterator[Diagnosis]:
    """The loss rose above where it began, and stayed there."""
    losses = [float(s["loss"]) for s in e.steps if isinstance(s.get("loss"), int | float)]
    before = next((float(v["loss"]) for v in e.evals if v["step"] == 0), None)
    after = [float(v["loss"]) for v in e.evals if v["step"] > 0]
    if len(losses) < 4:
        return
    first, last = before if before is not None else losses[0], fmean(losses[-max(1, len(losses) // 4) :])
    if last > first * 1.1 and (not after or min(after) > first):
        yield Diagnosis(
            "diverged",
            "error",
            f"the training loss went from {first:.2f} to {last:.2f} nats and never came under where it began",
            "tunesmith lr-find … and train with its rate; or leave --learning-rate out",
        )


def overfitting(e: Evidence) -> Iterator[Diagnosis]:
    """The validation loss rose clearly over its lowest while the training loss went on falling.

    Of a run that early stopping has ended, only where many more epochs had been asked for: else the rules have done their work.
    """
    after = [v for v in e.evals if v["step"] > 0]
    if len(after) < 3:
        return
    best = min(after, key=lambda v: v["loss"])
    in_time = e.stopped_early and not (e.epochs and e.epochs > 2 * best.get("epoch", e.epochs))
    rise = 1.0 if e.stopped_early else RISE
    if in_time or min(v["loss"] for v in after[-2:]) <= rise * best["loss"] or after[-1]["step"] == best["step"]:
        return
    early = [s["loss"] for s in e.steps if s["step"] <= best["step"]][-8:]
    late = [s["loss"] for s in e.steps][-8:]
    if not early or fmean(late) >= fmean(early):
        return
    yield Diagnosis(
        "overfitting",
        "warning",
        f"the validation loss rose from {best['loss']:.3f} at step {best['step']} (epoch {best.get('epoch', 0):.1f}) to "
        f"{after[-1]['loss']:.3f} at step {after[-1]['step']} while the training loss fell to {fmean(late):.3f}; "
        f"best_model is of step {best['step']}",
        f"stop there: --epochs {max(1, round(best.get('epoch', 1)))}; more rows help more than more epochs",
    )


def underfitting(e: Evidence) -> Iterator[Diagnosis]:
    """Nothing was gained, or the best step is the last and the loss was still falling fast."""
    after = [v for v in e.evals if v["step"] > 0]
    before = next((v["loss"] for v in e.evals if v["step"] == 0), None)
    if not after or e.stopped_early or any(d.name == "diverged" for d in diverged(e)):
        return
    if before is not None and abs(before - after[-1]["loss"]) < LEVEL * before:
        yield Diagnosis(
            "underfitting",
            "warning",
            f"the validation loss is {after[-1]['loss']:.3f} after training and was {before:.3f} before: "
            "hardly anything was learnt",
            "a higher --learning-rate (tunesmith lr-find tells which), or more --epochs",
        )
    elif len(after) >= 2 and after[-1]["loss"] < after[-2]["loss"] * (1 - LEVEL) and _best_is_last(after):
        yield Diagnosis(
            "underfitting",
            "info",
            f"the validation loss was still falling at the end ({after[-2]['loss']:.3f}, then {after[-1]['loss']:.3f})",
            "more --epochs; it stops by itself when nothing more is gained",
        )


def _best_is_last(after: list[dict[str, Any]]) -> bool:
    return bool(after[-1]["loss"] <= min(v["loss"] for v in after))


def memorisation(e: Evidence) -> Iterator[Diagnosis]:
    report = e.training_rows
    if report and report.asked >= ANSWERS and report.recited >= RECITED * report.asked:
        yield Diagnosis(
            "memorisation",
            "warning",
            f"asked the {report.asked} training rows it knows best, the model repeats {report.recited} answers word for word",
            "fewer --epochs, --lora with a lower --lora-rank, or more rows; see the rows marked memorised",
        )


def mismatched(e: Evidence) -> Iterator[Diagnosis]:
    """Answers have no more to do with their own prompts than with others'."""
    report = e.training_rows
    if not report or report.belonging is None or report.looked_at < 16:
        return
    mean, error = report.belonging
    if mean > error:
        return
    helps = (
        report.gain is not None and report.gain[0] > report.gain[1]
    )  # on rows that the model has not learnt by heart
    if not helps:
        yield Diagnosis(
            "shuffled answers",
            "error",
            f"prompts and their own answers have no more in common than prompts and other rows' answers (by {mean:.2f} ± "
            f"{error:.2f} standard deviations over {report.looked_at} rows)",
            "look for a column that was sorted or shifted by itself: tunesmith data preview DATASET",
        )


def degraded(e: Evidence) -> Iterator[Diagnosis]:
    """Worse than the base on the very rows it was tuned for."""
    first = next(iter(e.metrics.values()), None)
    if e.verdict == "worse" and first:
        yield Diagnosis(
            "worse than the base",
            "error",
            f"{first.metric} went from {first.base:.3f} to {first.tuned:.3f} on rows like those it was trained on",
            "a lower --learning-rate, fewer --epochs; tunesmith data check DATASET for the rows",
        )


def forgetting(e: Evidence) -> Iterator[Diagnosis]:
    for m in e.canary.metrics if e.canary else []:
        if m.verdict == "worse" and m.difference > FORGOT * m.base:
            yield Diagnosis(
                "loss of general capability",
                "warning",
                f"{m.metric} rose from {m.base:.3f} to {m.tuned:.3f} (95 % interval of the rise {m.low:.3f} to {m.high:.3f})",
                "--lora or --freeze-ratio 0.7, a lower --learning-rate, or mix in a tenth of general rows "
                "(tunesmith data convert A B --weights 1,0.1)",
            )
            return


def repetition(e: Evidence) -> Iterator[Diagnosis]:
    """The same words again and again; or the same few characters, which are one word, until the limit."""
    fix = "fewer --epochs or a lower --learning-rate; see whether training answers repeat themselves"
    m = e.metrics.get("self-repetition")
    if m and m.rows >= ANSWERS and m.tuned > REPEATS and m.tuned > m.base + 0.05 and m.verdict == "worse":
        evidence = (
            f"{m.tuned:.0%} of the runs of four words in its answers stood in them before (the base: {m.base:.0%})"
        )
        yield Diagnosis("repetition", "warning", evidence, fix)
        return
    before, after = ([_looped(said) for h in side if (said := h.said)] for side in (e.base, e.tuned))
    if len(after) >= ANSWERS and len(before) >= ANSWERS and fmean(after) > max(LOOPED, fmean(before) + 0.2):
        evidence = f"{fmean(after):.0%} of its answers end in a loop (the base: {fmean(before):.0%})"
        yield Diagnosis("repetition", "warning", evidence, fix)


def _looped(said: Said) -> bool:
    """Whether an answer was cut in the middle of a loop."""
    return said.ended is False and loops(said.text)


def endless(e: Evidence) -> Iterator[Diagnosis]:
    """Answers that no longer end, though the references would have had room (which a small --max-tokens does not leave).

    An end that was not learnt is missing after every answer. So where some end, those that loop do not count.
    """
    m = e.metrics.get("end-of-turn rate")
    cut = [
        h.said.tokens < h.tokens / max(1, sum(x.role == "assistant" for x in row.messages))
        for row, h in zip(e.rows, e.tuned, strict=True)
        if h.said and not h.said.ended
    ]
    if cut and fmean(cut) > 0.5:
        return
    if not m or m.rows < ANSWERS:
        return
    straight = m.rows - sum(_looped(h.said) for h in e.tuned if h.said)
    fewer = m.tuned < m.base - 0.2 and m.tuned * m.rows < ENDS * straight
    if m.tuned < ENDS and (fewer or m.tuned < 0.1):
        yield Diagnosis(
            "never stops",
            "error",
            f"it ended {m.tuned:.0%} of its answers by itself within the limit (the base: {m.base:.0%})",
            f"is the end-of-turn token learnt? tunesmith data preview {e.run}/data/train.jsonl --model {e.run} marks it",
        )


def style(e: Evidence) -> Iterator[Diagnosis]:
    m = e.metrics.get("style")
    if m and m.rows >= ANSWERS and m.verdict != "better" and m.tuned < min(0.5, m.base + 0.2):
        yield Diagnosis(
            "style not learnt",
            "warning",
            f"its answers are taken for the training rows' style with {m.tuned:.2f} (the base's: {m.base:.2f}; 1 is sure)",
            "more --epochs, a higher --lora-rank (16), or --method full",
        )


def emoji(e: Evidence) -> Iterator[Diagnosis]:
    """Emoji that the references have and the answers lack, or far too many of them."""
    pairs = [(emoji_in(r.answer()), emoji_in(h.said.text)) for r, h in zip(e.rows, e.tuned, strict=True) if h.said]
    if len(pairs) < ANSWERS:
        return
    wanted, had = fmean(a for a, _ in pairs), fmean(b for _, b in pairs)
    if wanted >= 0.5 and had < 0.2 * wanted:
        yield Diagnosis(
            "emoji absent",
            "warning",
            f"{had:.2f} emoji an answer where the references have {wanted:.2f}",
            "more --epochs (3 to 5), a higher --lora-rank (16); keep only rows that have them "
            "(tunesmith data convert DATASET -o OUT.jsonl --where on their metadata)",
        )
    over, over_wanted = (
        fmean(side > 5 for side in column) for column in ([b for _, b in pairs], [a for a, _ in pairs])
    )
    if over >= 0.2 and over > 2 * over_wanted:
        yield Diagnosis(
            "emoji spam",
            "warning",
            f"{over:.0%} of its answers have more than five emoji (of the references {over_wanted:.0%})",
            "tunesmith data convert DATASET -o OUT.jsonl --max-emoji 5, and fewer --epochs",
        )


def inconsistent(e: Evidence) -> Iterator[Diagnosis]:
    """Answers to one prompt are no more alike than answers to different prompts, and were so before."""
    before, after = _consistency(e.base), _consistency(e.tuned)
    if len(after) < ANSWERS or len(before) != len(after):
        return
    mean, _ = _mean([within - between for within, between in after])
    lost, lost_error = _mean([a[0] - a[1] - (b[0] - b[1]) for a, b in zip(after, before, strict=True)])
    if mean <= ALIKE and lost < -lost_error:
        now, then = (tuple(fmean(column) for column in zip(*side, strict=True)) for side in (after, before))
        yield Diagnosis(
            "inconsistent outputs",
            "warning",
            f"answers to the same prompt are no more alike than answers to different ones: ROUGE-L {now[0]:.2f} and {now[1]:.2f} "
            f"over {len(after)} prompts (the base: {then[0]:.2f} and {then[1]:.2f})",
            "rows that contradict one another teach it: see the row report; then more rows, or a lower temperature",
        )


def _consistency(heard: Sequence[Heard]) -> list[tuple[float, float]]:
    """Of each prompt that was answered several times: how alike its answers are (mean ROUGE-L), and how like those to another."""
    several = [h.samples for h in heard if len(h.samples) > 1]
    return [
        (
            fmean(rouge_l(a.text, b.text) for a, b in combinations(own, 2)),
            fmean(rouge_l(a.text, b.text) for a, b in zip(own, other, strict=False)),
        )
        for own, other in zip(several, [*several[1:], *several[:1]], strict=True)
    ]


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean and twice its standard error."""
    mean = fmean(values)
    return mean, 2 * (sum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values)) ** 0.5


RULES: tuple[Callable[[Evidence], Iterator[Diagnosis]], ...] = (
    diverged,
    degraded,
    mismatched,
    endless,
    overfitting,
    memorisation,
    forgetting,
    repetition,
    inconsistent,
    style,
    emoji,
    underfitting,
)
