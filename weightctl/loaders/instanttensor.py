"""InstantTensor: reads past the page cache for what is cold, through it for what is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from weightctl.checkpoint import Checkpoint
from weightctl.config import Config
from weightctl.errors import UsageError
from weightctl.loaders.base import loaders
from weightctl.loaders.peers import PeerLoader
from weightctl.loaders.reading import is_cold

if TYPE_CHECKING:
    import torch


@loaders.register("instanttensor")
class InstantTensorLoader(PeerLoader):
    """`instanttensor.safe_open`."""

    summary = "the InstantTensor library, to CUDA devices"
    requires: ClassVar[Mapping[str, str]] = {"torch": "torch", "instanttensor": "loaders"}

    def stream(self, checkpoint: Checkpoint, device: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Its own default is O_DIRECT, which takes twenty times as long for what is in the page cache."""
        if device == "cpu":
            raise UsageError("instanttensor loads to CUDA devices only", "choose another strategy, or auto")
        import instanttensor

        backend = Config.load().instanttensor_backend
        if backend == "auto":
            cold = any(is_cold(file.source, file.size) for file in checkpoint.files)
            backend = "direct" if cold else "buffered"
        with instanttensor.safe_open(
            checkpoint.paths,
            framework="pt",
            device=device,
            backend=None if backend == "direct" else instanttensor.BackendPolicy.BUFFERED,
        ) as opened:
            yield from opened.tensors()
