"""Where a volume lives."""

from weightctl.volumes.base import Pruned, Published, Version, Volume, volumes
from weightctl.volumes.directory import DirectoryVolume, version_at

__all__ = ["DirectoryVolume", "Pruned", "Published", "Version", "Volume", "version_at", "volumes"]
