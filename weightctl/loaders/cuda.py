"""Streams, and the calls of the CUDA driver that every block needs, made without letting go of Python's lock.

Each takes a few microseconds. torch gives the lock up for each of its own, and with a dozen readers to fight for it,
taking it again costs more than the call: an H100 then got 33 GB/s where these calls bring 45.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from weightctl.errors import WeightctlError

if TYPE_CHECKING:
    import torch

LIBRARY = "libcuda.so.1"
NOT_READY = 600
"""CUDA_ERROR_NOT_READY: an event that has not come yet."""


class Driver:
    """Handles and addresses are the integers that torch gives (`Event.cuda_event`, `Stream.cuda_stream`, `data_ptr`).

    The thread's device must have been made current by torch. Every call raises WeightctlError if the driver refuses.
    """

    def __init__(self) -> None:
        """Raises WeightctlError where there is no NVIDIA driver."""
        try:
            library = ctypes.PyDLL(LIBRARY)
        except OSError as error:
            raise WeightctlError(f"cannot load {LIBRARY}: {error}", "take the strategy safetensors") from error
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._copy = library.cuMemcpyHtoDAsync_v2
        self._copy.argtypes = (pointer, pointer, size, pointer)
        self._record = library.cuEventRecord
        self._record.argtypes = (pointer, pointer)
        self._wait = library.cuStreamWaitEvent
        self._wait.argtypes = (pointer, pointer, ctypes.c_uint)
        self._query = library.cuEventQuery
        self._query.argtypes = (pointer,)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Begin to copy from pinned host memory to the device, in the order of `stream`."""
        self._require(self._copy(target, source, nbytes, stream))

    def record(self, event: int, stream: int) -> None:
        """Let `event` come when all that was given to `stream` is done."""
        self._require(self._record(event, stream))

    def wait(self, stream: int, event: int) -> None:
        """Let what is given to `stream` from now on wait until `event` has come."""
        self._require(self._wait(stream, event, 0))

    def has_come(self, event: int) -> bool:
        """Whether what `event` waits for is done."""
        status = self._query(event)
        if status != NOT_READY:
            self._require(status)
        return not status

    def _require(self, status: int) -> None:
        if status:
            raise WeightctlError(f"the device failed: CUDA error {status}", "see what nvidia-smi reports")


@functools.cache
def driver() -> Driver:
    """The one of this process."""
    return Driver()


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Work on a stream of any device. `torch.cuda.stream` alone would go back to the thread's own device, which brings
    that one's context into being: half a gigabyte of its memory, and a fifth of a second (H200)."""
    import torch

    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield
