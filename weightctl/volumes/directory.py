"""A volume in a mounted directory: VOLUME/NAME/VERSION/files and VOLUME/NAME/latest → VERSION."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from weightctl import storage
from weightctl.config import Config, expanded
from weightctl.digests import Check, DigestCache, Identity, check_against, check_files, hash_files
from weightctl.errors import IntegrityError, UsageError, WeightctlError, translated_os_errors
from weightctl.model import File, Snapshot, check_name
from weightctl.progress import Progress, Task
from weightctl.volumes import leases
from weightctl.volumes.base import Pruned, Published, Version, Volume, volumes
from weightctl.volumes.copying import copy_files
from weightctl.volumes.gathering import gather, link, make_places
from weightctl.volumes.manifests import Manifests, has_size
from weightctl.volumes.staging import Staging

VERSION_DIGITS = 16
"""A version is so many hex digits of its snapshot's digest: equal models have equal versions everywhere."""

_VERSION = re.compile(f"[0-9a-f]{{{VERSION_DIGITS}}}")

_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO})
"""How filesystems answer that have no links; EIO is what `rclone mount` says."""


@volumes.register("directory")
class DirectoryVolume(Volume):
    """A directory: a local disk, NFS, or any mount that renames atomically."""

    summary = "a mounted directory"

    def __init__(self, path: Path | str) -> None:
        path = expanded(path)
        if not path.is_dir():
            what = "is not a directory" if path.exists() else "does not exist"
            raise UsageError(f"the volume {path} {what}", "mount it, or create the directory, first")
        self.path = path.absolute()
        self._mounted = path.stat()
        self._control = self.path / ".weightctl"
        self._staging = Staging(self._control / "staging")
        self._manifests = Manifests(self._control / "manifests", self.path)
        self._latest: dict[str, Path] = {}

    # Pushing.

    def publish(
        self,
        snapshot: Snapshot,
        name: str,
        *,
        verify: bool = False,
        downloads: Path | None = None,
        config: Config,
        progress: Progress,
    ) -> Published:
        """See `Volume.publish`. What a push that died has copied is taken up again if it still equals the source."""
        check_name(name)
        self._latest.pop(name, None)

        def tell() -> None:
            progress.note(f"another process is pushing the same to {self.path}: waiting for it")

        with translated_os_errors(f"write to the volume {self.path}"):
            self._check_mount()
            key = f"{_flat(name)}@{_key(snapshot)}"
            with self._staging.work(key, tell) as work:
                snapshot = self._identified(snapshot, config, progress)
                self._staging.sweep((f"{_flat(name)}@", PRUNING))
                staging = downloads or work / "files"
                while True:
                    self._check_mount()
                    path = self._place(snapshot, name)
                    there = path if path and path.is_dir() else None
                    missing = self._damaged(snapshot, there, verify, config, progress) if there else snapshot.files
                    staged, copied = gather(
                        missing, staging, self._manifests, verify=verify, config=config, progress=progress
                    )
                    new = {file.path: file for file in staged}
                    whole = snapshot.replace_files([new.get(file.path, file) for file in snapshot.files])
                    with self._naming(name):
                        self._check_mount()
                        if there is None or there.is_dir():  # else it was pruned meanwhile
                            path = self._publish(whole, name, staged, staging, there, work)
                            self._point_latest(path, work)
                            return Published(path.name, path, copied, snapshot.bytes - copied)

    @contextmanager
    def downloads(self, name: str, *, progress: Progress) -> Iterator[Path]:
        """See `Volume.downloads`. What a dead push has downloaded is still there."""

        def tell() -> None:
            progress.note(f"another process is downloading {name} to {self.path}: waiting for it")

        with (
            translated_os_errors(f"write to the volume {self.path}"),
            self._staging.work(f"{_flat(check_name(name))}@download", tell) as work,
        ):
            yield work / "files"

    def seed(self, snapshot: Snapshot, downloads: Path, *, config: Config, progress: Progress) -> None:
        """See `Volume.seed`."""
        here: dict[object, list[Path]] = {}
        for entry in self._manifests.files():
            if entry.is_there:
                for key in (entry.file.sha256, (entry.file.path, entry.file.size)):
                    here.setdefault(key, []).append(entry.file.source)
        offers = [
            dataclasses.replace(file, source=source)
            for file in snapshot.files
            if not has_size(downloads / file.path, file.size)
            for source in here.get(file.sha256 or (file.path, file.size), ())
        ]
        with translated_os_errors(f"write to the volume {self.path}"):
            actual, bad = check_files(offers, config.workers, DigestCache(), progress)
            damaged = {file.source for file in bad}
            found = {file.path: file for file in actual if file.source not in damaged}
            make_places(list(found.values()), downloads)
            places = [(file, downloads / file.path) for file in found.values()]
            copy_files([(file, path) for file, path in places if not link(file.source, path)], config.workers, Task())

    def _identified(self, snapshot: Snapshot, config: Config, progress: Progress) -> Snapshot:
        """SHA-256 where it is remembered, and where reading a file first may save writing it."""
        snapshot = _with_remembered_digests(snapshot)
        if all(file.sha256 for file in snapshot.files):
            return snapshot
        sizes = {published.file.size for published in self._manifests.files()}
        unread = [file for file in snapshot.files if file.sha256 is None and file.size in sizes]
        known = {file.path: file for file in hash_files(unread, config.workers, DigestCache(), progress)}
        return snapshot.replace_files([known.get(file.path, file) for file in snapshot.files])

    def _place(self, snapshot: Snapshot, name: str) -> Path | None:
        """Where the snapshot belongs, if all its hashes are known."""
        if any(file.sha256 is None for file in snapshot.files):
            return None
        return self.path / name / snapshot.digest[:VERSION_DIGITS]

    def _damaged(
        self, snapshot: Snapshot, path: Path, verify: bool, config: Config, progress: Progress
    ) -> Sequence[File]:
        """The files of a version that are not what they should be: as sizes and times say, or their bytes."""
        version = path.relative_to(self.path)
        try:
            published = self._manifests.read(version.parent.as_posix(), version.name)
        except WeightctlError:
            published = ()
        proven = set() if verify else {entry.file.path for entry in published if entry.is_proven}
        there = [
            dataclasses.replace(file, source=path / file.path, git_id=None)
            for file in snapshot.files
            if file.path not in proven and has_size(path / file.path, file.size)
        ]
        _, bad = check_files(there, config.workers, None if verify else DigestCache(), progress)
        sound = proven | {file.path for file in there} - {file.path for file in bad}
        return [file for file in snapshot.files if file.path not in sound]

    def _publish(
        self, snapshot: Snapshot, name: str, staged: Sequence[File], staging: Path, there: Path | None, scratch: Path
    ) -> Path:
        """Give what is staged its place: as a version, or in the version that is `there` but damaged."""
        version = snapshot.digest[:VERSION_DIGITS]
        final = self.path / name / version
        if there is None and not final.is_dir():  # else somebody else had it first
            self._manifests.write(name, version, snapshot.files, staging, scratch)
            storage.make_directories(final.parent, 0o755)
            storage.rename(staging, final)
        elif there is not None and not self._is_proven(name, version, staged):
            for file in staged:
                storage.make_directories((final / file.path).parent, 0o755)
                storage.rename(staging / file.path, final / file.path)
            self._manifests.write(name, version, snapshot.files, final, scratch)
        self._manifests.path(name, version).touch()
        return final

    def _is_proven(self, name: str, version: str, staged: Sequence[File]) -> bool:
        if staged:
            return False
        try:
            return all(entry.is_proven for entry in self._manifests.read(name, version))
        except WeightctlError:
            return False

    def _point_latest(self, version: Path, scratch: Path) -> None:
        latest = version.parent / "latest"
        if _latest_in(version.parent) == version.name:
            return
        new = scratch / "latest"
        new.unlink(missing_ok=True)
        try:
            new.symlink_to(version.name)
        except OSError as error:
            if error.errno not in _NO_LINKS or latest.is_symlink():
                raise
            with storage.atomic_write(latest, scratch) as stream:  # no path, but it names the version
                stream.write(version.name.encode())
        else:
            storage.rename(new, latest)

    def _check_mount(self) -> None:
        """Raise WeightctlError if the volume was unmounted since: below its path there is now another filesystem."""
        if not os.path.samestat(self._mounted, self.path.stat()):
            raise WeightctlError(f"the volume {self.path} is no longer mounted there", "mount it, then push again")

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """One process at a time changes which versions a model has. Nothing is copied meanwhile."""
        locks = self._control / "locks"
        storage.make_directories(locks)
        with leases.held(locks / f"{_flat(name)}{leases.SUFFIX}"):
            yield

    # Reading.

    def find(self, snapshot: Snapshot, name: str) -> Path | None:
        """See `Volume.find`. A version counts if every file is there with its size."""
        snapshot = _with_remembered_digests(snapshot)
        path = self._place(snapshot, name)
        whole = path is not None and all(has_size(path / file.path, file.size) for file in snapshot.files)
        return path if whole else None

    def resolve(self, name: str, version: str = "latest") -> Path:
        """See `Volume.resolve`."""
        parent = self.path / check_name(name)
        if version == "latest":
            if (pinned := self._latest.get(name)) and pinned.is_dir():
                return pinned
            found = _latest_in(parent)
            if found is not None and not _VERSION.fullmatch(found):
                raise IntegrityError(f"{parent / 'latest'} points out of {parent}", "push the model again to mend it")
        else:
            found = version if _VERSION.fullmatch(version) else None
        if found is None or not (parent / found).is_dir():
            known = self.versions(name)
            hint = f"versions: {', '.join(known)}" if known else f"names here: {', '.join(self.names()) or 'none'}"
            raise UsageError(f"the volume {self.path} has no version {version!r} of {name!r}", hint)
        if version == "latest":
            self._latest[name] = parent.resolve() / found
        return parent.resolve() / found

    def reload(self) -> None:
        """See `Volume.reload`."""
        self._latest.clear()

    def names(self) -> list[str]:
        """The models in the volume."""
        return sorted({name for name, _ in self._manifests.versions()})

    def versions(self, name: str) -> list[str]:
        """See `Volume.versions`."""
        return [version for other, version in self._manifests.versions() if other == name]

    @contextmanager
    def use(self, name: str, version: str = "latest") -> Iterator[Path]:
        """See `Volume.use`. The mark is a lease: whatever ends this process ends it."""
        with contextlib.ExitStack() as mark:
            with translated_os_errors(f"mark a version as in use on the volume {self.path}"), self._naming(name):
                found = self.resolve(name, version)
                marks = self._marks(name, found.name)
                storage.make_directories(marks)
                mark.enter_context(leases.held(marks / f"{secrets.token_hex(8)}{leases.SUFFIX}"))
                self.resolve(name, found.name)  # where locks do not hold, a pruning may have come between
            yield found

    def contents(self) -> tuple[Version, ...]:
        """See `Volume.contents`."""
        with translated_os_errors(f"read the volume {self.path}"):
            found = [self._describe(name, version) for name, version in self._manifests.versions()]
        return tuple(sorted(found, key=lambda each: (each.name, -each.published)))

    def _describe(self, name: str, version: str) -> Version:
        path = self.path / name / version
        sizes = [status.st_size for status in _files_in(path)]
        return Version(
            name=name,
            version=version,
            path=path,
            files=len(sizes),
            bytes=sum(sizes),
            published=self._manifests.path(name, version).stat().st_mtime,
            latest=_latest_in(path.parent) == version,
            readers=self._readers(name, version),
        )

    def _marks(self, name: str, version: str) -> Path:
        return self._control / "readers" / f"{_flat(name)}@{version}"

    def _readers(self, name: str, version: str) -> tuple[str, ...]:
        marks = sorted(self._marks(name, version).glob(f"*{leases.SUFFIX}"))
        return tuple(str(owner) for mark in marks if (owner := leases.owner_of(mark)))

    def check(self, name: str, version: str, *, config: Config, progress: Progress) -> Check:
        """See `Volume.check`. A file that was not published is a problem too."""
        path = self.resolve(name, version)
        expected = [entry.file for entry in self._manifests.read(name, path.name)]
        found = check_against(expected, config.workers, progress)
        published = {file.path for file in expected}
        here = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_symlink() or not file.is_dir()]
        strays = [f"{file} was not published with this version" for file in sorted(here) if file not in published]
        return dataclasses.replace(found, problems=(*found.problems, *strays))

    # Pruning.

    def prune(
        self,
        *,
        name: str | None = None,
        keep: int | None = None,
        older_than: float | None = None,
        dry_run: bool = False,
        progress: Progress,
    ) -> Pruned:
        """See `Volume.prune`. A version leaves its place by one rename before its files go."""
        asked = keep is not None or older_than is not None
        old = self._beyond(name, keep or 1, older_than or 0) if asked else []
        prefixes = (f"{_flat(name)}@" if name else "", PRUNING)
        with translated_os_errors(f"prune the volume {self.path}"):
            leftovers = self._staging.sweep(prefixes, dry_run=dry_run)
            doomed = [version for version in old if not version.readers]
            if doomed and not dry_run:
                tell = "another process is pruning the volume: waiting for it"
                with self._staging.work(PRUNING, lambda: progress.note(tell)) as trash:
                    self._check_mount()
                    doomed = [version for version in doomed if self._discard(version, trash)]
                    freed = _bytes_only_in([trash / version.version for version in doomed])
            else:
                freed = _bytes_only_in([version.path for version in doomed])
        return Pruned(tuple(doomed), tuple(version for version in old if version not in doomed), leftovers, freed)

    def _beyond(self, name: str | None, keep: int, older_than: float) -> list[Version]:
        """The versions that are neither a latest one, nor among the newest `keep` of their model, nor too young."""
        rank: Counter[str] = Counter()
        found = []
        for version in sorted(self.contents(), key=lambda each: not each.latest):
            rank[version.name] += 1
            old = rank[version.name] > keep and time.time() - version.published >= older_than
            if old and not version.latest and name in (None, version.name):
                found.append(version)
        return found

    def _discard(self, version: Version, trash: Path) -> bool:
        """Move a version out of sight, unless it became the latest or got a reader since it was listed."""
        with self._naming(version.name):
            if _latest_in(version.path.parent) == version.version or self._readers(version.name, version.version):
                return False
            storage.rename(version.path, trash / version.version)
            if self._readers(version.name, version.version):  # only where locks do not hold
                storage.rename(trash / version.version, version.path)
                return False
            self._manifests.path(version.name, version.version).unlink(missing_ok=True)
        return True


