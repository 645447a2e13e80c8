"""Metrics of compression: whether answers say it in fewer tokens, with the references' measure of emoji, and keep the terms.

Token counts are those of cl100k_base, whatever the model's own tokenizer: figures of different models can then be compared.
Fewer tokens are no merit by themselves (an empty answer saves them all): read the reduction beside the terms kept.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice

import numpy as np

from tunesmith.conversation import Conversation
from tunesmith.data.convert import emoji_in
from tunesmith.evaluation.chat import CODE, from_reference, per_answer
from tunesmith.evaluation.metric import Facts, Heard, Metric
from tunesmith.evaluation.stats import Array
from tunesmith.recipe import FACTS

SPAM = 5  # emoji: an answer with more is spam
LONGEST = 80  # characters of code in backticks that are one term; more is a program, of which the names count
MOST = 1000  # terms of a reference that are looked for: the time grows with their number times the answer's length
_LETTER = "0-9A-Za-z_\u00c0-\u024f"  # what goes on with a name; a Chinese character does not: "用GPU训练"
_URL = re.compile(r"://(?:www\.)?([\w.-]*)[^\s)>\]]*")
_CHUNK = re.compile(f"[{_LETTER}~./#+-]+")
_SHAPES = re.compile(
    r"""\w_\w | [a-z][A-Z]                          # snake_case; camelCase, PyTorch
      | ^--[a-z][\w-]+$                             # a flag
      | ^(?:~|\.{1,2})?/[\w.]{2}                    # a path from the root, from home, from here
      | ^\w{2,}(?:[./-]\w+)*\.(?:[a-z]\w*|[0-9]+)$  # python.org, os.path, src/train.py
    """,
    re.VERBOSE,
)
_MEASURE = re.compile(r"[0-9.]+[a-z-]*")  # 10, 1.5, 10th, 5pm, 3-day: a number and its unit
_ACRONYM = re.compile(r"[A-Z]{2,}s?")


def tokens(text: str) -> int:
    """cl100k_base tokens of a text; a lone surrogate, which has no encoding, counts as "?"."""
    return _encoding()(text.encode("utf-8", "replace").decode())


@cache
def _encoding() -> Callable[[str], int]:
    from rs_bpe.bpe import openai

    count: Callable[[str], int] = openai.cl100k_base().count
    return count


def reduction(sums: Array) -> Array:
    """Percent saved: 100 * (first - second) / first; nan where the first is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(100 * (sums[0] - sums[1]) / sums[0], np.float64)


def against_reference(row: Conversation, heard: Heard, _: Facts) -> tuple[float, ...] | None:
    """(tokens of the reference, tokens of the answer)."""
    if heard.said is None or not row.answer():
        return None
    return tokens(row.answer()), tokens(heard.said.text)


def against_original(row: Conversation, heard: Heard, _: Facts) -> tuple[float, ...] | None:
    """(metadata.original_tokens, tokens of the answer), of rows with one answer: the number is of the whole row."""
    original = row.metadata.get("original_tokens")
    if not isinstance(original, int | float) or isinstance(original, bool) or not 0 < original < math.inf:
        return None
    if heard.said is None or sum(m.role == "assistant" for m in row.messages) != 1:
        return None
    return float(original), tokens(heard.said.text)


def emoji_per_answer(_: Sequence[Conversation], heard: Sequence[Heard], __: Facts) -> float | None:
    counts = [emoji_in(h.said.text) for h in heard if h.said]
    return sum(counts) / len(counts) if counts else None


def spam(text: str) -> float:
    return float(emoji_in(text) > SPAM)


# ---- technical terms


@cache
def known() -> tuple[frozenset[str], frozenset[str]]:
    """(names in lower case, everyday words in capitals): facts/technical.toml."""
    with (FACTS / "technical.toml").open("rb") as stream:
        facts = tomllib.load(stream)
    return frozenset(facts["names"]), frozenset(facts["everyday"])


