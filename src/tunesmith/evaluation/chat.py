"""Metrics of chat: whether answers are varied, repeat themselves, heed what was said before, keep the references' length and
habit of asking back, and end.

All but turn coherence are of the greedy answer alone, or of it and the reference. A row counts where both models' answers have
a value; `about` says when an answer has none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from tunesmith.conversation import Conversation
from tunesmith.data.language import words
from tunesmith.evaluation.metric import Facts, Heard, Metric

Columns = Callable[[Conversation, Heard, Facts], tuple[float, ...] | None]
TAILS = (24, 96, 384)  # characters of an ending that is looked at for a loop: of turns of up to 6, 30 and 126
VARIED = 1 / 3  # of the runs of four characters in an ending are different ones at least: of prose nearly all
REPEATED = 4  # words, or characters: shorter runs come again in any good text ("of the", "you can use")
CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)  # fenced, also where the end was cut off, and inline
# Latin; full-width, Arabic, Greek, Ethiopic. What goes on after it is an address or an operator: "?q=1", "x?.y"
_QUESTION = re.compile(r"\?(?![\w=&%/]|\.\w)|[\uff1f\u061f\u037e\u1367]")


def per_answer(value: Callable[[str], float | None]) -> Columns:
    """Columns (value of the answer, 1): their ratio is the mean over the rows. None where the answer has no value."""

    def columns(_: Conversation, heard: Heard, __: Facts) -> tuple[float, ...] | None:
        found = value(heard.said.text) if heard.said else None
        return None if found is None else (found, 1)

    return columns


def from_reference(value: Callable[[str], float]) -> Columns:
    """Columns (distance of the answer's value from the reference's, 1). None where the row has no reference."""

    def columns(row: Conversation, heard: Heard, _: Facts) -> tuple[float, ...] | None:
        if heard.said is None or not row.answer():
            return None
        return abs(value(heard.said.text) - value(row.answer())), 1

    return columns


def ngrams(items: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """Runs of n neighbours: len(items) - n + 1 of them, none where there are fewer items."""
    return zip(*(items[i:] for i in range(n)), strict=False)


def distinct(text: str, n: int) -> float | None:
    """Different word n-grams of all in a text, 0 to 1; None where it has none."""
    found = list(ngrams(words(text), n))
    return len(set(found)) / len(found) if found else None


def distinct_over_all(rows: Sequence[Conversation], heard: Sequence[Heard], _: Facts) -> float | None:
    """Different word pairs of all in all answers together; no pair reaches from one answer into the next.

    No sum over rows: a pair counts once however many answers have it. Nor can rows be drawn anew, since a row that is drawn
    twice brings no new pair, so that every bootstrap sample is less varied than the answers themselves.
    """
    found = [pair for h in heard if h.said for pair in ngrams(words(h.said.text), 2)]
    return len(set(found)) / len(found) if found else None


def self_repetition(text: str) -> float:
    """Share of a text's word 4-grams that stood in it before, 0 to 1; 0 where it has fewer than four words."""
    unique = distinct(text, REPEATED)
    return 0.0 if unique is None else 1 - unique


def loops(text: str) -> bool:
    """Whether a text ends in a loop: the same few characters again and again, which are one word in "0000…" and "-10-10…"."""
    ends = (text[-tail:] for tail in TAILS if tail <= len(text))
    return any(len(set(ngrams(end, REPEATED))) < VARIED * (len(end) - REPEATED + 1) for end in ends)


def turn_coherence(_: Conversation, heard: Heard, __: Facts) -> tuple[float, ...] | None:
    """(nats by which the true context makes the reference likelier than another row's context, tokens)."""
    if heard.context is None or not heard.context[2]:
        return None
    own, other, tokens = heard.context
    return other - own, tokens


def length(text: str) -> float:
    """ln(words + 1): differences of it are ratios, and twice as long is as far off as half as long."""
    return math.log(len(words(text)) + 1)


def asks(text: str) -> float:
    """1 where a text asks a question, 0 where not: a question mark outside of code and addresses."""
    return float(bool(_QUESTION.search(CODE.sub(" ", text))))


def ended(_: Conversation, heard: Heard, __: Facts) -> tuple[float, ...] | None:
    if heard.said is None or heard.said.ended is None:
        return None
    return float(heard.said.ended), 1


METRICS = (
    Metric(
        "distinct-1",
        "higher",
        "0 to 1",
        "The share of an answer's words that are different ones, the mean over answers that have a word. "
        "It falls as answers grow longer, so read it beside the length imbalance.",
        'Li et al. 2016 (arXiv:1510.03055), within an answer as "intra-dist" of Gu et al. 2019 (arXiv:1805.12352)',
        per_answer(partial(distinct, n=1)),
    ),
    Metric(
        "distinct-2",
        "higher",
        "0 to 1",
        "The share of an answer's pairs of neighbouring words that are different ones, the mean over answers of two words and "
        "more. "
        "It falls as answers grow longer, so read it beside the length imbalance.",
        'Li et al. 2016 (arXiv:1510.03055), within an answer as "intra-dist" of Gu et al. 2019 (arXiv:1805.12352)',
        per_answer(partial(distinct, n=2)),
    ),
    Metric(
        "distinct-2 over all answers",
        "higher",
        "0 to 1",
        "The share of the pairs of neighbouring words in all answers together that are different ones: low where a model says "
        "the same to everything. It falls as answers grow longer or more, and has no interval, because it is no sum over rows.",
        "Li et al. 2016 (arXiv:1510.03055)",
        whole=distinct_over_all,
    ),
    Metric(
        "self-repetition",
        "lower",
        "0 to 1",
        "The share of an answer's runs of four words that stood in the same answer before, the mean over answers. "
        "An answer of fewer than four words has 0.",
        "seq-rep-4 of Welleck et al. 2020 (arXiv:1908.04319), of words instead of tokens",
        per_answer(self_repetition),
    ),
    Metric(
        "turn coherence",
        "higher",
        "Without bounds, in nats per token; 0: the context is of no use",
        "How much likelier the last reference answers are after their own context than after another row's: the difference of "
        "the two losses over the tokens of the answers. Only for models of one tokenizer.",
        "After Sankar et al. 2019 (arXiv:1906.01603), who measure by how much a disturbed history raises the perplexity",
        turn_coherence,
    ),
    Metric(
        "length imbalance",
        "lower",
        "0 and up; 0.69: twice or half as long",
        "The distance of an answer's length from the reference's: |ln(words + 1) - ln(words of the reference + 1)|, the mean "
        "over answers. An answer that was cut at the token limit counts as long as it got.",
        "Defined here",
        from_reference(length),
    ),
    Metric(
        "question imbalance",
        "lower",
        "0 to 1",
        "The share of answers that ask a question where the reference asks none, or ask none where it does. "
        "A question is a question mark outside of code and addresses.",
        "Defined here; that a chat lives by how often it asks back: See et al. 2019 (arXiv:1902.08654)",
        from_reference(asks),
    ),
    Metric(
        "end-of-turn rate",
        "higher",
        "0 to 1",
        "The share of answers that the model ended by itself before the token limit. "
        "Answers of which that is not known are left out.",
        "Defined here",
        ended,
    ),
)
