"""fastsafetensors, through host memory unless told otherwise: few machines have the drivers of GPUDirect Storage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from weightctl.checkpoint import Checkpoint
from weightctl.config import Config
from weightctl.loaders.base import loaders
from weightctl.loaders.peers import PeerLoader

if TYPE_CHECKING:
    import torch


@loaders.register("fastsafetensors")
class FastSafetensorsLoader(PeerLoader):
    """`fastsafetensors.fastsafe_open`."""

    summary = "the fastsafetensors library"
    requires: ClassVar[Mapping[str, str]] = {"torch": "torch", "fastsafetensors": "loaders"}

    def stream(self, checkpoint: Checkpoint, device: str) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a file are views of one buffer."""
        from fastsafetensors import fastsafe_open

        with fastsafe_open(checkpoint.paths, device=device, nogds=not Config.load().fastsafetensors_gds) as opened:
            for entry in checkpoint.tensors:
                yield entry.name, opened.get_tensor(entry.name)
