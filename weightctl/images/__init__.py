"""Where an image goes."""

from weightctl.images.base import Baked, BakedLayer, Images, images
from weightctl.images.layout import LayoutImages

__all__ = ["Baked", "BakedLayer", "Images", "LayoutImages", "images"]
