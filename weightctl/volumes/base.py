"""What a volume has to do: keep versions of models for servers to read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from weightctl.config import Config
from weightctl.digests import Check
from weightctl.model import Snapshot
from weightctl.progress import Progress
from weightctl.registry import Backend, Registry


@dataclass(frozen=True)
class Published:
    """A version of a model that a push made the latest."""

    version: str
    path: Path
    copied_bytes: int
    """Of this version's files, what came from the model's source."""
    reused_bytes: int
    """What the volume had already: with this version, with an earlier one, or staged by a push that died."""


@dataclass(frozen=True)
class Version:
    """A version of a model in a volume, as it stands there."""

    name: str
    version: str
    path: Path
    files: int
    bytes: int
    published: float
    """When it was pushed last, in seconds since 1970."""
    latest: bool
    readers: tuple[str, ...]
    """HOST:PID of every process that has marked it in use."""


@dataclass(frozen=True)
class Pruned:
    """What a pruning removed, or would remove."""

    removed: tuple[Version, ...]
    in_use: tuple[Version, ...]
    """Those that would have gone, but are being read."""
    leftovers: int
    """Pushes that died, swept away."""
    freed_bytes: int
    """Less than all bytes of the versions where the remaining ones share files with them."""


class Volume(Backend, ABC):
    """A place that many servers read models from."""

    @abstractmethod
    def __init__(self, path: Path | str) -> None:
        """Open the volume at `path`. Raises UsageError if there is none."""

    @abstractmethod
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
        """Make `snapshot` a version of `name`, and the latest one.

        A reader sees the complete version or none. A version that is there already is proven by sizes and times, or
        with `verify` by reading it; what is damaged of it is mended. Files in `downloads` (see there) are moved.
        Raises IntegrityError if a file's bytes are not those that the snapshot claims, WeightctlError if the volume
        cannot take it; the volume then shows what it showed before.
        """

    @abstractmethod
    def downloads(self, name: str, *, progress: Progress) -> AbstractContextManager[Path]:
        """A directory on the volume to download `name` into, so that `publish` need not copy it. Gone afterwards."""

    @abstractmethod
    def seed(self, snapshot: Snapshot, downloads: Path, *, config: Config, progress: Progress) -> None:
        """Put into `downloads` what the volume has of the snapshot already, every byte of it read."""

    @abstractmethod
    def find(self, snapshot: Snapshot, name: str) -> Path | None:
        """The path of the version that holds exactly `snapshot`, if there is one. Reads no weights.

        A file whose SHA-256 the snapshot does not claim counts as long as it is remembered from an earlier reading.
        """

    @abstractmethod
    def resolve(self, name: str, version: str = "latest") -> Path:
        """The directory of a version. Raises UsageError, naming what there is, if there is no such version.

        What `latest` is stays the same for this object until `reload`; the directory is never written to again.
        """

    @abstractmethod
    def versions(self, name: str) -> list[str]:
        """The versions of a model."""

    @abstractmethod
    def reload(self) -> None:
        """See the pushes made since: `latest` is looked up anew."""

    @abstractmethod
    def use(self, name: str, version: str = "latest") -> AbstractContextManager[Path]:
        """Mark a version in use, as long as the block runs and this process lives: no pruning removes it.

        Gives its directory. Raises WeightctlError where the mark cannot be written, such as on a read-only mount.
        """

    @abstractmethod
    def contents(self) -> tuple[Version, ...]:
        """Every version of every model, the newest of each model first."""

    @abstractmethod
    def prune(
        self,
        *,
        name: str | None = None,
        keep: int | None = None,
        older_than: float | None = None,
        dry_run: bool = False,
        progress: Progress,
    ) -> Pruned:
        """Remove versions that are beyond the newest `keep` of their model and were pushed `older_than` seconds ago.

        A condition that is not given holds for all; with neither, only the leftovers of dead pushes go. Never the
        latest version, which counts among the newest, and never one in use.
        """

    @abstractmethod
    def check(self, name: str, version: str, *, config: Config, progress: Progress) -> Check:
        """Read every file of a version and compare it with what was published."""


volumes: Registry[Volume] = Registry("volume")
