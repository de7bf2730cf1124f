"""fastsafetensors, through host memory unless told otherwise: few machines have the drivers of GPUDirect Storage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from weightctl.config import Config
from weightctl.loaders.base import Loader, loaders, translated_library_errors
from weightctl.loaders.safetensors import own_checkpoint
from weightctl.model import Snapshot

if TYPE_CHECKING:
    import torch


@loaders.register("fastsafetensors")
class FastSafetensorsLoader(Loader):
    """`fastsafetensors.fastsafe_open`."""

    summary = "the fastsafetensors library"
    requires: ClassVar[Mapping[str, str]] = {"torch": "torch", "fastsafetensors": "loaders"}
    formats = ("safetensors",)

    def prepare(self, snapshot: Snapshot) -> None:  # noqa: ARG002
        """Import the library."""
        import fastsafetensors  # noqa: F401

    def load(self, snapshot: Snapshot, device: str) -> dict[str, torch.Tensor]:
        """The tensors of a file are views of one buffer."""
        from fastsafetensors import fastsafe_open

        checkpoint = own_checkpoint(snapshot)
        gds = Config.load().fastsafetensors_gds
        paths = [str(file.source) for file in checkpoint.files]
        with (
            translated_library_errors("fastsafetensors", snapshot),
            fastsafe_open(paths, device="cuda:0" if device == "cuda" else device, nogds=not gds) as opened,
        ):
            return {entry.name: opened.get_tensor(entry.name) for entry in checkpoint.tensors}
