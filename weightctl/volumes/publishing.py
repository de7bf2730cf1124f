"""A snapshot made a version of a model: put together out of sight, then published by one rename."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from weightctl import storage
from weightctl.config import Config
from weightctl.digests import DigestCache, Identity, check_files, hash_files
from weightctl.errors import IntegrityError, WeightctlError, translated_os_errors
from weightctl.model import File, Snapshot
from weightctl.progress import Progress
from weightctl.volumes.base import Published
from weightctl.volumes.gathering import gather
from weightctl.volumes.manifests import VERSION_DIGITS, PublishedFile, has_size
from weightctl.volumes.mount import Mount, flat
from weightctl.volumes.pruning import PRUNING
from weightctl.volumes.staging import links_in

STORING_SECONDS = 600.0
"""How long a mount may take to store what it took, before `latest` moves."""


@dataclass(frozen=True)
class Push:
    """A push of a snapshot to a volume."""

    mount: Mount
    name: str
    """The model's, on the volume."""
    verify: bool
    """Whether what is there already is read."""
    config: Config
    progress: Progress

    def run(self, snapshot: Snapshot, downloads: Path | None) -> Published:
        """See `Volume.publish`. What a push that died has copied is taken up again if it still equals the source."""
        mount, flat_name = self.mount, flat(self.name)
        mount.check()
        mount.check_place(self.name)
        with mount.staging.work(f"{flat_name}@{_key(snapshot)}", self._tell) as work:
            snapshot = self._identified(snapshot)
            mount.staging.sweep((f"{flat_name}@", PRUNING))
            staging = downloads or work / "files"
            while True:
                self._check(work, downloads)
                path = place(mount, snapshot, self.name)
                there = path if path and path.is_dir() else None
                missing = self._damaged(snapshot, there) if there else snapshot.files
                staged, copied = gather(
                    missing, staging, mount.manifests, verify=self.verify, config=self.config, progress=self.progress
                )
                hashed = {file.path: file.sha256 for file in staged}
                snapshot = snapshot.replace_files(
                    [dataclasses.replace(file, sha256=hashed.get(file.path, file.sha256)) for file in snapshot.files]
                )
                path = _path(mount, snapshot, self.name)
                with mount.naming(self.name):
                    self._check(work, downloads)
                    if path.is_dir() != (there is not None):
                        continue  # it was pruned meanwhile, or is one that nobody knew by its hashes
                    if there:
                        self._mend(snapshot, there, staged, staging, work)
                    else:
                        self._place(snapshot, path, staging, work)
                    mount.manifests.path(self.name, path.name).touch()
                    if mount.latest(self.name) != path.name:
                        self._wait_until_readable(snapshot, path)
                        mount.point_latest(path, work)
                    return Published(path.name, path, copied, snapshot.bytes - copied)

    def _check(self, work: Path, downloads: Path | None) -> None:
        """Raises WeightctlError if the volume is no longer what it was, or what is staged no longer ours."""
        self.mount.check()
        for directory in (work, downloads.parent) if downloads else (work,):
            if not self.mount.staging.is_ours(directory):
                raise WeightctlError(
                    "this push stood still for so long that another process has taken it over",
                    "push again, to see how far that one is",
                )

    def _tell(self) -> None:
        self.progress.note(f"another process is pushing the same to {self.mount.path}: waiting for it")

    def _identified(self, snapshot: Snapshot) -> Snapshot:
        """SHA-256 where it is remembered, and where reading a file first may save writing it."""
        snapshot = with_remembered_digests(snapshot)
        if all(file.sha256 for file in snapshot.files):
            return snapshot
        sizes = {published.file.size for published in self.mount.manifests.files()}
        unread = [file for file in snapshot.files if file.sha256 is None and file.size in sizes]
        read = hash_files(unread, self.config.workers, DigestCache(), self.progress)
        known = {file.path: file for file in read}
        return snapshot.replace_files([known.get(file.path, file) for file in snapshot.files])

    def _damaged(self, snapshot: Snapshot, there: Path) -> Sequence[File]:
        """The files of a version that are not what they should be: as sizes and times say, or their bytes."""
        proven = set() if self.verify else {entry.file.path for entry in self._published(there) if entry.is_proven}
        unproven = [
            dataclasses.replace(file, source=there / file.path, git_id=None)
            for file in snapshot.files
            if file.path not in proven and has_size(there / file.path, file.size)
        ]
        cache = None if self.verify else DigestCache()
        try:
            _, bad = check_files(unproven, self.config.workers, cache, self.progress)
        except WeightctlError:
            if there.is_dir():
                raise
            return snapshot.files  # it was pruned meanwhile
        sound = proven | {file.path for file in unproven} - {file.path for file in bad}
        return [file for file in snapshot.files if file.path not in sound]

    def _place(self, snapshot: Snapshot, path: Path, staging: Path, scratch: Path) -> None:
        """Publish what is staged as a new version."""
        self.mount.manifests.write(self.name, path.name, snapshot.files, staging, scratch)
        storage.make_directories(path.parent, 0o755)
        storage.rename(staging, path)

    def _mend(self, snapshot: Snapshot, there: Path, staged: Sequence[File], staging: Path, scratch: Path) -> None:
        """Put what is staged into a version that is there but damaged."""
        if staged and (links := links_in(there)):
            raise IntegrityError(f"{links[0]} is a link, which no version holds", "remove it, then push again")
        for file in staged:
            storage.make_directories((there / file.path).parent, 0o755)
            storage.rename(staging / file.path, there / file.path)
        published = self._published(there)
        if staged or not published or not all(entry.is_proven for entry in published):
            self.mount.manifests.write(self.name, there.name, snapshot.files, there, scratch)

    def _wait_until_readable(self, snapshot: Snapshot, path: Path) -> None:
        """`rclone mount` cannot read what it has yet to store, once its directory was renamed."""
        if storage.is_on_disk(path):
            return
        deadline = time.monotonic() + STORING_SECONDS
        waiting = False
        for file in snapshot.files:
            while error := _reading_fails(path / file.path):
                if error.errno != errno.EIO or time.monotonic() > deadline:
                    self.mount.check()
                    raise WeightctlError(
                        f"{path / file.path} cannot be read where it was published: {error.strerror}",
                        "this mount loses files when their directory is renamed: mount it in another way",
                    ) from error
                if not waiting:
                    self.progress.note(f"waiting until {self.mount.path} has stored what it took")
                    waiting = True
                storage.pause(0.1)

    def _published(self, there: Path) -> Sequence[PublishedFile]:
        """What the manifest of a version says; nothing if it is damaged."""
        try:
            return self.mount.manifests.read(self.name, there.name)
        except WeightctlError:
            return ()


