"""For programs: the result itself as JSON, and its runs as CSV."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, fields

from weightctl.benchmark.reports.base import Report, reports
from weightctl.benchmark.reports.markup import printable
from weightctl.benchmark.reports.tables import STAGES
from weightctl.benchmark.results import PHASES, BenchResult, Row, Run, Scenario

RUN = tuple(field.name for field in fields(Run) if field.name not in ("status", "reason", "phases"))
PARTS = tuple(dict.fromkeys((*PHASES, *STAGES)))
WHAT = ("scenario", "way", "jobs", "strategy", "cache")
COLUMNS = ("created", "model", "model_bytes", *WHAT, "status", "reason", "counts", *RUN, *PARTS)


@reports.register("json")
class JsonReport(Report):
    """What `--output` writes."""

    summary = "the result itself, as --output writes it"

    def render(self, result: BenchResult) -> bytes:
        return json.dumps(asdict(result), indent=2).encode() + b"\n"


@reports.register("csv")
class CsvReport(Report):
    """One line for each run and each whole cold start, warm-ups and failures too; one for each row that has none."""

    summary = "every run on a line, for spreadsheets and scripts"

    def render(self, result: BenchResult) -> bytes:
        text = io.StringIO()
        lines = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\r\n")  # as RFC 4180 says
        lines.writeheader()
        about = {"created": result.created, "model": result.model.name, "model_bytes": result.model.bytes}
        found = (*map(_runs, result.results), *map(_starts, result.scenarios))
        for line in itertools.chain.from_iterable(found):
            lines.writerow({key: _cell(value) for key, value in {**about, **line}.items()})
        return text.getvalue().encode()


def _runs(row: Row) -> Iterator[dict[str, object]]:
    about = {name: getattr(row, name) for name in ("strategy", "cache", "status", "reason")}
    if not row.runs:
        yield about
    for run in row.runs:
        known = {phase: run.phases[phase] for phase in PHASES if phase in run.phases}
        outcome = {"status": run.status, "reason": run.reason, "counts": run.counts}
        yield {**about, **outcome, **{name: getattr(run, name) for name in RUN}, **known}


def _starts(scenario: Scenario) -> Iterator[dict[str, object]]:
    about = {name: getattr(scenario, name) for name in ("scenario", "way", "jobs", "strategy", "status", "reason")}
    if not scenario.starts:
        yield about
    for start in scenario.starts:
        known = {stage.name: stage.seconds for stage in start.stages if stage.name in STAGES}
        outcome = {"status": start.status, "reason": start.reason, "counts": not (start.reason or start.mark)}
        yield {**about, **outcome, "round": start.round, "mark": start.mark, "seconds": start.seconds, **known}


def _cell(value: object) -> object:
    """No text that a spreadsheet would take for a formula."""
    if not isinstance(value, str):
        return value
    return f"'{printable(value)}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else printable(value)
