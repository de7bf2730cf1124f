"""What a place where models come from has to do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from weightctl.config import Config
from weightctl.model import File, Reference, Snapshot
from weightctl.progress import Progress
from weightctl.registry import Backend, Registry


@dataclass(frozen=True)
class Plan:
    """A model as its source lists it, before anything has moved."""

    source: str
    """The backend that made the plan, and that fetches it."""
    snapshot: Snapshot
    """All files; one that is not here yet has the `source` that it will have."""
    missing: tuple[File, ...] = ()
    """Those still to be fetched."""


class Source(Backend, ABC):
    """A place where models come from."""

    @abstractmethod
    def plan(
        self,
        reference: Reference,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        to: Path | None = None,
        config: Config,
        progress: Progress,
    ) -> Plan:
        """List the model's files, moving nothing.

        `to` is the directory to fetch into, instead of the source's own cache.
        """

    @abstractmethod
    def fetch(self, plan: Plan, *, verify: bool, config: Config, progress: Progress) -> Snapshot:
        """Bring what is missing. Every file of the snapshot is then where its `source` says.

        With `verify` every file has been read, has its SHA-256, and is what the source says of it (IntegrityError
        otherwise). Without, whoever reads a file has to compare it with its `sha256`, if it has one.
        """


sources: Registry[Source] = Registry("source")
