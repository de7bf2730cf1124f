"""InstantTensor: reads past the page cache for what is cold, through it for what is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from weightctl.config import Config
from weightctl.errors import UsageError
from weightctl.loaders.base import Loader, loaders, translated_library_errors
from weightctl.loaders.reading import is_cold
from weightctl.loaders.safetensors import own_checkpoint
from weightctl.model import Snapshot

if TYPE_CHECKING:
    import torch


@loaders.register("instanttensor")
class InstantTensorLoader(Loader):
    """`instanttensor.safe_open`."""

    summary = "the InstantTensor library, to CUDA devices"
    requires: ClassVar[Mapping[str, str]] = {"torch": "torch", "instanttensor": "loaders"}
    formats = ("safetensors",)

    def prepare(self, snapshot: Snapshot) -> None:  # noqa: ARG002
        """Import the library."""
        import instanttensor  # noqa: F401

    def load(self, snapshot: Snapshot, device: str) -> dict[str, torch.Tensor]:
        """Its own default is O_DIRECT, which takes twenty times as long for what is in the page cache."""
        if device == "cpu":
            raise UsageError("instanttensor loads to CUDA devices only", "choose another strategy, or auto")
        import instanttensor

        checkpoint = own_checkpoint(snapshot)
        wanted = {entry.name for entry in checkpoint.tensors}
        with translated_library_errors("instanttensor", snapshot):
            backend = Config.load().instanttensor_backend
            if backend == "auto":
                cold = any(is_cold(file.source, file.size) for file in checkpoint.files)
                backend = "direct" if cold else "buffered"
            with instanttensor.safe_open(
                [str(file.source) for file in checkpoint.files],
                framework="pt",
                device="cuda:0" if device == "cuda" else device,
                backend=None if backend == "direct" else instanttensor.BackendPolicy.BUFFERED,
            ) as opened:
                return {name: tensor for name, tensor in opened.tensors() if name in wanted}
