"""How a bench looks in a terminal: in 80 columns, and with more to see in more."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from weightctl import units
from weightctl.cli import ui

if TYPE_CHECKING:
    from rich.text import Text

    from weightctl.benchmark.results import BenchResult, Change, Comparison, Row

WIDE = 118
"""Columns from which there is room for the interval, the runs, the phases and pinned memory."""

NARROW_BAR, WIDE_BAR = 6, 16

EIGHTHS = " ▏▎▍▌▋▊▉"

COLORS = {
    "slower": "red", "broken": "red", "gone": "red", "faster": "green", "fixed": "green", "added": "green",
    "unclear": "yellow", "same": "",
}  # fmt: skip


def show(result: BenchResult) -> None:
    """The machine's limits, a line for each row with times, and why the others have none."""
    from rich.table import Table

    ui.show_folded(*_headline(result))
    measured = [row for row in result.results if row.status == "ok"]
    if measured:
        wide = shutil.get_terminal_size().columns >= WIDE
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("strategy", "cache", "median", *(("interval", "runs") if wide else ("±",)), "GB/s"):
            table.add_column(name, justify="left" if name in ("strategy", "cache") else "right", no_wrap=True)
        table.add_column("of limit", no_wrap=True)
        beside = ("pinned", "device") if wide else ("device",)
        memory = ["host", *(kind for kind in beside if any(_peak(row, kind) for row in measured))]
        for name in (*memory, *(("imports", "start-up") if wide else ())):
            table.add_column(name, justify="right", no_wrap=True)
        best = [min((r for r in measured if r.cache == cache), key=_median) for cache in {r.cache for r in measured}]
        for row in measured:
            table.add_row(*_cells(row, row in best, wide, memory), style="bold" if row in best else "")
        ui.show_drawn(table)
    ui.show_folded(*_notes(result))
    if result.comparison is not None:
        _show_comparison(result.comparison)


def _median(row: Row) -> float:
    return row.median_seconds or 0.0


def _headline(result: BenchResult) -> Iterator[str]:
    model = result.model
    about = f"{units.count(model.tensors, 'tensor')}, {units.size(model.bytes)}, {model.format}"
    yield f"{model.name}: {about}, to {result.device}"
    for limit in result.limits:
        fastest = f"{units.seconds(limit.seconds)}, {units.rate(limit.bytes_per_second)}"
        yield f"limit, {limit.cache}: {fastest} ({limit.bound})"
    rates = ", ".join(f"{name.replace('_', ' ')} {units.rate(rate)}" for name, rate in result.ceilings.items())
    yield f"ceilings: {rates}"


def _peak(row: Row, kind: str) -> int:
    return getattr(row, f"peak_{kind}_bytes") or 0


def _cells(row: Row, best: bool, wide: bool, memory: Sequence[str]) -> Iterator[Text | str]:
    from rich.text import Text

    from weightctl.benchmark.summary import width

    yield f"★ {row.strategy}" if best else f"  {row.strategy}"
    yield row.cache
    yield units.seconds(_median(row))
    if wide:
        yield units.span(row.interval.low, row.interval.high) if row.interval else ""
        yield str(len(row.seconds))
    else:
        yield f"{width(row):.0%}" if width(row) < 10 else "?"
    yield f"{(row.bytes_per_second or 0) / 1e9:.2f}"
    if row.share is None:
        yield ""
    else:
        bar = _bar(row.share, WIDE_BAR if wide else NARROW_BAR)
        yield Text.assemble((bar, "green" if best else "cyan"), f" {row.share:>4.0%}")
    yield from (units.size(_peak(row, kind)) if _peak(row, kind) else "" for kind in memory)
    if wide:
        for phase in ("imports", "device"):
            yield units.seconds(row.phases[phase]) if phase in row.phases else ""


def _bar(share: float, width: int) -> str:
    """`share` of `width` characters, to an eighth of one."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    return ("█" * (eighths // 8) + (EIGHTHS[eighths % 8] if eighths % 8 else "")).ljust(width)


def _notes(result: BenchResult) -> Iterator[str]:
    """Why rows have no times, and what else a reader of the others should know."""
    from weightctl.benchmark.summary import width

    yield from dict.fromkeys(f"{row.strategy} {row.status}: {row.reason}" for row in result.results if row.reason)
    for row in result.results:
        marks = [run.mark for run in row.runs if run.mark and run.round]
        if marks and row.status == "ok":
            yield f"{row.strategy}, {row.cache}: {units.count(len(marks), 'run')} not counted: {marks[-1]}"
    far = [
        f"{row.strategy}, {row.cache} {', '.join(units.seconds(seconds) for seconds in row.outliers)}"
        for row in result.results
        if row.outliers
    ]
    if far:
        yield f"far from the rest: {'; '.join(far)}"
    unsure = [row for row in result.results if row.status == "ok" and width(row) > result.settings.precision]
    if unsure:
        yield (
            f"{units.count(len(unsure), 'median')} not known to ±{result.settings.precision:.0%}: "
            "more --runs, or a quieter machine"
        )
    if not result.complete:
        yield "it did not come to its end"


def _show_comparison(comparison: Comparison) -> None:
    from rich.table import Table
    from rich.text import Text

    ui.show_folded("", f"since {comparison.created}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("strategy", "cache", "then", "now", "× as long", "interval", ""):
        table.add_column(name, no_wrap=True)
    for change in comparison.changes:
        verdict = Text(change.verdict, COLORS[change.verdict])
        table.add_row(change.strategy, change.cache, *_change_cells(change), verdict)
    ui.show_drawn(table)
    ui.show_folded(*(f"not the same: {difference}" for difference in comparison.differences))


def _change_cells(change: Change) -> Iterator[str]:
    for seconds in (change.before_seconds, change.after_seconds):
        yield units.seconds(seconds) if seconds is not None else "-"
    yield f"{change.ratio:.2f}" if change.ratio is not None else ""
    known = change.ratio_low is not None and change.ratio_high is not None
    yield f"{change.ratio_low:.2f}–{change.ratio_high:.2f}" if known else ""
