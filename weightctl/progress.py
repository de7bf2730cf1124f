"""Progress reporting, silent by default; whoever draws subclasses it."""

from __future__ import annotations

from types import TracebackType


class Task:
    """One bar. `advance` may be called from any thread."""

    def advance(self, amount: int) -> None:
        """`amount` more bytes are done (negative: a retry threw some away)."""

    def close(self) -> None:
        """The task is over, done or not."""

    def __enter__(self) -> Task:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Progress:
    """Where an operation reports to. This one is silent."""

    def task(self, description: str, total: int) -> Task:  # noqa: ARG002
        """Open a bar over `total` bytes."""
        return Task()

    def note(self, message: str) -> None:
        """Tell the user something that is not an error."""
