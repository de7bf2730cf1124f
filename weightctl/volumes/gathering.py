"""The files of a version brought together in one directory: linked to what the volume has, or copied."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from weightctl import storage
from weightctl.config import Config
from weightctl.digests import DigestCache, check_files
from weightctl.errors import WeightctlError
from weightctl.model import File, Snapshot
from weightctl.progress import Progress, Task
from weightctl.volumes.copying import copy_files
from weightctl.volumes.manifests import Manifests, PublishedFile, has_size


def gather(
    files: Sequence[File], staging: Path, manifests: Manifests, *, verify: bool, config: Config, progress: Progress
) -> tuple[list[File], int]:
    """Bring the files to `staging`, durably: linked to what the volume has, or copied.

    Returns them with their hashes, and how many bytes came from the model's source.
    """
    if not files:
        return [], 0
    _make_places(files, staging)
    offers = _offers(files, manifests)
    here = {file for file in files if _is_same(staging / file.path, file.source)}  # downloaded there
    linked, near, far = _link_known(
        [file for file in files if file not in here], offers, staging, verify, config, progress
    )
    missing = sum(max(0, file.size - _allocated(staging / file.path)) for file in (*near, *far))
    storage.check_space(manifests.volume, missing)
    with progress.task("pushing", sum(file.size for file in files)) as task:
        task.advance(sum(file.size for file in (*here, *linked)))
        try:
            orders = [dataclasses.replace(file, source=offers[file.sha256].file.source) for file in near]
            copied_near = copy_files([(file, staging / file.path) for file in orders], config.workers, task)
        except WeightctlError:  # pruned meanwhile, or damaged: the model has them too
            copied_near, near, far = [], [], [*far, *near]
        copied_far = copy_files([(file, staging / file.path) for file in far], config.workers, task)
    copied = [*copied_near, *copied_far]
    for file in here:
        storage.set_mode(staging / file.path, 0o644)
    DigestCache().put_all("sha256", [(copy.file.source, copy.seen, str(copy.file.sha256)) for copy in copied])
    directories = _tidy(staging, {staging / file.path for file in files})
    storage.sync_files([*(staging / file.path for file in (*here, *near, *far)), *directories], config.workers)
    fresh = [copy.file.size - copy.kept_bytes for copy in copied_far]
    fresh += [file.size for file in here if (staging / file.path).stat().st_nlink == 1]
    return [*here, *linked, *(copy.file for copy in copied)], sum(fresh)


def _link_known(
    files: Sequence[File],
    offers: Mapping[str | None, PublishedFile],
    staging: Path,
    verify: bool,
    config: Config,
    progress: Progress,
) -> tuple[list[File], list[File], list[File]]:
    """Link what the volume has. Returns what is linked, what could not be linked, and what the volume has not.

    Unless size and time prove it, a file is read after it was linked: from there no pruning takes it away.
    """
    linked: list[File] = []
    near: list[File] = []
    far: list[File] = []
    for file in files:
        offer = offers.get(file.sha256)
        if offer is None:
            far.append(file)
        elif _link(offer.file.source, staging / file.path):
            linked.append(file)
        else:
            near.append(file)
    unproven = [
        dataclasses.replace(file, source=staging / file.path, git_id=None)
        for file in linked
        if verify or not offers[file.sha256].at(staging / file.path).is_proven
    ]
    _, bad = check_files(unproven, config.workers, None if verify else DigestCache(), progress)
    damaged = {file.path for file in bad}
    far += [file for file in linked if file.path in damaged]
    return [file for file in linked if file.path not in damaged], near, far


def _offers(files: Sequence[File], manifests: Manifests) -> dict[str | None, PublishedFile]:
    """SHA-256 → a file in the volume that was published with it, if possible one that nobody wrote to since."""
    wanted = {file.sha256 for file in files if file.sha256 and file.size}
    there = [entry for entry in manifests.files() if entry.file.sha256 in wanted and entry.is_there]
    return {entry.file.sha256: entry for entry in sorted(there, key=lambda entry: entry.is_proven)}


def seed(snapshot: Snapshot, downloads: Path, manifests: Manifests, *, config: Config, progress: Progress) -> None:
    """See `Volume.seed`. The Hub tells no SHA-256 of a small file: one of its path and size is tried."""
    offers: dict[object, Path] = {}
    for entry in manifests.files():
        if entry.is_there:
            offers[entry.file.sha256] = offers[entry.file.path, entry.file.size] = entry.file.source
    found = [
        (dataclasses.replace(file, source=downloads / file.path), offer)
        for file in snapshot.files
        if not has_size(downloads / file.path, file.size)
        and (offer := offers.get(file.sha256 or (file.path, file.size)))
    ]
    _make_places([file for file, _ in found], downloads)
    apart = [(file, offer) for file, offer in found if not _link(offer, file.source)]
    with contextlib.suppress(WeightctlError):  # pruned meanwhile, or damaged: then it is downloaded
        copy_files(
            [(dataclasses.replace(file, source=offer), file.source) for file, offer in apart], config.workers, Task()
        )
    whole = [file for file, _ in found if has_size(file.source, file.size)]
    _, bad = check_files(whole, config.workers, DigestCache(), progress)
    for file in {file for file, _ in found}.difference(whole).union(bad):
        file.source.unlink(missing_ok=True)


def _make_places(files: Sequence[File], staging: Path) -> None:
    """Create `staging` and the directories of the files in it, but nothing above: if that is gone, so is the mount."""
    parents = {PurePosixPath(file.path).parent for file in files}
    places = {PurePosixPath(".")}.union(parents, *(parent.parents for parent in parents))
    for parent in sorted(places, key=lambda place: place.parts):  # Python orders "." in two ways, by its version
        (staging / parent).mkdir(exist_ok=True)


def _link(existing: Path, destination: Path) -> bool:
    """Give the file a second name, or return False where that does not work."""
    try:
        if _is_same(destination, existing):
            return True
        destination.unlink(missing_ok=True)
        destination.hardlink_to(existing)
    except OSError:  # no links here, too many of them, not to another user's file, or pruned: copying will do
        return False
    return True


def _is_same(one: Path, other: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return one.samefile(other)
    return False


def _allocated(path: Path) -> int:
    try:
        return path.lstat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _tidy(staging: Path, wanted: set[Path]) -> list[Path]:
    """Remove what does not belong into the version, and open its directories to every reader.

    Raises WeightctlError if a file is not there under its own name: some filesystems take `a` and `A` for one.
    """
    directories = []
    found: set[Path] = set()
    for parent, _, names in os.walk(staging, topdown=False):
        directory = Path(parent)
        here = {directory / name for name in names}
        found |= here & wanted
        for stray in here - wanted:
            stray.unlink()
        if directory == staging or any(directory in path.parents for path in wanted):
            storage.set_mode(directory, 0o755)
            directories.append(directory)
        else:
            directory.rmdir()
    if lost := sorted(str(path.relative_to(staging)) for path in wanted - found):
        raise WeightctlError(
            f"the volume does not keep the name {lost[0]!r} apart from that of another file of the model",
            "push to a filesystem that tells upper case from lower case",
        )
    return directories
