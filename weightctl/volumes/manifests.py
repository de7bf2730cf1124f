"""What each version in a volume was published as."""

from __future__ import annotations

import contextlib
import json
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from weightctl import storage
from weightctl.errors import IntegrityError, translated_os_errors
from weightctl.model import File, check_path


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
        return self.is_there and self.file.source.lstat().st_mtime_ns == self.mtime_ns


class Manifests:
    """One JSON file a version, below `root`; the versions themselves lie below `volume`."""

    def __init__(self, root: Path, volume: Path) -> None:
        self._root, self._volume = root, volume

    def path(self, name: str, version: str) -> Path:
        """Where the manifest of a version is."""
        return self._root / name / f"{version}.json"

    def versions(self) -> list[tuple[str, str]]:
        """Name and version of all that is published and still there."""
        found = [
            (path.parent.relative_to(self._root).as_posix(), path.stem) for path in sorted(self._root.rglob("*.json"))
        ]
        return [(name, version) for name, version in found if (self._volume / name / version).is_dir()]

    def read(self, name: str, version: str) -> tuple[PublishedFile, ...]:
        """The files of a version, each with its SHA-256. Raises IntegrityError if its manifest is none."""
        manifest, directory = self.path(name, version), self._volume / name / version
        with translated_os_errors(f"read {manifest}"):
            content = manifest.read_bytes()
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
        with storage.atomic_write(manifest, scratch) as stream:
            content = json.dumps({"name": name, "version": version, "files": entries})
            storage.write_all(stream)(memoryview(content.encode()))

    def files(self) -> Iterator[PublishedFile]:
        """Everything that is published in the volume. A damaged manifest offers nothing."""
        for name, version in self.versions():
            with contextlib.suppress(IntegrityError):
                yield from self.read(name, version)


def has_size(path: Path, size: int) -> bool:
    """Whether a file (no link) of `size` bytes is at `path`."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size