PRUNING = "@prune"
"""The key of the work that removes versions; no model's name begins so."""


def _flat(name: str) -> str:
    return name.replace("/", "%")


def _key(snapshot: Snapshot) -> str:
    """The same for whoever pushes this very snapshot at the same time."""
    entries = []
    for file in snapshot.files:
        with translated_os_errors(f"read {file.source}"):
            entries.append([file.path, file.size, file.sha256 or Identity.of(file.source).key])
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:VERSION_DIGITS]


def _latest_in(parent: Path) -> str | None:
    """What `latest` says; None if there is none. A filesystem without symbolic links keeps it in a file."""
    latest = parent / "latest"
    try:
        return str(latest.readlink())
    except FileNotFoundError:
        return None
    except OSError:
        return latest.read_text(errors="replace") if latest.is_file() and latest.stat().st_size < 100 else ""


def _with_remembered_digests(snapshot: Snapshot) -> Snapshot:
    """SHA-256 where it is known without reading the file."""
    known = DigestCache().get_all("sha256", [file.source for file in snapshot.files if file.sha256 is None])
    return snapshot.replace_files(
        [dataclasses.replace(file, sha256=file.sha256 or known.get(file.source)) for file in snapshot.files]
    )


def _files_in(path: Path) -> list[os.stat_result]:
    return [Path(parent, name).lstat() for parent, _, names in os.walk(path) for name in names]


def _bytes_only_in(paths: Sequence[Path]) -> int:
    """The bytes of the files of which every link lies below `paths`."""
    links: Counter[tuple[int, int]] = Counter()
    statuses = {}
    for status in (status for path in paths for status in _files_in(path)):
        links[status.st_dev, status.st_ino] += 1
        statuses[status.st_dev, status.st_ino] = status
    return sum(status.st_size for inode, status in statuses.items() if links[inode] == status.st_nlink)
