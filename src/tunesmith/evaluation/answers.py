"""Base against tuned by what they answer, where nothing else can be had of a model: one that a service keeps.

A service says how likely its own words were, not how likely the reference was. So both are asked the held-out prompts, and each
answer is compared with the reference by chrF (Popović 2015): the F-score of character n-grams, recall weighing twice, from 0 to
100, of `sacrebleu`. The verdict is that of the mean chrF, paired and with an interval like any other.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np

from tunesmith.conversation import Conversation
from tunesmith.data.convert import sample
from tunesmith.errors import DataError
from tunesmith.evaluation.stats import Comparison, compare

ROWS = 200  # asked at most, chosen by the seed: each is two requests, which a service may bill
UNAVAILABLE = "loss, perplexity, token accuracy: a service does not say how likely a reference is to its model"
ANSWER_TOKENS = 256


class Answered(msgspec.Struct, frozen=True):
    """An answer to a held-out prompt, and its chrF against the reference."""

    answer: str
    chrf: float


def asked(rows: list[Conversation], seed: int) -> list[Conversation]:
    """The rows with something to ask and a reference, ROWS of them at most. Raises DataError where there is none."""
    found = [row for row in rows if row.prompt() and row.answer().strip()]
    if not found:
        raise DataError("nothing to ask: the rows have no prompt with an answer", fix="evaluate on rows with both")
    return sample(found, ROWS, seed)


def answered(rows: list[Conversation], complete: Callable[..., list[str]], seed: int) -> list[Answered]:
    """A model's answers to the rows' prompts."""
    from sacrebleu.metrics.chrf import CHRF

    score = CHRF().sentence_score
    prompts = [Conversation(row.prompt(), tools=row.tools) for row in rows]
    texts = complete(prompts, max_tokens=ANSWER_TOKENS, temperature=0.0, seed=seed)
    return [Answered(text, float(score(text, [row.answer()]).score)) for text, row in zip(texts, rows, strict=True)]


def metrics(base: list[Answered], tuned: list[Answered], seed: int) -> list[Comparison]:
    """chrF, a mean over the rows."""
    before, after = (np.array([answer.chrf for answer in side], np.float64) for side in (base, tuned))
    found = compare("chrF of answers (0 to 100)", before, after, np.ones(len(base)), False, seed)
    if len(base) == ROWS:  # more are not asked: to say how many more it takes would be no help
        found = msgspec.structs.replace(found, rows_needed=None)
    return [found]
