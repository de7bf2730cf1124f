"""Where versions are put together out of sight: a directory and a lease for each piece of work."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from weightctl import storage
from weightctl.volumes import leases


class Staging:
    """The pieces of work under way on a volume, and what is left of those that died."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._leases: dict[Path, leases.Lease] = {}

    @contextlib.contextmanager
    def work(self, key: str, on_wait: Callable[[], object] = lambda: None) -> Iterator[Path]:
        """The directory of the work `key`, which one process at a time does, with what a dead one left in it.

        It is removed when the block ends well, and kept for the next one when it does not; where the disk is full,
        room is worth more to everybody than work half done. If another process has taken it over, it is that one's.
        """
        storage.make_directories(self._root, 0o755)
        directory = self._root / key
        with leases.held(self._lease(key), on_wait=on_wait) as lease:
            for link in links_in(directory):
                link.unlink()
            directory.mkdir(exist_ok=True)
            self._leases[directory] = lease
            try:
                yield directory
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT) and lease.is_ours():
                    shutil.rmtree(directory, ignore_errors=True)
                raise
            finally:
                del self._leases[directory]
            if lease.is_ours():
                _remove(directory)

    def is_ours(self, directory: Path) -> bool:
        """Whether the work in this directory still is, whose block has not ended: see `Lease.is_ours`."""
        return self._leases[directory].is_ours()

    def sweep(self, prefixes: tuple[str, ...], *, dry_run: bool = False) -> int:
        """Remove the work whose key begins so and whose process is dead; how much there was."""
        entries = list(self._root.iterdir()) if self._root.is_dir() else []
        keys = {path.name.removesuffix(leases.SUFFIX) for path in entries if path.name.startswith(prefixes)}
        return sum(self._sweep(key, dry_run=dry_run) for key in sorted(keys))

    def _sweep(self, key: str, *, dry_run: bool) -> bool:
        if dry_run:
            return leases.owner_of(self._lease(key)) is None
        try:
            with leases.held(self._lease(key), wait=False):
                return _remove(self._root / key)
        except BlockingIOError:
            return False

    def _lease(self, key: str) -> Path:
        return self._root / f"{key}{leases.SUFFIX}"


def links_in(directory: Path) -> list[Path]:
    """Links to directories, which we never make: through one, what is written here would land elsewhere."""
    if directory.is_symlink():
        return [directory]
    found = (Path(parent, name) for parent, names, _ in os.walk(directory) for name in names)
    return [path for path in found if path.is_symlink()]


def _remove(directory: Path) -> bool:
    """Remove work that is over; whether nothing is left of it.

    On NFS and FUSE a file that somebody has open lives on there, under a name of theirs, until it is closed.
    """
    shutil.rmtree(directory, ignore_errors=True)
    try:
        if directory.is_symlink() or directory.is_file():
            directory.unlink()
        else:
            shutil.rmtree(directory)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EBUSY):
            raise
        return False
    return True