def _reading_fails(path: Path) -> OSError | None:
    try:
        with path.open("rb", buffering=0) as stream:
            stream.read(1)
    except OSError as error:
        return error
    return None


def place(mount: Mount, snapshot: Snapshot, name: str) -> Path | None:
    """Where the snapshot belongs, if all its hashes are known."""
    if any(file.sha256 is None for file in snapshot.files):
        return None
    return _path(mount, snapshot, name)


def _path(mount: Mount, snapshot: Snapshot, name: str) -> Path:
    return mount.path / name / snapshot.digest[:VERSION_DIGITS]


def with_remembered_digests(snapshot: Snapshot) -> Snapshot:
    """SHA-256 where it is known without reading the file."""
    known = DigestCache().get_all("sha256", [file.source for file in snapshot.files if file.sha256 is None])
    return snapshot.replace_files(
        [dataclasses.replace(file, sha256=file.sha256 or known.get(file.source)) for file in snapshot.files]
    )


def _key(snapshot: Snapshot) -> str:
    """The same for whoever pushes this very snapshot at the same time."""
    entries = []
    for file in snapshot.files:
        with translated_os_errors(f"read {file.source}"):
            entries.append([file.path, file.size, file.sha256 or Identity.of(file.source).key])
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:VERSION_DIGITS]
