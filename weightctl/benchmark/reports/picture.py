"""For a slide: all charts as one picture, drawn as SVG, and the same in pixels."""

from __future__ import annotations

from typing import ClassVar
from xml.etree.ElementTree import Element, tostring

from weightctl.benchmark.reports.base import Report, reports
from weightctl.benchmark.reports.charts import Chart, charts, shortened
from weightctl.benchmark.reports.markup import style, tag
from weightctl.benchmark.reports.tables import title, when
from weightctl.benchmark.results import BenchResult

WIDTH = 1200
MARGIN = 56
GAP = 64
PIXELS = 2
"""For each unit of length: sharp on today's screens."""


@reports.register("svg")
class SvgReport(Report):
    """Light, or dark where the viewer prefers it."""

    summary = "the charts as one picture"

    def render(self, result: BenchResult) -> bytes:
        picture: bytes = tostring(draw(result), encoding="utf-8", xml_declaration=True)
        return picture + b"\n"


@reports.register("png")
class PngReport(Report):
    """The light one, in a font of its own: the same pixels on every machine."""

    summary = "the charts as one picture, in pixels"
    requires: ClassVar[dict[str, str]] = {"resvg_py": "report", "font_roboto": "report"}

    def render(self, result: BenchResult) -> bytes:
        import font_roboto
        import resvg_py

        fonts = [font_roboto.font_files[name] for name in ("Roboto", "RobotoMedium")]
        picture = tostring(draw(result), encoding="unicode")
        return bytes(resvg_py.svg_to_bytes(picture, skip_system_fonts=True, font_files=fonts, zoom=PIXELS))


def draw(result: BenchResult) -> Element:
    """The whole picture, with what was measured above and when below."""
    parts = [
        tag("text", shortened(result.model.name, 70), x=MARGIN, y=78, class_="headline"),
        tag("text", shortened(title(result), 150), x=MARGIN, y=106, class_="quiet"),
    ]
    y = 106
    for chart in charts(result):
        parts += _chart(chart, y + 66)
        y += 66 + 44 + max(int(panel.drawing.attrib["height"]) + 30 for panel in chart.panels)
    if not charts(result):
        parts.append(tag("text", "Nothing has a time.", x=MARGIN, y=y + 66, class_="heading"))
        y += 66
    state = "" if result.complete else ", interrupted"
    parts.append(tag("text", f"weightctl bench, {when(result.created)}{state}", x=MARGIN, y=y + 60, class_="quiet"))
    height = y + 60 + MARGIN
    return tag(
        "svg",
        tag("title", f"weightctl bench: {result.model.name}"),
        tag("style", style("charts.css")),
        tag("rect", width="100%", height="100%", class_="paper"),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        width=WIDTH,
        height=height,
        viewBox=f"0 0 {WIDTH} {height}",
    )


def _chart(chart: Chart, y: int) -> list[Element]:
    width = (WIDTH - 2 * MARGIN - GAP) // 2 if len(chart.panels) > 1 else WIDTH - 2 * MARGIN
    parts = [
        tag("text", chart.title, x=MARGIN, y=y, class_="heading"),
        tag("text", chart.note, x=MARGIN, y=y + 22, class_="quiet"),
    ]
    for place, panel in enumerate(chart.panels):
        x = MARGIN + place * (width + GAP)
        parts.append(tag("text", panel.title, x=x, y=y + 56, class_="strong"))
        panel.drawing.attrib.update(x=str(x), y=str(y + 70), width=str(width))
        parts.append(panel.drawing)
    return parts
