"""Paired comparison of two models on the same rows, with a bootstrap interval and one of three words."""

from __future__ import annotations

import math

import msgspec
import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95


class Comparison(msgspec.Struct, frozen=True):
    """A metric of base and tuned, their difference (tuned - base) with its 95 % interval, and the word for it.

    `rows_needed`: with an effect and a spread like these, about so many rows would settle it (only for "cannot tell").
    """

    metric: str
    base: float
    tuned: float
    difference: float
    low: float
    high: float
    verdict: str
    rows_needed: int | None = None


def compare(
    metric: str,
    base: NDArray[np.float64],
    tuned: NDArray[np.float64],
    weight: NDArray[np.float64],
    lower_is_better: bool,
    seed: int = 0,
) -> Comparison:
    """Compare sums per row: the metric is sum(values) / sum(weight), e.g. nats over tokens.

    The interval is the percentile bootstrap over rows (Efron 1979): rows are drawn with replacement, both
    models always on the same rows, so what is common to a row cancels out.
    """
    difference, total = tuned - base, weight.sum()
    effect = float(difference.sum() / total)
    draws = _resample(difference, weight, seed)
    low, high = (float(q) for q in np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    if len(weight) < 2 or low <= 0 <= high:
        verdict = "cannot tell"
    else:
        verdict = "better" if (effect < 0) == lower_is_better else "worse"
    needed = None
    if verdict == "cannot tell" and effect and high > low:
        needed = max(len(weight) + 1, math.ceil(len(weight) * ((high - low) / 2 / effect) ** 2))
    return Comparison(metric, float(base.sum() / total), float(tuned.sum() / total), effect, low, high, verdict, needed)


def _resample(values: NDArray[np.float64], weight: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """The ratio of sums on RESAMPLES bootstrap samples. How often each row is drawn is multinomial; 16 MB at a time."""
    rng, n = np.random.default_rng(seed), len(values)
    parts, left = [], RESAMPLES
    while left:
        size = min(left, max(1, 2_000_000 // n))
        counts = rng.multinomial(n, np.full(n, 1 / n), size=size)
        parts.append((counts @ values) / (counts @ weight))
        left -= size
    return np.concatenate(parts)
