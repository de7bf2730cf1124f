"""Whole cold starts by their stages: how the last of them, the load, is timed, and what many starts amount to."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from weightctl.benchmark.engines import run_command
from weightctl.benchmark.results import ColdStart, Interval, Scenario, Stage
from weightctl.benchmark.statistics import median_interval
from weightctl.errors import WeightctlError
from weightctl.loaders import Loader, loaders, open_stored, weight_files
from weightctl.loaders.stored import difference, stored
from weightctl.model import File, Snapshot

SCENARIOS = ("image", "volume", "file", "model")
"""Pulled by an engine and unpacked; from a volume; a serialized file; the model's own files as they lie there."""

Kind = Literal["image", "volume", "file", "model"]


PR_SET_PDEATHSIG = 1
PAGE_BYTES = 4096

_START = "import sys; sys.path[:] = sys.argv[1:]; from weightctl.benchmark.scenarios import main; main()"
"""Imports what this process imports, and nothing from the working directory, which `-m` would: it may be a model's."""


def time_load(
    loader: Loader, snapshot: Snapshot, model: Snapshot, *, device: str, timeout: float
) -> tuple[Stage, Stage]:
    """Load `snapshot` in a fresh process, by this one's clock: until it can begin, and until all is on the device.

    Whether the files are cached is left as it is. Afterwards the tensors are compared with those of `model`. Raises
    WeightctlError if it loads something else, fails, or takes longer than `timeout` seconds.
    """
    job = {
        "parent": os.getpid(), "module": type(loader).__module__, "strategy": loader.name, "device": device,
        "snapshot": _plain(snapshot), "model": _plain(model),
    }  # fmt: skip
    marks: dict[str, float] = {}

    def see(line: str) -> None:
        word, _, rest = line.rstrip("\n").partition(": ")
        marks[word] = time.perf_counter()
        if word == "failed":
            raise WeightctlError(rest)

    began = time.perf_counter()
    run_command(sys.executable, "-c", _START, *sys.path, timeout=timeout, see=see, read=json.dumps(job))
    size = sum(file.size for file in weight_files(snapshot))
    return Stage("start", 0, marks["ready"] - began), Stage("load", size, marks["loaded"] - marks["ready"])


def main() -> None:
    """Be that process. What libraries print goes to standard error."""
    with os.fdopen(os.dup(1), "w") as reply:
        os.dup2(2, 1)
        job = json.load(sys.stdin)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # so that nothing outlives a killed bench
        if os.getppid() == job["parent"]:
            try:
                _load(job, lambda word: print(word, file=reply, flush=True))
            except WeightctlError as error:
                print(f"failed: {error.message}".replace("\n", " "), file=reply, flush=True)


def _load(job: dict[str, Any], say: Callable[[str], object]) -> None:
    import torch

    importlib.import_module(job["module"])  # registers the strategy, wherever it comes from
    loader, device = loaders.get(job["strategy"])(), job["device"]
    snapshot, model = _snapshot(job["snapshot"]), _snapshot(job["model"])
    loader.prepare(snapshot)
    if device != "cpu":
        torch.zeros(1, device=device)
        torch.cuda.synchronize(device)
    say("ready")
    tensors = loader.load(snapshot, device)
    if device != "cpu":
        torch.cuda.synchronize(device)
    else:  # a mapped file is loaded only when each of its pages was touched
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors.values()}
        for storage in storages.values():
            torch.empty(0, dtype=torch.uint8).set_(storage)[::PAGE_BYTES].sum()
    say("loaded")
    if found := difference(open_stored(model), stored(loader.as_stored(tensors, snapshot))):
        raise WeightctlError(f"it loaded something else: {found}")


def _plain(snapshot: Snapshot) -> dict[str, Any]:
    files = [(file.path, file.size, str(file.source)) for file in snapshot.files]
    return {"name": snapshot.name, "root": str(snapshot.root), "files": files}


def _snapshot(value: dict[str, Any]) -> Snapshot:
    files = [File(path, size, Path(source)) for path, size, source in value["files"]]
    return Snapshot(value["name"], Path(value["root"]), tuple(files))


def summarize(
    kind: Kind,
    way: str,
    jobs: int | None,
    strategy: str | None,
    deploy: Sequence[Stage],
    starts: Sequence[ColdStart],
    confidence: float,
) -> Scenario:
    """The row of at least one cold start. One that failed, or none that counts, makes it a failed row without times."""
    failed = next((start.reason for start in starts if start.status == "failed"), None)
    counted = [start for start in starts if start.mark is None]
    if failed is None and not counted:
        failed = starts[0].mark
    if failed is not None:
        return Scenario(kind, way, jobs, "failed", failed, strategy, tuple(deploy), starts=tuple(starts))
    seconds = tuple(start.seconds for start in counted)
    stages = [
        Stage(first.name, first.bytes, statistics.median(start.stages[place].seconds for start in counted))
        for place, first in enumerate(counted[0].stages)
    ]
    return Scenario(
        scenario=kind,
        way=way,
        jobs=jobs,
        status="ok",
        strategy=strategy,
        deploy=tuple(deploy),
        seconds=seconds,
        median_seconds=statistics.median(seconds),
        interval=Interval(*median_interval(seconds, confidence)),
        stages=tuple(stages),
        starts=tuple(starts),
    )
