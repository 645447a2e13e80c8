"""Two texts in a terminal: what stands on the screen at the end is what was written, whatever scrolled meanwhile."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.cli.columns import Columns, cut, wide, wrap


class Screen:
    """A terminal of so many columns and lines, as far as it is used here; `lines` with all that has scrolled away."""

    def __init__(self, columns: int, height: int) -> None:
        self.columns, self.height = columns, height
        self.lines: list[dict[int, str]] = [{}]
        self.row = self.column = 0

    def write(self, text: str) -> None:
        for code, number, letter, sign in re.findall(r"(\x1b\[(\??\d*)([A-Za-z]))|([\s\S])", text):
            if letter == "A":
                top = max(0, len(self.lines) - self.height)
                assert self.row - int(number) >= top, "what has scrolled away cannot be reached"
                self.row -= int(number)
            elif letter == "G":
                self.column = int(number) - 1
            elif letter == "K":
                line = self.lines[self.row]
                self.lines[self.row] = {at: s for at, s in line.items() if at < self.column}
            elif code:
                assert code in ("\x1b[?7l", "\x1b[?7h"), code
            elif sign == "\r":
                self.column = 0
            elif sign == "\n":
                self.row, self.column = self.row + 1, 0
                if self.row == len(self.lines):
                    self.lines.append({})
            else:
                assert sign.isprintable() or sign == "\u200d", repr(sign)
                assert self.column < self.columns
                self.lines[self.row][self.column] = sign
                self.column += wide(sign)

    def text(self) -> list[str]:
        found = []
        for line in self.lines:
            shown, at = "", 0
            for place, sign in sorted(line.items()):
                shown += " " * (place - at) + sign
                at = place + wide(sign)
            found.append(shown.rstrip())
        return found


def cells(screen: Screen, columns: int) -> list[list[str]]:
    """The texts' rows, below the titles."""
    found = [line.partition("│") for line in screen.text()[2:-1]]
    assert all(bar for _, bar, _ in found)
    return [[left.rstrip() for left, _, _ in found], [right.strip() for _, _, right in found]]


def test_wrap() -> None:
    assert wrap("the quick brown fox", 9) == ["the quick", "brown fox"]
    assert wrap("the quick brown fox", 10) == ["the quick", "brown fox"]
    assert wrap("a\n\nb", 9) == ["a", "", "b"] and wrap("", 9) == [""] and wrap("a\n", 9) == ["a", ""]
    assert wrap("the  quick   ", 3) == ["the", "qui", "ck   "] and wrap("the ", 3) == ["the "]
    assert wrap("abcdefghij k", 4) == ["abcd", "efgh", "ij k"]
    assert wrap("你好吗朋友", 4) == ["你好", "吗朋", "友"]
    assert cut("你好", 1) == ("你", "好") and cut("ab", 9) == ("ab", "")
    assert (wide("ab"), wide("你"), wide("e\u0301"), wide("😀"), wide("❤\ufe0f")) == (2, 2, 1, 2, 2)


@given(st.text(st.sampled_from("ab cd\n 你"), max_size=60), st.lists(st.integers(0, 60), max_size=6), st.integers(2, 9))
def test_wrapping_as_it_comes_loses_nothing(text: str, cuts: list[int], columns: int) -> None:
    """Rows fit, only the last of them changes as more comes, and all signs but spaces at the breaks are there."""
    rows = [""]
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), 60], strict=True):
        before = rows[:-1]
        rows[-1:] = wrap(rows[-1] + text[start:end], columns)
        assert rows[: len(before)] == before
    assert all(wide(row.rstrip()) <= max(columns, 2) for row in rows)
    assert "".join("".join(rows).split()) == "".join(text.split())
    assert len(rows) > text.count("\n")


@pytest.mark.parametrize("seed", range(60))
def test_what_is_drawn_is_what_was_said(seed: int) -> None:
    """Random texts of differing lengths, in pieces, on screens of few lines: nothing lost, nothing twice, nothing astray."""
    chance = random.Random(seed)
    columns, height = chance.choice([80, 81, 120]), chance.choice([3, 5, 24])
    words = ["word", "a", "longer-word", "\n", "x" * 50, "你好", "é", "😀", "1"]
    texts = [" ".join(chance.choices(words, k=chance.choice([0, 3, 60, 200]))).strip() for _ in range(2)]
    screen, writes = Screen(columns, height), 0

    def write(text: str) -> None:
        nonlocal writes
        writes += 1
        screen.write(text)

    shown = Columns(["tuned", "base"], columns, height, write)
    left = [list(re.findall(r"[\s\S]{1,7}", text)) for text in texts]
    lead = chance.choice([0.5, 0.9, 1.0])  # how far the first is ahead
    while any(left):
        side = int(chance.random() > lead) if all(left) else int(not left[0])
        shown.add(side, left[side].pop(0))
        if not left[side]:
            shown.end(side)
    shown.close()
    assert screen.text()[0].split() == ["tuned", "│", "base"] and "┼" in screen.text()[1]
    half = (columns - 3) // 2
    for text, found in zip(texts, cells(screen, columns), strict=True):
        assert "".join("".join(found).split()) == "".join(text.split())
        assert [row.strip() for row in found if row.strip()] == [row.strip() for row in wrap(text, half) if row.strip()]


def test_only_what_changes_is_drawn() -> None:
    """One write for a piece, from the first row that changes on; none where nothing does: so nothing flickers."""
    said: list[str] = []
    shown = Columns(["a", "b"], 80, 24, said.append)
    shown.add(0, "first row\nsecond")
    said.clear()
    shown.add(0, " more")
    assert len(said) == 1 and "second more" in said[0] and "first" not in said[0]
    shown.add(1, "b")
    assert len(said) == 2 and "first row" in said[1] and "\x1b[1A" in said[1]
    shown.add(1, "")
    assert len(said) == 2


def test_an_answer_does_not_steer_the_terminal() -> None:
    screen = Screen(80, 24)
    shown = Columns(["a\x1b[2J\nb", "c"], 80, 24, screen.write)
    shown.add(0, "\x1b[2Jred \x9b31m \x07 a\tb\rc \u202eback\x00")
    shown.add(1, "\x1b]0;title\x07")
    shown.close()
    assert screen.text()[2].startswith("␛[2Jred �31m ␇ a    bc �back␀ ")
    assert screen.text()[2].endswith("│ ␛]0;title␇")
