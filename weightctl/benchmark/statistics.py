"""What times amount to: pure functions that assume no distribution, each with its source."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

OUTLIER_SCORE = 3.5
"""B. Iglewicz and D. Hoaglin, How to Detect and Handle Outliers, 1993: the modified z-score of what to look at."""


def median_interval(values: Sequence[float], confidence: float) -> tuple[float, float, float]:
    """The narrowest symmetric pair of order statistics that holds the median at least as often as `confidence` says.

    Returns low, high and how often that is: the binomial probability that no more than so many of n values lie on one
    side (W. J. Conover, Practical Nonparametric Statistics, 3rd edition, section 3.2; the interval of the sign test).
    Of too few values it is the smallest and the largest, and less often: 2 give 0.5, 3 give 0.75, 6 give 0.969.
    """
    ordered = sorted(values)
    n = len(ordered)
    outside = 0.0  # how often the median lies below the interval; as often above
    cut = 0
    for left_out in range(n // 2 + n % 2):
        wider = outside + math.comb(n, left_out) / 2**n
        if left_out and 1 - 2 * wider < confidence:
            break
        outside, cut = wider, left_out
    return ordered[cut], ordered[n - 1 - cut], max(0.0, 1 - 2 * outside)


def outliers(values: Sequence[float]) -> tuple[float, ...]:
    """Those whose modified z-score, 0.6745 (x - median) / MAD, passes `OUTLIER_SCORE` (Iglewicz and Hoaglin).

    Where more than half of the values are equal, so that the MAD is nought, the mean absolute deviation takes its
    place, as (x - median) / (1.2533 MeanAD).
    """
    middle = statistics.median(values)
    deviations = [abs(value - middle) for value in values]
    spread = statistics.median(deviations) / 0.6745 or statistics.fmean(deviations) * 1.253314
    if not spread:
        return ()
    return tuple(value for value in values if abs(value - middle) / spread > OUTLIER_SCORE)


def ratio_interval(
    before: Sequence[float], after: Sequence[float], confidence: float
) -> tuple[float, float | None, float | None]:
    """How many times `before` fits into `after`: the median of all pairs' ratios, and the interval that holds it.

    Hodges and Lehmann's estimate and Moses' interval on logarithms, from the distribution of the Mann-Whitney statistic
    (M. Hollander, D. A. Wolfe and E. Chicken, Nonparametric Statistical Methods, 3rd edition, sections 4.2 and 4.3):
    exact, or its normal approximation for more than `EXACT_PAIRS`. The interval leaves out 1 exactly when the
    two-sided test finds a difference. It is None, None where there are too few values for any: fewer than four of each
    for 0.95, five for 0.99.
    """
    ratios = sorted(new / old for new in after for old in before)
    rank = _moses_rank(len(before), len(after), (1 - confidence) / 2)
    middle = statistics.median(ratios)
    return (middle, ratios[rank - 1], ratios[-rank]) if rank else (middle, None, None)


EXACT_PAIRS = 2500
"""50 runs of each take 0.1 s."""


def _moses_rank(n: int, m: int, tail: float) -> int:
    """The largest C for which the Mann-Whitney statistic is below C no more often than `tail`; 0 if there is none."""
    if n * m > EXACT_PAIRS:
        deviation = math.sqrt(n * m * (n + m + 1) / 12)
        return round(n * m / 2 + statistics.NormalDist().inv_cdf(tail) * deviation)
    cumulative = itertools.accumulate(_arrangements(n, m))
    return next(rank for rank, count in enumerate(cumulative) if count > tail * math.comb(n + m, n))


def _arrangements(n: int, m: int) -> list[int]:
    """How many orders of n and m values have 0, 1, … n × m pairs out of order: the coefficients of the Gaussian
    binomial (H. B. Mann and D. R. Whitney, 1947)."""
    counts = [1] + [0] * (n * m)
    for i in range(1, n + 1):
        for pairs in range(n * m, m + i - 1, -1):
            counts[pairs] -= counts[pairs - m - i]
        for pairs in range(i, n * m + 1):
            counts[pairs] += counts[pairs - i]
    return counts
