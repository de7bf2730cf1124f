"""Reports say all that a result holds, and believe none of it."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import math
import re
import struct
import subprocess
import sys
import zlib
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from weightctl.benchmark.reports import report_for, reports, write_report
from weightctl.benchmark.reports.charts import Scale, charts
from weightctl.benchmark.reports.tables import tables
from weightctl.benchmark.results import (
    SCHEMA,
    BenchResult,
    Change,
    ColdStart,
    Comparison,
    Interval,
    Limit,
    Model,
    Row,
    Run,
    Scenario,
    Settings,
    Stage,
    parse_result,
    read_result,
)
from weightctl.errors import UsageError, WeightctlError

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&|`[a](javascript:1)\n\x1b[31m\u202e\ud800"
TEXT = ("html", "md", "svg", "csv", "json")


def run(number: int, seconds: float, mark: str | None = None) -> Run:
    phases = {"start": 0.05, "imports": 1.5, "device": 0.5, "loading": seconds, "construction": 0.25 * seconds}
    return Run(number, "ok", None, mark, seconds, phases, 1.0, 789_000_000, 134_217_728, 4_000_000_000)


def row(strategy: str, cache: str, *times: float, **more: object) -> Row:
    """The last of `times` is an outlier; the row has a warm-up of 9.87654 seconds and a run that is not counted."""
    runs = (run(0, 9.87654, "the warm-up"), *(run(1 + n, time) for n, time in enumerate(times)), run(90, 0.4321, "odd"))
    median = sorted(times)[len(times) // 2]
    found = Row(
        strategy, "warm" if cache == "warm" else "cold", "ok", None, times, median, 4e9 / median, True, 789_000_000,
        4_000_000_000, 134_217_728, Interval(min(times), max(times), 0.95), 0.1 / median, times[-1:], 1.0,
        runs[1].phases, runs,
    )  # fmt: skip
    return dataclasses.replace(found, **more)  # type: ignore[arg-type]


FAILED = Row("torch", "warm", "failed", "it crashed with SIGSEGV", runs=(Run(0, "failed", "it crashed with SIGSEGV"),))
MISSING = Row("runai", "cold", "unavailable", "it is not installed")
RESULT = BenchResult(
    schema=SCHEMA,
    created="2026-11-22T04:10:00Z",
    environment={"gpu": "NVIDIA H100", "cpus": 16, "driver": None, "torch": "2.13.0", "memory_bytes": 137_438_953_472},
    ceilings={"warm_read": 40e9, "cold_read": 1.5e9, "host_to_device": 55e9},
    limits=(Limit("warm", 0.1, 40e9, "reading"), Limit("cold", 2.7, 1.5e9, "reading")),
    model=Model("org/model", "c0ffee", "safetensors", 4, 228, 4_000_000_000),
    settings=Settings("auto", ("pipelined", "torch"), ("warm", "cold"), 5, 0.05, 0.95, 600, 8),
    results=(
        row("safetensors", "warm", 1.05, 1.06, 1.04, 1.5),
        row("pipelined", "warm", 0.21, 0.22, 0.2, 0.31),
        row("pipelined", "cold", 3.1, 3.2, 3.0, 4.1),
        FAILED,
        MISSING,
    ),
    comparison=Comparison(
        "2026-11-20T09:00:00Z",
        (Change("pipelined", "warm", "slower", 0.15, 0.2, 1.33, 1.2, 1.4), Change("torch", "warm", "broken", 0.7)),
        ("torch: 2.10.0 → 2.13.0",),
    ),
)
STAGES = (Stage("pull", 4_000_000_000, 41.0), Stage("unpack", 0, 38.0), Stage("load", 4_000_000_000, 3.0))
SHIPPED = Scenario(
    "image", "docker", 3, "ok", None, "pipelined", (Stage("push", 4_000_000_000, 44.0),), (82.0,), 82.0, None, STAGES,
    (ColdStart(1, "ok", None, None, STAGES), ColdStart(2, "ok", None, "it was cached", STAGES)),
)  # fmt: skip
COLD_STARTS = dataclasses.replace(
    RESULT, results=(), comparison=None, scenarios=(SHIPPED, Scenario("volume", "copied", None, "failed", "it is full"))
)
NOTHING = dataclasses.replace(RESULT, results=(FAILED, MISSING), comparison=None, limits=(), ceilings={})
EVERY_STATE = (
    RESULT,
    COLD_STARTS,
    NOTHING,
    dataclasses.replace(RESULT, results=(), environment={}, complete=False),
    dataclasses.replace(RESULT, results=(row("pipelined", "cold", 0.2, phases={}, interval=None, share=None),)),
    dataclasses.replace(RESULT, results=(row("pipelined", "warm", 1e-9), row("torch", "warm", 1e9)), limits=()),
)


def attacked(value: object) -> object:
    """The same value with every text in it that need not be what it is turned into an attack."""
    if isinstance(value, dict):
        return {key if key in ("start", "gpu") else f"{key}{ATTACK}": attacked(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(attacked, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fixed = ("schema", "cache", "status", "bound", "verdict", "scenario")
        fields = [field.name for field in dataclasses.fields(value) if field.name not in fixed]
        return dataclasses.replace(value, **{name: attacked(getattr(value, name)) for name in fields})
    return f"={value}{ATTACK}" if isinstance(value, str) else value


class Page(HTMLParser):
    """The elements of a page, what its attributes fetch, and its text."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def render(name: str, result: BenchResult) -> bytes:
    return reports.get(name)().render(result)


