"""Metrics of following instructions: constraints kept, likeness to the reference, and whether the task was done at all.

They are what guides call instruction adherence ("constraints kept"), response quality ("ROUGE-L" and "chrF", which reward the
reference's words and say nothing of truth) and task completion ("completion rate").
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tunesmith.conversation import Conversation
from tunesmith.data.language import words
from tunesmith.data.text import refuses
from tunesmith.errors import UsageError
from tunesmith.evaluation.constraints import found
from tunesmith.evaluation.metric import Facts, Heard, Metric, Said

LONGEST = 20_000  # words that ROUGE-L looks at: 0.1 s for two texts of as many


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L of Lin (2004), 0 to 1: F1 of precision and recall by the longest common subsequence of words, LCS.

    2 LCS / (words of the answer + words of the reference); 0 where either has no words. Only the first LONGEST words count.
    """
    said, wanted = words(answer)[:LONGEST], words(reference)[:LONGEST]
    return 2 * common(said, wanted) / (len(said) + len(wanted)) if said and wanted else 0.0


def common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, in linear memory: the rows of the table as bits (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    every = (1 << len(a)) - 1
    row = every  # bit i is 0 where the subsequence grows at a[i]
    for word in b:
        met = row & places.get(word, 0)
        row = (row + met | row - met) & every
    return len(a) - row.bit_count()


def chrf(answer: str, reference: str) -> float:
    """chrF of Popović (2015), 0 to 100: F-score of n-grams of 1 to 6 characters, recall weighing twice; by sacrebleu.

    Raises UsageError where sacrebleu is missing.
    """
    return float(_chrf().sentence_score(answer, [reference]).score)


@cache
def _chrf() -> Any:
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError:
        raise UsageError("chrF needs sacrebleu", fix="pip install 'tunesmith[evaluate]'") from None
    return CHRF()


def instruction(row: Conversation) -> str:
    """What a row asks: its last user message. An `input` follows it after an empty line, see `constraints`."""
    return next((m.content for m in reversed(row.prompt()) if m.role == "user"), "")


def completed(said: Said, asked: str, reference: str) -> bool:
    """Whether an answer does anything at all with its task: it has words or signs, was not cut off (where that is known), is not
    the instruction over again, and is no refusal, unless the reference is one."""
    text = said.text.strip()
    if not text or said.ended is False:
        return False
    if repeats(text, asked) and not repeats(reference, asked):
        return False
    return not refuses(text) or refuses(reference)


def repeats(answer: str, asked: str) -> bool:
    """Whether an answer is the instruction, once or over and over."""
    given, said = words(asked), words(answer)
    return bool(given) and len(said) >= len(given) and said == (given * -(-len(said) // len(given)))[: len(said)]


def _constraints(row: Conversation, heard: Heard, facts: Facts) -> tuple[float, float] | None:
    constraints = found(instruction(row), row.answer()) if heard.said else ()
    if not heard.said or not constraints:
        return None
    return sum(c.kept(heard.said.text) for c in constraints), len(constraints)


def _rouge_l(row: Conversation, heard: Heard, facts: Facts) -> tuple[float, float] | None:
    return (rouge_l(heard.said.text, row.answer()), 1) if heard.said and words(row.answer()) else None


def _chrf_of(row: Conversation, heard: Heard, facts: Facts) -> tuple[float, float] | None:
    return (chrf(heard.said.text, row.answer()), 1) if heard.said and row.answer().strip() else None


def _completed(row: Conversation, heard: Heard, facts: Facts) -> tuple[float, float] | None:
    return (completed(heard.said, instruction(row), row.answer()), 1) if heard.said and instruction(row) else None


METRICS = (
    Metric(
        "constraints kept",
        "higher",
        "0 to 1",
        "The share of the verifiable constraints in the instructions (counts, format, language, words to use or avoid) that the "
        "answers keep, over all rows. Constraints that the reference breaks are not counted. English instructions only.",
        "After Zhou et al. 2023, IFEval (arXiv:2311.07911): strict accuracy by instruction, on constraints that are found",
        _constraints,
    ),
    Metric(
        "ROUGE-L",
        "higher",
        "0 to 1",
        "Words in common with the reference in the same order: F1 by the longest common subsequence, the mean over answers.",
        "Lin 2004, ROUGE",
        _rouge_l,
    ),
    Metric(
        "chrF",
        "higher",
        "0 to 100",
        "Runs of one to six characters in common with the reference: F-score in which recall weighs twice, the mean over "
        "answers. It rewards the reference's wording and says nothing of truth.",
        "Popović 2015, by sacrebleu (Post 2018, arXiv:1804.08771)",
        _chrf_of,
    ),
    Metric(
        "completion rate",
        "higher",
        "0 to 1",
        "The share of answers that are not empty, were not cut off, do not just repeat the instruction and do not refuse (unless "
        "the reference does).",
        "Defined here",
        _completed,
    ),
)
