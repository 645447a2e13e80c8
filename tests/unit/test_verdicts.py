"""Verdicts against hand-computed cases: the interval, the test, the number of rows, and how often equal models are told apart."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from tunesmith.evaluation.stats import MOST, Array, Comparison, compare


def table(values: Array, weights: Array | float = 1.0) -> Array:
    """Columns (value, weight) of rows."""
    return np.stack([values, np.broadcast_to(weights, values.shape)], 1).astype(np.float64)


def against(base: Array, tuned: Array, weights: Array | float = 1.0, lower: bool = True, seed: int = 0) -> Comparison:
    return compare("loss", table(base, weights), table(tuned, weights), lower, seed=seed)


def test_a_clear_effect() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(40, 5, 100)
    found = against(base, base - 5 + rng.normal(0, 1, 100), 10.0)
    assert found.verdict == "better" and found.difference == pytest.approx(-0.5, abs=0.03)
    assert found.low and found.high and found.low < found.difference < found.high < 0
    assert found.rows == 100 and found.p == pytest.approx(1 / 10_001)
    assert against(base, base + 5, 10.0).verdict == "worse"
    assert against(base, base + 5, 10.0, lower=False).verdict == "better"


def test_the_interval_is_that_of_the_theory() -> None:
    """For equal weights the bootstrap's interval is mean +- 1.96 s / sqrt(n), to a few percent; and so is what can be found:
    (2.17 + 0.84) s / sqrt(n)."""
    rng = np.random.default_rng(1)
    difference = rng.normal(0.1, 1.0, 400)
    found = against(np.zeros(400), difference)
    error = difference.std() / math.sqrt(400)
    assert found.low is not None and found.high is not None
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.05)
    assert found.detectable == pytest.approx((2.17 + 0.8416) * error, rel=0.05)


def test_the_p_value_is_that_of_all_exchanges() -> None:
    """Of 2^9 ways to exchange the two models in nine rows, so many give a difference at least as large."""
    rng = np.random.default_rng(5)
    difference = rng.normal(0.4, 1.0, 9)
    sums = np.array([np.dot(signs, difference) for signs in product((1, -1), repeat=9)])
    want = np.mean(np.abs(sums) >= abs(difference.sum()) - 1e-9)
    assert against(np.zeros(9), difference).p == pytest.approx(want, abs=0.02)


def test_a_figure_of_any_sums() -> None:
    """Perplexity: exp(sum of losses / sum of tokens). Its interval against the bootstrap written out in full,
    which ends up to an eighth nearer to zero where Hall's is wider."""
    rng = np.random.default_rng(7)
    base, tuned = rng.normal(50, 8, 60), rng.normal(45, 8, 60)

    def perplexity(sums: Array) -> Array:
        return np.exp(sums[0] / sums[1])

    found = compare("perplexity", table(base, 10), table(tuned, 10), True, perplexity)
    draws = rng.integers(0, 60, (10_000, 60))
    want = np.exp(tuned[draws].sum(1) / 600) - np.exp(base[draws].sum(1) / 600)
    assert found.base == pytest.approx(math.exp(base.sum() / 600))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(want, [0.0236, 0.9764])), rel=0.125)


def test_weights_of_their_own() -> None:
    """A row counts as much as its weight, of each model's own: (1 + 9) / (1 + 3) = 2.5 and (2 + 8) / (1 + 1) = 5."""
    found = compare("x", np.array([[1.0, 1], [9, 3]]), np.array([[2.0, 1], [8, 1]]), False)
    assert (found.base, found.tuned, found.difference, found.verdict) == (2.5, 5.0, 2.5, "cannot tell")
    nothing = compare("x", np.zeros((9, 2)), np.ones((9, 2)), False)  # 0 / 0 on one side
    assert nothing.verdict == "cannot tell" and nothing.low is None


def test_cannot_tell_says_how_many_rows() -> None:
    rng = np.random.default_rng(2)
    difference = rng.normal(0.05, 1.0, 50)
    found = against(np.zeros(50), difference)
    assert found.verdict == "cannot tell" and found.detectable
    want = 50 * (found.detectable / found.difference) ** 2
    assert found.rows_needed == math.ceil(want) > 50
    assert against(np.array([1.0]), np.array([0.5])).verdict == "cannot tell"  # one row proves nothing
    same = against(np.arange(9.0), np.arange(9.0))
    assert same.verdict == "cannot tell" and same.rows_needed is None and same.p == 1.0
    fewer = against(np.full(7, 9.0), np.arange(7) / 9)
    assert fewer.high is not None and fewer.high < 0 and fewer.verdict == "cannot tell" and fewer.rows_needed == 8


