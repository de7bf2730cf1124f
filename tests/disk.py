"""Filesystems of every kind, disks that are full and directories that cannot be written, for real."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import shutil
import struct
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import models

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


IMAGE_BYTES = 320 << 20
"""What XFS takes at least; the images are sparse."""

MAKE = {
    "ext4": ["mkfs.ext4", "-q"],
    "xfs": ["mkfs.xfs", "-q"],
    "btrfs": ["mkfs.btrfs", "-q"],
    "exfat": ["mkfs.exfat"],
    "ntfs": ["mkfs.ntfs", "-q", "-F"],
}
SSHFS = """
printf '#!/bin/sh\nexec %s /usr/lib/openssh/sftp-server\n' >"$0.ssh"
chmod +x "$0.ssh"
sshfs -o ssh_command="$0.ssh" :"$0" "$1"
"""
"""The server's half of sshfs without a host, a port or a key, run by a command."""

MOUNT = {
    "ext4": ["mount", "-o", "loop"],
    "xfs": ["mount", "-o", "loop"],
    "btrfs": ["mount", "-o", "loop"],
    "exfat": ["mount", "-o", "loop", "-t", "exfat-fuse"],  # no links, no modes, no upper case
    "ntfs": ["ntfs-3g"],
    "bindfs": ["bindfs"],
    "overlay": ["sh", "-c", 'cd "$0" && mkdir l u w && mount -t overlay -o lowerdir=l,upperdir=u,workdir=w none "$1"'],
    "sshfs": ["sh", "-c", SSHFS % ""],
    # Servers whose clocks are wrong by hours.
    "sshfs ahead": ["sh", "-c", SSHFS % "env FAKE_UTIME=1 faketime -f +3h"],
    "sshfs behind": ["sh", "-c", SSHFS % "env FAKE_UTIME=1 faketime -f -3h"],
    # Without links either. What rclone has yet to write back cannot be read after its directory was renamed.
    "rclone": ["rclone", "mount", "--daemon", "--vfs-cache-mode=writes", "--vfs-write-back=1s", "--config=/dev/null"],
}


def run(*command: object) -> None:
    """Run a command, or skip the test where it cannot be."""
    try:
        subprocess.run([*map(str, command)], check=True, capture_output=True, text=True, timeout=600)
    except FileNotFoundError:
        pytest.skip(f"{command[0]} is not installed")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{command[0]} does not work here: {error.stderr.strip()}")


@contextlib.contextmanager
def mounted(kind: str, directory: Path, *, below: Path | None = None, image: Path | None = None) -> Iterator[Path]:
    """`directory` as a filesystem of its own: of a sparse `image`, or as a view of the directory `below`."""
    if os.geteuid() != 0:
        pytest.skip("it takes root to mount a filesystem")
    directory.mkdir()
    source = image or below or directory.with_suffix(".below")
    if kind in MAKE:
        with source.open("wb") as stream:
            stream.truncate(IMAGE_BYTES)
        run(*MAKE[kind], source)
    else:
        source.mkdir(exist_ok=True)
    run(*MOUNT[kind], source, directory)
    models.wait_for(lambda: os.path.ismount(directory))
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


@contextlib.contextmanager
def in_memory() -> Iterator[Path]:
    """A directory in memory, where it can be: a killed process loses nothing there either, and no test waits for it."""
    memory = "/dev/shm"  # of 64 MiB in many a container
    has_room = os.path.isdir(memory) and shutil.disk_usage(memory).free > 1 << 30
    with tempfile.TemporaryDirectory(dir=memory if has_room else None) as name:
        yield Path(name)


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
    "x86_64": {"flock": (73,), "link": (86, 265), "symlink": (88, 266), "chmod": (90, 91, 268, 452)},
    "aarch64": {"flock": (32,), "link": (37,), "symlink": (36,), "chmod": (52, 53, 452)},
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
