"""From runs to rows, and from two benches to what has changed."""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections import Counter
from collections.abc import Callable

import pytest

from weightctl.benchmark.results import SCHEMA, BenchResult, Limit, Model, Row, Run, Settings
from weightctl.benchmark.summary import Floor, compare, summarize, width
from weightctl.errors import UsageError

LIMIT = Limit("warm", 0.5, 200.0, "reading")


def runs(*seconds: float) -> list[Run]:
    return [Run(n + 1, "ok", seconds=each, phases={"loading": each}, residency=1.0) for n, each in enumerate(seconds)]


def result(*rows: Row) -> BenchResult:
    settings = Settings("cpu", ("a",), ("warm",), 10, 0.05, 0.95, 60, 2)
    return BenchResult(
        SCHEMA,
        "2026-11-22T04:00:00Z",
        {"torch": "2"},
        {},
        (),
        Model("m", None, "safetensors", 1, 1, 100),
        settings,
        rows,
    )


def noisy(seconds: float, seed: int, count: int = 8) -> Row:
    chance = random.Random(seed)
    return summarize("a", "warm", runs(*(seconds * chance.gauss(1, 0.03) for _ in range(count))), 100, LIMIT)


def test_a_row_is_what_its_counted_runs_say() -> None:
    past = [Run(0, "ok", mark="it was the warm-up", seconds=9.0, peak_host_bytes=7), *runs(1.0, 2.0, 3.0)]
    past.append(Run(4, "ok", mark="it was not warm", seconds=0.1))
    row = summarize("a", "warm", past, 100, LIMIT)
    assert (row.status, row.seconds, row.median_seconds) == ("ok", (1.0, 2.0, 3.0), 2.0)
    assert (row.bytes_per_second, row.share, row.peak_host_bytes) == (50.0, 0.25, 7)
    assert row.interval is not None
    assert (row.interval.low, row.interval.high, row.interval.confidence) == (1.0, 3.0, 0.75)
    assert (row.phases, len(row.runs)) == ({"loading": 2.0}, 5)
    assert width(row) == float("inf")
    assert width(summarize("a", "warm", runs(*[1.0] * 6), 100, LIMIT)) == 0


def test_one_failed_run_fails_the_row() -> None:
    row = summarize("a", "warm", [*runs(1.0), Run(2, "failed", "it crashed")], 100, LIMIT)
    assert (row.status, row.reason, row.seconds, row.median_seconds, row.verified) == (
        "failed", "it crashed", (), None, False,
    )  # fmt: skip


def test_a_row_without_a_run_that_counts_says_why() -> None:
    row = summarize(
        "a", "cold", [Run(1, "ok", mark="it was not cold: 100 % of the files was cached", seconds=1.0)], 1, None
    )
    assert row.status == "unavailable"
    assert "not cold" in str(row.reason)
    interrupted = summarize("a", "warm", [Run(0, "ok", mark="it was the warm-up", seconds=1.0)], 1, None)
    assert (interrupted.status, interrupted.reason) == ("unavailable", "it got no farther than the warm-up")


def verdicts(times: Callable[[random.Random], float], slowdown: float) -> Counter[str]:
    """Of 200 comparisons of two benches of ten runs, whose times are drawn from one distribution."""
    found: Counter[str] = Counter()
    for seed in range(200):
        chance = random.Random(seed)
        before, after = (
            summarize("a", "warm", runs(*(factor * times(chance) for _ in range(10))), 100, LIMIT)
            for factor in (1, slowdown)
        )
        (change,) = compare(result(before), result(after)).changes
        found[change.verdict] += 1
    return found


DISTRIBUTIONS = {
    "normal": lambda chance: chance.gauss(1, 0.05),
    "skewed": lambda chance: 1 + chance.lognormvariate(-3, 0.8),
    "one in ten takes twice as long": lambda chance: chance.gauss(1, 0.03) * (2 if chance.random() < 0.1 else 1),
}


@pytest.mark.parametrize("times", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_a_slowdown_of_a_fifth_is_found_and_noise_is_not(times: Callable[[random.Random], float]) -> None:
    assert verdicts(times, 1.0) == {"same": 200}
    for slowdown, verdict in ((1.2, "slower"), (1 / 1.2, "faster")):
        found = verdicts(times, slowdown)
        assert found.keys() <= {verdict, "same"}
        assert found[verdict] >= 150


def test_much_noise_is_not_taken_for_a_change() -> None:
    assert verdicts(lambda chance: chance.gauss(1, 0.2), 1.0)["same"] >= 198  # one false alarm in a hundred, at most


def test_the_ratio_is_that_of_the_slowdown() -> None:
    (change,) = compare(result(noisy(1.0, 1)), result(noisy(1.2, 2))).changes
    assert (change.verdict, change.ratio) == ("slower", pytest.approx(1.2, rel=0.03))


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (lambda: noisy(1, 0, 3), lambda: noisy(9, 0, 3), "unclear"),
        (lambda: Row("a", "warm", "failed", "x"), lambda: noisy(1, 0), "fixed"),
        (lambda: noisy(1, 0), lambda: Row("a", "warm", "unavailable", "x"), "broken"),
        (lambda: Row("a", "warm", "failed", "x"), lambda: Row("a", "warm", "failed", "x"), "same"),
    ],
)
def test_what_has_no_times_is_said(before: Callable[[], Row], after: Callable[[], Row], verdict: str) -> None:
    assert [change.verdict for change in compare(result(before()), result(after())).changes] == [verdict]


def test_rows_of_one_bench_and_other_machines_are_said() -> None:
    other = dataclasses.replace(noisy(1, 0), strategy="b")
    newer = dataclasses.replace(result(other), environment={"torch": "3"})
    found = compare(result(noisy(1, 0)), newer)
    assert {change.strategy: change.verdict for change in found.changes} == {"a": "gone", "b": "added"}
    assert found.differences == ("torch: 2 → 3",)


def test_floors() -> None:
    row = summarize("a", "warm", runs(*[1.0] * 6), 100, LIMIT)
    assert Floor.parse("a>=0.5").shortfall(result(row)) is None
    assert "0.500 of the limit, less than 0.6" in str(Floor.parse(" a/warm >= 0.6 ").shortfall(result(row)))
    assert "not measured" in str(Floor.parse("a/cold>=0.1").shortfall(result(row)))
    assert "it crashed" in str(Floor.parse("a>=0").shortfall(result(Row("a", "warm", "failed", "it crashed"))))
    assert statistics.median(row.seconds) == 1


@pytest.mark.parametrize(
    "text", ["", "a", "a>0.5", "a>=", "a>=x", "a>=-1", "a>=nan", "a/hot>=1", "A>=1", "a>=1e9", "a>=1;b"]
)
def test_what_is_no_floor_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a floor"):
        Floor.parse(text)