@pytest.mark.parametrize("rows", [8, 12, 40, 200])
@pytest.mark.parametrize("kind", ["normal", "tailed", "skewed", "rare"])
def test_equal_models_are_told_apart_in_five_of_a_hundred_test_sets_at_most(rows: int, kind: str) -> None:
    """1,000 test sets (of 200 rows 400) of differences without an effect, of four shapes: at most 5 % of verdicts are wrong,
    within two standard errors of such a count (1.4 %). "skewed" has one tail alone."""
    rng, wrong = np.random.default_rng(rows), 0
    sets = 400 if rows == 200 else 1000
    for seed in range(sets):
        difference = {
            "normal": lambda: rng.normal(0, 0.3, rows),
            "tailed": lambda: rng.exponential(1, rows) * rng.choice([-1, 1], rows),
            "skewed": lambda: rng.exponential(1, rows) - 1,
            "rare": lambda: rng.choice(
                [-1.0, 0.0, 1.0], rows, p=[0.1, 0.8, 0.1]
            ),  # a rate of 0 or 1 a row, mostly alike
        }[kind]()
        base = rng.normal(3, 1, rows)
        wrong += against(base, base + difference, seed=seed % 4).verdict != "cannot tell"
    assert wrong / sets <= 0.064


def test_a_tail_widens_the_interval_to_its_side() -> None:
    """Hall's interval by hand, of differences 0 (nine times) and 10: mean 1, s 3.162, skewness g 2.667, t 2.262 / sqrt(10) =
    0.715: 1 - s * 3 / g * (cbrt(1 + g * (+-0.715 - g / 60)) - 1) = -0.450 and 8.146."""
    found = against(np.zeros(10), np.array([0.0] * 9 + [10.0]))
    assert found.low is not None and found.high is not None
    assert found.low == 0 and found.high == pytest.approx(8.146, abs=0.001)  # nine share the lowest: no tail there
    spread = against(np.zeros(10), np.array([i / 1000 for i in range(9)] + [10.0]))
    assert spread.low == pytest.approx(-0.447, abs=0.005)
    rates = against(np.zeros(12), np.array([-1.0] * 10 + [0.0] * 2))  # none lies beyond what two rows have
    assert rates.verdict == "better" and rates.high is not None and rates.high < -0.5
    even = against(np.zeros(10), np.array([-1.0, 1.0] * 5))
    assert even.low is not None and even.high is not None and -even.low == pytest.approx(even.high, rel=0.1)


def test_what_is_rounding_is_no_difference() -> None:
    base = np.full(8, 0.1) * 3
    for tuned in (np.full(8, 0.3), np.full(8, 0.3) + 1e-15):
        found = against(base, tuned)
        assert (found.verdict, found.difference, found.rows_needed) == ("cannot tell", 0.0, None)
    assert against(base, base - 1e-6).verdict == "better"


def test_the_number_of_rows_needed_has_an_end() -> None:
    for tiny in (1e-9, 1e-200, 5e-324):
        difference = np.array([1.0, -1.0] * 10 + [tiny * 21])
        found = compare("x", table(np.zeros(21)), table(difference), False)
        assert found.rows_needed in (None, MOST), found


def test_a_planted_difference_is_found_at_the_documented_rate() -> None:
    """The difference that `detectable` names for 60 rows (of the spread that they have) is found in 80 % of 300 test sets: within
    three standard errors (7 %) and what the estimate of the spread wavers."""
    rng, found = np.random.default_rng(11), 0
    planted = against(np.zeros(60), rng.normal(0, 1, 60)).detectable
    assert planted == pytest.approx(3.05 / math.sqrt(60), rel=0.2)
    effect = 3.05 / math.sqrt(60)
    for seed in range(300):
        found += against(np.zeros(60), rng.normal(-effect, 1, 60), seed=seed % 4).verdict == "better"
    assert 0.72 <= found / 300 <= 0.88
