"""For people: one page that says everything, and asks no other for anything."""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Iterator
from xml.etree.ElementTree import Element, tostring

from weightctl import units
from weightctl.benchmark.reports.base import Report, reports
from weightctl.benchmark.reports.charts import Chart, charts
from weightctl.benchmark.reports.markup import style, tag
from weightctl.benchmark.reports.tables import (
    CACHES,
    MEANINGS,
    Table,
    caches,
    how_to_read,
    journeys,
    ranked,
    tables,
    title,
    way,
    when,
)
from weightctl.benchmark.results import BenchResult


@reports.register("html")
class HtmlReport(Report):
    """Charts and tables, light and dark, from a phone to paper. The result itself is in it, to be saved."""

    summary = "one page with charts and every figure"

    def render(self, result: BenchResult) -> bytes:
        root = tag("html", _head(result), tag("body", tag("main", *_body(result))), lang="en")
        page: bytes = tostring(root, encoding="utf-8", method="html")
        return b"<!doctype html>\n" + page + b"\n"


def _head(result: BenchResult) -> Element:
    # Nothing is fetched and nothing runs, whatever the result holds: only this style sheet means anything.
    sheet = style("charts.css", "page.css")
    digest = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"{result.model.name} – weightctl bench"),
        tag("style", sheet),
    )


def _body(result: BenchResult) -> Iterator[Element]:
    yield tag("header", tag("p", "weightctl bench", class_="eyebrow"), tag("h1", result.model.name),
              tag("p", title(result), tag("br"), when(result.created)))  # fmt: skip
    if not result.complete:
        yield tag("p", "This bench was interrupted: it shows what was measured until then.", class_="notice")
    if not charts(result):
        yield tag("p", "Nothing has a time: the reasons are below.", class_="notice")
    else:
        yield tag("div", *_shipping(result), *(_card(result, cache) for cache in caches(result)), class_="cards")
    yield tag("p", how_to_read(result), class_="reading-aid")
    yield from (_section(chart) for chart in charts(result))
    for named, group in itertools.groupby(tables(result), lambda table: bool(table.columns[0])):
        if named:
            yield from map(_table, group)
        else:
            yield tag("div", *map(_table, group), class_="columns")
    yield tag("footer", tag("a", "Save the result as JSON", href=_data(result), download="weightctl-bench.json"))


def _card(result: BenchResult, cache: str) -> Element:
    """The answer in one glance: the fastest, how fast, and what comes after it."""
    best, *others = ranked(result, cache)
    median, rate = best.median_seconds or 0.0, best.bytes_per_second or 0.0
    share = "" if best.share is None else f", {units.share(best.share)} of the limit"
    limit = result.limit(cache)
    after = [f"next: {others[0].strategy}, {units.seconds(others[0].median_seconds or 0.0)}"] if others else []
    least = [f"limit: {units.seconds(limit.seconds)}, by {limit.bound}"] if limit else []
    return tag(
        "section",
        tag("h2", CACHES[cache], tag("small", MEANINGS[cache])),
        tag("p", units.seconds(median), class_="big"),
        tag("p", tag("strong", best.strategy), f" at {units.rate(rate)}{share}"),
        tag("p", " · ".join((*after, *least)), class_="muted"),
        class_="card",
    )


def _shipping(result: BenchResult) -> Iterator[Element]:
    shipped = journeys(result)
    if shipped:
        after = f"next: {way(shipped[1])}, {units.seconds(shipped[1].median_seconds or 0.0)}" if shipped[1:] else ""
        yield tag(
            "section",
            tag("h2", "Cold start", tag("small", "from nothing to the device")),
            tag("p", units.seconds(shipped[0].median_seconds or 0.0), class_="big"),
            tag("p", tag("strong", way(shipped[0]))),
            tag("p", after, class_="muted"),
            class_="card",
        )


def _section(chart: Chart) -> Element:
    for panel in chart.panels:
        panel.drawing.set("width", "100%")
    panels = [tag("div", tag("h3", panel.title), panel.drawing, class_="panel") for panel in chart.panels]
    caption = tag("figcaption", tag("h2", chart.title), tag("p", chart.note, class_="muted"))
    return tag("figure", caption, tag("div", *panels, class_="panels"))


def _table(table: Table) -> Element:
    numeric = ["number" if table.is_numeric(column) else None for column in range(len(table.columns))]
    head = [tag("th", name, scope="col", class_=kind) for name, kind in zip(table.columns, numeric, strict=True)]
    rows = [
        tag("tr", tag("th", row[0], scope="row"),
            *(tag("td", cell, class_=kind) for cell, kind in zip(row[1:], numeric[1:], strict=True)))
        for row in table.rows
    ]  # fmt: skip
    whole = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *rows), aria_label=table.title)
    scrolled = tag("div", whole, class_="scrolled", tabindex=0, role="region", aria_label=table.title)
    note = tag("p", table.note, class_="muted") if table.note else None
    return tag("section", tag("h2", table.title), note, scrolled)


def _data(result: BenchResult) -> str:
    return f"data:application/json;base64,{base64.b64encode(reports.get('json')().render(result)).decode()}"
