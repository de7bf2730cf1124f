"""The charts, as SVG that is as wide as the place it is put in: all of x in per cent, all of y in pixels.

So text keeps its size on a phone and on a wall, and bars take what room there is. Colours are in charts.css.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from weightctl import units
from weightctl.benchmark.reports.markup import tag
from weightctl.benchmark.reports.tables import CACHES, CEILINGS, MEANINGS, caches, in_order, journeys, ranked, way
from weightctl.benchmark.results import PHASES, BenchResult, Row, Run, Scenario

ROW = 44
LABEL = 14
"""From the top of a row to the line on which its text stands."""
LINE = 20
NARROW = 300
"""The room in pixels that what is laid out here must fit: a phone's."""
BESIDE = 2.0
"""A ceiling so many times higher than all else is not drawn but named: it would squeeze the bars."""
COLOURED = (*PHASES, "pull", "unpack", "copy", "load")
"""The parts that charts.css knows."""


@dataclass(frozen=True)
class Panel:
    """One drawing of a chart."""

    title: str
    drawing: Element
    """An `svg` without x, y and width; its height is in pixels."""


@dataclass(frozen=True)
class Chart:
    """What belongs together: a drawing for each state of the page cache, and how to read them."""

    title: str
    note: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Scale:
    """Values from 0 to `top`, from the left to the right."""

    top: float

    def at(self, value: float) -> str:
        """Where a value is; one beyond the scale is at its end."""
        return f"{self._share(value):.3f}%"

    def width(self, low: float, high: float) -> str:
        """From one value to another."""
        return f"{max(self._share(high) - self._share(low), 0.0):.3f}%"

    def _share(self, value: float) -> float:
        top = self.top if 0 < self.top < math.inf else 1.0
        return 100 * min(max(0.0, value / top), 1.0)  # in this order also of what is no number

    def anchor(self, value: float) -> str:
        """On which side of its place a text has room."""
        return "end" if self._share(value) > 55 else "start"

    def ticks(self) -> Iterator[float]:
        """Three to six round values, 0 the first."""
        if not 1e-9 < self.top < 1e12:
            return
        rough = self.top / 4
        power = 10 ** math.floor(math.log10(rough))
        step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * 0.999)
        yield from (step * turn for turn in range(int(self.top / step * 1.001) + 1))


def charts(result: BenchResult) -> tuple[Chart, ...]:
    """All for which there are times."""
    found = [(cache, ranked(result, cache)) for cache in caches(result)]
    whole = Scale(max((sum(row.phases.values()) for _, rows in found for row in rows), default=0.0))
    drawn = (
        Chart(
            "From nothing to the device",
            "The median of each stage of a whole cold start.",
            tuple(_panel("stages", "Cold starts", _stages(shipped)) for shipped in [journeys(result)] if shipped),
        ),
        Chart(
            "How near to the limit",
            "Bytes of the model a second, at the median. A mark shows what the machine could do at best.",
            tuple(_panel("rate", _heading(cache), _rates(result, cache)) for cache, _ in found),
        ),
        Chart(
            "Where the time goes",
            "The median of each phase of a process, on one scale. The load, which the other charts show, is blue.",
            tuple(_panel("phases", _heading(cache), _phases(rows, whole)) for cache, rows in found),
        ),
        Chart(
            "How steady the runs are",
            "The seconds of each run that was right; the median stands in the band of its confidence interval.",
            tuple(_panel("runs", _heading(cache), _runs(rows)) for cache, rows in found),
        ),
    )
    return tuple(chart for chart in drawn if chart.panels)


def _heading(cache: str) -> str:
    return f"{CACHES[cache]}: {MEANINGS[cache]}"


@dataclass(frozen=True)
class _Drawn:
    height: int
    parts: tuple[Element, ...]
    words: tuple[str, ...]
    """The same for those who do not see it."""


def _panel(name: str, heading: str, drawn: _Drawn) -> Panel:
    key = f"{name}-{heading.partition(':')[0].replace(' ', '-').lower()}"
    title, description = f"{key}-title", f"{key}-description"
    drawing = tag(
        "svg",
        tag("title", heading, id=title),
        tag("desc", "; ".join(drawn.words), id=description),
        *drawn.parts,
        role="img",
        aria_labelledby=f"{title} {description}",
        height=drawn.height,
        class_="chart",
    )
    return Panel(heading, drawing)


