"""Rendered rows as three memory-mapped arrays: written when a run is laid out (without torch), read by the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import RunError
from tunesmith.render import Rendered

PARTS = ("ids", "mask", "starts")


class Tokens(msgspec.Struct, frozen=True):
    """Rendered rows, concatenated: row i is ids[starts[i] : starts[i + 1]]. ids int32, mask bool, starts int64 [rows + 1]."""

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def length(self, row: int) -> int:
        return int(self.starts[row + 1] - self.starts[row])

    def supervised(self, rows: list[int]) -> int:
        """Tokens that the loss is taken over: a row's first token has nothing before it and never counts."""
        return sum(int(self.mask[self.starts[r] + 1 : self.starts[r + 1]].sum()) for r in rows)


def save_tokens(rows: list[Rendered], folder: Path, side: str) -> None:
    """Write rows as three .npy files that are memory-mapped when training."""
    arrays: tuple[NDArray[Any], ...] = flatten(rows)
    for part, array in zip(PARTS, arrays, strict=True):
        np.save(folder / f"{side}.{part}.npy", array)


def flatten(rows: list[Rendered]) -> tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.int64]]:
    """Rows as (ids, mask, starts) of Tokens."""
    starts = np.cumsum([0, *(len(r.ids) for r in rows)], dtype=np.int64)
    ids = np.fromiter((i for r in rows for i in r.ids), np.int32, int(starts[-1]))
    return ids, np.fromiter((m for r in rows for m in r.mask), np.bool_, int(starts[-1])), starts


def load_tokens(folder: Path, side: str, rows: int) -> Tokens:
    """The rows of a split, of which there must be `rows`. Raises RunError when its files are missing or cut short."""
    if not rows:
        return Tokens(np.zeros(0, np.int32), np.zeros(0, np.bool_), np.zeros(1, np.int64))
    try:
        ids, mask, starts = (np.load(folder / f"{side}.{part}.npy", mmap_mode="r") for part in PARTS)
    except (OSError, ValueError) as error:
        raise RunError(f"the {side} tokens cannot be read: {error}", where=str(folder), fix="train anew") from None
    if len(starts) != rows + 1 or len(ids) != starts[-1] or len(mask) != starts[-1]:
        raise RunError(f"the {side} tokens are not whole", where=str(folder), fix="train anew")
    return Tokens(ids, mask, starts)
