"""Where an image goes."""

from weightctl.images.archive import ArchiveImages
from weightctl.images.base import Baked, BakedLayer, Images, images
from weightctl.images.docker import DockerImages
from weightctl.images.layout import LayoutImages
from weightctl.images.remote import RemoteImages

__all__ = [
    "ArchiveImages",
    "Baked",
    "BakedLayer",
    "DockerImages",
    "Images",
    "LayoutImages",
    "RemoteImages",
    "images",
]
