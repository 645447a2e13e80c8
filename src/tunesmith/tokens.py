"""Rendered rows as three arrays, in memory or memory-mapped: filled while rows are rendered, read by the training loop."""

from __future__ import annotations

import io
import os
import shutil
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from tunesmith.errors import RunError
from tunesmith.render import Rendered

PARTS = {"ids": np.int32, "mask": np.bool_, "starts": np.int64}


class Tokens(msgspec.Struct, frozen=True):
    """Rendered rows, concatenated: row i is ids[starts[i] : starts[i + 1]]. ids int32, mask bool, starts int64 [rows + 1]."""

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def length(self, row: int) -> int:
        return int(self.starts[row + 1] - self.starts[row])

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, int64 [rows]."""
        return np.diff(self.starts)

    def row(self, row: int) -> tuple[list[int], list[int]]:
        """(ids, mask) of one row."""
        span = slice(int(self.starts[row]), int(self.starts[row + 1]))
        return self.ids[span].tolist(), self.mask[span].astype(int).tolist()

    def supervised(self, rows: list[int]) -> int:
        """Tokens that the loss is taken over: a row's first token has nothing before it and never counts."""
        return sum(int(self.mask[self.starts[r] + 1 : self.starts[r + 1]].sum()) for r in rows)

    def all_supervised(self) -> int:
        """As `supervised`, of all rows."""
        firsts = self.starts[:-1][self.lengths() > 0]
        return int(np.count_nonzero(self.mask)) - int(np.count_nonzero(self.mask[firsts]))


class Flat(msgspec.Struct):
    """Some rows one after the other, as bytes: what one process sends another. ids int32, mask bool, lengths int64."""

    ids: bytes = b""
    mask: bytes = b""
    lengths: bytes = b""

    @staticmethod
    def of(rows: Iterable[Rendered]) -> Flat:
        ids, mask, lengths = array("i"), bytearray(), array("q")
        for row in rows:
            ids.extend(row.ids)
            mask.extend(row.mask)
            lengths.append(len(row.ids))
        return Flat(ids.tobytes(), bytes(mask), lengths.tobytes())


class Writer:
    """Makes the Tokens of one side from parts: in memory, or with `folder` as .npy files there."""

    def __init__(self, folder: Path | None = None, side: str = "") -> None:
        self._paths = {part: folder / f"{side}.{part}.npy" for part in PARTS} if folder else {}
        self._files = {part: path.open("wb") for part, path in self._paths.items()}
        self._memory = {} if folder else {part: io.BytesIO() for part in PARTS}
        self._out: Mapping[str, IO[bytes]] = self._files or self._memory
        self._end = self._rows = 0
        for part in self._files:
            self._head(part, 0)
        self._out["starts"].write(np.int64(0).tobytes())

    def _head(self, part: str, count: int) -> None:
        """The .npy header for so many numbers: of the same length for any number of them."""
        about = {"descr": npy.dtype_to_descr(np.dtype(PARTS[part])), "fortran_order": False, "shape": (count,)}
        npy.write_array_header_1_0(self._out[part], about)

    def add(self, rows: Flat) -> None:
        lengths = np.frombuffer(rows.lengths, np.int64)
        self._out["ids"].write(rows.ids)
        self._out["mask"].write(rows.mask)
        self._out["starts"].write((self._end + np.cumsum(lengths)).tobytes())
        self._end += int(lengths.sum())
        self._rows += len(lengths)

    def close(self) -> Tokens:
        if not self._paths:
            return Tokens(*(np.frombuffer(out.getvalue(), PARTS[part]) for part, out in self._memory.items()))
        for part, out in self._files.items():
            out.seek(0)
            self._head(part, self._rows + 1 if part == "starts" else self._end)
            out.flush()
            os.fsync(out.fileno())
            out.close()
        return Tokens(*(_mapped(path) for path in self._paths.values()))


def flatten(rows: Iterable[Rendered]) -> Tokens:
    """Rows in memory."""
    writer = Writer()
    writer.add(Flat.of(rows))
    return writer.close()


def save_tokens(tokens: Tokens, folder: Path, side: str) -> None:
    """As three .npy files that are memory-mapped when training; those that are files already are linked."""
    for part in PARTS:
        values, path = getattr(tokens, part), folder / f"{side}.{part}.npy"
        file = getattr(values, "filename", None)
        if file is None:
            np.save(path, values)
            continue
        try:
            os.link(file, path)
        except OSError:  # another file system, or one without links
            shutil.copyfile(file, path)


def load_tokens(folder: Path, side: str, rows: int) -> Tokens:
    """The rows of a split, of which there must be `rows`. Raises RunError when its files are missing or cut short."""
    if not rows:
        return flatten([])
    try:
        tokens = Tokens(*(_mapped(folder / f"{side}.{part}.npy") for part in PARTS))
    except (OSError, ValueError) as error:
        raise RunError(f"the {side} tokens cannot be read: {error}", where=str(folder), fix="train anew") from None
    if len(tokens) != rows or not len(tokens.ids) == len(tokens.mask) == tokens.starts[-1]:
        raise RunError(f"the {side} tokens are not whole", where=str(folder), fix="train anew")
    return tokens


def _mapped(path: Path) -> NDArray[Any]:
    """An array in a file. One without elements cannot be mapped and is read."""
    with path.open("rb") as stream:
        npy.read_magic(stream)
        empty = npy.read_array_header_1_0(stream)[0] == (0,)
    found: NDArray[Any] = np.load(path, mmap_mode=None if empty else "r")
    return found
