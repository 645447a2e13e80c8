"""Which learning rate: short real runs, the better half of them again for twice as long, until two are left.

Every trial starts from the same weights and goes through a whole schedule of its own length, so that what is compared is
what training does, not a point of one sweep (successive halving, Jamieson and Talwalkar 2016).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec
import torch

from tunesmith.errors import DataError
from tunesmith.local import batches, methods, optim
from tunesmith.local import model as models
from tunesmith.local.loss import LossModule
from tunesmith.local.tokens import Tokens, flatten
from tunesmith.models import find
from tunesmith.planning import Prepared
from tunesmith.recipe import Recipe

SPREAD = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)  # times the rate of the recipe
EVAL_TOKENS = 8192


class Trial(msgspec.Struct, frozen=True):
    """One short run: its rate and length, and the loss of each validation row after it (sums in nats; inf: diverged)."""

    rate: float
    steps: int
    losses: list[float]
    tokens: list[int]

    def loss(self) -> float:
        """Mean over all supervised tokens of the validation rows, in nats."""
        return sum(self.losses) / max(1, sum(self.tokens))


def search(prepared: Prepared, steps: int, on_trial: Callable[[Trial], None] = lambda _: None) -> list[list[Trial]]:
    """Rounds of trials, each sorted from the best to the worst; the first has all rates for `steps` steps.

    Raises DataError where there are no validation rows.
    """
    recipe = prepared.plan.recipe
    sets = {side: Tokens(*flatten(rows)) for side, rows in prepared.rendered.items() if rows}
    if "valid" not in sets:
        raise DataError("no validation rows to judge by", where=recipe.dataset or "", fix="raise --valid-fraction")
    torch.set_num_threads(int(recipe.threads))
    base = models.load(find(recipe.model), True, methods.quantisation(recipe, models.device()))
    module, _ = models.loss_module(methods.apply(base, recipe))
    models.arrange(module, recipe)
    start = {n: p.detach().clone() for n, p in module.model.named_parameters() if p.requires_grad}
    rates = [float(recipe.learning_rate) * times for times in SPREAD]
    rounds: list[list[Trial]] = []
    while len(rates) > 1:
        trials = []
        for rate in rates:
            trials.append(_trial(module, start, msgspec.structs.replace(recipe, learning_rate=rate), sets, steps))
            on_trial(trials[-1])
        rounds.append(sorted(trials, key=Trial.loss))
        if len(rates) == 2:
            break
        rates = sorted(trial.rate for trial in rounds[-1][: math.ceil(len(rates) / 2)])
        steps *= 2
    return rounds


def _trial(
    module: LossModule, start: dict[str, torch.Tensor], recipe: Recipe, sets: dict[str, Tokens], steps: int
) -> Trial:
    model = module.model.train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in start:
                parameter.copy_(start[name])
    torch.manual_seed(recipe.seed)
    optimizer = optim.make(model, recipe)
    device = next(model.parameters()).device
    for step in range(steps):
        _, chosen = batches.step_rows(len(sets["train"]), recipe, step)
        supervised = sets["train"].supervised(chosen)
        for group in optimizer.param_groups:
            group["lr"] = optim.learning_rate(recipe, step, steps)
        for part in batches.in_parts(sets["train"], chosen, int(recipe.batch_size), int(recipe.micro_batch_tokens)):
            batch = batches.collate(sets["train"], part, device)
            loss, _ = module(batch.ids, batch.mask, batch.segments)
            (loss / supervised).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    losses, tokens = _row_losses(module, sets["valid"], device)
    return Trial(float(recipe.learning_rate), steps, losses, tokens)


def _row_losses(module: LossModule, rows: Tokens, device: torch.device) -> tuple[list[float], list[int]]:
    module.model.eval()
    losses, counts = [math.inf] * len(rows), [0] * len(rows)
    for group in batches.in_order(rows, EVAL_TOKENS):
        batch = batches.collate(rows, group, device)
        values, _, owner = module.scores(batch.ids, batch.mask, batch.segments)
        for i, row in enumerate(group):
            mine = values[owner.to(values.device) == i].double()
            losses[row] = float(mine.sum()) if bool(torch.isfinite(mine).all()) else math.inf
            counts[row] = len(mine)
    return losses, counts
