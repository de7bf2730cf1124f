"""Which processes live: files on a volume that are held until their owner lets go or dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from weightctl.errors import WeightctlError

SUFFIX = ".lease"

HEARTBEAT_SECONDS = 10.0
"""How often an owner touches its lease, for those who cannot see its lock."""

SILENCE_SECONDS = 60.0
"""So long after its last heartbeat an owner counts as dead, where its lock cannot tell."""

NAMELESS_SECONDS = 5.0
"""So long after a lease was created its owner has written its name, or died before it could."""

SETTLE_SECONDS = 1.0
"""Two who take over a silent lease on two hosts both write their names; after so long, the last one stands."""

POLL_SECONDS = 0.1

OWNER_BYTES = 512
"""A lease's length: its owner, and spaces."""

_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW
"""A link in the place of a lease would have us write to what it leads to."""


@dataclass(frozen=True)
class Owner:
    """Who wrote itself into a lease."""

    host: str
    pid: int
    mount: str
    """The running kernel and its device number of the volume: whoever shares both sees the owner's lock. Two FUSE or
    network mounts of one volume have two, even on one machine."""
    locked: bool
    """Whether the owner found, when it tried, that its lock keeps others out."""
    token: str

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}"


@dataclass(frozen=True)
class Lease:
    """One that this process holds."""

    path: Path
    descriptor: int
    owner: Owner

    def is_ours(self) -> bool:
        """Whether it still is: a process that stood still for too long was taken for dead by hosts that do not see its
        lock. Raises OSError."""
        return _is_at(self.descriptor, self.path) and _read(self.descriptor) in (self.owner, None)


@contextlib.contextmanager
def held(path: Path, *, wait: bool = True, on_wait: Callable[[], object] = lambda: None) -> Iterator[Lease]:
    """Hold the lease `path` for the block; one process at a time does, wherever on the volume's hosts it runs.

    A lock (flock) holds it where locks work, and dies with its process. For hosts that do not see the lock, and on
    filesystems that have none, a heartbeat does. `on_wait` is called once if another holds it. Raises BlockingIOError
    if another holds it and we are not to wait.
    """
    while (lease := _acquire(path)) is None:
        if not wait:
            raise BlockingIOError(f"{path} is held")
        on_wait()
        on_wait = lambda: None  # noqa: E731
        time.sleep(POLL_SECONDS)
    over = threading.Event()
    beating = threading.Thread(target=_beat, args=(lease.descriptor, over), daemon=True)
    beating.start()
    try:
        yield lease
    finally:
        over.set()
        beating.join()
        with contextlib.suppress(OSError):
            if lease.is_ours():
                path.unlink()
        os.close(lease.descriptor)


def owner_of(path: Path) -> Owner | None:
    """Who holds the lease; None if nobody living does. Raises OSError if that cannot be found out."""
    try:
        descriptor = os.open(path, os.O_RDONLY | _FLAGS)
    except FileNotFoundError:
        return None
    try:
        owner = _read(descriptor) or Owner("?", 0, "", False, "")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return owner
        except OSError:
            return None if _is_silent(descriptor, path) else owner
        return None if _is_dead(descriptor, path) else owner
    finally:
        os.close(descriptor)


def _acquire(path: Path) -> Lease | None:
    """The lease, now ours; None while another has it."""
    try:
        descriptor, new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS, 0o666), True
    except FileExistsError:
        try:
            descriptor, new = os.open(path, os.O_RDWR | _FLAGS), False
        except FileNotFoundError:
            return None  # its owner has just let go
    try:
        locks = _lock(descriptor, wait=new)
        free = locks is not False and _is_at(descriptor, path) and (new or _is_dead(descriptor, path, locks=locks))
        if free:
            contested = not new and _may_look_dead(descriptor)
            owner = Owner(
                socket.gethostname(), os.getpid(), _mount(descriptor), _keeps_others_out(path), secrets.token_hex(8)
            )
            _write(descriptor, owner)
            if contested:
                time.sleep(SETTLE_SECONDS)
                free = _is_at(descriptor, path) and _read(descriptor) == owner
            if free:
                return Lease(path, descriptor, owner)
    except BaseException:
        if new:  # nobody need wait for a name that does not come
            with contextlib.suppress(OSError):
                path.unlink()
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _lock(descriptor: int, *, wait: bool) -> bool | None:
    """True: locked. False: another has the lock. None: there are no locks here.

    We wait for that of a new lease: whoever has it only looks whether it is held, for a moment.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _keeps_others_out(path: Path) -> bool:
    """Whether our lock on `path` is seen through another descriptor: some filesystems grant every lock."""
    try:
        stream = path.open("rb")
    except FileNotFoundError as error:
        raise WeightctlError(
            f"{path} was created, but cannot be opened while it is written to",
            "is the volume still mounted? It takes random access: of rclone mount, --vfs-cache-mode writes",
        ) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False


def _is_dead(descriptor: int, path: Path, *, locks: bool | None = True) -> bool:
    """Whether the lease, whose lock is free or not to be had, has no living owner."""
    owner = _read(descriptor)
    if owner is None:
        return _is_silent(descriptor, path, NAMELESS_SECONDS)
    if locks and owner.locked and owner.mount == _mount(descriptor):
        return True  # its lock would have been seen
    return _is_silent(descriptor, path)


def _is_silent(descriptor: int, path: Path, seconds: float = SILENCE_SECONDS) -> bool:
    beat = os.fstat(descriptor).st_mtime
    return not _is_fresh(beat, seconds) and _now(path.parent) - beat > seconds


def _is_fresh(beat: float, seconds: float) -> bool:
    """Whether this host's clock is enough to say that a heartbeat is no older."""
    return abs(time.time() - beat) < seconds / 2


def _may_look_dead(descriptor: int) -> bool:
    """Whether some other host may be taking the lease over at this very moment."""
    return _read(descriptor) is None or not _is_fresh(os.fstat(descriptor).st_mtime, SILENCE_SECONDS)


def _now(directory: Path) -> float:
    """The time by the volume's own clock, which set the heartbeats; by ours where nothing can be written."""
    probe = directory / f"{secrets.token_hex(8)}.clock"
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS)
        try:
            return os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
            probe.unlink(missing_ok=True)  # a sweep may have had it
    except OSError:
        return time.time()


def _write(descriptor: int, owner: Owner) -> None:
    try:
        os.pwrite(descriptor, json.dumps(vars(owner)).encode().ljust(OWNER_BYTES), 0)
    except OSError as error:
        # A prune has to make room on a full disk: there its lock alone holds the lease.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not owner.locked:
            raise


def _read(descriptor: int) -> Owner | None:
    try:
        return Owner(**json.loads(os.pread(descriptor, OWNER_BYTES, 0)))
    except (TypeError, ValueError):
        return None


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open lease still is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):  # NFS says of what is gone that its handle is stale
            raise
        return False


def _beat(descriptor: int, over: threading.Event) -> None:
    while not over.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):  # a network that fails now may be back before we count as dead
            # The volume times a write by its own clock; utime over sshfs takes this host's, which may be wrong.
            os.pwrite(descriptor, b" ", OWNER_BYTES - 1)
            os.fsync(descriptor)


def _mount(descriptor: int) -> str:
    return f"{_boot()} {os.fstat(descriptor).st_dev}"


@lru_cache(maxsize=1)
def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()}, unknown"
