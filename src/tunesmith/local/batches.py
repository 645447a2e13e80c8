"""Rows to steps: a pure function of (number of rows, batch, seed, step), so that a resume needs only a position."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.recipe import Recipe
from tunesmith.render import Rendered


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


class Batch(msgspec.Struct, frozen=True):
    """Conversations one after the other: ids [tokens] int64, mask [tokens] bool, their lengths."""

    ids: torch.Tensor
    mask: torch.Tensor
    segments: list[int]


def save_tokens(rows: list[Rendered], folder: Path, side: str) -> None:
    """Write rows as three .npy files that are memory-mapped when training."""
    arrays: tuple[NDArray[Any], ...] = flatten(rows)
    for part, array in zip(("ids", "mask", "starts"), arrays, strict=True):
        np.save(folder / f"{side}.{part}.npy", array)


def flatten(rows: list[Rendered]) -> tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.int64]]:
    """Rows as (ids, mask, starts) of Tokens."""
    starts = np.cumsum([0, *(len(r.ids) for r in rows)], dtype=np.int64)
    ids = np.fromiter((i for r in rows for i in r.ids), np.int32, int(starts[-1]))
    return ids, np.fromiter((m for r in rows for m in r.mask), np.bool_, int(starts[-1])), starts


def load_tokens(folder: Path, side: str) -> Tokens:
    """Rows of a split; none when it has no files."""
    if not (folder / f"{side}.starts.npy").exists():
        return Tokens(np.zeros(0, np.int32), np.zeros(0, np.bool_), np.zeros(1, np.int64))
    ids, mask, starts = (np.load(folder / f"{side}.{part}.npy", mmap_mode="r") for part in ("ids", "mask", "starts"))
    return Tokens(ids, mask, starts)


def collate(tokens: Tokens, rows: list[int], device: torch.device) -> Batch:
    """Rows packed without padding."""
    spans = [slice(int(tokens.starts[r]), int(tokens.starts[r + 1])) for r in rows]
    ids = torch.from_numpy(np.concatenate([tokens.ids[s] for s in spans]).astype(np.int64))
    mask = torch.from_numpy(np.concatenate([tokens.mask[s] for s in spans]))
    return Batch(ids.to(device), mask.to(device), [tokens.length(r) for r in rows])


@functools.lru_cache(maxsize=2)
def _order(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def step_rows(rows: int, recipe: Recipe, step: int) -> tuple[int, list[list[int]]]:
    """(epoch, rows of each micro-batch) of the optimizer step `step`, counted from 0.

    Each epoch is a permutation of its own; its last step takes what is left.
    """
    assert isinstance(recipe.batch_size, int)
    per_step = recipe.batch_size * recipe.gradient_accumulation_steps
    per_epoch = -(-rows // per_step)
    epoch, at = divmod(step, per_epoch)
    chosen = _order(rows, recipe.seed, epoch)[at * per_step : (at + 1) * per_step].tolist()
    return epoch, [chosen[i : i + recipe.batch_size] for i in range(0, len(chosen), recipe.batch_size)]


def in_order(tokens: Tokens, budget: int) -> Iterator[list[int]]:
    """All rows, shortest first, in groups of at most `budget` tokens (or one row): for validation."""
    group: list[int] = []
    size = 0
    for row in np.argsort(np.diff(tokens.starts), kind="stable").tolist():
        if group and size + tokens.length(row) > budget:
            yield group
            group, size = [], 0
        group.append(row)
        size += tokens.length(row)
    if group:
        yield group
