"""Where a volume lives."""

from weightctl.volumes.base import Published, Volume, volumes
from weightctl.volumes.directory import DirectoryVolume

__all__ = ["DirectoryVolume", "Published", "Volume", "volumes"]