def _rates(result: BenchResult, cache: str) -> _Drawn:
    rows = ranked(result, cache)
    limit = result.limit(cache)
    rates = [row.bytes_per_second or 0.0 for row in rows]
    marks = [("limit", f"limit ({limit.bound})", limit.bytes_per_second)] if limit else []
    bound = limit.bytes_per_second if limit else 0.0
    for name, rate in result.ceilings.items():
        other_cache = name.startswith(tuple(CACHES)) and not name.startswith(cache)
        if not other_cache and abs(rate - bound) > bound / 100:
            marks.append(("ceiling", CEILINGS.get(name, name), rate))
    near = BESIDE * max(*rates, bound, 1e-9)
    inside = [mark for mark in marks if mark[2] <= near]
    scale = Scale(max([*rates, *(rate for _, _, rate in inside)]) * 1.01)
    parts: list[Element] = []
    for line, (kind, name, rate) in enumerate(marks):
        y = LINE * line
        label = f"{shortened(name)} {units.rate(rate)}"
        if rate > near:
            label = f"off the scale: {label}"
        else:
            parts.append(_mark(scale.at(rate), y + 3, y + LINE - 3, kind))
        anchor = scale.anchor(rate)
        side = {"start": 7, "end": -7}[anchor] if rate <= near else None
        class_ = "small strong" if kind == "limit" else "small quiet"
        parts.append(tag("text", label, x=scale.at(rate), dx=side, y=y + LABEL, text_anchor=anchor, class_=class_))
    top = LINE * len(marks) + (8 if marks else 0)
    shares = ["" if row.share is None else units.share(row.share) for row in rows]
    parts += _labels([row.strategy for row in rows], top, [units.rate(rate) for rate in rates], shares)
    for place, (row, rate) in enumerate(zip(rows, rates, strict=True)):
        y = top + ROW * place
        kind = "bar best" if row is rows[0] else "bar"
        parts.append(tag("rect", x=0, y=y + 21, width=scale.at(bound), height=12, class_="track"))
        parts.append(tag("rect", x=0, y=y + 21, width=scale.at(rate), height=12, rx=2, class_=kind))
        parts += [_mark(scale.at(value), y + 18, y + 36, kind) for kind, _, value in inside]
    words = (
        f"{row.strategy} {units.rate(rate)}" + (f", {share} of the limit" if share else "")
        for row, rate, share in zip(rows, rates, shares, strict=True)
    )
    return _Drawn(top + ROW * len(rows), tuple(parts), tuple(words))


def _mark(x: str, top: float, bottom: float, kind: str) -> Element:
    return tag("line", x1=x, x2=x, y1=top, y2=bottom, class_=kind)


def _labels(names: Sequence[str], top: float, values: Sequence[str], asides: Sequence[str] = ()) -> Iterator[Element]:
    """The rows' texts: names on the left; figures on the right, and what stands beside them, in columns."""
    gap = -7.5 * max(map(len, asides)) - 12 if any(asides) else None
    for place, (name, value) in enumerate(zip(names, values, strict=True)):
        y = top + ROW * place + LABEL
        first = not place and len(names) > 1
        crown = tag("tspan", "fastest", dx=8, class_="accent") if first else None
        yield tag("text", shortened(name), crown, x=0, y=y, class_="strong" if first else None)
        yield tag("text", value, x="100%", dx=gap, y=y, text_anchor="end", class_="strong")
        if any(asides):
            yield tag("text", asides[place], x="100%", y=y, text_anchor="end", class_="quiet")


def _phases(rows: Sequence[Row], scale: Scale) -> _Drawn:
    totals = [sum(row.phases.values()) for row in rows]
    return _stacked([row.strategy for row in rows], totals, [row.phases for row in rows], PHASES, scale)


def _stages(shipped: Sequence[Scenario]) -> _Drawn:
    parts = [{stage.name: stage.seconds for stage in scenario.stages} for scenario in shipped]
    scale = Scale(max(sum(stages.values()) for stages in parts))
    medians = [scenario.median_seconds or 0.0 for scenario in shipped]
    return _stacked([way(scenario) for scenario in shipped], medians, parts, in_order(parts), scale)


def _stacked(
    names: Sequence[str],
    totals: Sequence[float],
    rows: Sequence[Mapping[str, float]],
    order: Sequence[str],
    scale: Scale,
) -> _Drawn:
    """A bar for each row, made of its parts' seconds in their order."""
    present = [part for part in order if any(row.get(part) for row in rows)]
    kinds = {part: part if part in COLOURED else "other" for part in present}
    parts, top = _legend(
        (shortened(part), tag("rect", x=-5, y=-5, width=10, height=10, rx=2, class_=kinds[part])) for part in present
    )
    parts += _labels(names, top, [units.seconds(total) for total in totals])
    for place, row in enumerate(rows):
        y = top + ROW * place
        ends = list(itertools.accumulate((row.get(part, 0.0) for part in present), initial=0.0))
        for part, start, end in zip(present, ends, ends[1:], strict=False):
            width, time = scale.width(start, end), tag("title", f"{part}: {units.seconds(end - start)}")
            parts.append(tag("rect", time, x=scale.at(start), y=y + 20, width=width, height=16, class_=kinds[part]))
            if _room(width) > _length(part):
                class_ = f"inside on-{kinds[part]}"
                parts.append(tag("text", part, x=scale.at(start), dx=6, y=y + 32, class_=class_))
    words = (
        f"{name} " + ", ".join(f"{part} {units.seconds(row[part])}" for part in present if part in row)
        for name, row in zip(names, rows, strict=True)
    )
    return _Drawn(top + ROW * len(rows), tuple(parts), tuple(words))


