"""Progress is silent unless somebody draws it."""

from __future__ import annotations

import pytest

from weightctl.progress import Progress, Task


def test_the_default_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.note("a note")
    with progress.task("copying", 10) as task:
        task.advance(5)
        task.advance(-5)
    assert capfd.readouterr() == ("", "")


def test_a_task_is_closed_when_its_block_ends_in_an_error() -> None:
    class Recorded(Task):
        closed = False

        def close(self) -> None:
            self.closed = True

    task = Recorded()
    with pytest.raises(ZeroDivisionError), task:
        raise ZeroDivisionError
    assert task.closed
