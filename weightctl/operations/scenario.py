"""Time whole cold starts: from nothing to weights on the device, by every way of shipping that weightctl makes."""

from __future__ import annotations

import dataclasses
import json
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from weightctl import storage
from weightctl.benchmark.ceilings import COLD_RESIDENCY, forget_files, read_files, residency
from weightctl.benchmark.engines import Engine, Image, engines
from weightctl.benchmark.results import SCHEMA, BenchResult, ColdStart, Scenario, Settings, Stage, write_result
from weightctl.benchmark.runner import Job, described, run_load
from weightctl.benchmark.scenarios import SCENARIOS, Kind, last_stages, summarize
from weightctl.benchmark.scratch import PREFIX, temporary
from weightctl.benchmark.summary import CONFIDENCE
from weightctl.config import Config
from weightctl.errors import IntegrityError, UsageError, WeightctlError, translated_os_errors
from weightctl.images.credentials import is_loopback
from weightctl.images.oci import ImageName
from weightctl.images.registry_client import RegistryClient
from weightctl.loaders import Loader, choose_loader, loaders, weight_files
from weightctl.model import File, Snapshot
from weightctl.operations.bake import Recipe, bake
from weightctl.operations.bench import check_output, in_one_file, now, opened
from weightctl.operations.push_volume import push_volume
from weightctl.operations.resolve import resolve
from weightctl.operations.serialize import serialize
from weightctl.progress import Progress
from weightctl.sources.directory import read_directory

RUNS = 3
"""Unless `config.runs` says otherwise: a whole cold start takes long."""

SCRATCH, IMAGE = "weightctl-start-", "image"
"""How its directory's name begins, and the file in it that names the image which engines pull."""


@dataclass(frozen=True)
class Shipping:
    """How the model is shipped, where there is a choice."""

    scenarios: tuple[str, ...]
    engines: tuple[str, ...] = ()
    """Those that pull the image; all, unless given."""
    jobs: tuple[int, ...] = ()
    """How many layers an engine is told to fetch at once, one row for each; its own default, unless given."""
    registry: str | None = None
    """HOST[:PORT]/NAME that the image is pushed to; an OCI layout on the local disk, unless given."""
    volume: Path | None = None
    """The volume; a directory on the local disk, unless given."""
    scratch: Path | None = None
    """The local disk; where temporary files go, unless given."""
    strategy: str = "auto"
    """What loads the weights in the end, but for a serialized file, which has its own."""


@dataclass(frozen=True)
class _Arrived:
    """A model's files on this machine, ready to be loaded."""

    stages: tuple[Stage, ...]
    snapshot: Snapshot
    cold: bool
    """Whether its files must not be in the page cache, since nothing has just brought them."""


@dataclass(frozen=True)
class _Way:
    """One way of shipping that can be had here, and its cold starts so far."""

    kind: Kind
    name: str
    loader: Loader
    deploy: tuple[Stage, ...]
    begin: Callable[[Path], AbstractContextManager[_Arrived]]
    """Bring the files here, by the clock, with a directory of its own for whatever it needs; then take them away."""
    jobs: int | None = None
    layers: int | None = None
    starts: list[ColdStart] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.kind}, {self.name}" + (f", {self.jobs} jobs" if self.jobs else "")

    @property
    def failed(self) -> bool:
        """Whether there is no use in another start."""
        return any(start.status == "failed" for start in self.starts)

    def row(self) -> Scenario:
        """Of at least one start."""
        found = summarize(self.kind, self.name, self.jobs, self.loader.name, self.deploy, self.starts)
        return dataclasses.replace(found, layers=self.layers)


@dataclass(frozen=True)
class _Bench:
    """What every scenario is made from."""

    snapshot: Snapshot
    include: Sequence[str]
    exclude: Sequence[str]
    shipping: Shipping
    job: Job
    config: Config
    progress: Progress

    @property
    def scratch(self) -> Path:
        """The local disk."""
        return self.job.directory

    @property
    def directory(self) -> str:
        """The model as a MODEL: the same files, listed without asking the Hub again."""
        return str(self.snapshot.root)

    def loader(self, snapshot: Snapshot) -> Loader:
        """What loads it. Raises UsageError if that cannot."""
        return choose_loader(self.shipping.strategy, snapshot, self.job.device)

    def forget(self) -> None:
        """Let a deployment begin with the model's files on the disk alone."""
        forget_files([file.source for file in self.snapshot.files])


