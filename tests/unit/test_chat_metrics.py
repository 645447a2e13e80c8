"""Metrics of chat against hand-computed values."""

from __future__ import annotations

import math
import time

import pytest

from tunesmith.conversation import Conversation, Message
from tunesmith.data.language import words
from tunesmith.evaluation import chat
from tunesmith.evaluation.chat import loops, self_repetition
from tunesmith.evaluation.metric import Facts, Heard, Said, measure

METRICS = {metric.name: metric for metric in chat.METRICS}


def row(reference: str = "yes") -> Conversation:
    return Conversation((Message("user", "u"), Message("assistant", reference)))


def said(text: str, ended: bool | None = None) -> Heard:
    return Heard(said=Said(text, ended))


def columns(name: str, heard: Heard, reference: str = "yes") -> tuple[float, ...] | None:
    found = METRICS[name].columns
    assert found
    return found(row(reference), heard, Facts())


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("Don't stop, naïve_x42!", ["don", "t", "stop", "naïve_x42"]),
        ("使用GPU训练。", ["使", "用", "gpu", "训", "练"]),  # Chinese has no spaces: a character each
        ("カタ・ひら", ["カ", "タ", "ひ", "ら"]),
        ("ที่นี่ดี", ["ที่", "นี่", "ดี"]),  # Thai: a letter with its vowel and tone
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),  # marks inside a word do not part it
        ("한국어 문장", ["한국어", "문장"]),
        ("cafe\u0301 👩‍💻 \x00 \u0301", ["cafe\u0301"]),
        ("", []),
    ],
)
def test_words_in_any_script(text: str, want: list[str]) -> None:
    assert words(text) == want


def test_distinct_within_an_answer() -> None:
    """ "a b a b c": 3 different of 5 words; of the pairs ab ba ab bc 3 of 4. One word has no pair, blank text no word."""
    assert columns("distinct-1", said("a b, A b. c")) == (3 / 5, 1)
    assert columns("distinct-2", said("a b, A b. c")) == (3 / 4, 1)
    assert columns("distinct-1", said("a")) == (1, 1) and columns("distinct-2", said("a")) is None
    assert columns("distinct-1", said(" ?! ")) is None and columns("distinct-1", Heard()) is None


def test_distinct_is_the_mean_over_the_rows_that_both_answer() -> None:
    """Rows: base 1/2 and 2/2, tuned 2/2 and 1/3; the third has no word of the tuned model's. Means 3/4 and 2/3."""
    base, tuned = [said("a a"), said("a b"), said("a a a")], [said("a b"), said("a a a"), said("")]
    found = measure(METRICS["distinct-1"], [row()] * 3, base, tuned, Facts())
    assert found and (found.base, found.tuned, found.rows) == (pytest.approx(3 / 4), pytest.approx(2 / 3), 2)
    assert found.low is not None


def test_distinct_over_all_answers_counts_a_pair_once() -> None:
    """Each answer is all different; together ab bc ab are 2 of 3 pairs, and no pair reaches over the end ("c a")."""
    base, tuned = [said("a b c"), said("a b"), Heard()], [said("x y"), said("x y"), Heard()]  # the third was not asked
    found = measure(METRICS["distinct-2 over all answers"], [row()] * 3, base, tuned, Facts())
    assert found and (found.base, found.tuned, found.rows) == (pytest.approx(2 / 3), 1 / 2, 2)
    assert found.low is None and found.verdict == ""
    whole = METRICS["distinct-2 over all answers"].whole
    assert whole and whole([row()], [said("a")], Facts()) is None and whole([row()], [Heard()], Facts()) is None


