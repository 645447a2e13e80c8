"""Rows to steps: a pure function of (number of rows, batch, seed, step), so that a resume needs only a position."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.costs import steps_per_epoch
from tunesmith.recipe import Recipe
from tunesmith.tokens import Tokens


class Batch(msgspec.Struct, frozen=True):
    """Conversations one after the other: ids [tokens] int64, mask [tokens] bool, their lengths."""

    ids: torch.Tensor
    mask: torch.Tensor
    segments: list[int]


def collate(tokens: Tokens, rows: list[int], device: torch.device) -> Batch:
    """Rows packed without padding."""
    spans = [slice(int(tokens.starts[r]), int(tokens.starts[r + 1])) for r in rows]
    ids = torch.from_numpy(np.concatenate([tokens.ids[s] for s in spans]).astype(np.int64))
    mask = torch.from_numpy(np.concatenate([tokens.mask[s] for s in spans]))
    return Batch(ids.to(device), mask.to(device), [tokens.length(r) for r in rows])


@functools.lru_cache(maxsize=2)
def _order(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def step_rows(rows: int, recipe: Recipe, step: int) -> list[int]:
    """Rows of the optimizer step `step`, counted from 0. Each epoch is a permutation of its own; its last step takes what
    is left."""
    per_step = int(recipe.batch_size) * recipe.gradient_accumulation_steps
    epoch, at = divmod(step, steps_per_epoch(rows, recipe))
    found: list[int] = _order(rows, recipe.seed, epoch)[at * per_step : (at + 1) * per_step].tolist()
    return found


def in_parts(tokens: Tokens, rows: list[int], most_rows: int, budget: int) -> Iterator[list[int]]:
    """Rows in their order, in groups of at most `most_rows` rows and `budget` tokens (or one row): the micro-batches."""
    group: list[int] = []
    size = 0
    for row in rows:
        if group and (len(group) == most_rows or size + tokens.length(row) > budget):
            yield group
            group, size = [], 0
        group.append(row)
        size += tokens.length(row)
    if group:
        yield group


def in_order(tokens: Tokens, budget: int = 8192) -> Iterator[list[int]]:
    """All rows, shortest first, in groups of at most `budget` tokens (or one row): for validation, where logits exist only
    chunk by chunk, so that the budget bounds activations."""
    by_length = np.argsort(np.diff(tokens.starts), kind="stable").tolist()
    return in_parts(tokens, by_length, len(by_length), budget)