def run_scenarios(
    model: str,
    shipping: Shipping,
    *,
    output: Path | None = None,
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    config: Config,
    progress: Progress,
) -> BenchResult:
    """Deploy `model` in every way that is asked for, then start from nothing, in `config.runs` (or `RUNS`) rounds.

    What a round brought here is gone before the next, images and caches too, and at the end so is what was deployed.
    The result so far is saved to `output` after every start. A way that is not to be had here, or fails, is a row that
    says so; UsageError is raised for what cannot be, IntegrityError if the model's files are damaged.
    """
    if unknown := set(shipping.scenarios) - set(SCENARIOS):
        raise UsageError(f"unknown scenario {unknown.pop()!r}", f"known: {', '.join(SCENARIOS)}")
    for engine in shipping.engines:
        engines.get(engine)
    check_output(output)
    wanted = {"include": include, "exclude": exclude}
    snapshot = resolve(model, revision=revision, **wanted, verify=True, config=config, progress=progress)
    stored, about = opened(snapshot)
    runs = config.runs or RUNS
    paths = [file.source for file in weight_files(snapshot)]
    environment = described(config, map(str, paths))
    device = environment["device"]
    created = now()
    settings = Settings(
        device, (shipping.strategy,), ("cold",), runs, 0.0, CONFIDENCE, config.timeout, config.workers
    )  # fmt: skip
    forget_files(paths)
    states = ("cold_read", "warm_read") if residency(paths) <= COLD_RESIDENCY else ("warm_read",)
    ceilings = {state: read_files(paths, config.workers) for state in states}
    ways: list[_Way | Scenario] = []

    def result(complete: bool) -> BenchResult:
        rows = tuple(
            way if isinstance(way, Scenario) else way.row() for way in ways if isinstance(way, Scenario) or way.starts
        )
        found = BenchResult(SCHEMA, created, environment, ceilings, (), about, settings, (), complete, scenarios=rows)
        if output is not None:
            write_result(found, output)
        return found

    where = shipping.scratch or Path(tempfile.gettempdir())
    with translated_os_errors(f"write to {where}"), ExitStack() as shipped:
        scratch = shipped.enter_context(temporary(where, SCRATCH, partial(_undo, config, progress)))
        job = Job.of(stored, device, scratch, config, progress)
        bench = _Bench(snapshot, include, exclude, shipping, job, config, progress)
        for kind in dict.fromkeys(shipping.scenarios):
            ways += _deployed(kind, bench, shipped)
        able = [way for way in ways if isinstance(way, _Way)]
        try:
            for number in range(1, runs + 1):
                for way in able:
                    if not way.failed:
                        start = _start(way, job, number)
                        way.starts.append(start)
                        words = start.reason or start.mark or f"{start.seconds:.2f} s"
                        progress.note(f"{way}: {words}, start {number} of {runs}")
                        result(False)
        except KeyboardInterrupt:
            if any(way.starts for way in able):
                return result(False)
            raise
    return result(True)


def _deployed(kind: str, bench: _Bench, shipped: ExitStack) -> list[_Way | Scenario]:
    """The ways of one scenario, with what they start from in place until `shipped` is closed."""
    prepare: dict[str, Callable[[_Bench, ExitStack], list[_Way | Scenario]]] = {
        "image": _image, "volume": _volume, "file": _file, "model": _model
    }  # fmt: skip
    try:
        return prepare[kind](bench, shipped)
    except (UsageError, IntegrityError):
        raise
    except WeightctlError as error:
        return [Scenario(kind, "deploy", None, "failed", error.message)]  # type: ignore[arg-type]


def _start(way: _Way, job: Job, number: int) -> ColdStart:
    """One cold start, and whether the tensors are the model's own."""
    try:
        with (
            tempfile.TemporaryDirectory(dir=job.directory, ignore_cleanup_errors=True) as directory,
            way.begin(Path(directory)) as arrived,
        ):
            run = run_load(way.loader, arrived.snapshot, "cold" if arrived.cold else None, number, job)
            return ColdStart(number, "ok", None, run.mark, arrived.stages + last_stages(run, arrived.snapshot))
    except IntegrityError:
        raise
    except WeightctlError as error:
        return ColdStart(number, "failed", error.message)


# An image.


def _image(bench: _Bench, shipped: ExitStack) -> list[_Way | Scenario]:
    """Baked under a path that no image had before: no registry and no engine has a layer of it already."""
    chosen = [engines.get(name) for name in bench.shipping.engines or engines.names()]
    rows: list[_Way | Scenario] = []
    able: list[type[Engine]] = []
    for engine in chosen:
        if reason := _obstacle(engine, bench.shipping):
            rows.append(Scenario("image", engine.name, None, "unavailable", reason))
        else:
            able.append(engine)
    if not able:
        return rows
    word = f"bench-{secrets.token_hex(4)}"
    layout = None if bench.shipping.registry else bench.scratch / "layout"
    name = ImageName.parse(f"{bench.shipping.registry or 'weightctl'}:{word}")
    recipe = Recipe(str(name), f"layout:{layout}" if layout else "registry", path=f"/{word}")
    bench.forget()
    baked = bake(
        bench.directory, recipe, include=bench.include, exclude=bench.exclude, config=bench.config,
        progress=bench.progress,
    )  # fmt: skip
    host = (name.registry or "").rpartition(":")[0] or name.registry
    plain = bench.config.plain_http or is_loopback(host)
    image = Image(str(name), baked.bytes, layout, plain)
    with storage.atomic_write(bench.scratch / IMAGE) as stream:  # half of it could not be undone
        storage.write_all(stream)(memoryview(json.dumps([image.name, None if layout else baked.digest]).encode()))
    if layout is None:
        shipped.callback(_forget_image, name, baked.digest, bench.config, bench.progress)
    deploy = (Stage("bake", baked.written_bytes, baked.seconds),)
    loader = bench.loader(bench.snapshot)
    layers = sum(file.is_weight for file in bench.snapshot.files) or 1
    for engine in able:
        for jobs in bench.shipping.jobs if engine.takes_jobs and bench.shipping.jobs else (None,):
            begin = _puller(engine(), image, jobs, word, layout, bench)
            rows.append(_Way("image", engine.name, loader, deploy, begin, jobs, layers))
    return rows


