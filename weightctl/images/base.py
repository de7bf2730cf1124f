"""What a place where images go has to do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from weightctl import storage
from weightctl.config import Config
from weightctl.digests import Check
from weightctl.errors import WeightctlError
from weightctl.images.layers import LayerPlan
from weightctl.images.oci import ImageName, WrittenLayer
from weightctl.images.plan import ImagePlan
from weightctl.model import Snapshot
from weightctl.progress import Progress
from weightctl.registry import Backend, Registry


@dataclass(frozen=True)
class BakedLayer:
    """A layer of an image that is where it belongs."""

    digest: str
    size: int
    media_type: str
    files: tuple[str, ...]
    reused: bool
    """Whether it was there already."""


def describe(layers: Iterable[LayerPlan], written: Iterable[tuple[WrittenLayer, bool]]) -> tuple[BakedLayer, ...]:
    """The result rows of layers as written, each with whether it was there already."""
    return tuple(
        BakedLayer(
            digest=layer.blob.digest,
            size=layer.blob.size,
            media_type=layer.blob.media_type,
            files=tuple(file.path for file in plan.files),
            reused=reused,
        )
        for plan, (layer, reused) in zip(layers, written, strict=True)
    )


@dataclass(frozen=True)
class Baked:
    """An image that is where it belongs."""

    digest: str
    """Of the manifest."""
    layers: tuple[BakedLayer, ...]
    written_bytes: int


@dataclass(frozen=True)
class Preview:
    """What a bake would meet, as far as can be told without reading the model."""

    existing: tuple[bool, ...]
    """For each of the plan's layers, whether it is known to be there."""
    peak_disk_bytes: int
    """What has to be free where the image goes, on this machine; 0 if nothing is written here."""
    problems: tuple[str, ...] = ()
    """Why it would fail, a sentence each."""


class Images(Backend, ABC):
    """A place where images go."""

    @abstractmethod
    def __init__(self, location: str) -> None:
        """`location` is what follows the backend's name in `--to`."""

    def check_compression(self, compression: str) -> None:
        """Raise UsageError if layers that are packed so make no sense there. Unless a backend says so, they do."""

    @abstractmethod
    def preview(self, plan: ImagePlan, name: ImageName, *, config: Config) -> Preview:
        """What `bake` would meet. Moves nothing."""

    @abstractmethod
    def bake(self, plan: ImagePlan, name: ImageName, *, config: Config, progress: Progress) -> Baked:
        """Write the planned image under `name`. Nobody sees the name before all of the image is there.

        Raises IntegrityError if a file's bytes are not those that its source claims.
        """

    @abstractmethod
    def check(self, against: Snapshot | None = None, *, config: Config, progress: Progress) -> Check:
        """Read every blob of every image there, and compare digests, sizes and diffIDs.

        With `against`, whose files are hashed, also compare the files in the image with that model's.
        """


def space_problems(directory: Path, needed: int) -> tuple[str, ...]:
    """Whether the filesystem of `directory` lacks room for `needed` bytes."""
    try:
        storage.check_space(directory, needed)
    except WeightctlError as error:
        return (error.message,)
    return ()


images: Registry[Images] = Registry("image target")
