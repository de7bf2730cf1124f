"""Directories for a while, which do not outlive a killed process for longer than until the next one comes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from weightctl.benchmark.environment import mounts

PREFIX = "weightctl-bench-"


@contextlib.contextmanager
def temporary(parent: Path, prefix: str = PREFIX, undo: Callable[[Path], object] = id) -> Iterator[Path]:
    """A new directory, locked while it is used; what a killed process left beside it goes first. Raises OSError.

    `undo` is given each leftover before that is removed: what is noted in one may be undone elsewhere too.
    """
    sweep(parent, f"{prefix}*", undo)
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with contextlib.suppress(FileNotFoundError), _locked(path, 0) as descriptor:
            if os.fstat(descriptor).st_nlink:  # else the next bench took it for a leftover before it was locked
                try:
                    yield path
                finally:
                    shutil.rmtree(path, ignore_errors=True)
                return


def sweep(parent: Path, pattern: str, undo: Callable[[Path], object] = id) -> None:
    """Remove the directories that `pattern` matches, are ours, and that nobody has locked."""
    for leftover in parent.glob(pattern):
        with contextlib.suppress(OSError), _locked(leftover, fcntl.LOCK_NB):
            for mount in reversed(_mounted(leftover)):
                subprocess.run(["umount", mount], capture_output=True, check=False)
            undo(leftover)
            if not _mounted(leftover):  # else what would be removed lies elsewhere
                shutil.rmtree(leftover, ignore_errors=True)


def _mounted(directory: Path) -> list[Path]:
    return [mount.path for mount in mounts() if directory.resolve() in mount.path.parents]


@contextlib.contextmanager
def _locked(directory: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_uid != os.getuid():
            raise PermissionError
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
        yield descriptor
    finally:
        os.close(descriptor)
