"""Log-likelihood of answers under a model: what evaluation compares."""

from __future__ import annotations

import msgspec

from tunesmith.conversation import Conversation
from tunesmith.local import batches
from tunesmith.local import model as models
from tunesmith.local.loop import EVAL_TOKENS
from tunesmith.local.tokens import Tokens, flatten
from tunesmith.models import find
from tunesmith.render import Rendered, Renderer


class RowScore(msgspec.Struct, frozen=True):
    """A row's sum of -log p over its answer's tokens (nats), how many tokens that is, and how many were the likeliest."""

    loss: float
    tokens: int
    right: int


def score(name: str, rows: list[Conversation]) -> list[RowScore]:
    """Score each row with a model of that name or folder, in order. Rows longer than its context are cut."""
    folder = find(name)
    renderer = Renderer(folder)
    model = models.load(folder).eval()
    module, _ = models.loss_module(model)
    limit = model.config.get_text_config().max_position_embeddings
    cut = [Rendered(r.ids[:limit], r.mask[:limit], "", r.source) for r in renderer.render_all(rows)]
    tokens = Tokens(*flatten(cut))
    device = next(model.parameters()).device
    result: list[RowScore] = [RowScore(0.0, 0, 0)] * len(rows)
    for group in batches.in_order(tokens, EVAL_TOKENS):
        batch = batches.collate(tokens, group, device)
        losses, right, owner = (t.cpu() for t in module.scores(batch.ids, batch.mask, batch.segments))
        for i, row in enumerate(group):
            mine = owner == i
            result[row] = RowScore(float(losses[mine].double().sum()), int(mine.sum()), int(right[mine].sum()))
    return result
