"""Near duplicates: planted ones are found, others are not; equal rows, contradictions and leaks."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conftest import STARTER, write
from tunesmith.data.check import load
from tunesmith.data.dedup import BINS, likeness, pairs, sketches
from tunesmith.data.split import leaks, split

WORDS = sorted(
    {
        w
        for line in (STARTER / "heldout.jsonl").read_text().splitlines()
        for w in json.loads(line)["messages"][1]["content"].split()
    }
)


def swap(text: str, rng: random.Random) -> str:
    words = text.split()
    for _ in range(2):
        i, j = rng.randrange(len(words)), rng.randrange(len(words))
        words[i], words[j] = words[j], words[i]
    return " ".join(words)


def shout(text: str, rng: random.Random) -> str:
    return text.upper()


def punctuate(text: str, rng: random.Random) -> str:
    return "".join(rng.choice(("!", " ...", ";")) if c in ",." else c for c in text) + "?"


def edit(text: str, rng: random.Random) -> str:
    """5 % of the letters changed, inserted or deleted."""
    letters = list(text)
    for _ in range(max(1, len(letters) // 20)):
        i, c = rng.randrange(len(letters)), rng.choice(string.ascii_lowercase)
        letters[i : i + 1] = rng.choice(([c], [c, letters[i]], []))
    return "".join(letters)


@pytest.mark.parametrize("change", [swap, shout, punctuate, edit])
def test_planted_ones_are_found(change: Callable[[str, random.Random], str]) -> None:
    """3,000 rows of 12 to 120 words, 300 of them with a changed copy: recall 95 % and precision 99 % at least."""
    rng = random.Random(1)
    rows = [" ".join(rng.choices(WORDS, k=rng.randint(12, 120))) for _ in range(3000)]
    chosen = rng.sample(range(3000), 300)
    want = {(i, 3000 + n) for n, i in enumerate(chosen)}
    found = {(a, b) for a, b, _ in pairs(sketches([*rows, *(change(rows[i], rng) for i in chosen)]))}
    assert len(found & want) >= 0.95 * len(want)
    assert len(found & want) >= 0.99 * len(found)


def test_likeness_is_the_jaccard_overlap() -> None:
    """Of 5-byte shingles, to within four standard errors of 0.028."""
    rng = random.Random(2)
    for _ in range(30):
        words = rng.choices(WORDS, k=60)
        a, b = " ".join(words).lower(), " ".join(words[: rng.randint(5, 55)] + rng.choices(WORDS, k=20)).lower()
        plain = [" ".join("".join(c if c.isalnum() else " " for c in t).split()) for t in (a, b)]
        one, two = ({t[i : i + 5] for i in range(len(t) - 4)} for t in plain)
        found = sketches([a, b])
        assert likeness(found[:1], found[1:])[0] == pytest.approx(len(one & two) / len(one | two), abs=0.115)


def test_short_texts_are_not_alike_by_chance() -> None:
    """A text of 40 to 90 bytes fills a fifth of the bins; what the others borrow must not make it like every other."""
    rng = random.Random(5)
    found = sketches([" ".join(rng.choices(WORDS, k=10))[: rng.randint(45, 90)] for _ in range(400)])
    assert likeness(found[::2], found[1::2]).max() < 0.4


def test_sketches_depend_on_the_text_alone() -> None:
    rng = random.Random(3)
    rows = [" ".join(rng.choices(WORDS, k=rng.randint(1, 300))) for _ in range(500)] + ["", "a", "é" * 50, "x\0y" * 30]
    together = sketches(rows)
    assert together.shape == (504, BINS) and together.dtype == np.uint8
    assert all((sketches([row])[0] == sketch).all() for row, sketch in zip(rows, together, strict=True))
    assert not together[500:502].any() and sketches([]).shape == (0, BINS)
    assert list(pairs(sketches(["", "a", "short"]))) == []


def test_a_group_is_connected_once() -> None:
    text = " ".join(WORDS[:60])
    found = list(pairs(sketches([text, text + " more", "and " + text, text.upper()])))
    assert len(found) == 3 and all(a < b and alike > 0.8 for a, b, alike in found)


def test_duplicates_contradictions_and_leaks(tmp_path: Path) -> None:
    long = " ".join(WORDS[:40])
    rows = [
        {"prompt": "One?", "completion": long},
        {"prompt": "Two?", "completion": "2"},
        {"prompt": "one? ", "completion": "Another answer."},
        {"prompt": "Two?", "completion": "2"},
        {"prompt": "Three?", "completion": long.upper()},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    found = {(i.code, i.where.rpartition(":")[2]): i.message for i in load(str(path)).issues}
    assert found["contradiction", "3"].endswith(f"{path}:1") and found["duplicate", "4"] == f"the same as {path}:2"
    assert "alike to" in found["near-duplicate", "5"] and found["near-duplicate", "5"].endswith(f"{path}:1")
    assert not load(str(path), near_duplicates=False).counts.keys() & {"near-duplicate"}
    write(tmp_path / "b.jsonl", rows[:1])
    assert load(str(tmp_path)).counts["leak"] == 1


def test_near_duplicates_stay_on_one_side(tmp_path: Path) -> None:
    rng = random.Random(4)
    rows = []
    for i in range(100):
        text = " ".join(rng.choices(WORDS, k=30))
        rows += [{"prompt": f"{i}?", "completion": text}, {"prompt": f"{i} again?", "completion": text.upper() + "!"}]
    loaded = load(str(write(tmp_path / "d.jsonl", rows))).conversations
    parts = split(loaded, 0.2, 0.1)
    side = {row.source: name for name, part in parts.items() for row in part}
    names = [row.source for row in loaded]
    assert all(side[a] == side[b] for a, b in zip(names[::2], names[1::2], strict=True))
    assert [len(part) for part in parts.values()] == [140, 40, 20] and leaks(parts) == []
    straddling = leaks({"train": [loaded[0], loaded[2]], "valid": [], "test": [loaded[1]]})
    assert len(straddling) == 1 and straddling[0].code == "leak" and straddling[0].where == names[1]
    assert straddling[0].message.startswith("(test) is") and names[0] in straddling[0].message


def test_a_template_may_be_split() -> None:
    """Rows that differ in a number alone would else be one group, and nothing could be held out."""
    from tunesmith.conversation import Conversation, Message

    asks = [f"How many apples are left in the basket when {i} of the {i * 7} apples were eaten?" for i in range(100)]
    rows = [Conversation((Message("user", a), Message("assistant", str(i)))) for i, a in enumerate(asks)]
    assert [len(part) for part in split(rows, 0.1, 0.1).values()] == [80, 10, 10]
