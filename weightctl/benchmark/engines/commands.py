"""What engines have in common that are told by commands."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from typing import ClassVar

from weightctl.benchmark.engines.base import Engine
from weightctl.errors import WeightctlError

ENDING_SECONDS = 10
"""What a command has to clean up after itself when it is not to go on."""

PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


class CommandEngine(Engine):
    """An engine that is told by commands."""

    commands: ClassVar[tuple[str, ...]]
    package: ClassVar[str]
    """Of Debian, which has them."""

    @classmethod
    def unavailable(cls) -> str | None:
        """Looks for the commands; they mount or change owners, so only root can use them."""
        for command in cls.commands:
            if shutil.which(command) is None:
                return f"{command} is not installed: apt-get install {cls.package}"
        return None if os.geteuid() == 0 else f"{cls.commands[-1]} needs root to unpack an image"


def run_command(
    *command: str, timeout: float, see: Callable[[str], object] = id, variables: Mapping[str, str] | None = None
) -> str:
    """What a command prints; `see` is given every line at once.

    Raises WeightctlError if it fails, or takes longer than `timeout` seconds. However this ends, nothing of it is left:
    Ctrl-C is kept from it, and it is ended with time to clean up; if this process is killed, so is it.
    """
    lines: list[str] = []
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            command, env={**os.environ, **(variables or {})}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=errors, text=True, errors="replace", start_new_session=True, preexec_fn=_die_with_parent,
        )  # fmt: skip
        late = threading.Timer(timeout, process.terminate)
        late.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                see(line)
                lines.append(line)
            process.wait()
        finally:
            expired = late.finished.is_set()
            late.cancel()
            _end(process)
        if expired:
            raise WeightctlError(f"{command[0]} was stopped: it had not ended after {timeout:g} seconds")
        if process.returncode:
            errors.seek(0)
            last = errors.read().strip().rpartition("\n")[2] or f"it ended with {process.returncode}"
            raise WeightctlError(f"{command[0]} failed: {last[-300:]}")
    return "".join(lines)


def _die_with_parent() -> None:
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDING_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def quietly(*command: str, variables: Mapping[str, str] | None = None) -> str:
    """Clean up, as far as there is something to."""
    try:
        return run_command(*command, timeout=60, variables=variables)
    except WeightctlError:
        return ""