@pytest.mark.parametrize("name", reports.names())
@pytest.mark.parametrize("result", EVERY_STATE, ids=range(len(EVERY_STATE)))
def test_every_state_has_a_report_and_always_the_same(name: str, result: BenchResult) -> None:
    content = render(name, result)
    assert content == render(name, result)
    if name in TEXT:
        assert not re.search(rb"\bnan\b|\binf\b|None<", content)


@pytest.mark.parametrize("name", ["html", "md"])
def test_what_people_read_holds_every_figure(name: str) -> None:
    text = Page(render(name, RESULT)).text if name == "html" else render(name, RESULT).decode()
    for figure in ("org/model", "c0ffee", "220 ms", "18.18 GB/s", "45 %", "200–310 ms", "134.2 MB", "NVIDIA H100",
                   "40.00 GB/s", "9.876540", "1.060000", "0.052500", "the warm-up", "odd", "789000000", "outlier",
                   "it crashed with SIGSEGV", "it is not installed", "slower", "1.33", "1.20–1.40", "2.7",
                   "torch: 2.10.0 → 2.13.0", "137438953472", "2026-11-22 04:10 UTC"):  # fmt: skip
        assert figure in text, figure
    shipped = Page(render(name, COLD_STARTS)).text if name == "html" else render(name, COLD_STARTS).decode()
    for figure in ("image, docker, 3 jobs", "82.00 s", "41.000000", "push", "44.00 s", "it was cached", "it is full"):
        assert figure in shipped, figure


@pytest.mark.parametrize("result", EVERY_STATE, ids=range(len(EVERY_STATE)))
def test_a_page_fetches_nothing_and_runs_nothing(result: BenchResult) -> None:
    page = Page(render("html", result))
    attack = Page(render("html", attacked(result)))  # type: ignore[arg-type]
    for found in (page, attack):
        policy = next(value for name, value in found.attributes if value.startswith("default-src"))
        assert policy.startswith("default-src 'none'; style-src 'sha256-")
        assert not {"script", "img", "iframe", "object", "image", "use", "form", "foreignobject"} & set(found.tags)
        fetched = [value for name, value in found.attributes if name in ("src", "href", "action", "srcset", "data")]
        assert all(value.startswith("data:") for value in fetched)
        assert not [name for name, _ in found.attributes if name.startswith("on") or name == "style"]
        assert "url(" not in found.text
        assert "@import" not in found.text
        assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", found.text)
    if page.text.count("Every run") == attack.text.count("Every run"):
        assert set(page.tags) == set(attack.tags)


@pytest.mark.parametrize("result", EVERY_STATE, ids=range(len(EVERY_STATE)))
def test_a_picture_is_sound_whatever_is_in_it(result: BenchResult) -> None:
    for found in (result, attacked(result)):
        root = ElementTree.fromstring(render("svg", found))  # type: ignore[arg-type]
        names = {element.tag.rpartition("}")[2] for element in root.iter()}
        known = {"svg", "title", "desc", "style", "rect", "text", "tspan", "line", "circle", "path", "g"}
        assert names <= known
        assert not [key for element in root.iter() for key in element.attrib if "href" in key or key.startswith("on")]
        for element in root.iter():
            for key in ("x", "width", "x1", "x2"):
                if element.get(key, "").endswith("%"):
                    assert 0 <= float(element.attrib[key][:-1]) <= 100


