"""Files copied in blocks by several workers, each hashed in order on the way."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from weightctl import storage
from weightctl.digests import Identity
from weightctl.errors import IntegrityError, translated_os_errors
from weightctl.model import File
from weightctl.progress import Task

BLOCK_BYTES = 2 << 20
"""Read, hashed and written at a time."""

MOST_WORKERS = 24
"""Each has one block in memory, and two more to compare it when it takes up a dead push."""

SMALL_BYTES = 64 << 10
"""Files below this on average wait for Python's lock and hardly for a local disk: one worker copies ten thousand of
4 KiB in two thirds of the time that two take."""

_FICLONE = 0x40049409


@dataclass(frozen=True)
class Copied:
    """A file at its destination."""

    file: File
    """With the SHA-256 of the bytes that were copied."""
    seen: Identity
    """The source's, before its first byte was read."""
    kept_bytes: int
    """What lay at the destination already, equal to the source, and so was not written again."""


def copy_files(orders: Sequence[tuple[File, Path]], workers: int, task: Task) -> list[Copied]:
    """Copy each file to its path, in whose directory nobody else writes. Nothing is durable yet.

    A block that is at the destination already is compared and kept; where the filesystem can share blocks (reflink),
    none is written at all. Raises IntegrityError if a file changes meanwhile or is not what its `sha256` says.
    """
    if not orders:
        return []
    sizes = [file.size for file, _ in orders]
    small = sum(sizes) < SMALL_BYTES * len(sizes) and storage.is_on_disk(orders[0][1].parent)
    limit = 1 if small else min(workers, MOST_WORKERS)
    jobs = _Jobs((_Job(file, destination) for file, destination in orders), limit)
    largest = min(BLOCK_BYTES, max(sizes))

    def work(_: int) -> list[Copied]:
        buffer = memoryview(bytearray(largest))
        finished = []
        while taken := jobs.take():
            storage.pause(0)
            job, block = taken
            if job.copy(block, buffer):
                finished.append(job.finish())
            task.advance(job.length(block))
        return finished

    try:
        done = storage.in_parallel(work, range(limit), limit)
    finally:
        jobs.close()
    return [copied for each in done for copied in each]


class _Jobs:
    """The files that are open, at most one a worker; their blocks are dealt out in turn."""

    def __init__(self, jobs: Iterable[_Job], limit: int) -> None:
        self._waiting, self._limit = iter(jobs), limit
        self._open: deque[_Job] = deque()
        self._began: list[_Job] = []
        self._lock = threading.Lock()

    def take(self) -> tuple[_Job, int] | None:
        """A file and the number of its next block, of which an earlier one may still be under way."""
        with self._lock:
            if len(self._open) < self._limit and (new := next(self._waiting, None)):
                self._open.appendleft(new)
                self._began = [*(job for job in self._began if not job.closed), new]
            if not self._open:
                return None
            job = self._open.popleft()
            block, job.dealt = job.dealt, job.dealt + 1
            if job.dealt < job.blocks:
                self._open.append(job)
            return job, block

    def close(self) -> None:
        for job in self._began:
            job.close()


class _Job:
    """One file under way. Its blocks are copied in any order and hashed in theirs."""

    def __init__(self, file: File, destination: Path) -> None:
        self.file, self._destination = file, destination
        self.blocks = max(1, -(-file.size // BLOCK_BYTES))
        self.dealt = 0
        self.closed = False
        self._kept = 0
        self._digest = hashlib.sha256()
        self._hashed = 0
        self._turn = threading.Condition()
        self._descriptors = contextlib.ExitStack()
        self._opened = False

    def length(self, block: int) -> int:
        return min(BLOCK_BYTES, self.file.size - block * BLOCK_BYTES)

    def copy(self, block: int, buffer: memoryview) -> bool:
        """Bring a block over; whether all of the file is there now."""
        with self._turn:
            if not self._opened:
                self._open()
        offset, view = block * BLOCK_BYTES, buffer[: self.length(block)]
        with translated_os_errors(f"read {self.file.source}"):
            if _read(self._target if self._shared else self._source, view, offset) < len(view):
                raise self._changed()
        if self._shared:
            kept = 0
        elif offset < self._staged and os.pread(self._target, len(view), offset) == bytes(view):  # by memcmp
            kept = len(view)
        else:
            kept = 0
            _write(self._target, view, offset)
        with self._turn:
            while not self._turn.wait_for(lambda: self._hashed == block, timeout=0.2):
                storage.pause(0)
        self._digest.update(view)
        with self._turn:
            self._kept += kept
            self._hashed += 1
            self._turn.notify_all()
            return self._hashed == self.blocks

    def finish(self) -> Copied:
        """Close the file and see that it is what it should be."""
        with translated_os_errors(f"read {self.file.source}"):
            now = Identity.of(self._source)
            if now.content != self._seen.content or os.fstat(self._source).st_size != self.file.size:
                raise self._changed()
        if self._staged > self.file.size:
            os.ftruncate(self._target, self.file.size)
        self.close()
        storage.set_mode(self._destination, 0o644)
        digest = self._digest.hexdigest()
        if self.file.sha256 not in (None, digest):
            raise IntegrityError(
                f"{self.file.source} is damaged: it hashes to {digest}, not to {self.file.sha256}",
                "pull the model again",
            )
        file = File(self.file.path, self.file.size, self.file.source, digest, self.file.git_id)
        return Copied(file, self._seen, self._kept)

    def close(self) -> None:
        self.closed = True
        self._descriptors.close()

    def _open(self) -> None:
        with translated_os_errors(f"read {self.file.source}"):
            self._source = self._keep(os.open(self.file.source, os.O_RDONLY | os.O_CLOEXEC))
            self._seen = Identity.of(self._source)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._target = self._keep(os.open(self._destination, flags | os.O_EXCL, 0o644))
            self._staged = 0
        except FileExistsError:
            if self._destination.lstat().st_nlink > 1:  # linked by a dead push: these bytes belong to a version
                self._destination.unlink()
            self._target = self._keep(os.open(self._destination, flags, 0o644))
            self._staged = os.fstat(self._target).st_size
        self._shared = not self._staged and self.file.size > 0 and _share_blocks(self._source, self._target)
        self._opened = True

    def _keep(self, descriptor: int) -> int:
        self._descriptors.callback(os.close, descriptor)
        return descriptor

    def _changed(self) -> IntegrityError:
        return IntegrityError(
            f"{self.file.source} changed while it was read: {self.file.size} bytes were expected",
            "run this when nothing writes it",
        )


def _share_blocks(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:  # another filesystem, or one that cannot
        return False
    return True


def _read(descriptor: int, view: memoryview, offset: int) -> int:
    filled = 0
    while filled < len(view) and (count := os.preadv(descriptor, [view[filled:]], offset + filled)):
        filled += count
    return filled


def _write(descriptor: int, view: memoryview, offset: int) -> None:
    written = 0
    while written < len(view):
        written += os.pwrite(descriptor, view[written:], offset + written)
    # Sends the dirty pages on their way now (nothing is dropped: none is clean yet), so that the disk writes while we
    # hash, and the sync at the end finds little left to do.
    if len(view) == BLOCK_BYTES:
        os.posix_fadvise(descriptor, offset, len(view), os.POSIX_FADV_DONTNEED)
