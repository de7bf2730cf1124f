"""The weightctl command, run as a user runs it: a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def weightctl(*arguments: object, cwd: Path | None = None, timeout: float = 120, **variables: str) -> Outcome:
    """Run the command with `variables` added to the environment. No outcome may hold a traceback."""
    process = start(*arguments, cwd=cwd, **variables)
    stdout, stderr = process.communicate(timeout=timeout)
    assert "Traceback" not in stderr, stderr
    return Outcome(process.returncode, stdout, stderr)


def start(*arguments: object, cwd: Path | None = None, **variables: str) -> subprocess.Popen[str]:
    """Start the command and let it run."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        env={**os.environ, **variables},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
