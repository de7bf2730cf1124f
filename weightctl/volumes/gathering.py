"""The files of a version brought together in one directory: linked to what the volume has, or copied."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from weightctl import storage
from weightctl.config import Config
from weightctl.digests import DigestCache, check_files
from weightctl.errors import WeightctlError
from weightctl.model import File
from weightctl.progress import Progress
from weightctl.volumes.copying import copy_files
from weightctl.volumes.manifests import Manifests


def gather(
    files: Sequence[File], staging: Path, manifests: Manifests, *, verify: bool, config: Config, progress: Progress
) -> tuple[list[File], int]:
    """Bring the files to `staging`, durably: linked to what the volume has, or copied.

    Returns them with their hashes, and how many bytes came from the model's source.
    """
    if not files:
        return [], 0
    make_places(files, staging)
    offers = _offers(files, manifests, verify, config, progress)
    here: list[File] = []  # downloaded to this very place
    linked: list[File] = []
    orders: list[tuple[File, Path]] = []
    for file in files:
        offer, destination = offers.get(file.sha256), staging / file.path
        if _is_same(destination, file.source):
            here.append(file)
        elif offer and link(offer, destination):
            linked.append(file)
        else:  # an offer that was pruned since is none
            source = offer if offer and offer.exists() else file.source
            orders.append((dataclasses.replace(file, source=source), destination))
    storage.check_space(staging, sum(max(0, file.size - _allocated(path)) for file, path in orders))
    with progress.task("pushing", sum(file.size for file in files)) as task:
        task.advance(sum(file.size for file in (*here, *linked)))
        copied = copy_files(orders, config.workers, task)
    for file in here:
        storage.set_mode(staging / file.path, 0o644)
    DigestCache().put_all("sha256", [(copy.file.source, copy.seen, str(copy.file.sha256)) for copy in copied])
    directories = _tidy(staging, {staging / file.path for file in files})
    written = [staging / file.path for file in here] + [path for _, path in orders]
    storage.sync_files([*written, *directories], config.workers)
    given = set(offers.values())
    fresh = [copy.file.size - copy.kept_bytes for copy in copied if copy.file.source not in given]
    fresh += [file.size for file in here if (staging / file.path).stat().st_nlink == 1]
    return [*here, *linked, *(copy.file for copy in copied)], sum(fresh)


def _offers(
    files: Sequence[File], manifests: Manifests, verify: bool, config: Config, progress: Progress
) -> dict[str | None, Path]:
    """SHA-256 → a file in the volume that has it: proven by size and time, or by reading it."""
    wanted = {file.sha256 for file in files if file.sha256 and file.size}
    there = [entry for entry in manifests.files() if entry.file.sha256 in wanted and entry.is_there]
    proven = {entry.file.sha256: entry.file.source for entry in there if entry.is_proven and not verify}
    unproven = [entry.file for entry in there if entry.file.sha256 not in proven]
    actual, _ = check_files(unproven, config.workers, None if verify else DigestCache(), progress)
    return {file.sha256: file.source for file in actual if file.sha256 in wanted} | proven


def make_places(files: Sequence[File], staging: Path) -> None:
    """Create `staging` and the directories of the files in it, but nothing above: if that is gone, so is the mount."""
    parents = {PurePosixPath(file.path).parent for file in files}
    for parent in sorted({PurePosixPath(".")}.union(parents, *(parent.parents for parent in parents))):
        (staging / parent).mkdir(exist_ok=True)


def link(existing: Path, destination: Path) -> bool:
    """Give the file a second name, or return False where that does not work."""
    try:
        if _is_same(destination, existing):
            return True
        destination.unlink(missing_ok=True)
        destination.hardlink_to(existing)
    except OSError:  # no links here, too many of them, or not to another user's file: copying will do
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
