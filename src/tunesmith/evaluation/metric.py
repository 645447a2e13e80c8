"""What a metric is: a number of each row and each model, and how rows add up to the figure that is compared.

A metric is a row of a table in one of the modules beside this one. Its `columns` say, of one row and what a model did with it,
what is summed over rows: mostly (value, 1). Its `figure` makes the metric of these sums: mostly the first over the second, a
mean. So all metrics have the same paired interval and the same test, and all can be recomputed from `evaluation/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
import numpy as np

from tunesmith.conversation import Conversation
from tunesmith.evaluation.stats import Comparison, Figure, compare, ratio


class Said(msgspec.Struct, frozen=True):
    """An answer of a model. `ended`: it stopped by itself; None where that is not known (of a service's model)."""

    text: str
    ended: bool | None = None
    tokens: int = 0


class Heard(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one model did with one held-out row. What was not asked of it is None, or empty.

    `loss`: sum of -log p over the `tokens` of its answers, nats; `right`: how many were the likeliest. `bins`: of the
    likeliest tokens, by how sure the model was (tenths): their number, the sum of their probabilities, how many were right.
    `context`: of the last answer, its loss, its loss after another row's context, its tokens. `said`: the greedy answer to the
    row's prompt; `samples`: further ones, drawn at temperature 0.8 within the likeliest 0.95. `passed`: whether each of these
    passed the row's tests.
    `cut`: some of the answers' tokens stood beyond the model's context and are not among `tokens`.
    """

    loss: float | None = None
    tokens: int = 0
    right: int = 0
    bins: list[tuple[int, float, int]] = []
    context: tuple[float, float, int] | None = None
    said: Said | None = None
    samples: list[Said] = []
    passed: list[bool] = []
    cut: bool = False


class Facts(msgspec.Struct, frozen=True, omit_defaults=True):
    """What metrics know of the training rows, kept in evaluation/facts.json. Each module documents its own part."""

    terms: list[str] = []  # of the domain: mined from the training answers
    vocabulary: list[str] = []  # of the persona: words that its answers use far more often than the base model's
    style: dict[
        str, float
    ] = {}  # weight of each feature of the classifier between the base's style and the training rows'


class Metric(msgspec.Struct, frozen=True):
    """A metric. `better`: which way; `span`: its range, with the unit; `about`: its definition, in whole sentences; `source`: who
    defined it. All of it is in docs/metrics.md.

    `columns(row, heard, facts)`: what is summed over the rows, None where the row has nothing to say of it. `whole`: instead,
    for figures that are no sum over rows: of all rows at once; they get no interval and no verdict.
    """

    name: str
    better: Literal["lower", "higher"]
    span: str
    about: str
    source: str
    columns: Callable[[Conversation, Heard, Facts], tuple[float, ...] | None] | None = None
    figure: Figure = ratio
    whole: Callable[[Sequence[Conversation], Sequence[Heard], Facts], float | None] | None = None


def measure(
    metric: Metric,
    rows: Sequence[Conversation],
    base: Sequence[Heard],
    tuned: Sequence[Heard],
    facts: Facts,
    seed: int = 0,
) -> Comparison | None:
    """A metric of both models on the rows that have something to say of it with both; None where there is no such row."""
    if metric.whole:
        figures = [metric.whole(rows, side, facts) for side in (base, tuned)]
        if figures[0] is None or figures[1] is None:
            return None
        answered = sum(b.said is not None and t.said is not None for b, t in zip(base, tuned, strict=True))
        return Comparison(metric.name, figures[0], figures[1], figures[1] - figures[0], rows=answered)
    assert metric.columns
    pairs = [
        (before, after)
        for row, b, t in zip(rows, base, tuned, strict=True)
        if (before := metric.columns(row, b, facts)) is not None
        and (after := metric.columns(row, t, facts)) is not None
    ]
    if not pairs:
        return None
    first, second = (np.array(side, np.float64) for side in zip(*pairs, strict=True))
    return compare(metric.name, first, second, metric.better == "lower", metric.figure, seed)
