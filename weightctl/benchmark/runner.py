"""Runs one job in a process group of its own, and tells how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weightctl.benchmark.meeting import invitations, together
from weightctl.benchmark.hashing import Fingerprint
from weightctl.benchmark.results import Run
from weightctl.errors import IntegrityError, UsageError, WeightctlError
from weightctl.loaders import Loader
from weightctl.model import Snapshot
from weightctl.storage import in_parallel

_START = "import sys; sys.path[:] = sys.argv[1:]; from weightctl.benchmark.child import main; main()"
"""Imports what this process imports, and nothing from the working directory, which `-m` would: it may be a model's."""


@dataclass(frozen=True)
class Job:
    """What every load of a bench has in common."""

    device: str
    threads: int
    timeout: float
    """Seconds, for the whole process."""
    key: bytes
    expected: tuple[Fingerprint, ...]
    """Of the model's own tensors, by `key`."""
    drop_caches: bool = False
    construct: bool = False


def run_load(loader: Loader, snapshot: Snapshot, cache: str, round: int, job: Job) -> Run:
    """Load `snapshot` once in a fresh process, and compare what that gives with `job.expected`.

    Its files are read beforehand and, for a cold cache, dropped from it. However the load ends, that is a `Run`.
    """
    given = {
        "job": "load",
        "strategy": loader.name,
        "module": type(loader).__module__,
        "snapshot": _plain(snapshot),
        "files": [str(file.source) for file in snapshot.files if file.size],
        "device": job.device,
        "cache": cache,
        "threads": job.threads,
        "key": job.key.hex(),
        "expected": [(each.name, each.dtype, each.shape, each.digest) for each in job.expected],
        "drop_caches": job.drop_caches,
        "construct": job.construct,
    }
    try:
        outcome = run_job(given, job.timeout)
    except WeightctlError as error:
        return Run(round, "failed", error.message)
    if difference := outcome.pop("difference"):
        return Run(round, "failed", f"it loaded something else: {difference}")
    mark = "it was the warm-up" if round == 0 else outcome.pop("mark")
    return Run(round, "ok", **{**outcome, "mark": mark})


def run_job(job: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """The outcome of one job. Raises WeightctlError if the process fails, crashes, or outlasts `timeout` seconds.

    However this ends, nothing of the process group is left.
    """
    command = [sys.executable, "-c", _START, *sys.path]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
        try:
            output, _ = process.communicate(
                json.dumps({**job, "parent": os.getpid(), "began": time.monotonic()}).encode(), timeout
            )
        except subprocess.TimeoutExpired:
            raise WeightctlError(f"it was stopped: it had not ended after {timeout:g} seconds") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode < 0:
            name = signal.Signals(-process.returncode).name
            raise WeightctlError(f"it crashed with {name}" + (" (out of memory?)" if name == "SIGKILL" else ""))
        if process.returncode:
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise WeightctlError(f"it ended with exit code {process.returncode}: {last[:300]}")
    outcome: dict[str, Any] = json.loads(output)
    if "error" in outcome:
        kinds = {kind.exit_code: kind for kind in (WeightctlError, UsageError, IntegrityError)}
        raise kinds[outcome["exit_code"]](outcome["error"], outcome["hint"])
    return outcome


def _plain(snapshot: Snapshot) -> dict[str, Any]:
    files = [(file.path, file.size, str(file.source)) for file in snapshot.files]
    return {"name": snapshot.name, "root": str(snapshot.root), "files": files}
