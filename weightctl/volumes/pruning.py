"""Old versions removed from a volume, and what dead pushes left there."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from weightctl import storage
from weightctl.progress import Progress
from weightctl.volumes.base import Pruned, Version
from weightctl.volumes.mount import Mount, files_in, flat

PRUNING = "@prune"
"""The key of the work that removes versions; no model's name begins so."""


def prune(
    mount: Mount, name: str | None, keep: int | None, older_than: float | None, dry_run: bool, progress: Progress
) -> Pruned:
    """See `Volume.prune`. A version leaves its place by one rename before its files go."""
    mount.check()
    asked = keep is not None or older_than is not None
    old = _beyond(mount, name, keep or 1, older_than or 0) if asked else []
    leftovers = mount.staging.sweep((f"{flat(name)}@" if name else "", PRUNING), dry_run=dry_run)
    if not dry_run:
        mount.sweep_marks()
    doomed = [version for version in old if not version.readers]
    if doomed and not dry_run:
        tell = "another process is pruning the volume: waiting for it"
        with mount.staging.work(PRUNING, lambda: progress.note(tell)) as trash:
            discarded = {version: place for version in doomed if (place := _discard(mount, version, trash))}
            doomed = list(discarded)
            freed = _bytes_only_in(list(discarded.values()))
    else:
        freed = _bytes_only_in([version.path for version in doomed])
    in_use = [version for version in old if version not in doomed and version.path.is_dir()]
    return Pruned(tuple(doomed), tuple(in_use), leftovers, freed)


def _beyond(mount: Mount, name: str | None, keep: int, older_than: float) -> list[Version]:
    """The versions that are neither a latest one, nor among the newest `keep` of their model, nor too young."""
    rank: Counter[str] = Counter()
    found = []
    for version in sorted(mount.contents(), key=lambda each: not each.latest):
        rank[version.name] += 1
        old = rank[version.name] > keep and time.time() - version.published >= older_than
        if old and not version.latest and name in (None, version.name):
            found.append(version)
    return found


def _discard(mount: Mount, version: Version, trash: Path) -> Path | None:
    """Move a version out of sight, unless it became the latest, got a reader or is gone since it was listed."""
    place = trash / f"{flat(version.name)}@{version.version}"
    with mount.naming(version.name):
        mount.check()
        mount.check_place(version.name)
        if mount.latest(version.name) == version.version or mount.readers(version.name, version.version):
            return None
        if not version.path.is_dir():  # another process has just pruned it
            return None
        storage.rename(version.path, place)
        if mount.readers(version.name, version.version):  # only where locks do not hold
            storage.rename(place, version.path)
            return None
        mount.forget(version.name, version.version)
    return place


def _bytes_only_in(paths: Sequence[Path]) -> int:
    """The bytes of the files of which every link lies below `paths`."""
    links: Counter[tuple[int, int]] = Counter()
    statuses: dict[tuple[int, int], os.stat_result] = {}
    for status in (status for path in paths for status in files_in(path)):
        links[status.st_dev, status.st_ino] += 1
        statuses[status.st_dev, status.st_ino] = status
    return sum(status.st_size for inode, status in statuses.items() if links[inode] == status.st_nlink)
