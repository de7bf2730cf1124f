"""What a reader of the figures has to know of the machine: nothing that names a host, a user or a path."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import weightctl
from weightctl.loaders import choose_device

LIBRARIES = (
    "torch", "transformers", "safetensors", "tensorizer", "accelerate", "fastsafetensors", "runai-model-streamer",
    "instanttensor",
)  # fmt: skip

NETWORK = ("nfs", "cifs", "smb", "fuse.", "ceph", "lustre", "9p", "virtiofs", "gpfs")
"""How the names of filesystems begin whose bytes lie elsewhere."""

Facts = dict[str, Any]


def describe(device: str, files: Sequence[Path]) -> Facts:
    """The machine, the device that is meant, and what lies under `files`. Raises UsageError if there is no such device.

    Keys: weightctl, python, system, cpu, cpus, memory_bytes, filesystem, storage (`nvme`, `ssd`, `disk`, `memory` or
    `network`; None where nobody tells), device, the libraries, and of a GPU gpu, gpu_memory_bytes, cuda, driver,
    pcie_generation and pcie_width (as nvidia-smi tells, while the device is awake).
    """
    device = device if device == "cpu" else choose_device(device)  # which imports torch
    return {
        "weightctl": weightctl.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {re.split('[-+]', platform.release())[0]} {platform.machine()}",
        "cpu": _cpu(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        **(storage_under(files[0]) if files else {}),
        "device": device,
        **{name: _version(name) for name in LIBRARIES},
        **(_gpu(device) if device != "cpu" else {}),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def storage_under(path: Path) -> Facts:
    """The filesystem's type and the kind of device under a file."""
    number = path.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    filesystem = _filesystem(path.resolve(), device)
    return {"filesystem": filesystem, "storage": _kind(filesystem, Path("/sys/dev/block") / device)}


@dataclass(frozen=True)
class Mount:
    """A filesystem's place."""

    path: Path
    device: str
    """`8:1`."""
    filesystem: str
    """Its type."""


def mounts() -> list[Mount]:
    """All that this process sees, in the order in which they were mounted (proc(5), mountinfo)."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        path = re.sub(r"\\(\d{3})", lambda escaped: chr(int(escaped[1], 8)), fields[4])
        found.append(Mount(Path(path), fields[2], fields[fields.index("-") + 1]))
    return found


def _filesystem(path: Path, device: str) -> str | None:
    """By the mount's device (which an overlay's files do not have), or else by the longest path."""
    above = [mount for mount in mounts() if path.is_relative_to(mount.path)]
    same = [mount for mount in above if mount.device == device] or above
    deepest = max(same, key=lambda mount: len(mount.path.parts), default=None)
    return deepest.filesystem if deepest else None


def _kind(filesystem: str | None, block: Path) -> str | None:
    if filesystem in ("tmpfs", "ramfs"):
        return "memory"
    if filesystem and filesystem.startswith(NETWORK):
        return "network"
    try:
        real = block.resolve(strict=True)
    except OSError:
        return None
    if "nvme" in real.name:
        return "nvme"
    for disk in (real, real.parent):  # a partition's queue is its disk's
        if (rotational := disk / "queue" / "rotational").exists():
            return "disk" if rotational.read_text().strip() == "1" else "ssd"
    return None


def _gpu(device: str) -> Facts:
    import torch

    torch.zeros(1, device=device)
    properties = torch.cuda.get_device_properties(device)
    facts = {
        "gpu": properties.name,
        "gpu_memory_bytes": torch.cuda.mem_get_info(device)[1],
        "cuda": torch.version.cuda,
        **dict.fromkeys(("driver", "pcie_generation", "pcie_width")),
    }
    program = shutil.which("nvidia-smi")
    if program is None:
        return facts
    query = "--query-gpu=driver_version,pcie.link.gen.current,pcie.link.width.current"
    command = [program, query, "--format=csv,noheader", "-i", f"GPU-{getattr(properties, 'uuid', '')}"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        driver, generation, width = told.strip().split(", ")
    except (OSError, subprocess.SubprocessError, ValueError):
        return facts
    numbers = {"pcie_generation": generation, "pcie_width": width}
    return {**facts, "driver": driver, **{name: int(text) for name, text in numbers.items() if text.isdecimal()}}
