"""Remove old versions from a volume, and what dead pushes left there."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from weightctl.errors import UsageError
from weightctl.progress import Progress
from weightctl.volumes import Version, volumes


@dataclass(frozen=True)
class PruneResult:
    """What was removed, or with a dry run would be."""

    volume: Path
    removed: tuple[Version, ...]
    in_use: tuple[Version, ...]
    """Old enough to go, but marked in use by a living reader."""
    leftovers: int
    """Dead pushes whose staged files were swept."""
    freed_bytes: int
    """Of the removed versions, what no remaining one shares."""
    dry_run: bool
    seconds: float


def prune(
    volume: Path, *, keep: int | None = None, older_than: float | None = None, dry_run: bool = False, progress: Progress
) -> PruneResult:
    """Remove the versions that are not among the newest `keep` of their model, nor younger than `older_than` seconds.

    Without either only leftovers go. Never the latest version of a model, never one that a living reader uses.
    """
    if (keep is not None and keep < 1) or (older_than is not None and older_than < 0):
        raise UsageError("at least one version is kept: the latest", "give --keep 1 or more, and no negative age")
    began = time.monotonic()
    done = volumes.get("directory")(volume).prune(keep=keep, older_than=older_than, dry_run=dry_run, progress=progress)
    return PruneResult(
        volume=volume.absolute(),
        removed=done.removed,
        in_use=done.in_use,
        leftovers=done.leftovers,
        freed_bytes=done.freed_bytes,
        dry_run=dry_run,
        seconds=time.monotonic() - began,
    )
