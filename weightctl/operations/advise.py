"""Say how to ship a model: a few rates, measured here or read from a bench, through the model of docs/advise.md."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from weightctl import storage
from weightctl.benchmark import advice
from weightctl.benchmark.advice import Option, Rates, Situation, Turn
from weightctl.benchmark.ceilings import COLD_RESIDENCY, forget_files, read_files, residency
from weightctl.benchmark.results import BenchResult, Stage, read_result
from weightctl.benchmark.runner import Job, described, run_load
from weightctl.benchmark.scenarios import last_stages
from weightctl.benchmark.scratch import temporary
from weightctl.config import Config
from weightctl.errors import UsageError, translated_os_errors
from weightctl.loaders import FormatLoader, Loader, choose_loader, loaders, open_stored, own_format, weight_files
from weightctl.loaders.base import SUFFIXES
from weightctl.model import File, Snapshot
from weightctl.operations import resolve
from weightctl.operations.serialize import write_verified
from weightctl.progress import Progress

SAMPLE_BYTES = 256 << 20
"""Of the model that the machine is measured with: its rates are those of larger ones too, to within a tenth or so."""

TENSOR_BYTES = 32 << 20
BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Figure:
    """A rate in bytes a second (of `start`: seconds), and where it is from."""

    name: str
    value: float
    origin: Literal["measured", "bench"]


@dataclass(frozen=True)
class Circumstances:
    """What the user said, or what is true of this machine."""

    cores: int
    memory_bytes: int
    device: str
    registry_bytes_per_second: float | None
    """None: the registry is taken never to be what takes the time."""
    volume_bytes_per_second: float | None
    """None: as the local disk."""
    updates_per_month: int
    replicas: int


@dataclass(frozen=True)
class AdviseResult:
    """What to expect of each way of shipping, which to take, and what would change that."""

    model: str
    bytes: int
    """Of all its files: what is shipped."""
    loaded_bytes: int
    """Of the weight files of its own format."""
    layers: int
    circumstances: Circumstances
    figures: tuple[Figure, ...]
    options: tuple[Option, ...]
    recommendation: str
    turns: tuple[Turn, ...]


def advise(
    model: str,
    *,
    registry: float | None = None,
    volume: float | None = None,
    cores: int | None = None,
    updates: int = 1,
    replicas: int = 1,
    bench: Path | None = None,
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    config: Config,
    progress: Progress,
) -> AdviseResult:
    """Cold start, deployment, storage and transfer of `model` as a container, on a volume and serialized.

    `registry` and `volume` are bytes a second that one replica gets. What a load takes is read from `bench`, or
    measured here with a model of `SAMPLE_BYTES`; what reading, hashing and unpacking take is measured here where
    `bench` does not have it. Of `model` itself only the sizes are needed: nothing is downloaded. Raises UsageError for
    what cannot be.
    """
    past = read_result(bench) if bench else None
    found = resolve.plan(model, revision=revision, include=include, exclude=exclude, config=config, progress=progress)
    snapshot = found.snapshot
    suffixes = SUFFIXES[own_format(snapshot)]
    loaded = sum(file.size for file in weight_files(snapshot) if file.path.endswith(suffixes))
    figures, device = _figures(past, bench, config, progress)
    rates = Rates(**{figure.name: figure.value for figure in figures})
    circumstances = Circumstances(
        cores=cores or _known(past, "cpus") or len(os.sched_getaffinity(0)),
        memory_bytes=_known(past, "memory_bytes") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        device=device,
        registry_bytes_per_second=registry,
        volume_bytes_per_second=volume,
        updates_per_month=updates,
        replicas=replicas,
    )
    layers = sum(file.is_weight for file in snapshot.files) or 1
    situation = Situation(
        snapshot.bytes, loaded, layers, rates, circumstances.cores, circumstances.memory_bytes, registry, volume,
        updates, replicas,
    )  # fmt: skip
    options = advice.options(situation)
    return AdviseResult(
        model=snapshot.name,
        bytes=snapshot.bytes,
        loaded_bytes=loaded,
        layers=layers,
        circumstances=circumstances,
        figures=figures,
        options=options,
        recommendation=advice.recommend(options).name,
        turns=advice.turns(situation),
    )


def _known(past: BenchResult | None, name: str) -> int | None:
    """What the environment of a bench counts; None if it does not tell, or tells nonsense."""
    value = past.environment.get(name) if past else None
    return value if isinstance(value, int) and value > 0 else None


def _figures(
    past: BenchResult | None, path: Path | None, config: Config, progress: Progress
) -> tuple[tuple[Figure, ...], str]:
    """Every rate, and the device that they hold for."""
    known = recorded(past) if past else {}
    if past and (missing := [name for name in ("load", "load_cold") if name not in known]):
        raise UsageError(
            f"{path} lacks what is needed: {' and '.join(_MEANINGS[name] for name in missing)}",
            "weightctl bench MODEL --cache warm --cache cold --output FILE, or --scenario volume --scenario model",
        )
    with _directory() as directory:
        if past is None:
            loaders.get("safetensors").require()
            size = f"{SAMPLE_BYTES >> 20} MiB"
            progress.note(
                f"measuring this machine with a model of {size}; --bench FILE takes what a bench has measured"
            )
        sample, written = _written(directory)
        found = {"write": written, **_processor(sample), "read": _disk(sample, config, progress)}
        device = past.device if past else described(config)["device"]
        if past is None:
            job = Job.of(open_stored(sample), device, directory, config, progress)
            found |= _loads(("load", "load_cold"), choose_loader(config.strategy, sample, device), sample, job)
        home = loaders.get("tensorizer")
        if (past is None or "file" in known) and not home.unavailable():
            file, found["serialize"] = _serialized(sample, directory, progress)
            if past is None:
                found |= _loads(("file", "file_cold"), home(), file, job)
    # A load from the disk reads it too: no raw read is slower.
    both = {**found, **known}
    read = max(both["read"], both["load_cold"], both.get("file_cold", 0.0))
    (known if "read" in known else found)["read"] = read
    figures = [Figure(name, value, "bench") for name, value in known.items()]
    figures += [Figure(name, value, "measured") for name, value in found.items() if name not in known]
    return tuple(figures), device


_MEANINGS = {"load": "a load from the page cache", "load_cold": "a load from the disk"}


def recorded(past: BenchResult) -> dict[str, float]:
    """The rates that a bench found: of its quickest strategy, of Tensorizer, and of its cold starts."""
    found = {"read": past.ceilings.get("cold_read", 0.0), **_of_strategies(past), **_of_starts(past)}
    found = {name: value for name, value in found.items() if value >= 1 or name == "start"}  # a byte a second
    if "file" not in found or "file_cold" not in found:
        found = {name: value for name, value in found.items() if name not in ("file", "file_cold", "serialize")}
    return found


def _of_strategies(past: BenchResult) -> dict[str, float]:
    warm = [row for row in past.results if row.median_seconds and row.cache == "warm" and row.strategy != "tensorizer"]
    if not warm:
        return {}
    best = min(warm, key=lambda row: row.median_seconds or 0.0)
    found = {"start": sum(best.phases.get(name, 0.0) for name in ("start", "imports", "device"))}
    for prefix, strategy in (("load", best.strategy), ("file", "tensorizer")):
        for suffix, cache in (("", "warm"), ("_cold", "cold")):
            row = past.row(strategy, cache)
            if row and row.bytes_per_second:
                found[prefix + suffix] = row.bytes_per_second
    return found


def _of_starts(past: BenchResult) -> dict[str, float]:
    found: dict[str, float] = {}
    for scenario in past.scenarios:
        stages = {stage.name: stage for stage in (*scenario.deploy, *scenario.stages)}
        if scenario.status != "ok" or "load" not in stages or "start" not in stages:
            continue
        found.setdefault("start", stages["start"].seconds)
        names = {
            "model": ["load_cold"], "file": ["file", "file_cold"], "image": ["load"],
            "volume": ["load"] if scenario.way == "copied" else [],
        }  # fmt: skip
        found |= dict.fromkeys(names[scenario.scenario], _rate(stages["load"]))
        if "serialize" in stages:
            found["serialize"] = _rate(stages["serialize"])
        if moved := [stages[name] for name in ("pull", "unpack") if name in stages]:
            seconds = max(sum(stage.seconds for stage in moved), 1e-9)
            rate = advice.engine_rate(moved[0].bytes, scenario.layers or 1, _known(past, "cpus") or 1, seconds)
            found["unpack"] = max(rate, found.get("unpack", 0.0))
    return found


def _rate(stage: Stage) -> float:
    return stage.bytes / max(stage.seconds, 1e-9)


@contextmanager
def _directory() -> Iterator[Path]:
    where = Path(tempfile.gettempdir())
    with translated_os_errors(f"write to {where}"), temporary(where) as directory:
        storage.check_space(directory, 4 * SAMPLE_BYTES)
        yield directory


def _written(directory: Path) -> tuple[Snapshot, float]:
    """A safetensors model in the directory, and the bytes a second at which it came to lie on the disk."""
    places = [(number, number * TENSOR_BYTES) for number in range(SAMPLE_BYTES // TENSOR_BYTES)]
    header = json.dumps({
        f"layer{number}.weight": {
            "dtype": "BF16", "shape": [TENSOR_BYTES // 2], "data_offsets": [start, start + TENSOR_BYTES]
        }
        for number, start in places
    }).encode()  # fmt: skip
    header += b" " * (-len(header) % 8)
    block = memoryview(os.urandom(BLOCK_BYTES))
    path = directory / "model.safetensors"
    began = time.perf_counter()
    with storage.atomic_write(path) as stream:
        write = storage.write_all(stream)
        write(memoryview(len(header).to_bytes(8, "little") + header))
        for _ in range(SAMPLE_BYTES // BLOCK_BYTES):
            write(block)
    rate = SAMPLE_BYTES / (time.perf_counter() - began)
    return Snapshot("sample", directory, (File(path.name, path.stat().st_size, path),)), rate


def _disk(sample: Snapshot, config: Config, progress: Progress) -> float:
    paths = [file.source for file in sample.files]
    best = 0.0
    for _ in range(2):
        forget_files(paths)
        if not best and residency(paths) > COLD_RESIDENCY:
            where = sample.root.parent  # the directory for temporary files
            progress.note(f"{where} stays in memory: set TMPDIR to a directory on the disk that is meant")
        best = max(best, read_files(paths, config.workers))
    return best


def _processor(sample: Snapshot) -> dict[str, float]:
    """Of one core; the sample was just written, and so is cached."""
    path = sample.files[0].source
    copy = path.with_name("unpacked")
    buffer = memoryview(bytearray(BLOCK_BYTES))

    def passed(*sinks: storage.Sink) -> float:
        began = time.perf_counter()
        with path.open("rb", buffering=0) as source:
            while count := source.readinto(buffer):
                for sink in sinks:
                    sink(buffer[:count])
        return SAMPLE_BYTES / (time.perf_counter() - began)

    with copy.open("wb", buffering=0) as stream:
        unpack = passed(hashlib.sha256().update, storage.write_all(stream))
    copy.unlink()
    return {"sha256": passed(hashlib.sha256().update), "unpack": unpack}


def _serialized(sample: Snapshot, directory: Path, progress: Progress) -> tuple[Snapshot, float]:
    """The sample as one Tensorizer file, and how quickly it was written, read back and compared."""
    home = loaders.get("tensorizer")()
    assert isinstance(home, FormatLoader)
    stored = open_stored(sample)
    path = directory / "serialized" / home.filename
    began = time.perf_counter()
    write_verified(home, stored, path, progress)
    rate = SAMPLE_BYTES / (time.perf_counter() - began)
    return Snapshot("sample", path.parent, (File(path.name, path.stat().st_size, path),)), rate


def _loads(names: tuple[str, str], loader: Loader, form: Snapshot, job: Job) -> dict[str, float]:
    """Bytes a second of a warm and of a cold load of `form`, and the seconds before one can begin."""
    found: dict[str, float] = {}
    for name, cache in zip(names, ("warm", "cold"), strict=True):
        start, load = last_stages(run_load(loader, form, cache, 1, job), form)
        found |= {name: load.bytes / load.seconds, "start": start.seconds}
    return found
