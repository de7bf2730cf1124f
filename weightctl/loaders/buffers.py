"""The memory on a device that shards end up in, and their tensors as views of it."""

from __future__ import annotations

import contextlib
import os
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from weightctl.errors import WeightctlError
from weightctl.loaders.blocks import Shard
from weightctl.loaders.cuda import on_stream

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
        if self.stream is not None and self._needed > self._free():
            raise self._no_room()

    def __getitem__(self, index: int) -> torch.Tensor:
        """The bytes of the shard `index`. Raises WeightctlError if there is no memory for them."""
        made = self._made.get(index)
        if made is None:
            with self._lock:
                made = self._made.get(index)
                if made is None:
                    made = self._made[index] = self.allocate(self._shards[index].nbytes)
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

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Memory beside the buffers, of the same pool. Raises WeightctlError if there is none."""
        import torch

        try:
            with on_stream(self.stream) if self.stream else contextlib.nullcontext():
                return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        except RuntimeError as error:  # the CPU's allocator has no error of its own for that
            if self.stream and not isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            raise self._no_room(nbytes) from error

    @property
    def _needed(self) -> int:
        return sum(shard.nbytes for shard in self._shards)

    @property
    def _taken(self) -> int:
        return sum(buffer.nbytes for buffer in list(self._made.values()))

    def _free(self) -> int:
        """What the buffers have, and what torch can still hand out: what is free, or held by it without a use."""
        import torch

        if self.stream is None:
            return self._taken + os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return self._taken + torch.cuda.mem_get_info(self.device)[0] + unused

    def _no_room(self, more: int = 0) -> WeightctlError:
        needed = max(self._needed, self._taken + more)
        return WeightctlError(
            f"the model does not fit on {self.device}: {needed} bytes are needed, {self._free()} are free",
            "free some of it, load to another device, or load fewer tensors",
        )


@contextlib.contextmanager
def let_go_of_errors() -> Iterator[None]:
    """Clear the variables of all that an error of the block came through: whoever keeps the error, as `except` does,
    would keep the memory that they hold. Those of the block's own function stay."""
    try:
        yield
    except BaseException as error:
        chain = [error]
        for one in chain:
            traceback.clear_frames(one.__traceback__)
            chain += [other for other in (one.__cause__, one.__context__) if other and other not in chain]
        raise
