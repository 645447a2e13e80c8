"""Paired comparison of two models on the same rows: an interval, a test, and one of three words.

The rule of a verdict: *better* or *worse* where the 95 % bootstrap interval of the difference excludes zero and a paired
permutation test agrees (p at most SURE), on FEWEST rows at least; else *cannot tell*. Two equal models are then told apart in
3 % of test sets: the promise of at most 5 % has a margin for few and for skewed rows, where every interval is approximate. How
far it holds is measured in decision 21.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist

import msgspec
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Figure = Callable[[Array], Array]  # sums over rows [k, …] -> the metric […]
RESAMPLES = 10_000
LEVEL = 0.95
SURE = 0.03  # p-value up to which the test agrees
POWER = 0.8  # the rate at which a difference is to be found, for the number of rows that would settle it
FEWEST = 8  # rows: with fewer a verdict would rest on a handful of examples, whatever the arithmetic says
MOST = 1_000_000  # rows that are said to be needed: more is no advice, and a difference near 0 needs more than a number holds
ROUNDING = 1e-12  # of a figure: a difference under that is one of the order in which numbers were added
PART = 2_000_000  # resampling counts, a byte each, that are looked at together
KEPT = 64  # parts that are kept for the next metric on as many rows: all of up to 12,800 rows


class Comparison(msgspec.Struct, frozen=True):
    """A metric of base and tuned, their difference with its 95 % interval, the p-value, and the word for it. A figure that is
    no sum over rows has none of these three: those fields are None and the verdict is ""."""

    metric: str  # its name, with the unit
    base: float  # its value for the base
    tuned: float  # for the tuned model
    difference: float  # tuned - base
    low: float | None = None  # of the interval of the difference
    high: float | None = None  # of the same
    p: float | None = None  # of the permutation test [0, 1]
    verdict: str = ""  # "better", "worse", "cannot tell"; "" where there is no interval
    rows: int = 0  # that had something to say of it
    rows_needed: int | None = None  # would settle a "cannot tell" in 80 % of cases; MOST: or more
    detectable: float | None = None  # the difference that would be found in 80 % of cases on rows like these


def ratio(sums: Array) -> Array:
    """The first sum over the second: a mean, where the second counts. nan where that is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums[0] / sums[1], np.float64)


def compare(
    metric: str, base: Array, tuned: Array, lower_is_better: bool, figure: Figure = ratio, seed: int = 0
) -> Comparison:
    """Compare two models by a metric that is a `figure` of sums over rows; base and tuned [rows, k], row i of both the same.

    The interval is the expanded percentile bootstrap over rows (Efron 1979; Hesterberg 2015, which widens it for few rows as
    Student's t does): rows are drawn with replacement, both models always on the same rows, so what is common to a row
    cancels out. Where differences have a long tail to one side, it is widened to what Hall's transformed t (1992) leaves open
    there: the few rows seen say too little of that tail. The test exchanges base and tuned in each row by the throw of a coin
    (Fisher 1935; RESAMPLES throws).
    """
    n = len(base)
    sums = np.stack([base.sum(0), tuned.sum(0)], 1)  # [k, 2]
    before, after = (float(x) for x in figure(sums))
    effect = after - before
    if not math.isfinite(effect):
        return Comparison(metric, before, after, effect, verdict="cannot tell", rows=n)
    if abs(effect) <= ROUNDING * max(abs(before), abs(after)):
        effect = 0.0
    differences = _resampled(base, tuned, figure, seed)
    tail = _tail(n)
    low, high = (float(q) for q in np.quantile(differences, [tail, 1 - tail]))
    spread = high - low
    left, right = _skewed(_influence(base, tuned, figure)) if n > 1 else (0.0, 0.0)
    low, high = min(low, effect + left), max(high, effect + right)
    p = _exchanged(base, tuned, figure, effect, seed)
    if n < FEWEST or not effect or low <= 0 <= high or p > SURE:
        verdict = "cannot tell"
    else:
        verdict = "better" if (effect < 0) == lower_is_better else "worse"
    detectable = None
    if n > 1:
        t, normal = _student(n - 1), NormalDist().inv_cdf
        error = spread / 2 / t
        detectable = error * (t * normal(1 - SURE / 2) / normal((1 + LEVEL) / 2) + normal(POWER)) if spread else None
    needed = None
    if verdict == "cannot tell" and effect and detectable:
        needed = math.ceil(min(MOST, max(n + 1, FEWEST, n * min(MOST, detectable / abs(effect)) ** 2)))
    return Comparison(metric, before, after, effect, low, high, p, verdict, n, needed, detectable)


