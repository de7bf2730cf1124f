"""What was hashed before: digests of files that have not changed since, kept across runs."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from weightctl import storage
from weightctl.config import user_directory
from weightctl.errors import IntegrityError, translated_os_errors
from weightctl.model import File
from weightctl.progress import Progress, Task

RACY_NANOSECONDS = 2_000_000_000
"""A file that changed so recently may change again within its timestamp's grain (2 s on FAT and some network
filesystems), so nothing is remembered of it. Git calls such an index entry racily clean."""

REMEMBERED_TOGETHER_BYTES = 1 << 20
"""A smaller file is hashed again sooner than its digest is written down, so those are written down in one go."""


@dataclass(frozen=True)
class Identity:
    """Device, inode, size, mtime and ctime: while all stay equal, so do the bytes (ctime cannot be set back)."""

    key: str
    settled: bool
    """Whether the file was left alone for so long that its next change must show in its times."""

    @property
    def content(self) -> str:
        """What a write changes: all but the ctime, which one more link to the file changes as well."""
        return self.key.rpartition(":")[0]

    @classmethod
    def of(cls, file: Path | int) -> Identity:
        """Take it, of a path or of an open descriptor, before the file's first byte is read. Raises OSError."""
        stat = file.stat() if isinstance(file, Path) else os.fstat(file)
        age = time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns)
        key = f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
        return cls(key, age >= RACY_NANOSECONDS)


@contextlib.contextmanager
def unchanging(path: Path) -> Iterator[Identity]:
    """The identity of `path`, for a block that reads it. Raises IntegrityError if it was written to meanwhile."""
    seen = Identity.of(path)
    yield seen
    if Identity.of(path).content != seen.content:
        raise IntegrityError(f"{path} changed while it was read", "run this when nothing writes it")


class DigestCache:
    """A small database: which digest of which file → its value.

    It only ever saves work: where it cannot be read or written, everything is hashed again.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or user_directory("cache") / "weightctl" / "digests.sqlite3"

    def get(self, what: str, file: Path) -> str | None:
        """The value remembered as `what` for the file's present bytes."""
        return self.get_all(what, [file]).get(file)

    def get_all(self, what: str, files: Iterable[Path]) -> dict[Path, str]:
        """The values remembered of many files, for those of which there is one."""
        found = {}
        with contextlib.suppress(OSError, sqlite3.Error), self._connection() as database:
            query = "SELECT value FROM digests WHERE what = ? AND identity = ?"
            for file in files:
                if row := database.execute(query, (what, Identity.of(file).key)).fetchone():
                    found[file] = str(row[0])
        return found

    def put(self, what: str, file: Path, seen: Identity, value: str) -> None:
        """Remember `value`, read from `file` whose identity was `seen` before."""
        self.put_all(what, [(file, seen, value)])

    def put_all(self, what: str, found: Iterable[tuple[Path, Identity, str]]) -> None:
        """Remember the values of many files at the cost of one: each write waits for the disk."""
        with contextlib.suppress(OSError, sqlite3.Error):
            rows = [
                (what, seen.key, value) for file, seen, value in found
                if seen.settled and Identity.of(file).key == seen.key
            ]  # fmt: skip
            if rows:
                with self._connection() as database, database:
                    database.executemany("INSERT OR REPLACE INTO digests VALUES (?, ?, ?)", rows)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(self._path, timeout=5)) as database:
            columns = "what TEXT, identity TEXT, value TEXT, PRIMARY KEY (what, identity)"
            database.execute(f"CREATE TABLE IF NOT EXISTS digests ({columns})")
            yield database


def hash_files(files: Iterable[File], workers: int, cache: DigestCache | None, progress: Progress) -> list[File]:
    """The files as they really are: each with the digests of its bytes on disk, in place of those claimed of it.

    With a cache, a file that has not changed since it was last hashed is not read again.
    """
    files = list(files)
    remembered: dict[str, dict[Path, str]] = {"sha256": {}, "git_id": {}}
    if cache:
        for what, values in remembered.items():
            values.update(cache.get_all(what, [file.source for file in files if what in _wanted(file)]))
    small: list[tuple[File, Identity, dict[str, str]]] = []

    def hash_file(file: File) -> File:
        known = {what: remembered[what].get(file.source) for what in _wanted(file)}
        if all(known.values()):
            task.advance(file.size)
            return dataclasses.replace(file, **known)  # type: ignore[arg-type]
        with translated_os_errors(f"read {file.source}"), unchanging(file.source) as seen:
            digests = _read_digests(file, task)
        if file.size < REMEMBERED_TOGETHER_BYTES:
            small.append((file, seen, digests))
        elif cache:
            _remember(cache, [(file, seen, digests)])
        return dataclasses.replace(file, **digests)  # type: ignore[arg-type]

    with progress.task("verifying", sum(file.size for file in files)) as task:
        hashed = storage.in_parallel(hash_file, files, workers)
    if cache:
        _remember(cache, small)
    return hashed


def _remember(cache: DigestCache, found: Iterable[tuple[File, Identity, dict[str, str]]]) -> None:
    found = list(found)
    for what in ("sha256", "git_id"):
        cache.put_all(what, [(file.source, seen, values[what]) for file, seen, values in found if what in values])


def _wanted(file: File) -> tuple[str, ...]:
    return ("sha256", "git_id") if file.git_id else ("sha256",)


def _read_digests(file: File, task: Task) -> dict[str, str]:
    hashes = {"sha256": hashlib.sha256()}
    if file.git_id:
        hashes["git_id"] = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with file.source.open("rb", buffering=0) as source:
        storage.pump(source, file.size, [digest.update for digest in hashes.values()], task)
    return {what: digest.hexdigest() for what, digest in hashes.items()}


def check_files(
    files: Iterable[File], workers: int, cache: DigestCache | None, progress: Progress
) -> tuple[list[File], list[File]]:
    """The files as they really are, and those of `files` whose size or digests claim something else."""
    claimed = list(files)
    actual = hash_files(claimed, workers, cache, progress)
    return actual, [file for file, read in zip(claimed, actual, strict=True) if _contradicts(file, read)]


def _contradicts(claimed: File, actual: File) -> bool:
    return any(getattr(claimed, what) not in (None, getattr(actual, what)) for what in ("sha256", "git_id"))


@dataclass(frozen=True)
class Check:
    """What a reading of every byte found."""

    files: int
    bytes: int
    problems: tuple[str, ...]
    """One sentence each; empty if all is well."""


def check_against(expected: Iterable[File], workers: int, progress: Progress) -> Check:
    """Read every file that should be there, now, and tell a missing one from a cut and from a damaged one."""
    files = list(expected)
    problems = []
    whole = []
    for file in files:
        try:
            size = file.source.stat().st_size
        except OSError as error:
            problems.append(f"{file.path} cannot be read: {error.strerror}")
            continue
        if size != file.size:
            problems.append(f"{file.path} has {size} bytes instead of {file.size}")
        else:
            whole.append(file)
    _, damaged = check_files(whole, workers, None, progress)
    problems += [f"{file.path} is damaged: its bytes are not those that were written" for file in damaged]
    return Check(len(files), sum(file.size for file in files), tuple(sorted(problems)))
