"""The memory on a device that shards end up in, and their tensors as views of it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from weightctl.errors import WeightctlError
from weightctl.loaders.blocks import Shard

if TYPE_CHECKING:
    import torch


class Buffers:
    """One allocation a shard, made when a reader first asks for it, so that the others read meanwhile."""

    def __init__(self, shards: Sequence[Shard], device: str) -> None:
        """Raises WeightctlError if the device has not enough free memory."""
        import torch

        self.device = torch.device(device)
        self.stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        """The caller's: the memory is of its pool."""
        if self.stream is not None:
            self.device = self.stream.device
        self._shards = shards
        self._made: dict[int, torch.Tensor] = {}
        self._lock = threading.Lock()
        if self.stream is not None and self._needed > (free := self._free()):
            raise self._no_room(free)

    def __getitem__(self, index: int) -> torch.Tensor:
        """The bytes of the shard `index`. Raises WeightctlError if there is no memory for them."""
        made = self._made.get(index)
        if made is None:
            with self._lock:
                made = self._made.get(index)
                if made is None:
                    made = self._made[index] = self._allocate(self._shards[index].nbytes)
        return made

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name."""
        found = {}
        for index, shard in enumerate(self._shards):
            typed = {dtype: self[index].view(dtype) for dtype in {tensor.dtype for tensor in shard.tensors}}
            for tensor in shard.tensors:
                first, count = tensor.place // tensor.dtype.itemsize, tensor.nbytes // tensor.dtype.itemsize
                found[tensor.name] = typed[tensor.dtype][first : first + count].view(tensor.shape)
        return found

    def clear(self) -> None:
        """Give the memory back."""
        self._made.clear()

    @property
    def _needed(self) -> int:
        return sum(shard.nbytes for shard in self._shards)

    def _allocate(self, nbytes: int) -> torch.Tensor:
        import torch

        try:
            with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
                return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        except torch.cuda.OutOfMemoryError as error:
            raise self._no_room(self._free()) from error
        except RuntimeError as error:  # the CPU's allocator has no error of its own
            if self.stream:
                raise
            raise self._no_room(self._free()) from error

    def _free(self) -> int:
        """What torch can still hand out: what is free, and what it holds without using it."""
        import torch

        if self.stream is None:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + unused

    def _no_room(self, free: int) -> WeightctlError:
        return WeightctlError(
            f"the model does not fit on {self.device}: {self._needed} bytes are needed, {free} are free",
            "free some of it, load to another device, or load fewer tensors",
        )
