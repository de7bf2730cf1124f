"""Disks that are full and directories that cannot be written, for real."""

from __future__ import annotations

import contextlib
import os
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
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            action()
            status = 0
        except BaseException:  # noqa: BLE001 (nothing may leave the child but its status)
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
