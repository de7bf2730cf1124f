"""For a pull request or a wiki: every table as Markdown that can also be read as it is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from weightctl.benchmark.reports.base import Report, reports
from weightctl.benchmark.reports.markup import printable
from weightctl.benchmark.reports.tables import Table, how_to_read, tables, title, when
from weightctl.benchmark.results import BenchResult


@reports.register("md")
class MarkdownReport(Report):
    """Every table, in columns."""

    summary = "every table as Markdown"

    def render(self, result: BenchResult) -> bytes:
        parts = [
            f"# {_text(result.model.name)}",
            f"{_text(title(result))}. Measured by weightctl bench, {_text(when(result.created))}.",
            *([] if result.complete else ["**This bench was interrupted; it shows what was measured until then.**"]),
            _text(how_to_read(result)),
        ]
        for table in tables(result):
            parts.append(f"## {_text(table.title)}")
            parts.extend([_text(table.note)] if table.note else [])
            parts.append("\n".join(_lines(table)))
        return ("\n\n".join(parts) + "\n").encode()


def _lines(table: Table) -> Iterator[str]:
    rows = [tuple(map(_text, row)) for row in (table.columns, *table.rows)]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    numeric = [table.is_numeric(index) for index in range(len(widths))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    yield line(rows[0])
    yield line([f"{'-' * (width - 1)}{':' if right else '-'}" for width, right in zip(widths, numeric, strict=True)])
    yield from map(line, rows[1:])


def _text(text: str) -> str:
    """As text and nothing else, in every dialect: tags as entities, the rest escaped."""
    entities = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~])", r"\\\1", entities)
