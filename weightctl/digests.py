"""What was hashed before: digests of files that have not changed since, kept across runs."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RACY_NANOSECONDS = 2_000_000_000
"""A file that changed so recently may change again within its timestamp's grain (2 s on FAT and some network
filesystems), so nothing is remembered of it. Git calls such an index entry racily clean."""


@dataclass(frozen=True)
class Identity:
    """Device, inode, size, mtime and ctime: while all stay equal, so do the bytes (ctime cannot be set back)."""

    key: str
    settled: bool
    """Whether the file was left alone for so long that its next change must show in its times."""

    @classmethod
    def of(cls, path: Path) -> Identity:
        """Take it before the file's first byte is read. Raises OSError."""
        stat = path.stat()
        age = time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns)
        key = f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
        return cls(key, age >= RACY_NANOSECONDS)


class DigestCache:
    """A small database: which digest of which file → its value.

    It only ever saves work: where it cannot be read or written, everything is hashed again.
    """

    def __init__(self, path: Path | None = None) -> None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self._path = path or home / "weightctl" / "digests.sqlite3"

    def get(self, what: str, file: Path) -> str | None:
        """The value remembered as `what` for the file's present bytes."""
        with contextlib.suppress(OSError, sqlite3.Error), self._connection() as database:
            query = "SELECT value FROM digests WHERE what = ? AND identity = ?"
            row = database.execute(query, (what, Identity.of(file).key)).fetchone()
            return str(row[0]) if row else None
        return None

    def put(self, what: str, file: Path, seen: Identity, value: str) -> None:
        """Remember `value`, read from `file` whose identity was `seen` before."""
        with contextlib.suppress(OSError, sqlite3.Error):
            if not seen.settled or Identity.of(file).key != seen.key:
                return
            with self._connection() as database, database:
                database.execute("INSERT OR REPLACE INTO digests VALUES (?, ?, ?)", (what, seen.key, value))

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(self._path, timeout=5)) as database:
            columns = "what TEXT, identity TEXT, value TEXT, PRIMARY KEY (what, identity)"
            database.execute(f"CREATE TABLE IF NOT EXISTS digests ({columns})")
            yield database
