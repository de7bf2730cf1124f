"""Disks that are full and directories that cannot be written, for real."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import struct
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

NOBODY = 65534


def cannot(reason: str) -> None:
    """Skip the test for want of something, or fail it where everything is promised to be there."""
    if os.environ.get("WEIGHTCTL_REQUIRE_SERVICES") == "1":
        pytest.fail(f"{reason}, and WEIGHTCTL_REQUIRE_SERVICES=1 promises it")
    pytest.skip(reason)


@contextlib.contextmanager
def small_disk(directory: Path, size: int) -> Iterator[Path]:
    """`directory` as a filesystem of `size` bytes, for the time of the block. Skips without the right to mount."""
    directory.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    if os.geteuid() != 0:
        cannot("a full disk takes root, to mount one")
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        cannot(f"a full disk takes a tmpfs, which cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@contextlib.contextmanager
def read_only_directory() -> Iterator[Path]:
    """A directory that an ordinary user can read but not write."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o555)
        yield directory
        directory.chmod(0o755)


def as_ordinary_user(action: Callable[[], object]) -> None:
    """Run `action` in a process of its own without root's rights; what it raises fails the test."""

    def drop() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        action()

    assert os.waitstatus_to_exitcode(os.waitpid(fork(drop), 0)[1]) == 0


def fork(action: Callable[[], object]) -> int:
    """Start `action` in a process of its own, which exits 0 unless it raises. Returns its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException:  # noqa: BLE001 (nothing may leave the child but its status)
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


SYSTEM_CALLS = {
    "x86_64": {"flock": (73,), "link": (86, 265), "symlink": (88, 266)},
    "aarch64": {"flock": (32,), "link": (37,), "symlink": (36,)},
}


def lacking(*calls: str) -> None:
    """From here on this process lives on filesystems without these system calls: the kernel (seccomp) refuses them."""
    numbers = [number for call in calls for number in SYSTEM_CALLS[os.uname().machine][call]]
    allow, refuse, load, equal = 0x7FFF0000, 0x00050000 | errno.EOPNOTSUPP, 0x20, 0x15
    program = [(load, 0, 0, 0)]
    for number in numbers:
        program += [(equal, 0, 1, number), (0x06, 0, 0, refuse)]
    program.append((0x06, 0, 0, allow))
    code = b"".join(struct.pack("=HBBI", *step) for step in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(buffer)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, header) == 0, os.strerror(ctypes.get_errno())


def open_to_all(directory: Path) -> None:
    """Let every user find its way to a directory of the test."""
    for above in itertools.takewhile(lambda path: path != Path(tempfile.gettempdir()), (directory, *directory.parents)):
        above.chmod(above.stat().st_mode | 0o055)
