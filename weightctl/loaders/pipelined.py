"""Plain safetensors at the speed of the bus: parallel reads into pinned memory, and copies to the device meanwhile."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from weightctl.config import Config
from weightctl.loaders.base import Loader, loaders
from weightctl.loaders.blocks import PAGE_BYTES, Block, Shard, blocks_of, lay_out
from weightctl.loaders.buffers import Buffers, let_go_of_errors
from weightctl.loaders.lanes import CudaLane, Lane, StraightLane, pinned
from weightctl.loaders.reading import Source
from weightctl.loaders.safetensors import watched_checkpoint
from weightctl.model import Snapshot
from weightctl.storage import in_parallel, pause

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 4 << 20
"""Read at once. Two such slabs a reader stay in its processor's cache while they are read and sent: on an H100 with 16
cores, 8.4 GB warm and twelve readers, slabs of 4 MiB bring 43 GB/s, of 8 MiB 42, of 2 MiB 26 (Python's lock). This and
what follows is of one sweep (docs/measured.md), whose runs of the same tuning differed by 1 GB/s."""

SLABS = 2
"""Of each reader: into one it reads, from the other is copied. With one, 40 GB/s; with three, 45."""

READER_SHARE = 3 / 4
"""Of the processors: with a reader on each of the 16, 42 GB/s; with eight, 45."""

RING_SHARE = 2
"""A small model gets a ring of this part of it: pinning memory costs more than reading into it."""


@dataclass(frozen=True)
class Tuning:
    """How many read, and through how much memory."""

    readers: int
    block_bytes: int
    """A multiple of PAGE_BYTES."""
    slabs: int = SLABS
    """Of each reader, at most."""

    @classmethod
    def of(cls, nbytes: int, ring_bytes: int) -> Tuning:
        """For `nbytes` bytes to load, through a ring of up to `ring_bytes`."""
        ring = min(ring_bytes, max(nbytes // RING_SHARE, SLABS * BLOCK_BYTES))
        readers = max(1, min(ring // (SLABS * BLOCK_BYTES), math.ceil(READER_SHARE * len(os.sched_getaffinity(0)))))
        return cls(readers, min(BLOCK_BYTES, ring // (SLABS * readers)) // PAGE_BYTES * PAGE_BYTES)


@loaders.register("pipelined")
class PipelinedLoader(Loader):
    """One allocation a shard, every tensor a view of it, and no wait for a single tensor."""

    summary = "parallel reads through pinned memory, straight into place"
    requires: ClassVar[Mapping[str, str]] = {"torch": "torch", "numpy": "torch"}
    formats = ("safetensors",)

    def peak_pinned_bytes(self) -> int:
        """The slabs of all lanes."""
        return pinned.peak

    def load(self, snapshot: Snapshot, device: str) -> dict[str, torch.Tensor]:
        """On a CUDA device, what is not in the page cache is read past it."""
        return self.load_part(snapshot, device)

    def load_part(
        self,
        snapshot: Snapshot,
        device: str,
        names: Collection[str] | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Reads no more than it must, and converts on the device, block by block."""
        with watched_checkpoint(snapshot) as checkpoint:
            wanted = [entry for entry in checkpoint.tensors if names is None or entry.name in names]
            tuning = Tuning.of(sum(entry.nbytes for entry in wanted), Config.load().ring_bytes)
            lane = StraightLane if device == "cpu" else CudaLane
            return load_shards(lay_out(wanted, dtypes), device, lane, tuning)


def load_shards(shards: Sequence[Shard], device: str, lane: type[Lane], tuning: Tuning) -> dict[str, torch.Tensor]:
    """The tensors of `shards` on `device`, which `tuning.readers` lanes bring there at once.

    The first failure stops them all. Of memory, threads and descriptors, only the tensors' own outlives this.
    """
    buffers = Buffers(shards, device)
    sources = [Source(shard.file.source, shard.file.size) for shard in shards]
    supply = Supply(shards, tuning.block_bytes)

    def bring(_: int) -> None:
        with contextlib.closing(lane(sources, buffers, tuning.block_bytes, tuning.slabs)) as mine:
            for index, block in supply:
                pause(0)
                mine.bring(index, block)

    try:
        with let_go_of_errors():
            if any(shard.runs for shard in shards):
                in_parallel(bring, range(tuning.readers), tuning.readers)
            return buffers.tensors()
    finally:
        buffers.clear()


class Supply:
    """The blocks of all shards, each for whoever asks next, made as they are asked for: reading need not wait for a
    large model's thousands."""

    def __init__(self, shards: Sequence[Shard], block_bytes: int) -> None:
        self._lock = threading.Lock()
        self._left = (
            (index, block) for index, shard in enumerate(shards) for block in blocks_of(shard.runs, block_bytes)
        )

    def __iter__(self) -> Iterator[tuple[int, Block]]:
        while True:
            with self._lock:
                taken = next(self._left, None)
            if taken is None:
                return
            yield taken