def test_self_repetition() -> None:
    """abcd bcda cdab dabc abcd: of 5 runs of four the last stood there before. An answer that loops: 1 of 97 is new."""
    assert columns("self-repetition", said("a b c d a b c d")) == (pytest.approx(1 / 5), 1)
    assert columns("self-repetition", said("no " * 100)) == (pytest.approx(96 / 97), 1)
    assert columns("self-repetition", said("no no no")) == (0, 1) and columns("self-repetition", said("")) == (0, 1)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("48 / 2 = " + "0" * 24, True),
        ("48 / 2 = " + "0" * 12, False),
        ("It is " + "-10" * 18 + "-120" * 5 + "-12=120>>120-120", True),  # one that wavers
        ("1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15", False),
        ("It is 10" + "-10" * 8, True),
        ("A box. " + "The box is by the door. " * 4, True),
        ("It is on the shelf. " + "The box is by the door. " * 2, False),  # said twice is no loop
        ("The box is by the door. " * 9 + "It is green.", False),  # it came out of it
        ("", False),
    ],
)
def test_an_ending_that_loops(text: str, want: bool) -> None:
    assert loops(text) is want
    assert self_repetition("0" * 99) == 0  # one word: what words do not show


def test_turn_coherence_is_nats_a_token_over_all_rows() -> None:
    """(12 - 10) / 4 alone; with a second row of 1 nat on 6 tokens (2 + 1) / (4 + 6) = 0.3. The tuned model: (4 + 2) / 10."""
    base = [Heard(context=(10, 12, 4)), Heard(context=(3, 4, 6)), Heard(loss=3, tokens=6)]
    tuned = [Heard(context=(8, 12, 4)), Heard(context=(3, 5, 6)), Heard(context=(2, 9, 6))]
    found = measure(METRICS["turn coherence"], [row()] * 3, base, tuned, Facts())
    assert found and (found.base, found.tuned, found.rows) == (pytest.approx(0.3), pytest.approx(0.6), 2)
    assert columns("turn coherence", Heard(context=(0.0, 0.0, 0))) is None  # no tokens
    assert columns("turn coherence", said("text")) is None


def test_length_imbalance() -> None:
    """3 words against 7: ln 4 - ln 8 = -ln 2, whichever is the longer; an empty answer against 7: ln 8."""
    seven = "one two three four five six seven"
    assert columns("length imbalance", said("a b c"), seven) == (pytest.approx(math.log(2)), 1)
    assert columns("length imbalance", said(seven), "a b c") == (pytest.approx(math.log(2)), 1)
    assert columns("length imbalance", said(""), seven) == (pytest.approx(math.log(8)), 1)
    assert columns("length imbalance", said("a"), "") is None and columns("length imbalance", Heard(), "a") is None


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("How are you?", 1),
        ('He said "why?" And left', 1),
        ("Really?! **Sure?**", 1),
        ("元気ですか？はい", 1),
        ("كيف حالك؟", 1),
        ("See https://a.org/?q=1 and `a ? b` then.", 0),
        ("```\nx = y ? 1 : 2\n```\nDone.", 0),
        ("```\nwho?", 0),  # code that was cut off
        ("Really??", 1),
        ("Take x?.y or f%3F?&z.", 0),
        ("No.", 0),
        ("", 0),
    ],
)
def test_questions(text: str, want: float) -> None:
    assert chat.asks(text) == want


def test_question_imbalance_is_of_both_kinds() -> None:
    assert columns("question imbalance", said("And you?"), "Fine.") == (1, 1)
    assert columns("question imbalance", said("Fine."), "And you?") == (1, 1)
    assert columns("question imbalance", said("You?"), "And you?") == (0, 1)


def test_end_of_turn_rate_leaves_out_what_is_not_known() -> None:
    """Of three rows one is not known of the base: 1 of 2 and 2 of 2."""
    base, tuned = [said("a", True), said("a", False), said("a")], [said("a", True), said("a", True), said("a", False)]
    found = measure(METRICS["end-of-turn rate"], [row()] * 3, base, tuned, Facts())
    assert found and (found.base, found.tuned, found.rows) == (0.5, 1.0, 2)
    assert columns("end-of-turn rate", Heard()) is None


@pytest.mark.parametrize(
    "text",
    ["\x00" * 100_000, "a" * 100_000, "`" * 99_999, "?" * 100_000, "漢" * 100_000, "a\u0301" * 50_000, "\ud800", "🙂"],
)
def test_any_text_has_its_figures_in_no_time(text: str) -> None:
    start = time.perf_counter()
    for metric in chat.METRICS:
        if metric.columns:
            found = metric.columns(row("a reference"), said(text, True), Facts())
            assert found is None or all(math.isfinite(value) for value in found)
    assert time.perf_counter() - start < 10  # 1 s where the machine is free