def _influence(base: Array, tuned: Array, figure: Figure) -> Array:
    """What each row adds to the difference, around 0: n - 1 times what it changes when the row is left out (Tukey 1958)."""
    before, after = (figure((side.sum(0) - side).T) for side in (base, tuned))
    with np.errstate(invalid="ignore"):
        gone = after - before
        return np.asarray((len(base) - 1) * (gone.mean() - gone), np.float64)


def _skewed(influence: Array) -> tuple[float, float]:
    """Ends of the 95 % interval around the difference, by Hall's transformed t (1992), which corrects for skewness:
    with u = mean / s and g the skewness, sqrt(n) ((1 + g u / 3)^3 - 1) / g + g / (6 sqrt(n)) is nearly a t.

    0: no end is told on this side. There is no spread; or two rows share the utmost value, as with rates, so that a tail that was
    not seen is none."""
    n, spread = len(influence), float(influence.std())
    if not 0 < spread < math.inf:
        return 0.0, 0.0
    skew = float(np.mean((influence / spread) ** 3))
    t = _student(n - 1) / math.sqrt(n)
    ends = [end - skew / (6 * n) for end in (-t, t)]
    if abs(skew) > 1e-6:  # else the root loses all digits
        ends = [3 / skew * (float(np.cbrt(1 + skew * end)) - 1) for end in ends]
    scale, order = spread * math.sqrt(n / (n - 1)), np.sort(influence)
    low, high = (math.isclose(*pair, rel_tol=0, abs_tol=1e-9 * spread) for pair in (order[:2], order[-2:]))
    return 0.0 if low else -scale * ends[1], 0.0 if high else -scale * ends[0]


def _tail(n: int) -> float:
    """The share beyond each end: Phi(-t * sqrt(n / (n - 1))), t the two-sided quantile of Student's t, n - 1 degrees."""
    if n < 2:
        return 0.0
    return NormalDist().cdf(-_student(n - 1) * math.sqrt(n / (n - 1)))


def _student(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t: exact for 1 and 2 degrees, else Cornish-Fisher (error under 0.6 %)."""
    if freedom == 1:
        return math.tan(math.pi * LEVEL / 2)
    if freedom == 2:
        return LEVEL * math.sqrt(2 / (1 - LEVEL**2))
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def _resampled(base: Array, tuned: Array, figure: Figure, seed: int) -> Array:
    """The difference on RESAMPLES bootstrap samples, without those on which the metric has no value."""
    found = []
    for start, size in _parts(len(base)):
        counts = _drawn(len(base), seed, start, size).astype(np.float64)
        before, after = (figure((counts @ side).T) for side in (base, tuned))
        found.append(after - before)
    every = np.concatenate(found)
    kept = every[np.isfinite(every)]
    return kept if len(kept) else np.zeros(1)


def _exchanged(base: Array, tuned: Array, figure: Figure, effect: float, seed: int) -> float:
    """Two-sided p-value: how often a difference at least as large comes about when the models' names are thrown anew."""
    total, gap = (base + tuned).sum(0)[:, None], tuned - base
    extreme = 0
    for start, size in _parts(len(base)):
        signs = _thrown(len(base), seed, start, size)
        moved = (signs.astype(np.float64) @ gap).T  # [k, size]
        with np.errstate(invalid="ignore"):
            other = np.abs(figure((total + moved) / 2) - figure((total - moved) / 2))
        extreme += int(np.sum(~(other < abs(effect) * (1 - 1e-9))))  # one that has no value speaks against certainty
    return (1 + extreme) / (1 + RESAMPLES)


def _parts(rows: int) -> list[tuple[int, int]]:
    """(first, number) of the samples that are looked at together."""
    size = min(RESAMPLES, max(1, PART // rows))
    return [(start, min(size, RESAMPLES - start)) for start in range(0, RESAMPLES, size)]


@lru_cache(maxsize=KEPT)
def _drawn(rows: int, seed: int, start: int, size: int) -> NDArray[np.uint8]:
    """How often each row is in each bootstrap sample: multinomial. A count over 255 has a chance of less than 1e-500."""
    drawn = np.random.default_rng([seed, 0, start]).multinomial(rows, np.full(rows, 1 / rows), size=size)
    return drawn.astype(np.uint8)


@lru_cache(maxsize=KEPT)
def _thrown(rows: int, seed: int, start: int, size: int) -> NDArray[np.int8]:
    """A coin for each row: 1 or -1."""
    return np.random.default_rng([seed, 1, start]).integers(0, 2, (size, rows), np.int8) * 2 - 1
