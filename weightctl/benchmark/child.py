"""The process of one measurement: a job as JSON on standard input, its outcome as JSON on standard output."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightctl.benchmark import ceilings
from weightctl.benchmark.environment import describe
from weightctl.benchmark.hashing import Fingerprint, TensorHash, fingerprint_difference
from weightctl.benchmark.meeting import meeting
from weightctl.errors import WeightctlError
from weightctl.loaders import Loader, loaders
from weightctl.model import File, Snapshot

if TYPE_CHECKING:
    import torch

PAGE_BYTES = 4096


def main() -> None:
    """Do the job on standard input. What libraries print goes to standard error."""
    entered = time.monotonic()
    with os.fdopen(os.dup(1), "w") as reply:
        os.dup2(2, 1)
        job = json.load(sys.stdin)
        with _guarded(job["alive"]):
            try:
                outcome = JOBS[job["job"]](job, entered - job["began"])
            except WeightctlError as error:
                outcome = {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
        json.dump(outcome, reply)


@contextlib.contextmanager
def _guarded(alive: int) -> Iterator[None]:
    """Let a process wait for the end of the pipe `alive`, which a killed bench leaves too, and then end the group.

    The kernel's own signal for that (PR_SET_PDEATHSIG) would spare the children of this process.
    """
    guard = os.fork()
    if not guard:
        os.read(alive, 1)
        os.killpg(0, signal.SIGKILL)
    try:
        yield
    finally:
        os.kill(guard, signal.SIGKILL)
        os.waitpid(guard, 0)


def _describe(job: dict[str, Any], _: float) -> dict[str, Any]:
    return {"environment": describe(job["device"], [Path(path) for path in job["files"]])}


def _ceilings(job: dict[str, Any], _: float) -> dict[str, Any]:
    """What the machine can do now, in bytes a second: the best way to read, of those that there are."""
    paths, threads = [Path(path) for path in job["files"]], job["threads"]
    found: dict[str, float] = {}
    if "cold" in job["caches"]:
        for direct in (False, True):
            ceilings.forget_files(paths, everything=job["drop_caches"])
            if ceilings.residency(paths) <= ceilings.COLD_RESIDENCY:
                with contextlib.suppress(WeightctlError):  # a filesystem without O_DIRECT
                    rate = ceilings.read_files(paths, threads, direct=direct)
                    found["cold_read"] = max(found.get("cold_read", 0.0), rate)
    ceilings.read_files(paths, threads)
    if "warm" in job["caches"]:
        found["warm_read"] = max(ceilings.read_files(paths, threads) for _ in range(3))
        if job["device"] == "cpu":
            found["warm_map"] = max(ceilings.map_files(paths, threads) for _ in range(3))
    if job["device"] != "cpu":
        found["host_to_device"] = ceilings.copy_to_device(job["device"])
    return found


def _load(job: dict[str, Any], start: float) -> dict[str, Any]:
    """Load once by the clock, then look whether that brought what the model's own files hold."""
    watch = _Stopwatch({"start": start})
    importlib.import_module(job["module"])  # registers the strategy, wherever it comes from
    loader = loaders.get(job["strategy"])()
    snapshot = _snapshot(job["snapshot"])
    loader.prepare(snapshot)
    watch.lap("imports")
    with meeting(job) as met:
        free = _start(met.device)
        watch.lap("device")
        files = [Path(path) for path in job["files"]]
        if met.rank == 0 and job["cache"] == "warm":
            ceilings.read_files(files, job["threads"])
        elif met.rank == 0 and job["cache"] == "cold":
            ceilings.forget_files(files, everything=job["drop_caches"])
        met.wait()
        residency = ceilings.residency(files)
        _forget_peaks(met.device)
        met.wait()
        watch.restart()
        tensors = met.load(loader, snapshot)
        _settle(tensors, met.device)
        seconds = watch.lap("loading")
        outcome = {
            "seconds": seconds,
            "residency": residency,
            "mark": ceilings.objection(job["cache"], residency) if job["cache"] else None,
            "peak_host_bytes": _peak_host(),
            "peak_pinned_bytes": _peak_pinned(met.device, loader),
            "peak_device_bytes": _peak_device(met.device, free),
            "difference": _difference(job, loader, snapshot, tensors, met.device),
        }
        if job["construct"] and outcome["difference"] is None:
            _construct(loader, snapshot, tensors, met.device, watch)
        return {**outcome, "phases": watch.phases}


