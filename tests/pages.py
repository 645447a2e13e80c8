"""A page of docs/coming-from: the rows of its tables, and the tests that do them."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest

from conftest import ROOT


class Row(NamedTuple):
    """A row of a table. `there`, `here`, `why`: its cells, as Markdown."""

    there: str
    here: str
    why: str

    @property
    def code(self) -> list[str]:
        """What `here` sets in code."""
        return [text.replace("\\|", "|") for text in re.findall(r"`([^`]+)`", self.here)]

    @property
    def command(self) -> str:
        """The one command of `here`."""
        (found,) = (text for text in self.code if text.startswith("tunesmith "))
        return found


class Page:
    """`rows` by their first cell. Each table of a page has three columns: there, here, and what differs."""

    def __init__(self, name: str) -> None:
        self.text = (ROOT / "docs" / "coming-from" / name).read_text(encoding="utf-8")
        self.rows: dict[str, Row] = {}
        self._done: set[str] = set()
        for line in self.text.splitlines():
            if not line.startswith("| ") or re.match(r"\| (There|In the) ", line):
                continue
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            row = Row(*cells)
            assert row.there not in self.rows and row.here, f"{name}: {row.there} stands there twice, or says nothing"
            self.rows[row.there] = row

    def does(self, *there: str) -> Any:
        """Mark a test as the one that does these rows: it takes one `row` at a time."""
        assert not set(there) - set(self.rows), f"no such rows: {set(there) - set(self.rows)}"
        assert not set(there) & self._done, f"done twice: {set(there) & self._done}"
        self._done.update(there)
        return pytest.mark.parametrize("row", [self.rows[text] for text in there], ids=list(there))

    def undone(self) -> list[str]:
        return [there for there in self.rows if there not in self._done]

    def block(self, heading: str, kind: str = "") -> str:
        """The first block of code under a heading."""
        part = self.text.partition(f"\n## {heading}\n")[2] or self.text.partition(f"\n### {heading}\n")[2]
        found = re.search(rf"```{kind or '[a-z]*'}\n(.*?)```", part.split("\n## ")[0], re.S)
        assert found, heading
        return found[1]
