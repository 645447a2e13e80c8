"""The terms of a domain, mined from training answers, and how many of them a model's answers have.

Perplexity of the domain is the perplexity that every evaluation has, for its held-out rows are the domain's: no other metric.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from tunesmith.conversation import Conversation
from tunesmith.evaluation.metric import Facts, Heard, Metric
from tunesmith.recipe import FACTS

GENERAL = FACTS / "general_words.txt"  # made by tools/general_words.py
LOOK = 4_000_000  # characters of training answers that are looked at, spread evenly
LONGEST = 3  # words in a term
FEWEST = 2  # answers that have a term: in one alone it may be chance
KEYNESS = 10.83  # log-likelihood that chance exceeds once in 1000 (chi-squared, one degree of freedom)
FREQUENT = 7e-4  # of general text: a word said more often ("most", "few", "new") is in no term
KNOWN = 0.5  # of the words have to be in the general list: else the text is not English, where all would seem typical
_TOKEN = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|\d+|[^\w\s]")

Term = tuple[str, ...]  # words as `singular` has them


def mine_terms(answers: Sequence[str], most: int = 200) -> list[str]:
    """Terms of the domain, the most typical first: words, and phrases of two or three words, that at least two answers have.

    A word is typical by its `keyness` against general English, unless it is frequent there. A phrase has a typical word and no
    frequent one, and counts as never said in general. What stands only inside a longer term is left out (as in C-value, Frantzi
    et al. 2000). [] where the text is not English.
    """
    said = [_TOKEN.findall(answer.casefold()) for answer in _spread(answers)]
    surfaces = Counter(token for text in said for token in text if token[0].isalpha())
    texts = [[singular(token) for token in text] for text in said]
    counts, (general, total) = Counter(word for text in texts for word in text if word != "|"), general_words()
    size = counts.total()
    if sum(n for word, n in counts.items() if word in general) <= KNOWN * size:
        return []
    frequent = {word for word, n in general.items() if n > FREQUENT * total} | {"|"}
    numbers = _counted(texts, 1, lambda term: len(term[0]) > 2 and frequent.isdisjoint(term))
    keys = {term: keyness(n, size, general.get(term[0], 0), total) for term, n in numbers.items()}
    keys = {term: key for term, key in keys.items() if key > KEYNESS}
    typical = {term[0] for term in keys}
    for length in range(2, LONGEST + 1):
        phrases = _counted(texts, length, lambda term: not typical.isdisjoint(term) and frequent.isdisjoint(term))
        numbers |= phrases
        keys |= {term: keyness(n, size, 0, total) for term, n in phrases.items()}
    inner = {(part, numbers[term]) for term in keys for part in _parts(term)}
    kept = [term for term in keys if (term, numbers[term]) not in inner]
    kept.sort(key=lambda term: (-keys[term], term))
    names = _names(surfaces)
    return [" ".join(names[word] for word in term) for term in kept[:most]]


def keyness(here: int, size: int, general: int, total: int) -> float:
    """Log-likelihood ratio of a word that is said `here` times in `size` words and `general` times in `total` (Dunning 1993, as
    Rayson and Garside 2000 write it for two corpora): 2 (a ln(a / E) + b ln(b / F)); 0 where it is not more frequent here."""
    if here * total <= general * size:
        return 0.0
    rate = (here + general) / (size + total)
    seen = general * math.log(general / (rate * total)) if general else 0.0
    return 2 * (here * math.log(here / (rate * size)) + seen)


def recall(answer: str, reference: str, terms: Sequence[str]) -> tuple[int, int]:
    """(terms of the reference that the answer has, terms of the reference): each once, singular or plural."""
    wanted, said = _line(reference), _line(answer)
    known = [term for term in {_line(term) for term in terms} if term in wanted]
    return sum(term in said for term in known), len(known)


@cache
def singular(token: str) -> str:
    """A word without "'s" and a plural's ending, roughly: alike for both forms. "|" for a figure or a mark."""
    if not token[0].isalpha():
        return "|"
    word = token.removesuffix("'s").removesuffix("’s")
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes", "zzes")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def tokens(text: str) -> list[str]:
    """Words in small letters and the singular; "|" for each figure and mark."""
    return [singular(token) for token in _TOKEN.findall(text.casefold())]


def _line(text: str) -> str:
    return f" {' '.join(tokens(text))} "


@cache
def general_words() -> tuple[dict[str, int], int]:
    """How often words are said in general English, and the number of all words there."""
    first, *lines = GENERAL.read_text(encoding="utf-8").splitlines()
    return {word: int(line.split(" ", 1)[0]) for line in lines for word in line.split()[1:]}, int(first.split()[0])


def _spread(answers: Sequence[str]) -> Iterator[str]:
    """LOOK characters of answers at most: all of them, or every so many-th."""
    step, left = -(-sum(map(len, answers)) // LOOK), LOOK
    for answer in answers[:: max(1, step)]:
        yield answer[: max(0, left)]
        left -= len(answer)


def _counted(texts: list[list[str]], length: int, wanted: Callable[[Term], bool]) -> dict[Term, int]:
    """How often each run of so many words is said, of those that are wanted and that FEWEST texts have."""
    counts: Counter[Term] = Counter()
    within: Counter[Term] = Counter()
    for text in texts:
        runs = [run for run in zip(*(text[i:] for i in range(length)), strict=False) if wanted(run)]
        counts.update(runs)
        within.update(set(runs))
    return {run: n for run, n in counts.items() if within[run] >= FEWEST}


def _parts(term: Term) -> list[Term]:
    """The shorter runs of words in a term."""
    return [term[i : i + length] for length in range(1, len(term)) for i in range(len(term) - length + 1)]


def _names(surfaces: Counter[str]) -> dict[str, str]:
    """How to write each word: as it is in the singular where it was said so, else in its most frequent form."""
    names: dict[str, str] = {}
    for surface, _ in surfaces.most_common():
        word = singular(surface)
        if word not in names or surface == word:
            names[word] = surface
    return names


def _recalled(row: Conversation, heard: Heard, facts: Facts) -> tuple[float, float] | None:
    if heard.said is None:
        return None
    hits, possible = recall(heard.said.text, row.answer(), facts.terms)
    return (hits, possible) if possible else None


METRICS = (
    Metric(
        "term recall",
        "higher",
        "0 to 1",
        "The share of the domain's terms in the references that the answers have too, over all rows. Terms are mined from the "
        "training answers: words and phrases far more frequent there than in general English. Absent where the training answers "
        "are not English.",
        "Defined here; terms by the log-likelihood ratio of Dunning 1993, for two corpora as Rayson and Garside 2000",
        _recalled,
    ),
)
