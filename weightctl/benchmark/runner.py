"""Runs one job in a process group of its own, and tells how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightctl.benchmark.meeting import invitations, together
from weightctl.benchmark.statistics import Run
from weightctl.errors import IntegrityError, UsageError, WeightctlError
from weightctl.loaders import Loader
from weightctl.model import Snapshot
from weightctl.storage import in_parallel

_START = "import sys; sys.path[:] = sys.argv[1:]; from weightctl.benchmark.child import main; main()"
"""Imports what this process imports, and nothing from the working directory, which `-m` would: it may be a model's."""


def run_load(
    loader: Loader,
    snapshot: Snapshot,
    model: Snapshot,
    *,
    weights: list[Path],
    device: str,
    cache: str,
    threads: int,
    timeout: float,
    nproc: int = 1,
) -> Run:
    """Load `snapshot` once in a fresh process, or in `nproc` at once, and compare it with `model`.

    `weights` are the files that are read beforehand and, for a cold cache, dropped from it. `timeout` (seconds) is
    for the whole process.
    """
    job = {
        "strategy": loader.name,
        "module": type(loader).__module__,
        "snapshot": _plain(snapshot),
        "model": _plain(model),
        "weights": [str(path) for path in weights],
        "device": device,
        "cache": cache,
        "threads": threads,
        "timeout": timeout,
    }
    try:
        with tempfile.TemporaryDirectory() as scratch:
            jobs = invitations(job, nproc, f"{scratch}/store")
            outcome = together(in_parallel(lambda one: run_job(one, timeout), jobs, nproc))
    except WeightctlError as error:
        return Run("failed", error.message)
    if outcome["difference"]:
        return Run("failed", f"it loaded something else: {outcome['difference']}")
    return Run("ok", None, outcome["seconds"], outcome["peak_host_bytes"], outcome["peak_device_bytes"])


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
            output, _ = process.communicate(json.dumps({**job, "parent": os.getpid()}).encode(), timeout)
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
