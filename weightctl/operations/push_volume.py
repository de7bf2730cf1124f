"""Publish a model as a version on a volume."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightctl.config import Config
from weightctl.model import check_name
from weightctl.operations import resolve
from weightctl.progress import Progress
from weightctl.volumes import volumes


@dataclass(frozen=True)
class PushResult:
    """A version that readers of the volume can see."""

    volume: Path
    name: str
    version: str
    path: Path
    files: int
    bytes: int
    copied_bytes: int
    reused_bytes: int
    verified: bool
    seconds: float


@dataclass(frozen=True)
class PushPlan:
    """What a push would copy."""

    volume: Path
    name: str
    path: Path
    """Of the version, if the volume has it; else of the model."""
    files: int
    bytes: int
    missing_bytes: int
    """Of the model, what would first have to be fetched."""
    exists: bool
    """Whether the volume is known to have this version already."""


def push_volume(
    model: str,
    volume: Path,
    *,
    name: str | None = None,
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    keep: int | None = None,
    verify: bool = False,
    no_cache: bool = False,
    config: Config,
    progress: Progress,
) -> PushResult:
    """Copy `model` to `volume` as a version of `name` (its own name unless given) and make that the latest.

    Every file is hashed while it is copied and compared with what its source says of it. With `verify` a version that
    is there already is read. With `no_cache` what is missing of a Hub model is downloaded to the volume itself. Of the
    model's versions, only the newest `keep` and those in use remain.
    """
    began = time.monotonic()
    target = volumes.get("directory")(volume)
    wanted: dict[str, Any] = {"revision": revision, "include": include, "exclude": exclude}
    wanted |= {"config": config, "progress": progress}
    found = resolve.plan(model, **wanted)
    name = check_name(name or found.snapshot.name)
    if no_cache and found.missing:
        with target.downloads(name, progress=progress) as downloads:
            found = resolve.plan(model, to=downloads, **wanted)
            target.seed(found.snapshot, downloads, config=config, progress=progress)
            snapshot = resolve.fetch(found, verify=True, config=config, progress=progress)
            published = target.publish(
                snapshot, name, verify=verify, downloads=downloads, config=config, progress=progress
            )
    else:
        snapshot = resolve.fetch(found, verify=False, config=config, progress=progress)
        published = target.publish(snapshot, name, verify=verify, config=config, progress=progress)
    if keep is not None:
        for version in target.prune(name=name, keep=keep, progress=progress).removed:
            progress.note(f"removed {version.name}@{version.version}")
    return PushResult(
        volume=volume.absolute(),
        name=name,
        version=published.version,
        path=published.path,
        files=len(snapshot.files),
        bytes=snapshot.bytes,
        copied_bytes=published.copied_bytes,
        reused_bytes=published.reused_bytes,
        verified=True,
        seconds=time.monotonic() - began,
    )


def plan_push(
    model: str,
    volume: Path,
    *,
    name: str | None = None,
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    config: Config,
    progress: Progress,
) -> PushPlan:
    """What `push_volume` would do. Touches nothing."""
    target = volumes.get("directory")(volume)
    found = resolve.plan(model, revision=revision, include=include, exclude=exclude, config=config, progress=progress)
    name = check_name(name or found.snapshot.name)
    there = None if found.missing else target.find(found.snapshot, name)
    return PushPlan(
        volume=volume.absolute(),
        name=name,
        path=there or volume.absolute() / name,
        files=len(found.snapshot.files),
        bytes=found.snapshot.bytes,
        missing_bytes=sum(file.size for file in found.missing),
        exists=there is not None,
    )
