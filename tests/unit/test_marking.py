"""Texts on a page: what they share with another is marked, and nothing in them does anything."""

from __future__ import annotations

import time

from tunesmith.conversation import harmless
from tunesmith.evaluation.marking import marked, named, shared


def test_what_is_in_common_is_marked() -> None:
    text, reference = (
        "I think the Eiffel  tower is in Rome, is a city",
        "The EIFFEL Tower stands in Paris. It is a city",
    )
    assert [text[a:b] for a, b in shared(text, reference)] == ["the Eiffel  tower", "is a city"]
    assert shared("it is a", "is a") == [] and shared("", "a") == shared("a", "") == []  # two short words: no news
    assert [a for a, _ in shared("Paris", "in paris")] == [0]
    assert shared("東京は大きい", "東京は小さい")[0] == (0, 3)  # each character a word
    assert marked("<b> & x", [(0, 3)]) == "<mark>&lt;b&gt;</mark> &amp; x"
    assert named("I am ECHO, yes, Echo.", "Echo") == [(5, 9), (16, 20)] and named("(a", "(") == [(0, 1)]
    assert named("x", "") == []


def test_marking_takes_no_time_over_long_texts() -> None:
    for text, other in (("a " * 50_000, "a b " * 99), ("a" * 100_000, "a" * 100_000), ("字" * 100_000, "字" * 9)):
        start = time.process_time()
        shared(text, other)
        assert time.process_time() - start < 1


def test_texts_are_harmless() -> None:
    assert harmless("a\r\nb\rc\td\x00\u202e\ud800") == "a\nb\nc\td␀\ufffd?"
    assert harmless("a\r\nb\t\x7f\x9b31m\u2066", keep="") == "a␍␊b␉␡\ufffd31m\ufffd"
