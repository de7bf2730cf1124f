"""How blocks of a file get to a device: what one reading thread does with one after the other."""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from weightctl.errors import WeightctlError
from weightctl.loaders.blocks import PAGE_BYTES, Block, Cast, Piece
from weightctl.loaders.cuda import driver
from weightctl.loaders.reading import Reader, Source

if TYPE_CHECKING:
    import torch

    from weightctl.loaders.buffers import Buffers

NODES = Path("/sys/devices/system/node")


class Lane(ABC):
    """Made, used and closed in one thread, which is its own. `slabs` blocks of `block_bytes` at most are in flight."""

    def __init__(self, sources: Sequence[Source], buffers: Buffers, block_bytes: int, slabs: int) -> None:
        self._sources = sources
        self._buffers = buffers
        self._block_bytes = block_bytes
        self._most_slabs = slabs
        self._reader = Reader()

    @abstractmethod
    def bring(self, index: int, block: Block) -> None:
        """Read a block of the shard `index`, and send it to its places in the shard's buffer."""

    def close(self) -> None:
        """Wait until all that was sent has arrived, then give everything back."""
        self._reader.close()


class StraightLane(Lane):
    """Reads into the buffers themselves, in host memory."""

    def bring(self, index: int, block: Block) -> None:
        """Only what is converted is copied."""
        import torch

        source, buffer = self._sources[index], self._buffers[index]
        for piece in block.pieces:
            place = slice(piece.place, piece.place + piece.nbytes)
            data = torch.empty(piece.nbytes, dtype=torch.uint8) if piece.cast else buffer[place]
            self._reader.fill(source, data.numpy().data, block.offset + piece.start, piece.nbytes)
            if piece.cast:
                _convert(data, buffer, piece, piece.cast)


class Slab:
    """Page-aligned host memory for one block."""

    def __init__(self, nbytes: int) -> None:
        import torch

        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages: only slower to pin
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.view = memoryview(memory)
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)

    def is_free(self) -> bool:
        """Whether its last block has arrived."""
        return True

    def sending(self) -> None:
        """Its block has been read, and is about to be sent."""

    def send(self, piece: Piece, buffer: torch.Tensor) -> None:
        """Begin to copy a piece, as it is, to its place in `buffer`."""
        buffer[piece.place : piece.place + piece.nbytes].copy_(self.tensor[piece.start : piece.end])

    def sent(self) -> None:
        """All of its block is on its way."""

    def close(self) -> None:
        """Give back what `sending` took. Only when it is free."""


class SlabLane(Lane):
    """Reads into a few slabs in turn, and sends from them."""

    slab: ClassVar[type[Slab]] = Slab

    def __init__(self, sources: Sequence[Source], buffers: Buffers, block_bytes: int, slabs: int) -> None:
        super().__init__(sources, buffers, block_bytes, slabs)
        self._slabs: deque[Slab] = deque()  # the next to be free is the first
        self._index = -1
        self._landing: torch.Tensor | None = None

    def bring(self, index: int, block: Block) -> None:
        """Whole pages are read, for the sake of O_DIRECT, and what is not wanted stays behind."""
        slab = self._free_slab()
        view = slab.view[: block.nbytes + -block.nbytes % PAGE_BYTES]
        self._reader.fill(self._sources[index], view, block.offset, block.nbytes)
        slab.sending()
        buffer = self._buffers[index]
        if index != self._index:
            self._follow_the_caller()
            self._index = index
        for piece in block.pieces:
            if piece.cast is None:
                slab.send(piece, buffer)
            else:
                _convert(self._landed(slab, piece), buffer, piece, piece.cast)
        slab.sent()

    def close(self) -> None:
        """The slabs go."""
        super().close()
        self._landing = None
        for slab in self._slabs:
            slab.close()
        self._slabs.clear()

    def _landed(self, slab: Slab, piece: Piece) -> torch.Tensor:
        """A piece's bytes where they are converted: in the device's memory, and aligned, whatever the file does."""
        if self._landing is None:
            self._landing = self._buffers.allocate(self._block_bytes)
            self._follow_the_caller()
        slab.send(piece._replace(place=0), self._landing)
        return self._landing[: piece.nbytes]

    def _follow_the_caller(self) -> None:
        """Memory was given out, of which the caller's stream may have a use that it has not come to yet."""

    def _free_slab(self) -> Slab:
        if self._slabs and (len(self._slabs) == self._most_slabs or self._slabs[0].is_free()):
            self._slabs.rotate(-1)
            while not self._slabs[-1].is_free():
                time.sleep(NAP_SECONDS)
        else:
            self._slabs.append(self.slab(self._block_bytes))
        return self._slabs[-1]


