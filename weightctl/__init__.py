"""weightctl packages model weights once and gets them into GPU memory as fast as the hardware allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightctl.errors import IntegrityError, NotInstalledError, UsageError, WeightctlError

if TYPE_CHECKING:
    from weightctl.operations.load import load, load_into, load_model
    from weightctl.volumes import DirectoryVolume as Volume

__version__ = "0.1.0"

__all__ = [
    "IntegrityError", "NotInstalledError", "UsageError", "Volume", "WeightctlError", "load", "load_into", "load_model",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Bring what does the work only when it is asked for."""
    if name in ("load", "load_into", "load_model"):
        from weightctl.operations import load

        return getattr(load, name)
    if name == "Volume":
        from weightctl.volumes import DirectoryVolume

        return DirectoryVolume
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
