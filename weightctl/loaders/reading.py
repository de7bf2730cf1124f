"""Reads of model files: from the page cache what lies there, past it what does not."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import random
import threading
import time
from pathlib import Path

from weightctl.errors import IntegrityError, translated_os_errors

SAMPLES = 8
"""Places at which it is asked whether a file is cached."""

COLD_SAMPLES = 6
"""So many missing make it cold. A file half cached is read through the cache: there a wrong guess costs little, while
reading a cached file past the cache costs more than ten times the time (InstantTensor: 12 s for 0.5 s)."""

CACHED_SECONDS = 50e-6
"""A page from the cache takes 2–5 µs, from a quick local disk 80 µs and more."""


class Source:
    """One file that several threads read, each through a `Reader`."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._size = size
        self._lock = threading.Lock()
        self._direct: bool | None = None

    def open(self) -> tuple[int, bool]:
        """A new descriptor, and whether it reads past the page cache: if the file is cold and its filesystem can."""
        with self._lock:
            if self._direct is None:
                self._direct = is_cold(self.path, self._size)
        if self._direct:
            try:
                return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT), True
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.refuse_direct()
        return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC), False

    def refuse_direct(self) -> None:
        """Whoever opens it from now on reads through the page cache."""
        self._direct = False


class Reader:
    """One thread's reads, with the descriptor of the file that it is at."""

    def __init__(self) -> None:
        self._source: Source | None = None
        self._descriptor = -1
        self._direct = False

    def fill(self, source: Source, view: memoryview, offset: int, nbytes: int) -> None:
        """Read `nbytes` bytes from `offset` to the beginning of `view`, which may be longer and take more.

        Past the page cache only if the view, its length and `offset` are multiples of the page (4096). Raises
        IntegrityError if the file ends before, WeightctlError if it cannot be read.
        """
        done = 0
        try:
            if source is not self._source:
                self._open(source)
            while done < nbytes:
                try:
                    count = os.preadv(self._descriptor, (view[done:],), offset + done)
                except OSError as error:
                    # The filesystem refuses O_DIRECT only now, or for the odd rest that a short read left.
                    if error.errno != errno.EINVAL or not self._direct:
                        raise
                    source.refuse_direct()
                    self._open(source)
                    continue
                if not count:
                    raise IntegrityError(
                        f"{source.path} became shorter while it was read: it ends at byte {offset + done}",
                        "run this when nothing writes it",
                    )
                done += count
        except OSError:
            with translated_os_errors(f"read {source.path} at byte {offset + done}"):  # not always: it costs time
                raise

    def close(self) -> None:
        """Close the file."""
        if self._source is not None:
            self._source = None
            os.close(self._descriptor)

    def _open(self, source: Source) -> None:
        self.close()
        self._descriptor, self._direct = source.open()
        self._source = source


def is_cold(path: Path, size: int) -> bool:
    """Whether most of a file of `size` bytes is not in the page cache. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # To ask for a page may bring it in: only that one, and at a place that the next who asks does not choose.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        places = [random.randrange(max(size, 1)) for _ in range(SAMPLES)]
        return sum(not is_cached(descriptor, place) for place in places) >= COLD_SAMPLES
    finally:
        os.close(descriptor)


def is_cached(descriptor: int, offset: int) -> bool:
    """Whether the page at `offset` is in the page cache.

    What mincore calls absent is absent. What it calls present need not be, since it says that to whoever may not write
    the file: then a read that must not wait is asked. It alone would not do: it has a missing page brought in, which
    on a busy machine comes before it looks. Where there are no such reads (overlayfs, FUSE, gVisor), by the clock.
    """
    if is_absent(descriptor, offset):
        return False
    byte = bytearray(1)
    try:
        os.preadv(descriptor, [byte], offset, os.RWF_NOWAIT)
        return True
    except BlockingIOError:
        return False
    except (AttributeError, NotImplementedError):
        pass  # a Python that was built for older systems
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
    began = time.perf_counter()
    os.preadv(descriptor, [byte], offset)
    return time.perf_counter() - began < CACHED_SECONDS


def is_absent(descriptor: int, offset: int) -> bool:
    """Whether mincore says that the page at `offset` is not in the page cache. Leaves it as it was."""
    start = offset - offset % mmap.PAGESIZE
    length = min(mmap.PAGESIZE, os.fstat(descriptor).st_size - start)
    known, found = ctypes.c_ubyte(), -1
    with (
        contextlib.suppress(OSError, OverflowError, ValueError),  # it cannot be mapped, or ends before
        mmap.mmap(descriptor, length, offset=start, access=mmap.ACCESS_COPY) as page,
    ):
        first = ctypes.c_char.from_buffer(page)
        found = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(length), ctypes.byref(known)
        )
        del first  # or the page could not be closed
    return found == 0 and not known.value & 1
