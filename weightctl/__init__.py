"""weightctl packages model weights once and gets them into GPU memory as fast as the hardware allows."""

from weightctl.errors import IntegrityError, NotInstalledError, UsageError, WeightctlError

__version__ = "0.1.0"

__all__ = ["IntegrityError", "NotInstalledError", "UsageError", "WeightctlError"]
