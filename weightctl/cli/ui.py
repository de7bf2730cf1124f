"""What the user sees: the result on stdout, everything else on stderr."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightctl.errors import WeightctlError, translated_os_errors
from weightctl.progress import Progress, Task
from weightctl.units import count as count
from weightctl.units import seconds as seconds
from weightctl.units import size as size

if TYPE_CHECKING:
    import rich.progress
    import rich.table


def show_json(result: object) -> None:
    """Print exactly one JSON object (or list): the operation's result."""
    show(json.dumps(result, default=_plain, indent=2))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"no JSON for {type(value).__name__}")


def show_result(result: object, as_json: bool, answer: object, summary: str) -> None:
    """Print the result as JSON, or its one answer on stdout and a summary for the reader on stderr."""
    _show(result, as_json, answer, "done", summary)


def show_plan(plan: object, as_json: bool, answer: object, summary: str) -> None:
    """The same for what a dry run found."""
    _show(plan, as_json, answer, "plan", summary)


def _show(result: object, as_json: bool, answer: object, label: str, summary: str) -> None:
    if as_json:
        show_json(result)
    else:
        _print_stderr(label, "bold green", summary)
        if answer is not None:
            show(str(answer))


def show(text: str) -> None:
    """Print a line of the result."""
    with _stdout():
        print(text, flush=True)


@contextmanager
def _stdout() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise  # whoever reads has seen enough: typer ends in silence
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else what is left is tried again at the end
        with translated_os_errors("print the result"):
            raise error


def show_folded(*lines: str) -> None:
    """Print lines of text, each folded to the terminal, with what goes on below set in."""
    width = min(shutil.get_terminal_size().columns, 120)
    for line in lines:
        show(textwrap.fill(printable(line), width, subsequent_indent="    ", break_on_hyphens=False))


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a plain table that fits the terminal, if it is one."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    show_drawn(table)


def show_drawn(table: rich.table.Table) -> None:
    """Print what was laid out elsewhere."""
    from rich.console import Console

    # A file or a pipe has no width at which to fold.
    width = None if sys.stdout is None or sys.stdout.isatty() or "COLUMNS" in os.environ else 1000
    with _stdout():
        Console(highlight=False, width=width).print(table)


def show_error(error: WeightctlError) -> None:
    """The one way an error is printed."""
    _print_stderr("error", "bold red", error.message)
    if error.hint:
        _print_stderr("hint", "bold", error.hint)


def _print_stderr(label: str, style: str, message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    line = Text.assemble((f"{label}: ", style), printable(message))
    Console(stderr=True, soft_wrap=True, highlight=False).print(line)


def printable(text: str) -> str:
    """`text` for a terminal: a file's name, or what a foreign file says, may hold control characters."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


class Notes(Progress):
    """What a log gets: notes, and no bars."""

    def note(self, message: str) -> None:
        """A line on stderr, above the bars if there are any."""
        _print_stderr("note", "bold cyan", message)


class Bars(Notes):
    """What a terminal gets: bars too, only while a task is open, so that nothing draws while something is timed."""

    def __init__(self, bars: rich.progress.Progress) -> None:
        self._bars = bars

    def task(self, description: str, total: int) -> Task:
        """A bar by bytes."""
        self._bars.start()
        return _Bar(self._bars, self._bars.add_task(description, total=total))


class _Bar(Task):
    def __init__(self, bars: rich.progress.Progress, task: rich.progress.TaskID) -> None:
        self._bars, self._task = bars, task

    def advance(self, amount: int) -> None:
        self._bars.advance(self._task, amount)

    def close(self) -> None:
        self._bars.remove_task(self._task)
        if not self._bars.tasks:
            self._bars.stop()


@contextmanager
def progress() -> Iterator[Progress]:
    """Progress on stderr for the time of the block; bars only if it is a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield Notes()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    bars = RichProgress(*columns, console=Console(stderr=True, highlight=False), transient=True)
    try:
        yield Bars(bars)
    finally:
        bars.stop()
