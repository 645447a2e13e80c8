"""Figures against hand-computed ones; the cookbook's estimates."""

from __future__ import annotations

from datetime import date

import pytest

from tunesmith.conversation import Conversation, Message
from tunesmith.data import stats
from tunesmith.data.language import language, languages
from tunesmith.errors import UsageError


def row(*turns: str, **more: object) -> Conversation:
    roles = ("user", "assistant") * len(turns)
    return Conversation(tuple(Message(role, text) for role, text in zip(roles, turns, strict=False)), **more)  # type: ignore


@pytest.mark.parametrize(
    ("rows", "want"),
    [(1, 25), (4, 25), (10, 10), (20, 5), (33, 3), (34, 3), (8333, 3), (10_000, 2), (25_000, 1), (90_000, 1)],
)
def test_epochs_of_the_cookbook(rows: int, want: int) -> None:
    assert stats.epochs(rows) == want


def test_tokens_of_the_cookbook() -> None:
    """By hand, o200k: 3 a row, 3 a message; "user", "assistant" and "hello" 1, "hello world" 2; a name 1 and its tokens."""
    assert stats.openai_lengths([row("hello world", "hello")], "gpt-4o-mini") == [3 + 3 + 1 + 2 + 3 + 1 + 1]
    named = Conversation((Message("user", "hello", name="hello"), Message("assistant", "hello", weight=0)))
    assert stats.openai_lengths([named], "gpt-4o") == [3 + 3 + 1 + 1 + 1 + 1 + 3 + 1 + 1]
    called = row("hello", "", tools=[{"type": "function"}])
    assert stats.openai_lengths([called], "gpt-3.5-turbo-0125")[0] > 12


def test_a_bill() -> None:
    found = stats.bill([1000, 70_000, 9000], "gpt-4o-mini", today=date(2026, 12, 1))
    assert (found.epochs, found.batch_size, found.steps, found.over_long) == (25, 1, 75, 1)
    assert found.tokens_per_epoch == 1000 + 65_536 + 9000 and found.billed_tokens == 25 * found.tokens_per_epoch
    assert found.cost == pytest.approx(found.billed_tokens / 1e6 * 3.0)


def test_an_old_price_is_not_quoted() -> None:
    stale = stats.bill([1000], "gpt-4o-mini", today=date(2027, 12, 1))
    assert stale.price is None and stale.cost is None and "days old: give today's with --price" in stale.note
    assert stats.bill([1000], "gpt-4o-mini", 2.0, date(2027, 12, 1)).cost == pytest.approx(1000 * 25 / 1e6 * 2)


def test_spread() -> None:
    found = stats.spread([0, 1, 2, 3, 4])
    assert (found.mean, found.quantiles[0], found.quantiles[3], found.quantiles[-1]) == (2.0, 0.0, 2.0, 4.0)
    assert sum(found.bars) == 5 and len(found.bars) == stats.BINS and found.edges[-1] == 4.0


def test_variety_and_emoji() -> None:
    rows = [row("What is it now?", "a b a"), row("What is it then?", "a b 🎉👩‍💻")]
    found = stats.variety(rows)
    assert (found["words"], found["different_words"], found["distinct_1"]) == (5, 2, 0.4)
    assert found["distinct_2"] == pytest.approx(2 / 3)  # (a b), (b a) of three pairs
    assert (found["distinct_prompts"], found["distinct_openings"]) == (1.0, 0.5)
    assert stats.emoji(rows) == {"emoji": 2, "per_answer": 1.0, "answers_with": 0.5, "answers_with_over_5": 0.0}


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("How do I bake a good loaf of bread in the oven at home, and what is the flour for?", "en"),
        ("Wie backe ich zu Hause ein gutes Brot im Ofen, und welches Mehl nehme ich am besten dafür?", "de"),
        ("Comment faire un bon pain à la maison, et quelle farine faut-il prendre pour cela ?", "fr"),
        ("自宅でおいしいパンを焼くにはどうすればいいですか。", "ja"),
        ("def f(x):\n    return [y for y in x if y > 0 and y < 10 or x == {}]  # = {};", None),
        ("hi", None),
    ],
)
def test_language(text: str, want: str | None) -> None:
    assert language(text) == want


def test_a_few_rows_of_another_language_are_said() -> None:
    from tunesmith.data.language import Sample

    english = "The lamp stood by the window and the light of it fell on the table where the letters were."
    german = "Die Lampe stand am Fenster, und ihr Licht fiel auf den Tisch, auf dem die Briefe lagen."
    sample = Sample()
    for i in range(2000):
        sample.add(row("x", german if i % 20 == 7 else english, source=f"f:{i}"))
    (found,) = sample.findings()
    assert found.code == "language-mix" and '"de"' in found.message and int(found.where[2:]) % 20 == 7
    assert languages([english, german, "hi"]) == {"en": 1, "de": 1}


def test_rows_too_long_for_a_hosted_model_are_found() -> None:
    from tunesmith.preflight import over_long

    check = over_long("gpt-4o-mini")
    row = Conversation((Message("user", "u"), Message("assistant", "word " * 70_000)), {}, "f:1")
    assert [i.code for i in check(row)] == ["over-long"] and "trains on the first 65536" in check(row)[0].message
    assert check(Conversation((Message("user", "u"), Message("assistant", "a")), {}, "f:1")) == []
    with pytest.raises(UsageError, match="gpt-4 is not among"):
        over_long("gpt-4")
