"""What a volume has to do: keep versions of models for servers to read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from weightctl.config import Config
from weightctl.digests import Check
from weightctl.model import Snapshot
from weightctl.progress import Progress
from weightctl.registry import Backend, Registry


@dataclass(frozen=True)
class Published:
    """A version of a model in a volume."""

    version: str
    path: Path
    copied_bytes: int
    reused_bytes: int
    """Of this version's files, what did not have to be copied."""


class Volume(Backend, ABC):
    """A place that many servers read models from."""

    @abstractmethod
    def __init__(self, path: Path) -> None:
        """Open the volume at `path`. Raises UsageError if there is none."""

    @abstractmethod
    def publish(self, snapshot: Snapshot, name: str, *, config: Config, progress: Progress) -> Published:
        """Make `snapshot` a version of `name`, and the latest one.

        A reader sees the complete version or none. Raises IntegrityError if a file's bytes are not those that the
        snapshot claims, WeightctlError if the volume cannot take it; the volume then shows what it showed before.
        """

    @abstractmethod
    def find(self, snapshot: Snapshot, name: str) -> Path | None:
        """The path of the version that holds exactly `snapshot`, if there is one. Reads no weights.

        A file whose SHA-256 the snapshot does not claim counts as long as it is remembered from an earlier reading.
        """

    @abstractmethod
    def resolve(self, name: str, version: str = "latest") -> Path:
        """The directory of a version. Raises UsageError, naming what there is, if there is no such version."""

    @abstractmethod
    def check(self, name: str, version: str, *, config: Config, progress: Progress) -> Check:
        """Read every file of a version and compare it with what was published."""


volumes: Registry[Volume] = Registry("volume")
