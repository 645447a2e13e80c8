"""Files to conversations: rows are read in blocks, and each block is a part of the work that can be done by itself.

Plain chats in JSONL take a fast road (`formats.plain_chat`), all else `formats.convert`; both make the same rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from tunesmith.conversation import Conversation, Issue
from tunesmith.data.findings import finding
from tunesmith.data.formats import BY_NAME, convert, plain_chat, unused
from tunesmith.data.read import (
    PACKED,
    NotLines,
    Row,
    array,
    blocks,
    container,
    files,
    hub,
    opened,
    parsed,
    position,
    record,
    unreadable,
)
from tunesmith.errors import DataError

Progress = Callable[[int, float, str], None]  # rows so far, share of what is being done, and what that is
AT_A_TIME = 1000  # rows of the containers that have no lines


class Block(msgspec.Struct, frozen=True, gc=False):
    """Whole lines of a JSONL file, the number of the first, and the share of the data set that has been read with them.

    With `span`, their place in the file (first byte, length), `lines` is empty: who works on them reads them.
    """

    path: str
    first: int
    lines: bytes
    share: float
    span: tuple[int, int] | None = None

    def text(self) -> bytes:
        """The lines, read again where they were only placed."""
        if not self.span:
            return self.lines
        with open(self.path, "rb") as stream:
            stream.seek(self.span[0])
            found = stream.read(self.span[1])
        return found.removeprefix(b"\xef\xbb\xbf") if self.first == 1 else found


class Rows(msgspec.Struct, frozen=True, gc=False):
    """Rows of any other container, and the share of the data set that has been read with them."""

    items: list[Row | Issue]
    share: float


# A row, the name of its format ("" of an Issue's), and whether it is already known to have no structural finding
Item = tuple[Conversation | Issue, str, bool]


def scan(datasets: list[str], columns: dict[str, str], placed: bool = False) -> Iterator[Block | Rows]:
    """The rows of the data sets in order, some at a time. `placed`: blocks of plain files come without their lines, to be sent
    to another process for less. Raises DataError where nothing can be read at all."""
    listed = [(name, files(name)) for name in datasets]
    single = sum(len(paths or [0]) for _, paths in listed) == 1
    total = size(listed) or 1
    before = 0
    for name, paths in listed:
        if paths is None:
            yield from _some(hub(name), lambda: 0.0)
        for path in paths or ():
            try:
                yield from _file(path, bool(columns), placed, partial(_share, before, total))
            except DataError as error:
                if single:
                    raise
                yield Rows([unreadable(error)], 0.0)
            before += path.stat().st_size


def _share(before: int, total: int, at: int) -> float:
    return min(1.0, (before + at) / total)


def size(listed: Iterable[tuple[str, list[Path] | None]]) -> int:
    """Bytes of the files of some data sets (packed as they are)."""
    return sum(path.stat().st_size for _, paths in listed for path in paths or ())


def _file(path: Path, mapped: bool, placed: bool, share: Callable[[int], float]) -> Iterator[Block | Rows]:
    lines = container(path) not in (".csv", ".tsv", ".parquet", ".json") and not mapped
    with opened(path) as stream:
        if stream is None or not lines:
            yield from _some(parsed(path, stream), lambda: share(position(stream) if stream else 0))
            return
        try:
            placed = placed and path.is_file() and path.suffix.lower() not in PACKED
            before = 0
            for first, block in blocks(path, stream):
                at = position(stream)
                yield Block(
                    str(path), first, b"" if placed else block, share(at), (before, at - before) if placed else None
                )
                before = at
        except NotLines as whole:
            yield from _some(array(path, stream, whole), lambda: share(position(stream)))


def _some(rows: Iterator[Row | Issue], share: Callable[[], float]) -> Iterator[Rows]:
    while items := list(islice(rows, AT_A_TIME)):
        yield Rows(items, share())


def converted(part: Block | Rows, columns: dict[str, str], spare: Spare | None) -> tuple[list[Item], int]:
    """The conversations of a part; without `spare`, those without structural finding are only counted."""
    if isinstance(part, Rows):
        return [_converted(row, columns, spare) for row in part.items], 0
    batch: list[Item] = []
    plain = 0
    for number, line in enumerate(part.text().split(b"\n"), part.first):
        if found := plain_chat(line):
            if spare is None:
                plain += 1
                continue
            (chat, more), where = found, f"{part.path}:{number}"
            if more:
                spare.see(more, where)
            batch.append((Conversation(chat.messages, chat.metadata, where, chat.tools), "messages", True))
        elif line and not line.isspace():
            batch.append(_converted(record(line, f"{part.path}:{number}"), {}, spare))
    return batch, plain


def _converted(row: Any, columns: dict[str, str], spare: Spare | None) -> Item:
    result = row if isinstance(row, Issue) else convert(row, columns)
    if isinstance(result, Issue):
        return result, "", False
    if spare and not columns:
        spare.see(unused(row.value, BY_NAME[result[1]]), row.where)
    return (*result, False)


def conversations(dataset: str) -> Iterator[Conversation]:
    """A data set's rows one after the other, unchecked; what is none is left out."""
    for part in scan([dataset], {}):
        for item, *_ in converted(part, {}, Spare())[0]:
            if isinstance(item, Conversation):
                yield item


class Spare:
    """Columns that nothing is made of: how many rows have each, and where the first stands."""

    def __init__(self) -> None:
        self._count: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def see(self, names: Iterable[str], where: str) -> None:
        for name in names:
            self._count[name] += 1
            self._first.setdefault(name, where)

    def add(self, later: Spare) -> None:
        self._count.update(later._count)
        self._first = {**later._first, **self._first}

    def findings(self, dataset: str, formats: Iterable[str], provider: str | None) -> Iterator[Issue]:
        for name, count in self._count.most_common(20):
            yield finding(
                "unused-column",
                self._first[name],
                f'"{name}" is not trained on ({count} rows)',
                "--columns maps columns",
            )
        others = [name for name in formats if name != "messages"]
        if provider == "openai" and (self._count or others):
            yield finding(
                "extra-field",
                dataset,
                f"a service takes messages and tools alone in an upload; here: {', '.join([*others, *self._count][:5])}",
                "train --provider openai converts it; for an upload of your own: data convert --strip-metadata",
            )
