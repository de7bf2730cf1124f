"""A volume in a mounted directory: VOLUME/NAME/VERSION/files and VOLUME/NAME/latest → VERSION."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weightctl import storage
from weightctl.config import Config
from weightctl.digests import Check, DigestCache, Identity, check_against, hash_files, unchanging
from weightctl.errors import IntegrityError, UsageError, translated_os_errors
from weightctl.model import File, Snapshot, check_name, check_path
from weightctl.progress import Progress, Task
from weightctl.volumes.base import Published, Volume, volumes

VERSION_DIGITS = 16
"""A version is so many hex digits of its snapshot's digest: equal models have equal versions everywhere."""

_VERSION = re.compile(f"[0-9a-f]{{{VERSION_DIGITS}}}")


@volumes.register("directory")
class DirectoryVolume(Volume):
    """A directory: a local disk, NFS, or any mount that renames atomically."""

    summary = "a mounted directory"

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            what = "is not a directory" if path.exists() else "does not exist"
            raise UsageError(f"the volume {path} {what}", "mount it, or create the directory, first")
        self.path = path.absolute()
        self._control = self.path / ".weightctl"

    def publish(self, snapshot: Snapshot, name: str, *, config: Config, progress: Progress) -> Published:
        """See `Volume.publish`. Files of a push that died are taken up again if they still hash right."""
        check_name(name)
        with translated_os_errors(f"write to the volume {self.path}"), self._pushing(name):
            found = self.find(snapshot, name)
            if found is None and self._may_hold(snapshot, name):
                snapshot = _hashed(snapshot, config, progress)
                found = self.find(snapshot, name)
            if found is None:
                staging = self._staging(snapshot, name)
                with progress.task("pushing", snapshot.bytes) as task:
                    snapshot = _with_remembered_digests(snapshot)
                    snapshot, copied = self._stage(snapshot, staging, config, task)
                found = self._publish(snapshot, name, staging)
            else:
                copied = 0
            self._point_latest(name, found)
            return Published(found.name, found, copied, snapshot.bytes - copied)

    def find(self, snapshot: Snapshot, name: str) -> Path | None:
        """See `Volume.find`. A version counts if every file is there with its size."""
        snapshot = _with_remembered_digests(snapshot)
        if any(file.sha256 is None for file in snapshot.files):
            return None
        path = self.path / name / snapshot.digest[:VERSION_DIGITS]
        if path.is_dir() and not all(_has_size(path / file.path, file.size) for file in snapshot.files):
            raise IntegrityError(
                f"{path} is damaged: files are missing or have another size",
                f"see: weightctl verify 'volume:{self.path}#{name}@{path.name}'; remove it and push again",
            )
        return path if path.is_dir() else None

    def _may_hold(self, snapshot: Snapshot, name: str) -> bool:
        """Whether some version has files of these names and sizes: then hashing them first may save copying them."""
        versions = [self.path / name / version for version in self.versions(name)]
        return any(all(_has_size(path / file.path, file.size) for file in snapshot.files) for path in versions)

    def resolve(self, name: str, version: str = "latest") -> Path:
        """See `Volume.resolve`. `latest` is followed, so the path stays what it is when a new version comes."""
        parent = self.path / check_name(name)
        path = parent / version
        if not (version == "latest" or _VERSION.fullmatch(version)) or not path.is_dir():
            known = self.versions(name)
            hint = f"versions: {', '.join(known)}" if known else f"names here: {', '.join(self.names()) or 'none'}"
            raise UsageError(f"the volume {self.path} has no version {version!r} of {name!r}", hint)
        target = path.resolve()
        if target.parent != parent.resolve():
            raise IntegrityError(f"{path} points out of {parent}: to {target}", "push the model again to mend it")
        return target

    def check(self, name: str, version: str, *, config: Config, progress: Progress) -> Check:
        """See `Volume.check`. A file that was not published is a problem too."""
        path = self.resolve(name, version)
        expected = self._contents(name, path)
        found = check_against(expected, config.workers, progress)
        published = {file.path for file in expected}
        here = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_symlink() or not file.is_dir()]
        strays = [f"{file} was not published with this version" for file in sorted(here) if file not in published]
        return dataclasses.replace(found, problems=(*found.problems, *strays))

    def _contents(self, name: str, path: Path) -> tuple[File, ...]:
        """What the version in `path` was published as, every file with its SHA-256."""
        manifest = self._manifest(name, path.name)
        with translated_os_errors(f"read {manifest}"):
            content = manifest.read_bytes()
        try:
            listed = json.loads(content)["files"]
            return tuple(
                File(check_path(item["path"]), int(item["size"]), path / item["path"], str(item["sha256"]))
                for item in listed
            )
        except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise IntegrityError(f"{manifest} is damaged", "push the model again") from error

    def names(self) -> list[str]:
        """The models in the volume."""
        found = [path.parent for depth in ("*", "*/*") for path in self.path.glob(f"{depth}/latest")]
        return sorted(path.relative_to(self.path).as_posix() for path in found)

    def versions(self, name: str) -> list[str]:
        """The versions of a model, by name."""
        parent = self.path / name
        if not parent.is_dir():
            return []
        return sorted(path.name for path in parent.iterdir() if _VERSION.fullmatch(path.name))

    @contextmanager
    def _pushing(self, name: str) -> Iterator[None]:
        """One push of a name at a time: the second then finds what the first has published."""
        locks = self._control / "locks"
        storage.make_directories(locks)
        with storage.lock(locks / f"{_flat(name)}.lock"):
            yield

    def _staging(self, snapshot: Snapshot, name: str) -> Path:
        """Where this very snapshot is put together; what dead pushes of the same name left is removed."""
        lines = [f"{file.path}\0{file.size}\0{file.sha256 or Identity.of(file.source).key}" for file in snapshot.files]
        key = hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:VERSION_DIGITS]
        staging = self._control / "staging" / f"{_flat(name)}@{key}"
        storage.make_directories(staging.parent)
        for other in staging.parent.glob(f"{_flat(name)}@*"):
            if other != staging:
                shutil.rmtree(other)
        return staging

    def _stage(self, snapshot: Snapshot, staging: Path, config: Config, task: Task) -> tuple[Snapshot, int]:
        """Copy every file that is not staged yet, and make all of it durable."""
        there = sum(file.size for file in snapshot.files if _has_size(staging / file.path, file.size))
        storage.check_space(staging.parent, snapshot.bytes - there)
        directories = {(staging / file.path).parent for file in snapshot.files}
        for directory in sorted(directories):
            directory.mkdir(parents=True, exist_ok=True)
        staged = storage.in_parallel(
            lambda file: _stage_file(file, staging / file.path, task), snapshot.files, config.workers
        )
        wanted = {staging / file.path for file in snapshot.files}
        for parent, _, names in os.walk(staging):
            for stray in {Path(parent, name) for name in names} - wanted:
                stray.unlink()
            Path(parent).chmod(0o755)
            storage.fsync_directory(Path(parent))
        return snapshot.replace_files([file for file, _ in staged]), sum(copied for _, copied in staged)

    def _publish(self, snapshot: Snapshot, name: str, staging: Path) -> Path:
        version = snapshot.digest[:VERSION_DIGITS]
        final = self.path / name / version
        if (found := self.find(snapshot, name)) is not None:  # its digest was not known before it was copied
            shutil.rmtree(staging)
            return found
        manifest = self._manifest(name, version)
        storage.make_directories(manifest.parent)
        storage.sweep_temporaries(manifest.parent)
        with storage.atomic_write(manifest) as stream:
            files = [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in snapshot.files]
            content = json.dumps({"name": name, "version": version, "files": files})
            storage.write_all(stream)(memoryview(content.encode()))
        storage.make_directories(final.parent)
        storage.rename(staging, final)
        return final

    def _point_latest(self, name: str, version: Path) -> None:
        latest = version.parent / "latest"
        if latest.is_symlink() and latest.readlink() == Path(version.name):
            return
        temporary = self._control / "staging" / f"{_flat(name)}.latest"
        storage.make_directories(temporary.parent)
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(version.name)
        storage.rename(temporary, latest)

    def _manifest(self, name: str, version: str) -> Path:
        return self._control / "manifests" / name / f"{version}.json"