@pytest.mark.parametrize("result", EVERY_STATE, ids=range(len(EVERY_STATE)))
def test_markdown_stays_text(result: BenchResult) -> None:
    text = render("md", attacked(result)).decode()  # type: ignore[arg-type]
    assert not re.search(r"<[a-z/!]", text)
    widths: dict[int, int] = {}
    for number, line in enumerate(text.splitlines()):
        if line.startswith("|"):
            cells = len(re.findall(r"(?<!\\)\|", line))
            assert widths.get(number - 1, cells) == cells
            widths[number] = cells


def test_a_page_is_read_by_everyone() -> None:
    page = Page(render("html", RESULT))
    assert ("lang", "en") in page.attributes
    assert page.tags["h1"] == 1
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(set(ids)) == len(ids)
    labels = [value.split() for name, value in page.attributes if name == "aria-labelledby"]
    assert len(labels) == page.tags["desc"] == 6
    assert all(set(label) <= set(ids) for label in labels)
    assert page.tags["table"] == len(tables(RESULT))
    assert ("scope", "col") in page.attributes
    assert ("scope", "row") in page.attributes


def test_json_is_the_result_itself(tmp_path: Path) -> None:
    write_report(RESULT, tmp_path / "r.json")
    assert read_result(tmp_path / "r.json") == RESULT
    page = Page(render("html", RESULT))
    kept = next(value for name, value in page.attributes if name == "href" and "base64" in value)
    assert parse_result(json.loads(base64.b64decode(kept.partition(",")[2]))) == RESULT


def test_csv_has_a_line_for_each_run() -> None:
    lines = list(csv.DictReader(io.StringIO(render("csv", RESULT).decode(), newline="")))
    assert len(lines) == 3 * 6 + 2
    first, last = lines[0], lines[-1]
    assert (first["strategy"], first["mark"], first["counts"]) == ("safetensors", "the warm-up", "False")
    assert float(lines[1]["seconds"]) == 1.05
    assert (float(lines[1]["loading"]), float(lines[1]["construction"])) == (1.05, 0.25 * 1.05)
    assert (last["strategy"], last["status"], last["reason"]) == ("runai", "unavailable", "it is not installed")
    starts = list(csv.DictReader(io.StringIO(render("csv", COLD_STARTS).decode(), newline="")))
    assert [(line["scenario"], line["counts"], line["pull"]) for line in starts] == [
        ("image", "True", "41.0"), ("image", "False", "41.0"), ("volume", "", ""),
    ]  # fmt: skip


def test_a_spreadsheet_finds_no_formula() -> None:
    for line in csv.reader(io.StringIO(render("csv", attacked(RESULT)).decode(), newline="")):  # type: ignore[arg-type]
        assert not [cell for cell in line if cell.startswith(("=", "+", "@", "-"))]


def test_a_png_has_the_picture_twice_as_large() -> None:
    content = render("png", RESULT)
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height, depth, colour = struct.unpack(">IIBB", content[16:26])
    root = ElementTree.fromstring(render("svg", RESULT))
    assert (width, height) == (2 * int(root.attrib["width"]), 2 * int(root.attrib["height"]))
    assert (depth, colour) == (8, 6)
    data, at = b"", 8
    while at < len(content):
        size, kind = struct.unpack(">I4s", content[at : at + 8])
        data += content[at + 8 : at + 8 + size] if kind == b"IDAT" else b""
        at += size + 12
    # Text is there only if the font was found: without it, no row of the headline would have ink.
    lines, stride = zlib.decompress(data), 4 * width + 1
    assert any(any(lines[stride * y + 1 : stride * (y + 1)]) for y in range(120, 150))


def test_the_first_is_the_fastest() -> None:
    rates = charts(RESULT)[0].panels[0].drawing
    texts = ["".join(text.itertext()) for text in rates.iter("text")]
    assert texts.index("pipelinedfastest") < texts.index("safetensors")
    widths = [float(bar.attrib["width"][:-1]) for bar in rates.iter("rect") if "bar" in bar.attrib["class"]]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == pytest.approx(100 * (4e9 / 0.22) / (55e9 * 1.01), abs=0.01)


