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
from tunesmith.local import batches, optim
from tunesmith.local import model as models
from tunesmith.local.score import row_scores
from tunesmith.local.step import Diverged, Engine
from tunesmith.planning import Prepared

SPREAD = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)  # times the rate of the recipe


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
    sets = {side: rows for side, rows in prepared.tokens.items() if len(rows)}
    if "valid" not in sets:
        raise DataError("no validation rows to judge by", where=recipe.dataset or "", fix="raise --valid-fraction")
    torch.set_num_threads(int(recipe.threads))
    module, _ = models.for_training(recipe, prepared.plan.longest)
    engine = Engine(module, recipe, sets)
    start = {n: p.detach().clone() for n, p in module.model.named_parameters() if p.requires_grad}
    rates = [float(recipe.learning_rate) * times for times in SPREAD]
    rounds: list[list[Trial]] = []
    while len(rates) > 1:
        trials = []
        for rate in rates:
            trials.append(_trial(engine, start, rate, steps))
            on_trial(trials[-1])
        rounds.append(sorted(trials, key=Trial.loss))
        if len(rates) == 2:
            break
        rates = sorted(trial.rate for trial in rounds[-1][: math.ceil(len(rates) / 2)])
        steps *= 2
    return rounds


def _trial(engine: Engine, start: dict[str, torch.Tensor], rate: float, steps: int) -> Trial:
    recipe = msgspec.structs.replace(engine.recipe, learning_rate=rate)
    with torch.no_grad():
        for name, parameter in engine.model.train().named_parameters():
            if name in start:
                parameter.copy_(start[name])
    torch.manual_seed(recipe.seed)
    engine.begin()
    try:
        for step in range(steps):
            rows = batches.step_rows(len(engine.sets["train"]), recipe, step)
            engine.step(rows, optim.learning_rate(recipe, step, steps))
    except Diverged:
        return Trial(rate, steps, [math.inf] * len(engine.sets["valid"]), [1] * len(engine.sets["valid"]))
    scores = row_scores(engine.module, engine.sets["valid"])
    return Trial(rate, steps, [s.loss for s in scores], [s.tokens for s in scores])
