"""What the strategies have in common that are other people's libraries for safetensors files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

from weightctl.checkpoint import Checkpoint
from weightctl.loaders.base import Loader, translated_library_errors
from weightctl.loaders.safetensors import described, own_checkpoint
from weightctl.model import Snapshot

if TYPE_CHECKING:
    import torch


class PeerLoader(Loader):
    """A library that gives one tensor after the other."""

    formats = ("safetensors",)

    @abstractmethod
    def stream(self, checkpoint: Checkpoint, device: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor, of which there may be more than `checkpoint` has. `device` is `cpu` or `cuda:N`."""

    def load(self, snapshot: Snapshot, device: str) -> dict[str, torch.Tensor]:
        """Checks the headers first. What the library raises then is a WeightctlError that names it."""
        checkpoint = own_checkpoint(snapshot)
        wanted = {described(entry).name for entry in checkpoint.tensors}
        with translated_library_errors(self.name, snapshot):
            return {name: tensor for name, tensor in self.stream(checkpoint, device) if name in wanted}