NAP_SECONDS = 20e-6
"""Between two looks at a slab whose block is on its way (4 MiB at 50 GB/s take 80 µs). Neither does it spin, which
takes a processor from the readers, nor wait for CUDA's interrupt, which costs another 4 % (H100)."""

PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every device."""


class Pinned:
    """Counts bytes that are registered with CUDA, in all threads."""

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """So many more, or fewer if negative."""
        with self._lock:
            self.now += nbytes
            self.peak = max(self.peak, self.now)


pinned = Pinned()
"""By the slabs of this process."""


class PinnedSlab(Slab):
    """Sends on the thread's present stream. Registered with CUDA after the first read into it, which has brought its
    pages into being."""

    def __init__(self, nbytes: int) -> None:
        import torch

        super().__init__(nbytes)
        self._driver = driver()
        self._stream: int = torch.cuda.current_stream().cuda_stream
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._arrived.record()  # what brings its handle into being, and makes the device's context this thread's
        self._address = self.tensor.data_ptr()
        self._pinned = False

    def is_free(self) -> bool:
        return self._driver.has_come(self._arrived.cuda_event)

    def sending(self) -> None:
        """Raises WeightctlError if the system does not let it be pinned."""
        import torch

        if not self._pinned:
            cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            if status := int(cudart.cudaHostRegister(self._address, self.tensor.nbytes, PORTABLE)):
                raise WeightctlError(
                    f"cannot pin {self.tensor.nbytes} bytes of memory: CUDA error {status}",
                    "make ring_bytes smaller, or take the strategy safetensors",
                )
            self._pinned = True
            pinned.add(self.tensor.nbytes)

    def send(self, piece: Piece, buffer: torch.Tensor) -> None:
        self._driver.copy(buffer.data_ptr() + piece.place, self._address + piece.start, piece.nbytes, self._stream)

    def sent(self) -> None:
        self._driver.record(self._arrived.cuda_event, self._stream)

    def close(self) -> None:
        import torch

        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._address)  # type: ignore[no-untyped-call]
            self._pinned = False
            pinned.add(-self.tensor.nbytes)


class CudaLane(SlabLane):
    """Sends on a stream of its own, from processors near the device."""

    slab = PinnedSlab

    def __init__(self, sources: Sequence[Source], buffers: Buffers, block_bytes: int, slabs: int) -> None:
        import torch

        super().__init__(sources, buffers, block_bytes, slabs)
        if cpus := nearby_cpus(buffers.device) & os.sched_getaffinity(0):
            os.sched_setaffinity(0, cpus)  # of this thread alone, like the stream
        assert buffers.stream is not None
        self._caller = buffers.stream
        self._stream = torch.cuda.Stream(buffers.device)  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(self._stream)

    def close(self) -> None:
        """The one wait for the device."""
        try:
            self._stream.synchronize()
        finally:
            super().close()

    def _follow_the_caller(self) -> None:
        self._stream.wait_stream(self._caller)


def _convert(data: torch.Tensor, buffer: torch.Tensor, piece: Piece, cast: Cast) -> None:
    """Copy a piece's bytes to its place as another dtype, in the order of the present stream."""
    nbytes = piece.nbytes // cast.source.itemsize * cast.target.itemsize
    buffer[piece.place : piece.place + nbytes].view(cast.target).copy_(data.view(cast.source))


@functools.cache
def nearby_cpus(device: torch.device) -> frozenset[int]:
    """The processors of the NUMA node that a CUDA device is attached to; none where there is one node, or none says."""
    import torch

    if len(list(NODES.glob("node[0-9]*"))) < 2:
        return frozenset()
    properties: Any = torch.cuda.get_device_properties(device)
    try:
        address = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
        node = int(Path(f"/sys/bus/pci/devices/{address}/numa_node").read_text())
        cpus = parse_cpus((NODES / f"node{node}" / "cpulist").read_text())
    except (AttributeError, OSError, ValueError):
        return frozenset()
    return cpus


def parse_cpus(text: str) -> frozenset[int]:
    """`0-3,8` → 0, 1, 2, 3, 8. Raises ValueError."""
    ranges = [part.split("-") for part in text.strip().split(",") if part]
    return frozenset(cpu for ends in ranges for cpu in range(int(ends[0]), int(ends[-1]) + 1))
