"""Time every way to load a model, and check what each has loaded."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from weightctl import storage
from weightctl.benchmark import ceilings as limits
from weightctl.benchmark.runner import run_job, run_load
from weightctl.benchmark.statistics import Row, Run, summarize, unavailable
from weightctl.config import Config
from weightctl.digests import Identity
from weightctl.errors import UsageError, translated_os_errors
from weightctl.loaders import FormatLoader, Loader, loaders, open_stored, own_format, weight_files
from weightctl.loaders.stored import Stored
from weightctl.model import File, Snapshot
from weightctl.operations.resolve import resolve
from weightctl.operations.serialize import write_verified
from weightctl.progress import Progress

CACHES = ("warm", "cold")
"""warm: every weight file was read just before. cold: and then dropped from the page cache."""


@dataclass(frozen=True)
class BenchResult:
    """Every raw time, with what is needed to read it."""

    environment: dict[str, Any]
    """Versions, processors, memory, device."""
    ceilings: dict[str, float]
    """Bytes a second: `warm_read`, `cold_read` (if asked for) and, with CUDA, `host_to_device`."""
    model: dict[str, Any]
    """name, commit, format, files, tensors, bytes (of the tensors)."""
    results: tuple[Row, ...]


def bench(
    model: str,
    *,
    strategies: Sequence[str] = (),
    caches: Sequence[str] = (),
    nproc: int = 1,
    scratch: Path | None = None,
    output: Path | None = None,
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    config: Config,
    progress: Progress,
) -> BenchResult:
    """Load `model` with each of `strategies` (all, unless given), `config.runs` times, in rounds that interleave them.

    With `nproc`, that many processes load at once, each to a device of its own: `pipelined` shares the reads between
    them, the others load for themselves, and a run takes as long as the slowest.

    Where a strategy's format is missing, the model is converted to it first, into `scratch` (kept, and used again) or
    a temporary directory. The result so far is saved to `output` after every run. A strategy that cannot run, fails,
    or loads something else is a row that says so; WeightctlError is raised for what concerns them all.
    """
    chosen = [loaders.get(name)() for name in dict.fromkeys(strategies or loaders.names())]
    caches = tuple(dict.fromkeys(caches or ("warm",)))
    if unknown := set(caches) - set(CACHES):
        raise UsageError(f"unknown cache state {unknown.pop()!r}", f"known: {', '.join(CACHES)}")
    if output is not None and not output.absolute().parent.is_dir():
        raise UsageError(f"{output.absolute().parent} does not exist", "--output is the file to write the result to")
    snapshot = resolve(
        model, revision=revision, include=include, exclude=exclude, verify=True, config=config, progress=progress
    )
    stored = open_stored(snapshot)
    if not stored.bytes:
        raise UsageError(f"the tensors of {snapshot.name} have no bytes", "there is nothing to time")
    machine = run_job({"device": config.device}, config.timeout)
    machine["environment"]["processes"] = nproc
    device = machine["environment"]["device"]
    ceilings = {**_read_ceilings(_weight_paths(snapshot), caches, config), **machine["ceilings"]}
    about = {
        "name": snapshot.name,
        "commit": snapshot.commit,
        "format": own_format(snapshot),
        "files": len(snapshot.files),
        "tensors": len(stored.entries),
        "bytes": stored.bytes,
    }
    with _scratch(scratch) as directory:
        ready = {loader.name: _made_ready(loader, snapshot, stored, directory, progress) for loader in chosen}
        runs: dict[tuple[str, str], list[Run]] = {(loader.name, cache): [] for loader in chosen for cache in caches}
        for _ in range(config.runs):
            for cache, loader in itertools.product(caches, chosen):
                form, past = ready[loader.name], runs[loader.name, cache]
                if isinstance(form, str) or any(run.status == "failed" for run in past):
                    continue
                run = run_load(
                    loader, form, snapshot, weights=_weight_paths(form), device=device, cache=cache,
                    threads=config.workers, timeout=config.timeout, nproc=nproc,
                )  # fmt: skip
                past.append(run)
                progress.note(f"{loader.name}, {cache}: {run.status}, run {len(past)} of {config.runs}")
                save(BenchResult(machine["environment"], ceilings, about, _rows(runs, ready, stored.bytes)), output)
    result = BenchResult(machine["environment"], ceilings, about, _rows(runs, ready, stored.bytes))
    save(result, output)
    return result


def save(result: BenchResult, output: Path | None) -> None:
    """Write the result as JSON, in one step; nothing without `output`."""
    if output is not None:
        with translated_os_errors(f"write {output}"), storage.atomic_write(output.absolute()) as stream:
            storage.write_all(stream)(memoryview(json.dumps(asdict(result), indent=2).encode() + b"\n"))


def _rows(
    runs: Mapping[tuple[str, str], Sequence[Run]], ready: Mapping[str, Snapshot | str], nbytes: int
) -> tuple[Row, ...]:
    rows = []
    for (strategy, cache), past in runs.items():
        reason = ready[strategy]
        if isinstance(reason, str):
            rows.append(unavailable(strategy, cache, reason))
        elif past:
            rows.append(summarize(strategy, cache, past, nbytes))
    return tuple(rows)


def _weight_paths(snapshot: Snapshot) -> list[Path]:
    return [file.source for file in weight_files(snapshot)]


def _read_ceilings(paths: list[Path], caches: Sequence[str], config: Config) -> dict[str, float]:
    limits.read_files(paths, config.workers)
    found = {"warm_read": max(limits.read_files(paths, config.workers) for _ in range(3))}
    if "cold" in caches:
        limits.forget_files(paths)
        found["cold_read"] = limits.read_files(paths, config.workers)
    return found


@contextlib.contextmanager
def _scratch(directory: Path | None) -> Iterator[Path]:
    with translated_os_errors(f"write to {directory or tempfile.gettempdir()}"):
        if directory is not None:
            storage.make_directories(directory.absolute())
            yield directory.absolute()
        else:
            with tempfile.TemporaryDirectory(prefix="weightctl-bench-") as temporary:
                yield Path(temporary)


def _made_ready(
    loader: Loader, snapshot: Snapshot, stored: Stored, scratch: Path, progress: Progress
) -> Snapshot | str:
    """The model in a form that `loader` reads, converted if need be; or why there is none."""
    if reason := loader.unavailable():
        return reason
    reason = loader.obstacle(snapshot)
    if reason is None:
        return snapshot
    if not isinstance(loader, FormatLoader):
        return reason
    name = f"{snapshot.name.replace('/', '--')}-{_fingerprint(snapshot)}"
    path = scratch / name / loader.filename
    if not path.exists():
        progress.note(f"converting the model for {loader.name}, in {path.parent}")
        write_verified(loader, stored, path, progress)
    beside = [file for file in snapshot.files if file.path in ("config.json", "generation_config.json")]
    return Snapshot(snapshot.name, path.parent, (File(path.name, path.stat().st_size, path), *beside))


def _fingerprint(snapshot: Snapshot) -> str:
    """Changes when a file of the model does."""
    keys = [(file.path, Identity.of(file.source).key) for file in snapshot.files]
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]
