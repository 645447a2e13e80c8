"""Log-likelihood of answers under a model: what evaluation compares."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec
import torch

from tunesmith.conversation import Conversation
from tunesmith.local import batches
from tunesmith.local import model as models
from tunesmith.local.loss import LossModule
from tunesmith.render import Rendered, Renderer
from tunesmith.tokens import Tokens, flatten

BINS = 10  # of how sure a model is: tenths of the likeliest token's probability


class RowScore(msgspec.Struct, frozen=True):
    """A row's sum of -log p over its answer's tokens (nats; inf where it is no number), how many tokens that is, and how
    many were the likeliest. `bins`: of each tenth of sureness how many tokens, their summed probability, how many right.
    `cut`: some of the answer stood beyond the model's context, and is in none of these."""

    loss: float
    tokens: int
    right: int
    bins: list[tuple[int, float, int]] = []
    cut: bool = False


class Scorer:
    """A loaded model that scores rows."""

    def __init__(self, renderer: Renderer, model: torch.nn.Module) -> None:
        self._renderer, self._module = renderer, models.loss_module(model)[0]
        config = models.causal(model).config.get_text_config()
        self._limit = getattr(config, "max_position_embeddings", None)

    def __call__(self, rows: list[Conversation], told: Callable[[int], object] = lambda _: None) -> list[RowScore]:
        """In order; `told` hears now and then how many tokens more are done."""
        every = list(self._renderer.render_all(rows))
        cut = [Rendered(r.ids[: self._limit], r.mask[: self._limit], "", r.source) for r in every]
        scores = row_scores(self._module, flatten(cut), told)
        return [
            msgspec.structs.replace(s, cut=True) if self._limit and any(r.mask[self._limit :]) else s
            for s, r in zip(scores, every, strict=True)
        ]


def row_scores(module: LossModule, rows: Tokens, told: Callable[[int], object] = lambda _: None) -> list[RowScore]:
    """Score each of some rendered rows, in order; the model is in evaluation mode after it."""
    model = module.model.eval()
    device = next(model.parameters()).device
    result = [RowScore(0.0, 0, 0)] * len(rows)
    for group in batches.in_order(rows):
        batch = batches.collate(rows, group, device)
        losses, right, sure, owner = (t.cpu() for t in module.scores(batch.ids, batch.mask, batch.segments))
        places = owner * BINS + (sure.nan_to_num() * BINS).long().clamp(0, BINS - 1)
        count, sums, hits = (
            torch.bincount(places, weights, minlength=len(group) * BINS).view(len(group), BINS).tolist()
            for weights in (None, sure.nan_to_num().double(), right.double())
        )
        for i, row in enumerate(group):
            mine = losses[owner == i].double()
            loss = float(mine.sum()) if bool(torch.isfinite(mine).all()) else math.inf
            bins = [(n, s, int(h)) for n, s, h in zip(count[i], sums[i], hits[i], strict=True)]
            result[row] = RowScore(loss, len(mine), int(right[owner == i].sum()), bins)
        told(sum(batch.segments))
    return result
