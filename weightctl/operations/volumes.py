"""List what a volume holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from weightctl.volumes import Version
from weightctl.volumes import volumes as backends


@dataclass(frozen=True)
class VolumeContents:
    """Every version of every model in a volume."""

    volume: Path
    versions: tuple[Version, ...]
    """By name, the newest of each model first."""
    bytes: int
    """Files that several versions share are counted in each."""


def volumes(volume: Path) -> VolumeContents:
    """What the volume holds, which versions are the latest, and who is reading them."""
    versions = backends.get("directory")(volume).contents()
    return VolumeContents(volume.absolute(), versions, sum(version.bytes for version in versions))
