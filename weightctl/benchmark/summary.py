"""From runs to rows, and from two benches to what has changed between them."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from weightctl.benchmark.results import BenchResult, Change, Comparison, Interval, Limit, Row, Run
from weightctl.benchmark.statistics import median_interval, outliers, ratio_interval
from weightctl.errors import UsageError

CONFIDENCE = 0.95
"""Of the intervals of medians."""

CHANGE_CONFIDENCE = 0.99
"""Of the intervals of ratios: a comparison looks at many rows at once, and one false alarm in a hundred is enough."""

CHANGE = 0.05
"""A row has changed if the whole interval of its ratio lies farther from 1 than this: two sessions on one machine
differ by some percent for reasons that no run of either can show (where memory lies, how warm the machine is)."""


def summarize(strategy: str, cache: Any, runs: Sequence[Run], nbytes: int, limit: Limit | None) -> Row:
    """The row of at least one run over `nbytes` of tensors. One failed run makes it a failed row, without times."""
    failed = next((run for run in runs if run.status == "failed"), None)
    peaks: dict[str, Any] = {
        f"peak_{kind}_bytes": _largest(getattr(run, f"peak_{kind}_bytes") for run in runs)
        for kind in ("host", "device", "pinned")
    }
    if failed:
        return Row(strategy, cache, "failed", failed.reason, runs=tuple(runs), **peaks)
    counted = [run for run in runs if run.counts]
    seconds = tuple(run.seconds for run in counted if run.seconds is not None)
    if not seconds:
        why = f"no run counts: {runs[-1].mark}" if runs[-1].round else "it got no farther than the warm-up"
        return Row(strategy, cache, "unavailable", why, runs=tuple(runs), **peaks)
    median = statistics.median(seconds)
    return Row(
        strategy=strategy,
        cache=cache,
        status="ok",
        seconds=seconds,
        median_seconds=median,
        bytes_per_second=nbytes / median,
        verified=True,
        **peaks,
        interval=Interval(*median_interval(seconds, CONFIDENCE)),
        share=limit.seconds / median if limit else None,
        outliers=outliers(seconds),
        residency=statistics.median(run.residency or 0.0 for run in counted),
        phases={
            name: statistics.median(run.phases[name] for run in counted if name in run.phases)
            for name in dict.fromkeys(name for run in counted for name in run.phases)
        },
        runs=tuple(runs),
    )


def width(row: Row) -> float:
    """How far the interval of the median reaches, to either side, as a share of it; infinite while it is not known."""
    if row.interval is None or row.median_seconds is None or row.interval.confidence < CONFIDENCE:
        return math.inf
    return (row.interval.high - row.interval.low) / 2 / row.median_seconds


def _largest(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def compare(old: BenchResult, new: BenchResult) -> Comparison:
    """What became of every row, and what else is not as it was."""
    keys = dict.fromkeys((row.strategy, row.cache) for result in (new, old) for row in result.results)
    changes = tuple(_change(old.row(*key), new.row(*key)) for key in keys)
    return Comparison(old.created, changes, tuple(_differences(_facts(old), _facts(new))))


def _change(old: Row | None, new: Row | None) -> Change:
    either = new or old
    assert either is not None
    before, after = (row.median_seconds if row else None for row in (old, new))
    place = (either.strategy, either.cache)
    if old is None or new is None:
        return Change(*place, "added" if old is None else "gone", before, after)
    if before is None or after is None:
        return Change(*place, "fixed" if after else "broken" if before else "same", before, after)
    ratio, low, high = ratio_interval(old.seconds, new.seconds, CHANGE_CONFIDENCE)
    if low is None or high is None:
        return Change(*place, "unclear", before, after, ratio)
    verdict = "slower" if low > 1 + CHANGE else "faster" if high < 1 / (1 + CHANGE) else "same"
    return Change(*place, verdict, before, after, ratio, low, high)  # type: ignore[arg-type]


def _facts(result: BenchResult) -> dict[str, Any]:
    model = {f"model {name}": value for name, value in asdict(result.model).items()}
    return {**result.environment, **model, "construct": result.settings.construct}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterable[str]:
    for name in dict.fromkeys((*old, *new)):
        if old.get(name) != new.get(name):
            yield f"{name}: {old.get(name)} → {new.get(name)}"


@dataclass(frozen=True)
class Floor:
    """The least share of the limit that a strategy may reach: `pipelined>=0.7`, or `pipelined/cold>=0.7`."""

    strategy: str
    cache: str | None
    share: float

    def __str__(self) -> str:
        return f"{self.strategy}{f'/{self.cache}' if self.cache else ''}>={self.share:g}"

    @classmethod
    def parse(cls, text: str) -> Floor:
        """Raises UsageError for what is no floor."""
        found = re.fullmatch(
            r"([a-z][a-z0-9_-]*)(?:/(warm|cold))?\s*>=\s*(\d{1,3}(?:\.\d{1,9})?|\.\d{1,9})", text.strip()
        )
        if not found:
            raise UsageError(
                f"not a floor: {text!r}", "write STRATEGY>=SHARE or STRATEGY/CACHE>=SHARE, such as 'pipelined>=0.7'"
            )
        return cls(found[1], found[2], float(found[3]))

    def shortfall(self, result: BenchResult) -> str | None:
        """Why the result is below it, in words; None if it is not."""
        rows = [row for row in result.results if row.strategy == self.strategy and self.cache in (None, row.cache)]
        if not rows:
            return f"{self.strategy}{f', {self.cache}' if self.cache else ''} was not measured"
        for row in rows:
            if row.share is None:
                return f"{row.strategy}, {row.cache} has no times: {row.reason or 'its limit is not known'}"
            if row.share < self.share:
                return f"{row.strategy}, {row.cache} reached {row.share:.3f} of the limit, less than {self.share:g}"
        return None
