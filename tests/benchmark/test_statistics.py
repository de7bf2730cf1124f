"""What times amount to: known answers, and what must hold of any times."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightctl.benchmark.statistics import median_interval, outliers, ratio_interval

TIMES = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40)


@pytest.mark.parametrize(
    ("n", "low", "high", "confidence"),
    # The usual table of the sign test's interval at 95 %: which order statistics, and how often they hold the median.
    [(6, 1, 6, 0.96875), (9, 2, 8, 0.9609375), (10, 2, 9, 0.978515625), (20, 6, 15, 0.9586105), (25, 8, 18, 0.9567147)],
)
def test_the_intervals_of_the_table(n: int, low: int, high: int, confidence: float) -> None:
    found = median_interval([float(value) for value in range(n, 0, -1)], 0.95)
    assert found == (low, high, pytest.approx(confidence, abs=1e-6))


@pytest.mark.parametrize(("n", "confidence"), [(1, 0.0), (2, 0.5), (3, 0.75), (5, 0.9375)])
def test_few_values_give_less_confidence_not_a_narrow_interval(n: int, confidence: float) -> None:
    assert median_interval([float(value) for value in range(n)], 0.95) == (0, n - 1, confidence)


@given(TIMES, st.floats(0.5, 0.999))
def test_an_interval_holds_the_median_of_its_values(times: list[float], confidence: float) -> None:
    low, high, reached = median_interval(times, confidence)
    assert low <= statistics.median(times) <= high
    assert reached >= confidence or (low, high) == (min(times), max(times))


def test_outliers_that_would_hide_each_other() -> None:
    # Two that a standard deviation would hide: they are a fifth of the values.
    values = [2.1, 2.6, 2.4, 2.5, 2.3, 2.1, 2.3, 2.6, 8.2, 8.3]
    assert outliers(values) == (8.2, 8.3)
    assert outliers([1.0, 1.1, 0.9, 1.05, 0.95]) == ()
    assert outliers([1.0] * 9 + [3.0]) == (3.0,)
    assert outliers([1.0] * 5) == ()


# Hollander and Wolfe, Nonparametric Statistical Methods, tables 4.1 and example 4.4: the shift is 0.305 and lies in
# (-0.15, 0.76) at about 95 %. On logarithms, so that ratios become those shifts.
TERM = [0.80, 0.83, 1.89, 1.04, 1.45, 1.38, 1.91, 1.64, 0.73, 1.46]
EARLY = [1.15, 0.88, 0.90, 0.74, 1.21]


def test_the_shift_of_the_textbook() -> None:
    middle, low, high = ratio_interval([math.exp(x) for x in EARLY], [math.exp(x) for x in TERM], 0.95)
    assert low is not None
    assert high is not None
    assert math.log(middle) == pytest.approx(0.305, abs=1e-4)  # an even number of ratios: the mean of two
    assert (math.log(low), math.log(high)) == (pytest.approx(-0.15), pytest.approx(0.76))


def test_too_few_values_tell_nothing() -> None:
    assert ratio_interval([1.0] * 3, [2.0] * 3, 0.95) == (2.0, None, None)
    assert ratio_interval([1.0] * 4, [2.0] * 4, 0.95) == (2.0, 2.0, 2.0)
    assert ratio_interval([1.0] * 4, [2.0] * 4, 0.99) == (2.0, None, None)
    assert ratio_interval([1.0] * 5, [2.0] * 5, 0.99) == (2.0, 2.0, 2.0)


def test_many_values_go_by_the_normal_distribution() -> None:
    # Just below and above the bound, the exact and the approximate interval are nearly the same.
    exact = ratio_interval([1 + n / 1000 for n in range(50)], [1.2 + n / 1000 for n in range(50)], 0.95)
    normal = ratio_interval([1 + n / 1000 for n in range(51)], [1.2 + n / 1000 for n in range(50)], 0.95)
    assert exact == pytest.approx(normal, rel=2e-3)


@given(TIMES, TIMES)
def test_a_ratio_turned_round(before: list[float], after: list[float]) -> None:
    _, low, high = ratio_interval(before, after, 0.95)
    _, back_low, back_high = ratio_interval(after, before, 0.95)
    if low is not None and high is not None and back_low is not None and back_high is not None:
        assert (1 / back_high, 1 / back_low) == (pytest.approx(low), pytest.approx(high))
