"""The figures of a result as tables of text, which every report that people read lays out in its own way."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TypeVar

from weightctl import units
from weightctl.benchmark.results import PHASES, BenchResult, Interval, Row, Scenario

NOTHING = "–"
"""What a cell shows that has no value."""

CACHES = {"warm": "Warm", "cold": "Cold"}
MEANINGS = {"warm": "the files are in the page cache", "cold": "the files come from storage"}
CEILINGS = {
    "warm_read": "reading, warm",
    "cold_read": "reading, cold",
    "warm_map": "mapping, warm",
    "host_to_device": "host to device",
}

STAGES = ("pull", "unpack", "copy", "start", "load")

T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """Text in columns. A cell without a value is `NOTHING`."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    """What a reader has to know first."""

    def is_numeric(self, column: int) -> bool:
        """Whether the column's cells are numbers, which are read best with their ends below one another."""
        cells = [row[column] for row in self.rows if row[column] != NOTHING]
        return bool(cells) and all(cell[:1].isdigit() for cell in cells)


def tables(result: BenchResult) -> tuple[Table, ...]:
    """All there is, without the tables that would be empty; the raw runs last."""
    found = (_journeys(result), _results(result), _failures(result), _deployments(result), _changes(result),
             _differences(result), _limits(result), _conditions(result), _environment(result), _starts(result),
             _runs(result))  # fmt: skip
    return tuple(table for table in found if table.rows)


def caches(result: BenchResult) -> tuple[str, ...]:
    """The cache states that have a time, warm first."""
    return tuple(cache for cache in CACHES if ranked(result, cache))


def ranked(result: BenchResult, cache: str) -> tuple[Row, ...]:
    """The rows of one cache state that have a time, the fastest first."""
    rows = [row for row in result.results if row.cache == cache and row.median_seconds is not None]
    return tuple(sorted(rows, key=lambda row: row.median_seconds or 0))


def journeys(result: BenchResult) -> tuple[Scenario, ...]:
    """The ways of shipping that have a time, the fastest first."""
    found = [scenario for scenario in result.scenarios if scenario.median_seconds is not None]
    return tuple(sorted(found, key=lambda scenario: scenario.median_seconds or 0))


def way(scenario: Scenario) -> str:
    """`image, docker, 3 jobs`."""
    jobs = () if scenario.jobs is None else (units.count(scenario.jobs, "job"),)
    return ", ".join((scenario.scenario, scenario.way, *jobs))


def in_order(rows: Iterable[Mapping[str, object]]) -> tuple[str, ...]:
    """Every name in the rows, the stages of a cold start as they follow one another and then any other."""
    found = dict.fromkeys(name for row in rows for name in row)
    return tuple(sorted(found, key=lambda name: STAGES.index(name) if name in STAGES else len(STAGES)))


def title(result: BenchResult) -> str:
    """What was loaded, of what size, and to where."""
    model = result.model
    return (
        f"{units.size(model.bytes)} in {units.count(model.tensors, 'tensor')}, "
        f"{units.count(model.files, 'file')} of {model.format}, to {result.device}"
    )


