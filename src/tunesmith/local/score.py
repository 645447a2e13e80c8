"""Log-likelihood of answers under a model: what evaluation compares."""

from __future__ import annotations

import math

import msgspec
import torch

from tunesmith.conversation import Conversation
from tunesmith.local import batches
from tunesmith.local import model as models
from tunesmith.local.loss import LossModule
from tunesmith.models import find
from tunesmith.render import Rendered, Renderer
from tunesmith.tokens import Tokens, flatten


class RowScore(msgspec.Struct, frozen=True):
    """A row's sum of -log p over its answer's tokens (nats; inf where it is no number), how many tokens that is, and how
    many were the likeliest."""

    loss: float
    tokens: int
    right: int


def score(name: str, rows: list[Conversation], template: str | None = None) -> list[RowScore]:
    """Score each row with a model of that name or folder, in order. Rows longer than its context are cut.

    `template`: the text of another chat template than the model's own.
    """
    folder = find(name)
    renderer = Renderer(folder, template)
    model = models.to_judge(name)
    module, _ = models.loss_module(model)
    limit = model.config.get_text_config().max_position_embeddings
    cut = [Rendered(r.ids[:limit], r.mask[:limit], "", r.source) for r in renderer.render_all(rows)]
    return row_scores(module, flatten(cut))


def row_scores(module: LossModule, rows: Tokens) -> list[RowScore]:
    """Score each of some rendered rows, in order; the model is in evaluation mode after it."""
    model = module.model.eval()
    device = next(model.parameters()).device
    result = [RowScore(0.0, 0, 0)] * len(rows)
    for group in batches.in_order(rows):
        batch = batches.collate(rows, group, device)
        losses, right, owner = (t.cpu() for t in module.scores(batch.ids, batch.mask, batch.segments))
        for i, row in enumerate(group):
            mine = losses[owner == i].double()
            loss = float(mine.sum()) if bool(torch.isfinite(mine).all()) else math.inf
            result[row] = RowScore(loss, len(mine), int(right[owner == i].sum()))
    return result
