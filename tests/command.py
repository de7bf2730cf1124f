"""The weightctl command, run as a user runs it: a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.models import wait_for

COMMAND = [sys.executable, "-m", "weightctl"]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def result(self) -> Any:
        """What `--json` printed."""
        return json.loads(self.stdout)


def weightctl(*arguments: object, cwd: Path | None = None, timeout: float = 600, **variables: str) -> Outcome:
    """Run the command with `variables` added to the environment. No outcome may hold a traceback."""
    process = start(*arguments, cwd=cwd, **variables)
    stdout, stderr = process.communicate(timeout=timeout)
    assert "Traceback" not in stderr, stderr
    return Outcome(process.returncode, stdout, stderr)


def start(*arguments: object, cwd: Path | None = None, **variables: str) -> subprocess.Popen[str]:
    """Start the command and let it run."""
    return _started([*COMMAND, *map(str, arguments)], cwd, variables)


HALTING = """
import importlib, itertools, os, sys
from weightctl.cli.main import main

how, place, last = (sys.argv.pop(1) for _ in range(3))
module, _, name = place.rpartition(".")
calls, called = itertools.count(1), getattr(importlib.import_module(module), name)

def halting(*arguments, **options):
    if next(calls) == int(last):
        os.kill(os.getpid(), int(how))
    return called(*arguments, **options)

setattr(importlib.import_module(module), name, halting)
main()
"""


def start_halting(
    how: signal.Signals, function: str, call: int, *arguments: object, **variables: str
) -> subprocess.Popen[str]:
    """Start the command, which sends itself the signal `how` before that `call` of the function `package.module.name`.

    So it is always met at the same place, however busy the machine is. SIGSTOP and SIGKILL have arrived on return.
    """
    process = _started(
        [sys.executable, "-c", HALTING, str(int(how)), function, str(call), *map(str, arguments)], None, variables
    )
    if how == signal.SIGKILL:
        process.communicate()
        assert process.returncode == -how
    if how == signal.SIGSTOP:
        met = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert met is not None
        assert met.si_code == os.CLD_STOPPED
    return process


def interrupt(process: subprocess.Popen[str]) -> None:
    """Send SIGINT to the command, whose main thread waits for others: return when that has met it and waits again."""

    def waits() -> int:
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(status.rpartition("\nvoluntary_ctxt_switches:")[2].split()[0])

    before = waits()
    process.send_signal(signal.SIGINT)
    wait_for(lambda: process.poll() is not None or waits() > before)


def _started(command: list[str], cwd: Path | None, variables: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env={**os.environ, **variables},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
