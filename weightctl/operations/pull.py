"""Bring a model here and check every byte of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from weightctl.config import Config
from weightctl.operations import resolve
from weightctl.progress import Progress


@dataclass(frozen=True)
class PullResult:
    """A model that is here, and right."""

    model: str
    revision: str | None
    commit: str | None
    path: Path
    files: int
    bytes: int
    fetched_bytes: int
    verified: bool
    """Whether every byte was compared with what its source lists; in a plain directory there is nothing to compare."""
    seconds: float


@dataclass(frozen=True)
class PullPlan:
    """What a pull would do."""

    model: str
    revision: str | None
    commit: str | None
    path: Path
    files: int
    bytes: int
    missing_files: int
    missing_bytes: int


def pull(
    model: str,
    *,
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    to: Path | None = None,
    config: Config,
    progress: Progress,
) -> PullResult:
    """Fetch what is missing of `model`, into the Hub's cache or `to`, and check every file's bytes.

    Raises WeightctlError if the model cannot be had, IntegrityError if its bytes are not what the Hub lists.
    """
    began = time.monotonic()
    found = resolve.plan(
        model, revision=revision, include=include, exclude=exclude, to=to, config=config, progress=progress
    )
    snapshot = resolve.fetch(found, verify=True, config=config, progress=progress)
    return PullResult(
        model=snapshot.name,
        revision=snapshot.revision,
        commit=snapshot.commit,
        path=snapshot.root,
        files=len(snapshot.files),
        bytes=snapshot.bytes,
        fetched_bytes=sum(file.size for file in found.missing),
        verified=all(file.has_digest for file in found.snapshot.files),
        seconds=time.monotonic() - began,
    )


def plan_pull(
    model: str,
    *,
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    to: Path | None = None,
    config: Config,
    progress: Progress,
) -> PullPlan:
    """What `pull` would fetch. Moves nothing."""
    found = resolve.plan(
        model, revision=revision, include=include, exclude=exclude, to=to, config=config, progress=progress
    )
    snapshot = found.snapshot
    return PullPlan(
        model=snapshot.name,
        revision=snapshot.revision,
        commit=snapshot.commit,
        path=snapshot.root,
        files=len(snapshot.files),
        bytes=snapshot.bytes,
        missing_files=len(found.missing),
        missing_bytes=sum(file.size for file in found.missing),
    )
