"""What each version in a volume was published as."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from weightctl import storage
from weightctl.errors import IntegrityError, WeightctlError, translated_os_errors
from weightctl.model import File, check_path

VERSION_DIGITS = 16
"""A version is so many hex digits of its snapshot's digest: equal models have equal versions everywhere."""

VERSION = re.compile(f"[0-9a-f]{{{VERSION_DIGITS}}}")


@dataclass(frozen=True)
class PublishedFile:
    """A file of a version, as it was when it was published."""

    file: File
    """Its `source` is where it lies in the volume."""
    mtime_ns: int | None
    """None if nobody wrote it down."""

    @property
    def is_there(self) -> bool:
        """Whether a file of this size is in its place."""
        return has_size(self.file.source, self.file.size)

    @property
    def is_proven(self) -> bool:
        """Whether size and time say that nobody wrote to it since. A link to it changes neither."""
        status = _regular(self.file.source)
        return status is not None and (status.st_size, status.st_mtime_ns) == (self.file.size, self.mtime_ns)

    def at(self, place: Path) -> PublishedFile:
        """The same, as it should be at another place."""
        return dataclasses.replace(self, file=dataclasses.replace(self.file, source=place))


class Manifests:
    """One JSON file a version, below `root`; the versions themselves lie below `volume`."""

    def __init__(self, root: Path, volume: Path) -> None:
        self._root, self.volume = root, volume

    def path(self, name: str, version: str) -> Path:
        """Where the manifest of a version is."""
        return self._root / name / f"{version}.json"

    def versions(self) -> list[tuple[str, str]]:
        """Name and version of all that is published and still there. Raises WeightctlError if that cannot be read."""

        def fail(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise error

        with translated_os_errors(f"read {self._root}"):
            found = sorted(
                (Path(parent).relative_to(self._root).as_posix(), file.removesuffix(".json"))
                for parent, _, files in os.walk(self._root, onerror=fail)
                for file in files
                if file.endswith(".json")
            )
            return [
                (name, version)
                for name, version in found
                if VERSION.fullmatch(version) and (self.volume / name / version).is_dir()
            ]

    def read(self, name: str, version: str) -> tuple[PublishedFile, ...]:
        """The files of a version, each with its SHA-256. Raises IntegrityError if its manifest is none."""
        manifest, directory = self.path(name, version), self.volume / name / version
        with translated_os_errors(f"read {manifest}"):
            try:
                content = manifest.read_bytes()
            except FileNotFoundError:
                raise WeightctlError(
                    f"nobody knows what {directory} should hold: {manifest} is missing", "push the model again"
                ) from None
        try:
            return tuple(
                PublishedFile(
                    File(check_path(item["path"]), int(item["size"]), directory / item["path"], str(item["sha256"])),
                    item.get("mtime_ns"),
                )
                for item in json.loads(content)["files"]
            )
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise IntegrityError(f"{manifest} is damaged", "push the model again") from error

    def write(self, name: str, version: str, files: Sequence[File], staged: Path, scratch: Path) -> None:
        """Write down the version whose files lie in `staged`; `scratch` is on the volume too."""
        manifest = self.path(name, version)
        storage.make_directories(manifest.parent, 0o755)
        entries = [
            {
                "path": file.path,
                "size": file.size,
                "sha256": file.sha256,
                "mtime_ns": (staged / file.path).lstat().st_mtime_ns,
            }
            for file in files
        ]
        with storage.atomic_write(manifest, scratch, 0o644) as stream:
            content = json.dumps({"name": name, "version": version, "files": entries})
            storage.write_all(stream)(memoryview(content.encode()))

    def files(self) -> Iterator[PublishedFile]:
        """Everything that is published in the volume. A manifest that is damaged, or pruned now, offers nothing."""
        for name, version in self.versions():
            with contextlib.suppress(WeightctlError):
                yield from self.read(name, version)


def has_size(path: Path, size: int) -> bool:
    """Whether a file (no link) of `size` bytes is at `path`."""
    status = _regular(path)
    return status is not None and status.st_size == size


def _regular(path: Path) -> os.stat_result | None:
    try:
        status = path.lstat()
    except OSError:  # whoever needs it is told why
        return None
    return status if stat.S_ISREG(status.st_mode) else None
