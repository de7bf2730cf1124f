"""The process of one measurement: a job as JSON on standard input, its outcome as JSON on standard output."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import json
import os
import platform
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightctl.benchmark.ceilings import copy_to_device, forget_files, read_files
from weightctl.benchmark.meeting import meeting
from weightctl.errors import WeightctlError
from weightctl.loaders import choose_device, loaders, open_stored
from weightctl.loaders.stored import difference, stored
from weightctl.model import File, Snapshot

if TYPE_CHECKING:
    import torch

PR_SET_PDEATHSIG = 1
PAGE_BYTES = 4096
LIBRARIES = ("torch", "transformers", "safetensors", "tensorizer", "accelerate")


def main() -> None:
    """Do the job on standard input. What libraries print goes to standard error."""
    with os.fdopen(os.dup(1), "w") as reply:
        os.dup2(2, 1)
        job = json.load(sys.stdin)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # so that nothing outlives a killed bench
        if os.getppid() != job["parent"]:
            return
        try:
            outcome = measure(job) if "strategy" in job else describe(job["device"])
        except WeightctlError as error:
            outcome = {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
        json.dump(outcome, reply)


def describe(device: str) -> dict[str, Any]:
    """The device that is meant, its ceiling, and what a reader of the numbers has to know of the machine."""
    import torch

    device = choose_device(device)
    environment: dict[str, Any] = {
        "weightctl": importlib.metadata.version("weightctl"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": device,
    }
    environment.update((name, _version(name)) for name in LIBRARIES)
    ceilings: dict[str, float] = {}
    if device != "cpu":
        ceilings["host_to_device"] = copy_to_device(device)
        driver = Path("/sys/module/nvidia/version")
        environment["gpu"] = torch.cuda.get_device_name(device)
        environment["gpu_memory_bytes"] = torch.cuda.mem_get_info(device)[1]
        environment["cuda"] = torch.version.cuda
        environment["driver"] = driver.read_text().strip() if driver.exists() else None
    return {"environment": environment, "ceilings": ceilings}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Load once by the clock, then compare every tensor with the model's own bytes."""
    importlib.import_module(job["module"])  # registers the strategy, wherever it comes from
    loader = loaders.get(job["strategy"])()
    snapshot, model = _snapshot(job["snapshot"]), _snapshot(job["model"])
    files = [Path(path) for path in job["weights"]]
    loader.prepare(snapshot)
    with meeting(job) as met:
        device = met.device
        free = _start(device)
        if met.rank == 0:
            read_files(files, job["threads"])
            if job["cache"] == "cold":
                forget_files(files)
        met.wait()
        began = time.perf_counter()
        tensors = met.load(loader, snapshot)
        _settle(tensors, device)
        seconds = time.perf_counter() - began
    outcome = {"seconds": seconds, "peak_host_bytes": _peak_host(), "peak_device_bytes": _peak_device(device, free)}
    elsewhere = [name for name, tensor in tensors.items() if tensor.device.type != device.partition(":")[0]]
    found = f"{elsewhere[0]} is not on {device}" if elsewhere else None
    named = loader.as_stored(tensors, snapshot)
    return {**outcome, "difference": found or difference(open_stored(model), stored(named))}


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
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.mem_get_info(device)[0]


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


def _peak_device(device: str, free: int) -> int:
    """By torch's count, or what is gone from the device where another allocator took more."""
    import torch

    if device == "cpu":
        return 0
    return max(torch.cuda.max_memory_allocated(device), free - torch.cuda.mem_get_info(device)[0])