def terms(text: str) -> list[str]:
    """The technical terms of a text, case folded, each once, MOST at most. What one is, is told by its look:

    - code in single backticks, up to LONGEST characters, without closing "()";
    - elsewhere, fenced code included: names with an inner _, with a capital after a small letter, or of letters and digits;
      names with dots that end in a small letter or digit (python.org, train.py), paths, --flags; the host of an address;
    - commands and languages of facts/technical.toml;
    - two capitals and more, but for its everyday words, and not in a text that is in capitals throughout.

    Not: numbers, with or without a unit in small letters (10th, 5pm, 3-day); names outside ASCII.
    """
    marked = [code for span in CODE.findall(text) if (code := _marked(span))]
    rest = _URL.sub(r" \1 ", CODE.sub(lambda span: " " if _marked(span[0]) else span[0], text))
    shouts = sum(map(str.isupper, text)) > sum(map(str.islower, text))
    named = (term for chunk in _CHUNK.findall(rest) if chunk.isascii() for term in _named(chunk, shouts))
    return list(islice(dict.fromkeys(term.casefold() for term in [*marked, *named]), MOST))


def _marked(span: str) -> str:
    """The term that a span of code is, '' where it is none."""
    code = " ".join(span.strip("`").split()).removesuffix("()")
    return code if not span.startswith("```") and len(code) <= LONGEST and any(map(str.isalnum, code)) else ""


def _named(chunk: str, shouts: bool) -> Iterator[str]:
    """The terms in a run of letters, digits and ~./#+-_."""
    names, everyday = known()
    name = chunk.rstrip("./-_~").lstrip("_#+").removeprefix("www.")
    name = name if name.startswith("--") else name.lstrip("-")
    mixed = any(map(str.isalpha, name)) and any(map(str.isdigit, name))  # GPT-4, utf-8, 8GB, H2O
    if name.lower() in names or (mixed or _SHAPES.search(name)) and not _MEASURE.fullmatch(name):
        yield name
        return
    for part in re.split("[-/.~]", name):
        if part.lower() in names:
            yield part
        elif _ACRONYM.fullmatch(part) and not shouts and part.removesuffix("s") not in everyday:
            yield part.removesuffix("s")


def has(text: str, term: str) -> bool:
    """Whether a term stands in a text, both case folded, or its plural; not as a part of another name."""
    return term in text and bool(re.search(f"(?<![{_LETTER}]){re.escape(term)}s?(?![{_LETTER}])", text))


def terms_kept(row: Conversation, heard: Heard, _: Facts) -> tuple[float, ...] | None:
    """(technical terms of the reference that the answer has, those that the reference has)."""
    wanted = terms(row.answer())
    if heard.said is None or not wanted:
        return None
    text = " ".join(heard.said.text.casefold().split())
    return sum(has(text, term) for term in wanted), len(wanted)


METRICS = (
    Metric(
        "token reduction",
        "higher",
        "Up to 100, in percent; 0: as long as the references",
        "Tokens saved against the reference answers: 100 * (their tokens - the answers' tokens) / their tokens, over the sums of "
        "all rows, in cl100k_base tokens. Where the references are compressed themselves, 0 is what was to be learnt. "
        "An empty answer saves 100: read it beside the technical terms kept.",
        "Defined here",
        against_reference,
        reduction,
    ),
    Metric(
        "token reduction from originals",
        "higher",
        "Up to 100, in percent; 0: as long as before compression",
        "Tokens saved against the answers before they were compressed: 100 * (original - answers' tokens) / original, over the "
        "sums of the rows of one answer whose metadata has the number original_tokens; the answers in cl100k_base tokens.",
        "Defined here",
        against_original,
        reduction,
    ),
    Metric(
        "emoji distance",
        "lower",
        "0 and up, in emoji",
        "How many emoji an answer has more or fewer than its reference, the mean over answers. It grows with too many as with "
        "too few.",
        "Defined here",
        from_reference(emoji_in),
    ),
    Metric(
        "emoji per answer",
        "higher",
        "0 and up, in emoji",
        "The number of emoji in an answer, the mean over answers. Neither more nor fewer is better by itself: it has no "
        "verdict, and is there to be read with the emoji distance.",
        "Defined here",
        whole=emoji_per_answer,
    ),
    Metric(
        "over 5 emoji",
        "lower",
        "0 to 1",
        "The share of answers with more than five emoji.",
        "Defined here",
        per_answer(spam),
    ),
    Metric(
        "technical terms kept",
        "higher",
        "0 to 1",
        "The share of the references' technical terms that is also in the answers, over all rows. Terms are told by their "
        "look: code in backticks; names with an inner _ or capital, with dots, or of letters and digits; paths, flags, hosts; "
        "commands; acronyms. Case and a plural's s make no difference.",
        "Defined here",
        terms_kept,
    ),
)