class _Loaded(Loader):
    """Gives what is there already."""

    formats = ()

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def load(self, snapshot: Snapshot, device: str) -> dict[str, torch.Tensor]:  # noqa: ARG002
        return self._tensors


class _Stopwatch:
    def __init__(self, phases: dict[str, float]) -> None:
        self.phases = phases
        self.restart()

    def restart(self) -> None:
        self._began = time.perf_counter()

    def lap(self, phase: str) -> float:
        """Put down what has passed, and go on."""
        now = time.perf_counter()
        self.phases[phase], self._began = now - self._began, now
        return self.phases[phase]


def _snapshot(value: dict[str, Any]) -> Snapshot:
    files = [File(path, size, Path(source)) for path, size, source in value["files"]]
    return Snapshot(value["name"], Path(value["root"]), tuple(files))


def _start(device: str) -> int:
    """Bring the device up; its free bytes then."""
    import torch

    if device == "cpu":
        return 0
    torch.zeros(1, device=device)
    torch.cuda.synchronize(device)
    return torch.cuda.mem_get_info(device)[0]


def _forget_peaks(device: str) -> None:
    """What was needed to come here does not count."""
    import torch

    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the largest resident set, proc(5)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)


def _settle(tensors: dict[str, torch.Tensor], device: str) -> None:
    """Wait until every byte is there. On the CPU a mapped file is loaded only when each of its pages was touched."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize(device)
        return
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors.values()}
    for storage in storages.values():
        torch.empty(0, dtype=torch.uint8).set_(storage)[::PAGE_BYTES].sum()


def _peak_host() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def _peak_pinned(device: str, loader: Loader) -> int | None:
    """What torch's allocator of pinned memory held, and what the loader pinned itself. Other libraries tell nobody."""
    import torch

    if device == "cpu":
        return 0
    counted: dict[str, int] = getattr(torch.cuda, "host_memory_stats", dict)()
    return (counted.get("allocated_bytes.peak", 0) + loader.peak_pinned_bytes()) or None


def _peak_device(device: str, free: int) -> int:
    """By torch's count, or what is gone from the device where another allocator took more."""
    import torch

    if device == "cpu":
        return 0
    return max(torch.cuda.max_memory_allocated(device), free - torch.cuda.mem_get_info(device)[0])


def _difference(
    job: dict[str, Any], loader: Loader, snapshot: Snapshot, tensors: dict[str, torch.Tensor], device: str
) -> str | None:
    for name, tensor in tensors.items():
        if tensor.device.type != device.partition(":")[0]:
            return f"{name} is not on {device}"
    expected = [Fingerprint(name, dtype, tuple(shape), digest) for name, dtype, shape, digest in job["expected"]]
    actual = TensorHash(bytes.fromhex(job["key"]), device).fingerprints(loader.as_stored(tensors, snapshot))
    return fingerprint_difference(expected, actual)


def _construct(
    loader: Loader, snapshot: Snapshot, tensors: dict[str, torch.Tensor], device: str, watch: _Stopwatch
) -> None:
    """Build the model around the tensors, where a load has not done that and transformers knows the model."""
    from weightctl.loaders.transformers import TransformersLoader

    if isinstance(loader, TransformersLoader) or TransformersLoader.unavailable() or not snapshot.file("config.json"):
        return
    from weightctl.loaders.models import build_model

    TransformersLoader().prepare(snapshot)
    watch.restart()
    model = build_model(snapshot, _Loaded(loader.as_stored(tensors, snapshot)), device, "auto")
    _settle(dict(model.named_parameters()), device)
    watch.lap("construction")


JOBS = {"describe": _describe, "ceilings": _ceilings, "load": _load}
