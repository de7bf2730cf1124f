"""MODEL, as every command takes it, to the snapshot of files that it stands for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from weightctl.config import Config
from weightctl.model import Reference, Snapshot
from weightctl.progress import Progress
from weightctl.sources import Plan, sources
from weightctl.volumes import DirectoryVolume, version_at


def plan(
    model: str,
    *,
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    to: Path | None = None,
    config: Config,
    progress: Progress,
) -> Plan:
    """List the model's files and what is still to be fetched, moving nothing."""
    asked = reference = Reference.parse(model, revision)
    if asked.source == "directory":
        asked = version_at(Path(asked.location)) or asked
    if asked.source == "volume" and asked.name:
        path = DirectoryVolume(Path(asked.location)).resolve(asked.name, asked.revision or "latest")
        reference = Reference("directory", str(path))
    if asked.source == "huggingface" and Path(model).is_dir():
        progress.note(f"{model} is looked for on the Hub; the directory here is ./{model}")
    source = sources.get(reference.source)()
    found = source.plan(reference, include=include, exclude=exclude, to=to, config=config, progress=progress)
    name = asked.name or found.snapshot.name
    return dataclasses.replace(found, snapshot=dataclasses.replace(found.snapshot, name=name))


def fetch(found: Plan, *, verify: bool, config: Config, progress: Progress) -> Snapshot:
    """Bring what is missing; see `Source.fetch`."""
    return sources.get(found.source)().fetch(found, verify=verify, config=config, progress=progress)


def resolve(
    model: str,
    *,
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    verify: bool,
    config: Config,
    progress: Progress,
) -> Snapshot:
    """The model's files, all of them here: downloaded if need be. See `Source.fetch` for `verify`."""
    found = plan(model, revision=revision, include=include, exclude=exclude, config=config, progress=progress)
    return fetch(found, verify=verify, config=config, progress=progress)