def when(created: str) -> str:
    """`2026-11-22T04:00:00Z` as `2026-11-22 04:00 UTC`."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(:\d\d)?Z", created, re.ASCII)
    return f"{found[1]} {found[2]} UTC" if found else created


def how_to_read(result: BenchResult) -> str:
    """Two sentences for whoever sees such a report for the first time."""
    if not caches(result) and journeys(result):
        return (
            "Every cold start begins with nothing of the model where it is loaded and ends with all its weights on the "
            "device, stage after stage; a time is the median of those that count. "
            "What was done once, before the first of them, is listed as deploying and is in no time."
        )
    wanted, known = result.settings.confidence, [row.interval for row in result.results if row.interval]
    few = ", and less often where the runs were too few" if any(each.confidence < wanted for each in known) else ""
    return (
        "Every run loads the whole model in a fresh process and counts only if each tensor equals the model's own "
        f"bytes; a time is the median of those, and its interval holds the true median {wanted * 100:g} times in "
        f"100{few}. "
        "The limit is the least time in which this machine can read the files and copy them to the device: "
        "what a strategy lacks to 100 % of it is its own doing."
    )


def shown(value: T | None, form: Callable[[T], str] = str) -> str:
    """The value in a form, or that there is none."""
    return NOTHING if value is None else form(value)


def _results(result: BenchResult) -> Table:
    columns = ("strategy", "cache", "median", "interval", "rate", "of the limit", "runs", "verified", "host", "pinned",
               "device", "in page cache")  # fmt: skip
    rows = tuple(_figures(row) for cache in CACHES for row in ranked(result, cache))
    note = "Median, its interval and the rate at the median; the largest memory of any run; fastest first."
    return Table("Results", columns, rows, note)


def _figures(row: Row) -> tuple[str, ...]:
    return (
        row.strategy,
        row.cache,
        shown(row.median_seconds, units.seconds),
        _span(row.interval),
        shown(row.bytes_per_second, units.rate),
        shown(row.share, units.share),
        f"{len(row.seconds)}",
        "yes" if row.verified else "no",
        shown(row.peak_host_bytes, units.size),
        shown(row.peak_pinned_bytes, units.size),
        shown(row.peak_device_bytes or None, units.size),
        shown(row.residency, units.share),
    )


def _span(interval: Interval | None) -> str:
    """One time alone has none."""
    return units.span(interval.low, interval.high) if interval and interval.confidence else NOTHING


def _journeys(result: BenchResult) -> Table:
    shipped = journeys(result)
    names = in_order({stage.name: stage for stage in scenario.stages} for scenario in shipped)
    rows = []
    for scenario in shipped:
        stages = {stage.name: stage.seconds for stage in scenario.stages}
        rows.append((
            way(scenario),
            scenario.strategy or NOTHING,
            shown(scenario.median_seconds, units.seconds),
            _span(scenario.interval),
            f"{len(scenario.seconds)}",
            *(shown(stages.get(name), units.seconds) for name in names),
        ))  # fmt: skip
    columns = ("way", "strategy", "median", "interval", "cold starts", *names)
    return Table("Cold starts", columns, tuple(rows), "Median of the whole and of each stage; fastest first.")


def _deployments(result: BenchResult) -> Table:
    rows = tuple(
        (way(scenario), stage.name, units.seconds(stage.seconds), units.size(stage.bytes) if stage.bytes else NOTHING)
        for scenario in result.scenarios
        for stage in scenario.deploy
    )
    return Table("Deploying", ("way", "stage", "time", "moved"), rows, "Done once, before the first cold start.")


def _failures(result: BenchResult) -> Table:
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in result.results:
        if row.status != "ok":
            found.setdefault((row.strategy, row.status, row.reason or "no reason was given"), []).append(row.cache)
    for scenario in result.scenarios:
        if scenario.status != "ok":
            found[way(scenario), scenario.status, scenario.reason or "no reason was given"] = [NOTHING]
    rows = tuple((what, ", ".join(states), status, why) for (what, status, why), states in found.items())
    return Table("Without a time", ("what", "cache", "status", "reason"), rows)


def _changes(result: BenchResult) -> Table:
    columns = ("strategy", "cache", "verdict", "before", "now", "ratio", "interval")
    if result.comparison is None:
        return Table("", columns, ())
    rows = tuple(
        (
            change.strategy,
            change.cache,
            change.verdict,
            shown(change.before_seconds, units.seconds),
            shown(change.after_seconds, units.seconds),
            shown(change.ratio, _ratio),
            "–".join(_ratio(ratio) for ratio in (change.ratio_low, change.ratio_high) if ratio is not None) or NOTHING,
        )
        for change in result.comparison.changes
    )
    note = "The ratio says how many times as long a run takes now; it is a change where its interval leaves out 1."
    return Table(f"Compared with the bench of {when(result.comparison.created)}", columns, rows, note)


def _ratio(value: float) -> str:
    return f"{value:.2f}"


def _differences(result: BenchResult) -> Table:
    found = result.comparison.differences if result.comparison else ()
    return Table("What else is not as it was", ("difference",), tuple((text,) for text in found))


def _limits(result: BenchResult) -> Table:
    ceilings = [(f"ceiling: {CEILINGS.get(k, k)}", units.rate(rate), NOTHING) for k, rate in result.ceilings.items()]
    limits = [
        (f"limit, {it.cache}: bound by {it.bound}", units.rate(it.bytes_per_second), units.seconds(it.seconds))
        for it in result.limits
    ]
    note = "Measured in the same bench: what the machine can do at best, and the least time that follows from it."
    return Table("Limits", ("", "rate", "time"), (*ceilings, *limits), note)


def _conditions(result: BenchResult) -> Table:
    about = {f"model: {key}": value for key, value in asdict(result.model).items()}
    asked = asdict(result.settings)
    return Table("Model and settings", ("", "value"), _pairs({**about, **asked}.items()))


def _environment(result: BenchResult) -> Table:
    return Table("Environment", ("", "value"), _pairs(result.environment.items()))


def _pairs(items: Iterable[tuple[str, object]]) -> tuple[tuple[str, str], ...]:
    return tuple((key.replace("_", " "), _plain(key, value)) for key, value in items)


def _plain(key: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and key.endswith("bytes"):
        return f"{units.size(value)} ({value} bytes)"
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value))
    return NOTHING if value is None else str(value)


def _runs(result: BenchResult) -> Table:
    runs = [(row, run) for row in result.results for run in row.runs]
    phases = [phase for phase in PHASES if any(phase in run.phases for _, run in runs)]
    columns = ("strategy", "cache", "round", "outcome", "seconds", *phases, "in page cache", "host bytes",
               "pinned bytes", "device bytes")  # fmt: skip
    rows = tuple(
        (
            row.strategy,
            row.cache,
            f"{run.round}",
            run.reason or run.mark or ("outlier" if run.seconds in row.outliers else run.status),
            shown(run.seconds, _microseconds),
            *(shown(run.phases.get(phase), _microseconds) for phase in phases),
            shown(run.residency, lambda share: f"{share:.3f}"),
            shown(run.peak_host_bytes),
            shown(run.peak_pinned_bytes),
            shown(run.peak_device_bytes),
        )
        for row, run in runs
    )
    note = "In seconds and bytes. A run counts if its outcome is ok or outlier."
    return Table("Every run", columns, rows, note)


def _starts(result: BenchResult) -> Table:
    starts = [(scenario, start) for scenario in result.scenarios for start in scenario.starts]
    names = in_order({stage.name: stage for stage in start.stages} for _, start in starts)
    rows = []
    for scenario, start in starts:
        stages = {stage.name: stage.seconds for stage in start.stages}
        rows.append((
            way(scenario),
            f"{start.round}",
            start.reason or start.mark or start.status,
            _microseconds(start.seconds),
            *(shown(stages.get(name), _microseconds) for name in names),
        ))  # fmt: skip
    columns = ("way", "round", "outcome", "seconds", *names)
    return Table("Every cold start", columns, tuple(rows), "In seconds. One counts if its outcome is ok.")


def _microseconds(value: float) -> str:
    return f"{value:.6f}"