def _obstacle(engine: type[Engine], shipping: Shipping) -> str | None:
    if reason := engine.unavailable():
        return reason
    if shipping.registry is None and not engine.reads_layouts:
        return "it pulls from registries only: give --registry HOST:PORT/NAME"
    return None


def _puller(
    engine: Engine, image: Image, jobs: int | None, path: str, layout: Path | None, bench: _Bench
) -> Callable[[Path], AbstractContextManager[_Arrived]]:
    @contextmanager
    def pulled(scratch: Path) -> Iterator[_Arrived]:
        if layout is not None:
            forget_files([blob for blob in (layout / "blobs" / "sha256").iterdir() if blob.is_file()])
        with engine.pulled(image, jobs, scratch, bench.config.timeout) as found:
            files = [_moved(file, found.find(f"{path}/{file.path}")) for file in bench.snapshot.files]
            yield _Arrived(found.stages, Snapshot(bench.snapshot.name, _root(files[0]), tuple(files)), cold=False)

    return pulled


def _moved(file: File, source: Path) -> File:
    return File(file.path, file.size, source)


def _root(file: File) -> Path:
    return file.source.parents[file.path.count("/")]


def _forget_image(name: ImageName, digest: str, config: Config, progress: Progress) -> None:
    try:
        client = RegistryClient(name, actions="pull,push,delete", plain_http=config.plain_http)
        client.delete_manifest(digest)
    except WeightctlError as error:
        progress.note(f"{name} stays in the registry, which does not delete it: {error.message}")


def _undo(config: Config, progress: Progress, leftover: Path) -> None:
    """Have the registry, and every engine that answers, forget the image of a killed bench."""
    if (note := leftover / IMAGE).exists():
        name, digest = json.loads(note.read_text())
        for engine in map(engines.get, engines.names()):
            if not engine.unavailable():
                engine().forget(name)
        if digest:
            _forget_image(ImageName.parse(name), digest, config, progress)


# A volume.


def _volume(bench: _Bench, shipped: ExitStack) -> list[_Way | Scenario]:
    """A volume of its own within the volume: nothing of the model is there already."""
    where = bench.shipping.volume or bench.scratch
    if not where.is_dir():
        raise UsageError(f"the volume {where} does not exist", "mount it, or create the directory, first")
    with translated_os_errors(f"write to the volume {where}"):
        volume = shipped.enter_context(temporary(where.absolute(), f".{PREFIX}"))
    bench.forget()
    pushed = push_volume(
        bench.directory, volume, name="model", include=bench.include, exclude=bench.exclude, config=bench.config,
        progress=bench.progress,
    )  # fmt: skip
    there = read_directory(pushed.path)
    deploy = (Stage("push", pushed.copied_bytes, pushed.seconds),)
    loader = bench.loader(there)

    @contextmanager
    def copied(scratch: Path) -> Iterator[_Arrived]:
        forget_files([file.source for file in there.files])
        began = time.perf_counter()
        files = tuple(storage.in_parallel(lambda file: _copied(file, scratch), there.files, bench.config.workers))
        stage = Stage("copy", there.bytes, time.perf_counter() - began)
        yield _Arrived((stage,), Snapshot(there.name, scratch, files), cold=False)

    ways = (("in place", _in_place(there)), ("copied", copied))
    return [_Way("volume", name, loader, deploy, begin) for name, begin in ways]


def _copied(file: File, directory: Path) -> File:
    destination = directory / file.path
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file.source, destination)
    return _moved(file, destination)


def _in_place(snapshot: Snapshot) -> Callable[[Path], AbstractContextManager[_Arrived]]:
    return lambda _: nullcontext(_Arrived((), snapshot, cold=True))


# Files.


def _file(bench: _Bench, _: ExitStack) -> list[_Way | Scenario]:
    loader = loaders.get("tensorizer")
    if reason := loader.unavailable():
        return [Scenario("file", "in place", None, "unavailable", reason)]
    where = bench.scratch / "model.tensors"
    bench.forget()
    serialized = serialize(
        bench.directory, where, include=bench.include, exclude=bench.exclude, config=bench.config,
        progress=bench.progress,
    )  # fmt: skip
    deploy = (Stage("serialize", serialized.bytes, serialized.seconds),)
    return [_Way("file", "in place", loader(), deploy, _in_place(in_one_file(bench.snapshot, where)))]


def _model(bench: _Bench, _: ExitStack) -> list[_Way | Scenario]:
    return [_Way("model", "in place", bench.loader(bench.snapshot), (), _in_place(bench.snapshot))]
