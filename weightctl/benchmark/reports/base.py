"""What a report has to do: show a result of a bench in a file of its own kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from weightctl import storage
from weightctl.benchmark.results import BenchResult
from weightctl.errors import UsageError, translated_os_errors
from weightctl.registry import Backend, Registry


class Report(Backend, ABC):
    """A kind of file, named by its extension. The same result always gives the same bytes."""

    @abstractmethod
    def render(self, result: BenchResult) -> bytes:
        """The whole file. Nothing in `result` is believed: its text is shown, never interpreted."""


reports: Registry[Report] = Registry("report")


def report_for(path: Path) -> Report:
    """The report that the extension of `path` asks for. Raises UsageError if it cannot be made or written here."""
    name = path.suffix[1:].lower()
    if name not in reports.names():
        known = ", ".join(f".{name}" for name in reports.names())
        raise UsageError(f"no report is called {path.suffix or path.name!r}", f"a report's name ends in one of {known}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path.absolute().parent} does not exist", "--report is the file to write the report to")
    kind = reports.get(name)
    kind.require()
    return kind()


def write_report(result: BenchResult, path: Path) -> None:
    """Write the report that the extension of `path` asks for, in one step."""
    content = report_for(path).render(result)
    with translated_os_errors(f"write {path}"), storage.atomic_write(path.absolute()) as stream:
        storage.write_all(stream)(memoryview(content))
