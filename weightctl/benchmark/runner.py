"""Runs jobs in process groups of their own, and tells how they ended."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from weightctl.benchmark.hashing import Fingerprint, expected_fingerprints
from weightctl.benchmark.meeting import invitations, together
from weightctl.benchmark.results import Run
from weightctl.config import Config
from weightctl.errors import IntegrityError, UsageError, WeightctlError
from weightctl.loaders import Loader
from weightctl.loaders.stored import Stored
from weightctl.model import Snapshot
from weightctl.progress import Progress

_START = "import sys; sys.path[:] = sys.argv[1:]; from weightctl.benchmark.child import main; main()"
"""Imports what this process imports, and nothing from the working directory, which `-m` would: it may be a model's."""

POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Job:
    """What many loads of one model have in common."""

    device: str
    threads: int
    timeout: float
    """Seconds, for the whole process."""
    key: bytes
    expected: tuple[Fingerprint, ...]
    """Of the model's own tensors, by `key`."""
    directory: Path
    """For what the processes leave, and nobody wants."""
    processes: int = 1
    """That load at once, each to a device of its own."""
    drop_caches: bool = False
    construct: bool = False

    @classmethod
    def of(
        cls, stored: Stored, device: str, directory: Path, config: Config, progress: Progress, **options: Any
    ) -> Job:
        """Loads of the model that is `stored`: reads it once, and hashes it by a key that nobody knew before."""
        key = secrets.token_bytes(16)
        with progress.task("hashing the tensors", stored.bytes) as task:
            expected = tuple(expected_fingerprints(stored, key, task))
        return cls(device, config.workers, config.timeout, key, expected, directory, **options)


def run_load(loader: Loader, snapshot: Snapshot, cache: str | None, number: int, job: Job) -> Run:
    """Load `snapshot` once in a fresh process (or several), and compare what that gives with `job.expected`.

    Beforehand its files are read (warm) or dropped from the page cache (cold); without `cache`, that is left as it is.
    However the load ends, that is the `Run` of the round `number`.
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
        "timeout": job.timeout,
    }
    try:
        jobs = invitations(given, job.processes, str(job.directory / secrets.token_hex(8)))
        outcome = together(run_jobs(jobs, job.timeout))
    except WeightctlError as error:
        return Run(number, "failed", error.message)
    if difference := outcome.pop("difference"):
        return Run(number, "failed", f"it loaded something else: {difference}")
    mark = outcome.pop("mark")
    return Run(number, "ok", mark=mark if number else "it was the warm-up", **outcome)


def run_job(job: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """The outcome of one job; see `run_jobs`."""
    return run_jobs([job], timeout)[0]


def described(config: Config, files: Iterable[str] = ()) -> dict[str, Any]:
    """The environment that a job of its own finds: this process never imports what asking for a device takes."""
    return run_job({"job": "describe", "device": config.device, "files": list(files)}, config.timeout)["environment"]  # type: ignore[no-any-return]


def run_jobs(jobs: Sequence[Mapping[str, Any]], timeout: float) -> list[dict[str, Any]]:
    """The outcomes of jobs that run at once, each in a process of its own.

    Raises WeightctlError if one fails, crashes, or outlasts `timeout` seconds: then none goes on. However this ends,
    nothing of their process groups is left.
    """
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(_started(job)) for job in jobs]
        deadline = time.monotonic() + timeout
        while any(each.process.poll() is None for each in running):
            if any(each.process.returncode for each in running):
                break
            if time.monotonic() > deadline:
                raise WeightctlError(f"it was stopped: it had not ended after {timeout:g} seconds")
            time.sleep(POLL_SECONDS)
        for each in running:
            if each.process.returncode:
                raise each.failure()
        return [each.outcome() for each in running]


@dataclass(frozen=True)
class _Running:
    process: subprocess.Popen[bytes]
    reply: IO[bytes]
    errors: IO[bytes]

    def failure(self) -> WeightctlError:
        """Why it ended as it did, told by a signal or the last line that it wrote."""
        code = self.process.returncode
        if code < 0:
            name = signal.Signals(-code).name
            return WeightctlError(f"it crashed with {name}" + (" (out of memory?)" if name == "SIGKILL" else ""))
        self.errors.seek(0)
        last = self.errors.read().decode(errors="replace").strip().rpartition("\n")[2]
        return WeightctlError(f"it ended with exit code {code}: {last[:300]}")

    def outcome(self) -> dict[str, Any]:
        """What it replied. Raises the WeightctlError that it met."""
        self.reply.seek(0)
        outcome: dict[str, Any] = json.load(self.reply)
        if "error" in outcome:
            kinds = {kind.exit_code: kind for kind in (WeightctlError, UsageError, IntegrityError)}
            raise kinds[outcome["exit_code"]](outcome["error"], outcome["hint"])
        return outcome


@contextlib.contextmanager
def _started(job: Mapping[str, Any]) -> Iterator[_Running]:
    """Files instead of pipes: nobody has to feed or to drain one process while it waits for another.

    The one pipe carries nothing, and tells the process's group by its end that this one is gone.
    """
    with contextlib.ExitStack() as stack:
        given, reply, errors = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        alive, ours = os.pipe()
        stack.callback(os.close, ours)
        given.write(json.dumps({**job, "alive": alive, "began": time.monotonic()}).encode())
        given.seek(0)
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", _START, *sys.path], stdin=given, stdout=reply, stderr=errors, pass_fds=[alive],
                start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(alive)
        try:
            yield _Running(process, reply, errors)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _plain(snapshot: Snapshot) -> dict[str, Any]:
    files = [(file.path, file.size, str(file.source)) for file in snapshot.files]
    return {"name": snapshot.name, "root": str(snapshot.root), "files": files}
