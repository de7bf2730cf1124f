"""A volume's directory: what lies where in it, and what every process may do there at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from weightctl import storage
from weightctl.errors import IntegrityError, UsageError, WeightctlError, translated_os_errors
from weightctl.volumes import leases
from weightctl.volumes.base import Version
from weightctl.volumes.manifests import Manifests
from weightctl.volumes.staging import Staging

_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO})
"""How filesystems answer that have no links; EIO is what `rclone mount` says."""


class Mount:
    """VOLUME/NAME/VERSION/files and VOLUME/NAME/latest → VERSION; everything else is below VOLUME/.weightctl."""

    def __init__(self, path: Path) -> None:
        with translated_os_errors(f"open the volume {path}"):
            if not path.is_dir():
                what = "is not a directory" if path.exists() else "does not exist"
                raise UsageError(f"the volume {path} {what}", "mount it, or create the directory, first")
            self._mounted = path.stat()
        self.path = path.absolute()
        self._control = self.path / ".weightctl"
        self.staging = Staging(self._control / "staging")
        self.manifests = Manifests(self._control / "manifests", self.path)

    def check(self) -> None:
        """Raise WeightctlError if the volume was unmounted since, or links lead out of what weightctl keeps there."""
        if not os.path.samestat(self._mounted, self.path.stat()):
            raise WeightctlError(f"the volume {self.path} is no longer mounted there", "mount it, then push again")
        for place in (self._control, *self._control.glob("*")):
            if place.is_symlink():
                raise IntegrityError(f"{place} is a link, which weightctl did not make", "remove it, then try again")

    def check_place(self, name: str) -> None:
        """Raise WeightctlError if something else is where a model's versions belong, or the link to the latest one."""
        place = self.path / name
        if not place.resolve().is_relative_to(self.path.resolve()):
            raise IntegrityError(f"{place} is a link that leaves the volume", "remove it, then try again")
        latest = place / "latest"
        if latest.is_dir() and not latest.is_symlink():
            raise WeightctlError(
                f"{latest} is a directory, where the link to the latest version belongs",
                "move it away, then push again",
            )

    @contextlib.contextmanager
    def naming(self, name: str) -> Iterator[None]:
        """One process at a time changes which versions a model has. Nothing is copied meanwhile."""
        locks = self._control / "locks"
        storage.make_directories(locks, 0o755)
        with leases.held(locks / f"{flat(name)}{leases.SUFFIX}"):
            yield

    def latest(self, name: str) -> str | None:
        """What `latest` of a model says; None if there is none. Where there are no symbolic links it is a file."""
        latest = self.path / name / "latest"
        try:
            return str(latest.readlink())
        except FileNotFoundError:
            return None
        except OSError:
            return latest.read_text(errors="replace") if latest.is_file() and latest.stat().st_size < 100 else ""

    def point_latest(self, version: Path, scratch: Path) -> None:
        """Let `latest` say `version`, in one step; `scratch` is on the volume too."""
        latest = version.parent / "latest"
        new = scratch / "latest"
        new.unlink(missing_ok=True)
        try:
            new.symlink_to(version.name)
        except OSError as error:
            if error.errno not in _NO_LINKS or latest.is_symlink():
                raise
            with storage.atomic_write(latest, scratch, 0o644) as stream:  # no path, but it names the version
                stream.write(version.name.encode())
        else:
            storage.rename(new, latest)

    @contextlib.contextmanager
    def mark(self, name: str, version: str) -> Iterator[None]:
        """Mark a version as in use. The mark is a lease: whatever ends this process ends it."""
        marks = self._marks(name, version)
        storage.make_directories(marks, 0o755)
        with leases.held(marks / f"{secrets.token_hex(8)}{leases.SUFFIX}"):
            yield

    def readers(self, name: str, version: str) -> tuple[str, ...]:
        """HOST:PID of every process that has marked a version."""
        marks = sorted(self._marks(name, version).glob(f"*{leases.SUFFIX}"))
        return tuple(str(owner) for mark in marks if (owner := leases.owner_of(mark)))

    def sweep_marks(self) -> None:
        """Remove the marks of processes that died."""
        for mark in (self._control / "readers").glob(f"*/*{leases.SUFFIX}"):
            if leases.owner_of(mark) is None:
                mark.unlink(missing_ok=True)

    def forget(self, name: str, version: str) -> None:
        """Remove what is kept here of a version that is gone."""
        self.manifests.path(name, version).unlink(missing_ok=True)
        shutil.rmtree(self._marks(name, version), ignore_errors=True)

    def _marks(self, name: str, version: str) -> Path:
        return self._control / "readers" / f"{flat(name)}@{version}"

    def contents(self) -> tuple[Version, ...]:
        """Every version of every model, the newest of each model first."""
        all_versions = [self._describe(name, version) for name, version in self.manifests.versions()]
        found = [version for version in all_versions if version]
        return tuple(sorted(found, key=lambda each: (each.name, -each.published)))

    def _describe(self, name: str, version: str) -> Version | None:
        """A version as it stands there; None if it is pruned at this moment."""
        path = self.path / name / version
        try:
            published = self.manifests.path(name, version).stat().st_mtime
        except FileNotFoundError:
            return None
        sizes = [status.st_size for status in files_in(path)]
        return Version(
            name=name,
            version=version,
            path=path,
            files=len(sizes),
            bytes=sum(sizes),
            published=published,
            latest=self.latest(name) == version,
            readers=self.readers(name, version),
        )


def flat(name: str) -> str:
    """A model's name as a file's; no name holds a `%`."""
    return name.replace("/", "%")


def files_in(path: Path) -> list[os.stat_result]:
    """The status of every file below a directory, but of those that are removed at this moment."""
    found = []
    for file in (Path(parent, name) for parent, _, names in os.walk(path) for name in names):
        with contextlib.suppress(FileNotFoundError):
            found.append(file.lstat())
    return found
