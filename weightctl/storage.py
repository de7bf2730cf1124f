"""Durable files: hash while copying, atomic writes and renames, locks. Nothing else fsyncs or renames."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from weightctl import units
from weightctl.errors import IntegrityError, WeightctlError, translated_os_errors
from weightctl.progress import Task

BLOCK_BYTES = 4 << 20
"""Read, hashed and written at a time; two such blocks are in flight for each file."""

Sink = Callable[[memoryview], object]
T = TypeVar("T")
R = TypeVar("R")


def pump(source: BinaryIO, size: int, sinks: Sequence[Sink], task: Task) -> None:
    """Read exactly `size` bytes from `source` and give every block to every sink, all of them at once.

    Hashing and writing release Python's lock, so the next read, each hash and the write overlap: one pass costs what
    its slowest part costs. Raises IntegrityError if `source` ends early or goes on.
    """
    buffers = [memoryview(bytearray(min(BLOCK_BYTES, max(size, 1)))) for _ in range(2)]
    left = size
    with ThreadPoolExecutor(max(1, len(sinks))) as pool:
        running: list[object] = []
        for turn in _alternate():
            block = buffers[turn][: _read_full(source, buffers[turn][: min(left, BLOCK_BYTES)])]
            for done in running:
                done.result()  # type: ignore[attr-defined]
            if not block:
                break
            pause(0)
            left -= len(block)
            running = [pool.submit(sink, block) for sink in sinks]
            task.advance(len(block))
    if left or source.read(1):
        raise IntegrityError(
            f"{source.name} changed while it was read: {size} bytes were expected", "run this when nothing writes it"
        )


def _alternate() -> Iterator[int]:
    while True:
        yield 0
        yield 1


def _read_full(source: BinaryIO, view: memoryview) -> int:
    """Fill `view`; fewer bytes only at the end of the file."""
    filled = 0
    while filled < len(view):
        count = source.readinto(view[filled:])  # type: ignore[attr-defined]
        if not count:
            break
        filled += count
    return filled


def write_all(stream: BinaryIO) -> Sink:
    """A sink that writes every byte to the unbuffered `stream` (whose own write may stop short)."""

    def write(block: memoryview) -> None:
        while len(block):
            block = block[stream.write(block) :]

    return write


def in_parallel(function: Callable[[T], R], items: Iterable[T], workers: int) -> list[R]:
    """`function` of every item, in order, on up to `workers` threads.

    The first failure, or an interrupt, cancels what has not begun and stops what is being pumped.
    """
    over = threading.Event()
    with ThreadPoolExecutor(workers, initializer=setattr, initargs=(_thread, "over", over)) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            over.set()
            for future in futures:
                future.cancel()
        errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
        if errors:
            raise next(error for error in errors if not isinstance(error, _AbandonedError))
        return [future.result() for future in futures]


def pause(seconds: float) -> None:
    """Sleep, and end what this thread does as soon as it is no longer wanted (see `in_parallel`)."""
    over = getattr(_thread, "over", None)
    if over is None:
        time.sleep(seconds)
    elif over.is_set() or (seconds and over.wait(seconds)):
        raise _AbandonedError


class _AbandonedError(Exception):
    """What is being pumped is no longer wanted, since something beside it failed."""


_thread = threading.local()


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable: a renamed file is only certain to have its name after this."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some FUSE filesystems cannot, and need not
            raise
    finally:
        os.close(descriptor)


def make_directories(path: Path, mode: int = 0) -> None:
    """Create `path` and its parents, and make each new name durable. They have `mode`, whatever the umask allows."""
    missing = [directory for directory in (path, *path.parents) if not directory.exists()]
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
        if mode & ~stat.S_IMODE(directory.stat().st_mode):
            set_mode(directory, mode | stat.S_IMODE(directory.stat().st_mode))
        fsync_directory(directory.parent)


def set_mode(path: Path, mode: int) -> None:
    """Give a file or directory of ours a mode, where the filesystem has modes: FAT and some FUSE have none."""
    try:
        path.chmod(mode)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
            raise


def rename(source: Path, destination: Path) -> None:
    """Rename durably: atomic for every reader, and certain once this returns."""
    source.rename(destination)
    for directory in {destination.parent, source.parent}:
        fsync_directory(directory)


SYNC_TOGETHER = 64
"""From so many files on, one flush of the whole filesystem costs less than one of each file."""


def sync_files(paths: Sequence[Path], workers: int) -> None:
    """Make the bytes of many files durable, and the names in those that are directories.

    Ten thousand fsyncs are ten thousand commits of a journal. syncfs(2) is one, and promises the same where it reports
    failed writes (Linux 5.8) and where the kernel itself drives the block device; FUSE and network filesystems answer
    to fsync alone.
    """
    if len(paths) < SYNC_TOGETHER or not _sync_filesystem(paths[0]):
        in_parallel(_sync_file, paths, workers)


def _sync_file(path: Path) -> None:
    if path.is_dir():
        fsync_directory(path)
    else:
        with path.open("rb", buffering=0) as stream:
            os.fsync(stream.fileno())


def _sync_filesystem(path: Path) -> bool:
    """Write back everything on the filesystem of `path`, or return False where that would not be certain."""
    if not is_on_disk(path) or _linux_version() < (5, 8):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if libc.syncfs(descriptor):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    finally:
        os.close(descriptor)
    return True


def is_on_disk(path: Path) -> bool:
    """Whether the kernel itself drives the block device under `path`: no network, no FUSE, and no memory."""
    return os.major(path.stat().st_dev) != 0


def _linux_version() -> tuple[int, ...]:
    system, release = os.uname().sysname, os.uname().release
    found = re.match(r"(\d+)\.(\d+)", release) if system == "Linux" else None
    return tuple(map(int, found.groups())) if found else (0,)


@dataclass(frozen=True)
class StagedFile:
    """A file that nobody sees yet."""

    path: Path
    stream: BinaryIO
    """Unbuffered."""

    def publish(self, destination: Path) -> None:
        """Give the file its name, complete and durable. Whatever had that name is replaced in one step."""
        os.fsync(self.stream.fileno())
        rename(self.path, destination)


@contextlib.contextmanager
def staged_file(directory: Path) -> Iterator[StagedFile]:
    """A new file in `directory`, on the same filesystem as its destination; removed at the end if not published."""
    path = directory / f"{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
    try:
        with path.open("xb+", buffering=0) as stream:
            yield StagedFile(path, stream)
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(destination: Path, staging: Path | None = None, mode: int | None = None) -> Iterator[BinaryIO]:
    """Open an unbuffered file that gets the name `destination` when the block ends, complete and durable.

    Until then it lies in `staging` (the destination's own directory unless given). If the block raises, it is removed
    and an earlier `destination` stays as it was. It has `mode`, if given, and else what the umask allows.
    """
    with staged_file(staging or destination.parent) as staged:
        yield staged.stream
        if mode is not None:
            set_mode(staged.path, mode)
        staged.publish(destination)


TEMPORARY_SUFFIX = ".weightctl-tmp"


def sweep_temporaries(directory: Path) -> None:
    """Remove what killed writers left in `directory`. Only under a lock that every writer there takes."""
    for leftover in directory.glob(f"*{TEMPORARY_SUFFIX}"):
        leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def staging_beside(destination: Path) -> Iterator[Path]:
    """A directory to stage `destination` in, rid of what a killed writer of it left there, and gone at the end.

    Raises WeightctlError if another process is writing `destination`.
    """
    staging = destination.parent / f".{destination.name[:50]}{TEMPORARY_SUFFIX}"
    descriptor = _lock_directory(staging, destination)
    try:
        sweep_temporaries(staging)
        yield staging
    finally:
        with contextlib.suppress(OSError):
            staging.rmdir()
        os.close(descriptor)


def _lock_directory(path: Path, destination: Path) -> int:
    while True:
        path.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:  # else whoever had it has just removed it
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise WeightctlError(f"another process is writing {destination}", "wait until it has ended") from None
        os.close(descriptor)


@contextlib.contextmanager
def lock(path: Path, *, wait: bool = True) -> Iterator[int]:
    """Hold an exclusive lock on `path`, and give its descriptor; a process that dies lets go of it.

    Raises BlockingIOError if another process holds it and we are not to wait.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield descriptor
    finally:
        os.close(descriptor)


def check_space(directory: Path, needed: int) -> None:
    """Raise WeightctlError unless the filesystem of `directory` has room for `needed` bytes."""
    existing = next(parent for parent in (directory, *directory.parents) if parent.exists())
    with translated_os_errors(f"look at {existing}"):
        free = shutil.disk_usage(existing).free
    if free < needed:
        raise WeightctlError(
            f"not enough room in {directory}: {units.size(needed)} are needed, {units.size(free)} are free",
            "free some space there, or choose another destination",
        )