@given(st.floats(), st.floats())
@example(math.nan, 1.0)
@example(math.inf, math.inf)
def test_a_scale_stays_in_its_place(top: float, value: float) -> None:
    assert 0 <= float(Scale(top).at(value)[:-1]) <= 100
    assert len(list(Scale(top).ticks())) <= 6


def test_ticks_are_round() -> None:
    assert list(Scale(1.5).ticks()) == [0, 0.5, 1.0, 1.5]
    assert list(Scale(0.0).ticks()) == []
    assert list(Scale(97.0).ticks()) == [0, 25, 50, 75]


NUMBERS = st.floats(0, allow_infinity=False, allow_nan=False)


@st.composite
def results(draw: st.DrawFn) -> BenchResult:
    """What `parse_result` lets in: any text, any number from nought on, and a row with a median has times."""
    usual = {float: st.floats(), int: st.integers(), str: st.text()}
    any_text = st.text(max_size=30) | st.just(ATTACK)
    try:
        for kind, strategy in {float: NUMBERS, int: st.integers(0, 2**63 - 1), str: any_text}.items():
            st.register_type_strategy(kind, strategy)
        found = draw(st.builds(BenchResult))
    finally:
        for kind, strategy in usual.items():
            st.register_type_strategy(kind, strategy)
    timed = (dataclasses.replace(row, seconds=row.seconds or (1.0,)) for row in found.results)
    return dataclasses.replace(found, results=tuple(timed))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(results())
def test_no_result_breaks_a_report(result: BenchResult) -> None:
    page = Page(render("html", result))
    assert not {"script", "img", "iframe"} & set(page.tags)
    ElementTree.fromstring(render("svg", result))
    for name in ("md", "csv", "json"):
        assert render(name, result)


@pytest.mark.parametrize("name", reports.names())
def test_a_report_is_written_in_one_step(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"report.{name.upper()}"
    path.write_bytes(b"older")
    write_report(RESULT, path)
    assert path.read_bytes() == render(name, RESULT)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["report", "report.pdf", "report.html.gz", ".html"])
def test_an_unknown_kind_names_the_known_ones(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        report_for(tmp_path / name)
    assert caught.value.exit_code == 2
    assert all(f".{known}" in str(caught.value.hint) for known in ("html", "svg", "png", "md", "csv", "json"))


def test_a_report_needs_a_place(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        report_for(tmp_path / "nowhere" / "report.html")
    (tmp_path / "taken.html").mkdir()
    with pytest.raises(WeightctlError, match=r"taken\.html"):
        write_report(RESULT, tmp_path / "taken.html")
    assert [path.name for path in tmp_path.iterdir()] == ["taken.html"]


def test_every_report_says_what_it_is() -> None:
    assert set(reports.names()) == {"html", "svg", "png", "md", "csv", "json"}
    for name in reports.names():
        assert reports.get(name).summary
        assert reports.get(name).unavailable() is None
    assert set(reports.get("png").requires) == {"resvg_py", "font_roboto"}


MISSING_PACKAGE = """
from pathlib import Path
from weightctl.benchmark.reports import Report, report_for, reports
from weightctl.errors import NotInstalledError

@reports.register("pdf")
class PdfReport(Report):
    summary = "on paper"
    requires = {"no_such_module": "report"}

    def render(self, result):
        return b""

try:
    report_for(Path("bench.pdf"))
except NotInstalledError as error:
    print(error.exit_code, error.message, error.hint)
"""


def test_a_missing_package_is_told_before_anything_is_measured() -> None:
    done = subprocess.run([sys.executable, "-c", MISSING_PACKAGE], capture_output=True, text=True, check=True)
    expected = "2 pdf needs no_such_module, which is not installed pip install 'weightctl[report]'\n"
    assert done.stdout == expected


def test_numbers_beyond_a_machine_are_refused() -> None:
    value = json.loads(render("json", RESULT))
    value["model"]["bytes"] = 10**400
    with pytest.raises(ValueError, match="bytes is 1000"):
        parse_result(value)