def _room(width: str) -> float:
    return float(width[:-1]) / 100 * NARROW


def _length(text: str) -> float:
    """About how wide a small text is, in pixels."""
    return 6.3 * len(text) + 12


def _legend(entries: Iterable[tuple[str, Element]]) -> tuple[list[Element], int]:
    """Signs with their names, in lines that fit a narrow screen; and where what follows begins."""
    parts: list[Element] = []
    x = y = 0.0
    for name, sign in entries:
        if x and x + 14 + _length(name) > NARROW:
            x, y = 0, y + LINE
        parts.append(tag("g", sign, transform=f"translate({x + 6:g} {y + 10:g})"))
        parts.append(tag("text", name, x=f"{x + 17:g}", y=f"{y + LABEL:g}", class_="small quiet"))
        x += 17 + _length(name)
    return parts, int(y) + LINE + 10


def _runs(rows: Sequence[Row]) -> _Drawn:
    counted = max(max(*row.seconds, row.interval.high if row.interval else 0.0) for row in rows)
    marked = [run.seconds for row in rows for run in row.runs if run.mark and run.seconds]
    scale = Scale(max(counted, min(max(marked, default=0.0), 1.3 * counted)) * 1.02)
    parts, top = _legend(_signs(rows))
    bottom = top + ROW * len(rows)
    for tick in scale.ticks():
        parts.append(_mark(scale.at(tick), top - 2, bottom, "grid"))
        anchor = "start" if not tick else "end" if tick > 0.93 * scale.top else "middle"
        text = f"{tick * 1000:g} ms" if scale.top < 1 else f"{tick:g} s"
        parts.append(tag("text", text, x=scale.at(tick), y=bottom + 16, text_anchor=anchor, class_="small quiet"))
    medians = [row.median_seconds or 0.0 for row in rows]
    spans = [units.span(row.interval.low, row.interval.high) if row.interval else "" for row in rows]
    parts += _labels([row.strategy for row in rows], top, [units.seconds(median) for median in medians], spans)
    for place, (row, median) in enumerate(zip(rows, medians, strict=True)):
        middle = top + ROW * place + 29
        if row.interval:
            start, width = scale.at(row.interval.low), scale.width(row.interval.low, row.interval.high)
            parts.append(tag("rect", x=start, y=middle - 8, width=width, height=16, class_="band"))
        turn = itertools.cycle((0, -4, 4))  # so that runs of about the same time do not hide one another
        parts += [_dot(run, row, scale, middle + next(turn)) for run in row.runs if run.seconds is not None]
        parts.append(_mark(scale.at(median), middle - 10, middle + 10, "median"))
    words = [
        f"{row.strategy} median {units.seconds(median)} of {units.count(len(row.seconds), 'run')}"
        for row, median in zip(rows, medians, strict=True)
    ]
    return _Drawn(bottom + 24, tuple(parts), tuple(words))


def _signs(rows: Sequence[Row]) -> Iterator[tuple[str, Element]]:
    yield "run", SIGNS["run"]
    if any(row.outliers for row in rows):
        yield "outlier", SIGNS["outlier"]
    if any(run.mark for row in rows for run in row.runs):
        yield "not counted", SIGNS["marked"]
    yield "median", SIGNS["median"]
    yield "interval", SIGNS["interval"]


def _dot(run: Run, row: Row, scale: Scale, y: float) -> Element:
    """A run. The sign's own svg is there because a path has no per cents: it moves the path's origin."""
    seconds = run.seconds or 0.0
    kind = "marked" if run.mark else "outlier" if seconds in row.outliers else "run"
    if seconds > scale.top:
        kind = "beyond"
    remark = run.mark or ("an outlier" if kind == "outlier" else "")
    words = f"round {run.round}: {units.seconds(seconds)}" + (f", {remark}" if remark else "")
    return tag("svg", tag("title", words), SIGNS[kind], x=scale.at(seconds), y=f"{y:g}", overflow="visible")


SIGNS = {
    "run": tag("circle", r=3.5, class_="run"),
    "outlier": tag("circle", r=4, class_="outlier"),
    "marked": tag("path", d="M-3.5-3.5L3.5 3.5M-3.5 3.5L3.5-3.5", class_="marked"),
    "beyond": tag("path", d="M-9-4L-2 0L-9 4", class_="marked"),
    "median": tag("line", y1=-6, y2=6, class_="median"),
    "interval": tag("rect", x=-5, y=-5, width=10, height=10, class_="band"),
}
"""Told apart by their shape alone."""


def shortened(text: str, length: int = 26) -> str:
    """So that a text fits its line."""
    return text if len(text) <= length else f"{text[: length - 1]}…"
