"""Expressions that choose rows."""

from __future__ import annotations

import pytest

from tunesmith.conversation import Conversation, Message
from tunesmith.data.where import where
from tunesmith.errors import UsageError

ROW = Conversation(
    (Message("system", "Be kind."), Message("user", "How are you?"), Message("assistant", "Well, thank you.")),
    {"augmented": True, "score": 3.5, "tags": ["a", "b"], "deep": {"er": "x"}, "odd key": 1},
    "f.jsonl:7",
)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("metadata.augmented == true", True),
        ("metadata.augmented", True),
        ("not metadata.augmented", False),
        ("metadata.score > 3 and metadata.score <= 3.5", True),
        ("metadata.score == -1 or turns == 1", True),
        ("'a' in metadata.tags", True),
        ("'c' not in metadata.tags", True),
        ("metadata.deep.er == 'x'", True),
        ("metadata['odd key'] == 1", True),
        ("metadata.none == null", True),
        ("metadata.none.deeper == null", True),
        ("metadata.none > 3", False),
        ("metadata.score > 'text'", False),
        ("'thank' in answer and 'How' in prompt and system == 'Be kind.'", True),
        ("source == 'f.jsonl:7'", True),
        ("turns in [2, 3]", False),
        ("(turns == 2 or turns == 1) and true", True),
    ],
)
def test_expression(text: str, want: bool) -> None:
    assert where(text)(ROW) is want


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read"),
        ("metadata.a ==", "cannot be read"),
        ("a b", "cannot be read"),
        ("meta.a == 1", 'no field "meta"; did you mean'),
        ("open('x')", "not part of the language"),
        ("metadata.__class__()", "not part of the language"),
        ("1 + 1", "not part of the language"),
        ("[x for x in metadata]", "not part of the language"),
        ("lambda: 1", "not part of the language"),
        ("f'{turns}'", "not part of the language"),
        ("turns if turns else 0", "not part of the language"),
        ("1 < turns < 3", "not part of the language"),
        ("(" * 300 + "1" + ")" * 300, "cannot be read"),
    ],
)
def test_what_is_not_in_the_language(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        where(text)
    assert words.split(";")[0] in str(caught.value) and "--where" in str(caught.value)


def test_nothing_is_reached_by_an_attribute() -> None:
    """Fields are looked up in objects of the row alone: a Python attribute is no field."""
    assert where("metadata.__class__ == null and metadata.items == null")(ROW) is True
