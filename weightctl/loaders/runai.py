"""Run:ai Model Streamer: many readers into host memory, and each tensor to the device when it is there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from weightctl.checkpoint import Checkpoint
from weightctl.config import Config
from weightctl.loaders.base import loaders
from weightctl.loaders.peers import PeerLoader

if TYPE_CHECKING:
    import torch


@loaders.register("runai")
class RunaiLoader(PeerLoader):
    """`runai_model_streamer.SafetensorsStreamer`."""

    summary = "the Run:ai Model Streamer"
    requires: ClassVar[Mapping[str, str]] = {"torch": "torch", "runai_model_streamer": "loaders"}

    def stream(self, checkpoint: Checkpoint, device: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor is copied out of the library's buffer, which it uses again."""
        if threads := Config.load().runai_concurrency:
            os.environ["RUNAI_STREAMER_CONCURRENCY"] = str(threads)  # the only way that the library has
        from runai_model_streamer import SafetensorsStreamer

        with SafetensorsStreamer() as streamer:
            streamer.stream_files(checkpoint.paths)
            for name, tensor in streamer.get_tensors():
                yield name, tensor.to(device, copy=True)