def _flat(name: str) -> str:
    return name.replace("/", "--")


def _has_size(path: Path, size: int) -> bool:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size


def _with_remembered_digests(snapshot: Snapshot) -> Snapshot:
    """SHA-256 where it is known without reading the file."""
    cache = DigestCache()
    return snapshot.replace_files(
        [dataclasses.replace(file, sha256=file.sha256 or cache.get("sha256", file.source)) for file in snapshot.files]
    )


def _hashed(snapshot: Snapshot, config: Config, progress: Progress) -> Snapshot:
    """SHA-256 also where only reading the file tells."""
    unread = [file for file in snapshot.files if file.sha256 is None]
    known = {file.path: file for file in hash_files(unread, config.workers, DigestCache(), progress)}
    return snapshot.replace_files([known.get(file.path, file) for file in snapshot.files])


def _stage_file(file: File, destination: Path, task: Task) -> tuple[File, int]:
    """The file with its SHA-256 (as copied, so as verified), and how many bytes had to be copied."""
    cache = DigestCache()
    if file.sha256 and _has_size(destination, file.size):
        digest = hashlib.sha256()
        with destination.open("rb", buffering=0) as stream:
            storage.pump(stream, file.size, [digest.update], Task())
        if digest.hexdigest() == file.sha256:
            task.advance(file.size)
            return file, 0
    digest = hashlib.sha256()
    with (
        unchanging(file.source) as seen,
        file.source.open("rb", buffering=0) as source,
        destination.open("wb", buffering=0) as stream,
    ):
        storage.pump(source, file.size, [digest.update, storage.write_all(stream)], task)
        os.fchmod(stream.fileno(), 0o644)
        os.fsync(stream.fileno())
    if file.sha256 not in (None, digest.hexdigest()):
        raise IntegrityError(
            f"{file.source} is damaged: it hashes to {digest.hexdigest()}, not to {file.sha256}", "pull the model again"
        )
    cache.put("sha256", file.source, seen, digest.hexdigest())
    return dataclasses.replace(file, sha256=digest.hexdigest()), file.size
