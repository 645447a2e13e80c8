"""Texts of models and data sets as a page shows them: harmless, cut where they are long, what they share with another marked."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

from markupsafe import Markup, escape

from tunesmith.data.language import word_spans

LONGEST = 4000  # characters of a text that are shown
COMPARED = (
    200  # words of each text that are compared: the time grows with their product, and no one reads on marked so far
)
RUN, LONG = 3, 5  # words in a row, or characters of one of them: "is a" and "and I" are in common with any text

Span = tuple[int, int]


def shared(text: str, other: str) -> list[Span]:
    """Where a text has words in common with another one, in the same order: runs of RUN words, or with one of LONG
    characters. Case does not count, nor what stands between words. Of COMPARED words of each."""
    spans = word_spans(text)[:COMPARED]
    words = [text[a:b].casefold() for a, b in spans]
    others = [other[a:b].casefold() for a, b in word_spans(other)[:COMPARED]]
    found = SequenceMatcher(None, words, others).get_matching_blocks()
    return [
        (spans[run.a][0], spans[run.a + run.size - 1][1])
        for run in found
        if run.size >= RUN or any(len(word) >= LONG for word in words[run.a : run.a + run.size])
    ]


def named(text: str, name: str) -> list[Span]:
    """Where a name stands in a text, in any case."""
    return [found.span() for found in re.finditer(re.escape(name), text, re.IGNORECASE)] if name else []


def marked(text: str, spans: list[Span]) -> Markup:
    """The text, escaped, with <mark> around the spans, which follow one another."""
    parts, at = [], 0
    for first, last in spans:
        parts += [escape(text[at:first]), Markup("<mark>"), escape(text[first:last]), Markup("</mark>")]
        at = last
    return Markup("").join([*parts, escape(text[at:])])
