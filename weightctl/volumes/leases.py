"""Which processes live: files on a volume that are held until their owner lets go or dies."""

from __future__ import annotations

import contextlib
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


@contextlib.contextmanager
def held(path: Path, *, wait: bool = True, on_wait: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold the lease `path` for the block; one process at a time does, wherever on the volume's hosts it runs.

    A lock (flock) holds it where locks work, and dies with its process. For hosts that do not see the lock, and on
    filesystems that have none, a heartbeat does. `on_wait` is called once if another holds it. Raises BlockingIOError
    if another holds it and we are not to wait.
    """
    while (descriptor := _acquire(path)) is None:
        if not wait:
            raise BlockingIOError(f"{path} is held")
        on_wait()
        on_wait = lambda: None  # noqa: E731
        time.sleep(POLL_SECONDS)
    over = threading.Event()
    beating = threading.Thread(target=_beat, args=(descriptor, over), daemon=True)
    beating.start()
    try:
        yield
    finally:
        over.set()
        beating.join()
        with contextlib.suppress(OSError):
            if _is_at(descriptor, path):
                path.unlink()
        os.close(descriptor)


def owner_of(path: Path) -> Owner | None:
    """Who holds the lease; None if nobody living does. Raises OSError if that cannot be found out."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
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


def _acquire(path: Path) -> int | None:
    """The descriptor of the lease, now ours; None while another has it."""
    try:
        descriptor, new = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        try:
            descriptor, new = os.open(path, os.O_RDWR | os.O_CLOEXEC), False
        except FileNotFoundError:
            return None  # its owner has just let go
    try:
        locks = _lock(descriptor)
        free = locks is not False and _is_at(descriptor, path) and (new or _is_dead(descriptor, path, locks=locks))
        if free:
            contested = not new and _may_look_dead(descriptor)
            owner = Owner(
                socket.gethostname(), os.getpid(), _mount(descriptor), _keeps_others_out(path), secrets.token_hex(8)
            )
            os.pwrite(descriptor, json.dumps(vars(owner)).encode().ljust(OWNER_BYTES), 0)
            if contested:
                time.sleep(SETTLE_SECONDS)
                free = _is_at(descriptor, path) and _read(descriptor) == owner
        if free:
            return descriptor
    except BaseException:
        if new:  # nobody need wait for a name that does not come
            with contextlib.suppress(OSError):
                path.unlink()
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _lock(descriptor: int) -> bool | None:
    """True: locked. False: another has the lock. None: there are no locks here."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
    return time.time() - beat > seconds / 2 and _now(path.parent) - beat > seconds


def _may_look_dead(descriptor: int) -> bool:
    """Whether some other host may be taking the lease over at this very moment."""
    return _read(descriptor) is None or time.time() - os.fstat(descriptor).st_mtime > SILENCE_SECONDS / 2


def _now(directory: Path) -> float:
    """The time by the volume's own clock, which set the heartbeats; by ours where nothing can be written."""
    probe = directory / f"{secrets.token_hex(8)}.clock"
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
    except OSError:
        return time.time()
    return now


def _read(descriptor: int) -> Owner | None:
    try:
        return Owner(**json.loads(os.pread(descriptor, OWNER_BYTES, 0)))
    except (TypeError, ValueError):
        return None


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open lease still is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
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
