"""Where a model comes from."""

from weightctl.sources import directory, huggingface
from weightctl.sources.base import Plan, Source, sources

__all__ = ["Plan", "Source", "directory", "huggingface", "sources"]
