"""Directories for a while, which do not outlive a killed process for longer than until the next one comes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "weightctl-bench-"


@contextlib.contextmanager
def temporary(parent: Path, prefix: str = PREFIX) -> Iterator[Path]:
    """A new directory, locked while it is used; what a killed process left beside it goes first. Raises OSError."""
    sweep(parent, f"{prefix}*")
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with contextlib.suppress(FileNotFoundError), _locked(path, 0) as descriptor:
            if os.fstat(descriptor).st_nlink:  # else the next bench took it for a leftover before it was locked
                try:
                    yield path
                finally:
                    shutil.rmtree(path, ignore_errors=True)
                return


def sweep(parent: Path, pattern: str) -> None:
    """Remove the directories that `pattern` matches, are ours, and that nobody has locked."""
    for leftover in parent.glob(pattern):
        with contextlib.suppress(OSError), _locked(leftover, fcntl.LOCK_NB):
            shutil.rmtree(leftover, ignore_errors=True)


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
