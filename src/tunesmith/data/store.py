"""Conversations on disk that are used like a list: what a data set larger than memory is, once it has been checked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from tunesmith.conversation import Conversation

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Conversation).decode
AT_ONCE = 1 << 20  # bytes read at a time when going through all rows


class Conversations(Protocol):
    """What a list of conversations is used for."""

    def __len__(self) -> int: ...
    def __getitem__(self, row: int, /) -> Conversation: ...
    def __iter__(self) -> Iterator[Conversation]: ...


class Packed(msgspec.Struct):
    """Some conversations as lines, and the length of each: what one process sends another. lengths int64."""

    lines: bytes
    lengths: bytes

    @staticmethod
    def of(rows: list[Conversation]) -> Packed:
        lines = [_encode(row) + b"\n" for row in rows]
        return Packed(b"".join(lines), np.fromiter(map(len, lines), np.int64, len(lines)).tobytes())


class Store:
    """Rows of a JSONL file, each read when it is asked for. In memory: eight bytes a row."""

    def __init__(self, path: Path, starts: NDArray[np.int64]) -> None:
        self.path, self.starts = path, starts
        self._handle = os.open(path, os.O_RDONLY)  # read with `pread`, so that forked processes do not move each other

    def __del__(self) -> None:
        if handle := getattr(self, "_handle", None):
            os.close(handle)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> Conversation:
        row = range(len(self))[row]
        start, end = int(self.starts[row]), int(self.starts[row + 1])
        return _decode(os.pread(self._handle, end - start, start))

    def __iter__(self) -> Iterator[Conversation]:
        with self.path.open("rb", AT_ONCE) as stream:
            yield from map(_decode, stream)


class StoreWriter:
    """Makes a Store from parts."""

    def __init__(self, path: Path) -> None:
        self._path, self._out = path, path.open("wb")
        self._lengths: list[bytes] = []

    def add(self, rows: Packed) -> None:
        self._out.write(rows.lines)
        self._lengths.append(rows.lengths)

    def close(self) -> Store:
        self._out.close()
        lengths = np.frombuffer(b"".join(self._lengths), np.int64)
        return Store(self._path, np.concatenate([[0], lengths.cumsum()]).astype(np.int64))


class Chosen:
    """Some rows of a Store, by their numbers, in that order."""

    def __init__(self, store: Store, rows: NDArray[np.int64]) -> None:
        self.store, self.rows = store, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Conversation:
        return self.store[int(self.rows[row])]

    def __iter__(self) -> Iterator[Conversation]:
        return (self.store[int(i)] for i in self.rows)


def pick(rows: Conversations, numbers: Sequence[int] | NDArray[np.int64]) -> Conversations:
    """Some of the rows, in the order of their numbers: a list of a list's, a view of a Store's or of its rows."""
    if isinstance(rows, Store):
        return Chosen(rows, np.asarray(numbers, np.int64))
    if isinstance(rows, Chosen):
        return Chosen(rows.store, rows.rows[np.asarray(numbers, np.int64)])
    return [rows[int(i)] for i in numbers]
