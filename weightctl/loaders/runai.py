"""Run:ai Model Streamer: many readers into host memory, and each tensor to the device when it is there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from weightctl.config import Config
from weightctl.loaders.base import Loader, loaders, translated_library_errors
from weightctl.loaders.safetensors import own_checkpoint
from weightctl.model import Snapshot

if TYPE_CHECKING:
    import torch


@loaders.register("runai")
class RunaiLoader(Loader):
    """`runai_model_streamer.SafetensorsStreamer`."""

    summary = "the Run:ai Model Streamer"
    requires: ClassVar[Mapping[str, str]] = {"torch": "torch", "runai_model_streamer": "loaders"}
    formats = ("safetensors",)

    def prepare(self, snapshot: Snapshot) -> None:  # noqa: ARG002
        """Import the library."""
        import runai_model_streamer  # noqa: F401

    def load(self, snapshot: Snapshot, device: str) -> dict[str, torch.Tensor]:
        """Every tensor is copied out of the library's buffer, which it uses again."""
        if threads := Config.load().runai_concurrency:
            os.environ["RUNAI_STREAMER_CONCURRENCY"] = str(threads)  # the only way that the library has
        from runai_model_streamer import SafetensorsStreamer

        checkpoint = own_checkpoint(snapshot)
        wanted = {entry.name for entry in checkpoint.tensors}
        with translated_library_errors("runai", snapshot), SafetensorsStreamer() as streamer:
            streamer.stream_files([str(file.source) for file in checkpoint.files])
            return {name: tensor.to(device, copy=True) for name, tensor in streamer.get_tensors() if name in wanted}
