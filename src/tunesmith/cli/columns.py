"""Texts side by side in a terminal, drawn as they grow.

Of a text that is being written only the last row can still change. Rows that are done in all texts are left to scroll away;
those below are drawn anew where they differ, in one write, so that nothing flickers. A text that is far ahead of another is
held back to what the screen can show: what has scrolled out of it can no longer be written to.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

from tunesmith.conversation import harmless

LEAST = 80  # columns of a terminal in which two texts stand side by side
GAP = " │ "
_PIECES = re.compile(r"\n| +|[^\n ]+")


def drawable(text: str) -> str:
    """A piece of a model's answer as a terminal may have it."""
    return harmless(text.replace("\r", "").replace("\t", "    "))


def wide(text: str) -> int:
    """Columns that a text takes; where terminals differ, the greater number."""
    if text.isascii():
        return len(text)
    return sum(map(_wide, text))


def _wide(sign: str) -> int:
    if unicodedata.east_asian_width(sign) in "WF" or sign == "\ufe0f":  # the latter widens the sign before it
        return 1 + (sign != "\ufe0f")
    return int(unicodedata.category(sign) not in ("Mn", "Me", "Cf"))


def cut(text: str, columns: int) -> tuple[str, str]:
    """As much of a text as so many columns hold, one sign at least, and the rest."""
    at = used = 0
    while at < len(text) and (at == 0 or used + _wide(text[at]) <= columns):
        used, at = used + _wide(text[at]), at + 1
    return text[:at], text[at:]


def wrap(text: str, columns: int) -> list[str]:
    """Rows of so many columns at most (spaces at their end not counted), broken at spaces, longer words where they have to be.
    The last row is unfinished: wrapping it again with more text behind gives what wrapping the whole does."""
    rows, row, used = [], "", 0
    for piece in _PIECES.findall(text):
        if piece == "\n":
            rows.append(row.rstrip())
            row, used = "", 0
            continue
        size = wide(piece)
        if used + size > columns and not piece.isspace():
            if row.strip():
                rows.append(row.rstrip())
            row, used = "", 0
            while size > columns:
                head, piece = cut(piece, columns)
                rows.append(head)
                size = wide(piece)
        row, used = row + piece, used + size
    return [*rows, row]


class Columns:
    """A terminal of so many `columns` and `lines`, in which texts with titles stand side by side; `write` writes to it.

    `add` to them, tell which are at their `end`, and `close`. The window is taken to keep its size meanwhile.
    """

    def __init__(self, titles: Sequence[str], columns: int, lines: int, write: Callable[[str], object]) -> None:
        self._width = (columns - len(GAP) * (len(titles) - 1)) // len(titles)
        self._lines, self._write = max(2, lines), write
        self._rows = [[""] for _ in titles]
        self._open = {*range(len(titles))}
        self._done = 0  # rows that can no longer change
        self._drawn: list[str] = []  # those below, as they stand on the screen, the cursor behind the last
        heads = [cut(drawable(title).replace("\n", " "), self._width)[0] for title in titles]
        write(self._line(heads) + "\n" + "─┼─".join("─" * self._width for _ in titles))

    def add(self, side: int, piece: str) -> None:
        """More of a text."""
        rows = self._rows[side]
        if rows == [""]:
            piece = piece.lstrip()
        rows[-1:] = wrap(rows[-1] + drawable(piece), self._width)
        self._draw(self._done + self._lines - 1)

    def end(self, side: int) -> None:
        """Nothing more comes of a text."""
        self._open.discard(side)
        self._draw(self._done + self._lines - 1)

    def close(self) -> None:
        """Draw what is left, and go to the next line."""
        self._open.clear()
        self._draw(max(map(len, self._rows)))
        self._write("\n")

    def _draw(self, upto: int) -> None:
        """Draw rows up to a number of them."""
        upto = min(upto, max(map(len, self._rows)))
        cells = [[rows[i].rstrip() if i < len(rows) else "" for rows in self._rows] for i in range(self._done, upto)]
        now = [self._line(row) for row in cells]
        same = next((i for i, (a, b) in enumerate(zip(now, self._drawn, strict=False)) if a != b), None)
        first = min(len(now), len(self._drawn)) if same is None else same
        if first < len(now):
            up = len(self._drawn) - 1 - first
            go = "\n" if up < 0 else f"\r\x1b[{up}A" if up else "\r"
            self._write(
                f"\x1b[?7l{go}" + "\n".join(now[first:]) + "\x1b[?7h"
            )  # a sign too wide does not break the line
        self._drawn = now
        settled = min([upto, *(len(self._rows[side]) - 1 for side in self._open)])
        self._drawn = self._drawn[settled - self._done :]
        self._done = settled

    def _line(self, cells: Sequence[str]) -> str:
        """A row of the screen. Each cell is at its place by number, whatever the terminal thinks of the signs before it."""
        line = cells[0] + "\x1b[K"
        for i, cell in enumerate(cells[1:], 1):
            line += f"\x1b[{i * (self._width + len(GAP)) - len(GAP) + 1}G{GAP}{cell}"
        return line
