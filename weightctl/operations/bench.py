"""Time every way to load a model, and check what each has loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from weightctl import storage
from weightctl.benchmark.ceilings import drop_caches as drop_all
from weightctl.benchmark.ceilings import limits
from weightctl.benchmark.results import SCHEMA, BenchResult, Limit, Model, Row, Run, Settings, read_result, write_result
from weightctl.benchmark.runner import Job, described, run_job, run_load
from weightctl.benchmark.scratch import sweep, temporary
from weightctl.benchmark.summary import CONFIDENCE, Floor, compare, summarize, width
from weightctl.config import Config, user_directory
from weightctl.digests import Identity
from weightctl.errors import UsageError, translated_os_errors
from weightctl.loaders import FormatLoader, Loader, loaders, open_stored, own_format, weight_files
from weightctl.loaders.stored import Stored
from weightctl.model import File, Snapshot
from weightctl.operations.resolve import resolve
from weightctl.operations.serialize import write_verified
from weightctl.progress import Progress

CACHES = ("warm", "cold")
"""Every file of the model was just read, or dropped from the page cache."""

RUNS = 10
"""Of each row at most, unless `config.runs` says otherwise."""

CEILING_ROUNDS = 3
"""The rounds that begin with a look at what the machine can do; the best of them is the ceiling."""

VAIN_RUNS = 3
"""So many runs without one that counts, and a row has no more of them."""

KEPT_RESULTS = 20


def bench(
    model: str,
    *,
    strategies: Sequence[str] = (),
    caches: Sequence[str] = (),
    nproc: int = 1,
    drop_caches: bool = False,
    construct: bool = False,
    warm_up: bool = True,
    scratch: Path | None = None,
    output: Path | None = None,
    against: Path | None = None,
    floors: Sequence[Floor] = (),
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    config: Config,
    progress: Progress,
) -> BenchResult:
    """Load `model` with each of `strategies` (all, unless given), in rounds that go through them by turns.

    After a round to warm up, unless not `warm_up`, up to `config.runs` rounds (or `RUNS`) are measured, fewer when the
    interval of every median is narrower than `config.precision`. Where a strategy's format is missing, the model is
    converted to it first, into `scratch` (kept, and used again) or a temporary directory. `nproc` processes load at
    once, each to a device of its own. `drop_caches` empties the whole page cache for a cold run, `construct` builds the
    model after each load.

    The result so far is saved to `output` after every run (or among the last few in the cache directory), and is
    returned, not `complete`, if an interrupt ends the rounds. With `against`, a file of an older bench, it holds a
    comparison. A strategy that cannot run, fails, or loads something else is a row that says so; WeightctlError is
    raised for what concerns them all.
    """
    chosen = [loaders.get(name)() for name in dict.fromkeys(strategies or loaders.names())]
    caches = tuple(dict.fromkeys(caches or ("warm",)))
    if unknown := set(caches) - set(CACHES):
        raise UsageError(f"unknown cache state {unknown.pop()!r}", f"known: {', '.join(CACHES)}")
    check_output(output)
    for floor in floors:
        if floor.strategy not in (loader.name for loader in chosen) or floor.cache not in (None, *caches):
            raise UsageError(f"{floor} is a floor of what is not measured", "ask for it with --strategy and --cache")
    older = read_result(against) if against else None
    if drop_caches:
        drop_all()
    created = now()
    snapshot = resolve(
        model, revision=revision, include=include, exclude=exclude, verify=True, config=config, progress=progress
    )
    stored, about = opened(snapshot)
    paths = [str(file.source) for file in weight_files(snapshot)]
    environment = described(config, paths)
    runs = config.runs or RUNS
    settings = Settings(
        config.device, tuple(loader.name for loader in chosen), caches, runs, config.precision, CONFIDENCE,
        config.timeout, config.workers, drop_caches, construct,
    )  # fmt: skip
    path = output or _kept(created, snapshot.name, progress)
    with _directories(scratch) as (passing, kept):
        job = Job.of(
            stored, environment["device"], passing, config, progress,
            processes=nproc, drop_caches=drop_caches, construct=construct,
        )  # fmt: skip
        ready = {loader.name: _made_ready(loader, snapshot, stored, kept, progress) for loader in chosen}
        measured = _Measured(ready, {(loader.name, cache): [] for cache in caches for loader in chosen})
        if nproc > 1:
            environment["processes"] = nproc

        def result(complete: bool) -> BenchResult:
            least = limits(measured.ceilings, about, sum(file.size for file in weight_files(snapshot)))
            rows = measured.rows(about.bytes, {limit.cache: limit for limit in least})
            found = BenchResult(
                SCHEMA, created, environment, dict(measured.ceilings), least, about, settings, rows, complete
            )
            found = dataclasses.replace(found, comparison=compare(older, found)) if older else found
            if path:
                write_result(found, path)
            return found

        try:
            first = 0 if warm_up else 1
            for number in range(first, runs + 1):
                if number > first and not measured.goes_on(config.precision):
                    break
                if number < CEILING_ROUNDS:
                    measured.look(job, paths, caches)
                for loader, cache in measured.turns(chosen, caches, number):
                    form = ready[loader.name]
                    assert isinstance(form, Snapshot)
                    run = run_load(loader, form, cache, number, job)
                    measured.runs[loader.name, cache].append(run)
                    if run.status == "failed":
                        progress.note(f"{loader.name}, {cache}: failed: {run.reason}")
                    result(complete=False)
                progress.note(measured.news(number, runs))
        except KeyboardInterrupt:
            if not any(measured.runs.values()):
                raise
            return result(complete=False)
        return result(complete=True)


def reopen(saved: Path, against: Path | None = None) -> BenchResult:
    """A saved result, compared with an older one if there is one. Raises UsageError for files that are no results."""
    result = read_result(saved)
    return dataclasses.replace(result, comparison=compare(read_result(against), result)) if against else result


@dataclass(frozen=True)
class _Measured:
    """What is known so far."""

    ready: Mapping[str, Snapshot | str]
    runs: dict[tuple[str, str], list[Run]]
    ceilings: dict[str, float] = field(default_factory=dict)

    def look(self, job: Job, paths: list[str], caches: Sequence[str]) -> None:
        """Measure the ceilings, and keep the best."""
        asked = {
            "job": "ceilings", "device": job.device, "files": paths, "caches": caches, "threads": job.threads,
            "drop_caches": job.drop_caches,
        }  # fmt: skip
        for name, rate in run_job(asked, job.timeout).items():
            self.ceilings[name] = max(rate, self.ceilings.get(name, 0.0))

    def turns(self, chosen: Sequence[Loader], caches: Sequence[str], number: int) -> Iterator[tuple[Loader, str]]:
        """Who loads in a round, each time in another order, so that nobody always comes after the same."""
        turns = list(itertools.product(chosen, caches))
        start = number % len(turns)
        for loader, cache in turns[start:] + turns[:start]:
            if self._wanted(loader.name, cache):
                yield loader, cache

    def goes_on(self, precision: float) -> bool:
        """Whether one more round is of use."""
        return any(
            self._wanted(*key) and width(summarize(*key, past, 1, None)) > precision for key, past in self.runs.items()
        )

    def _wanted(self, strategy: str, cache: str) -> bool:
        past = self.runs[strategy, cache]
        if isinstance(self.ready[strategy], str) or any(run.status == "failed" for run in past):
            return False
        return len(past) < 1 + VAIN_RUNS or any(run.counts for run in past)

    def rows(self, nbytes: int, limits: Mapping[str, Limit]) -> tuple[Row, ...]:
        """Every strategy that had its turn, or cannot have one."""
        rows = []
        for (strategy, cache), past in self.runs.items():
            reason = self.ready[strategy]
            if isinstance(reason, str):
                rows.append(Row(strategy, cache, "unavailable", reason))  # type: ignore[arg-type]
            elif past:
                rows.append(summarize(strategy, cache, past, nbytes, limits.get(cache)))
        return tuple(rows)

    def news(self, number: int, most: int) -> str:
        """How far it is."""
        if not number:
            return f"warmed up; up to {most} rounds follow"
        widths = {
            f"{strategy}, {cache}": width(summarize(strategy, cache, past, 1, None))
            for (strategy, cache), past in self.runs.items()
            if self._wanted(strategy, cache)
        }
        widest = max(widths, key=lambda name: widths[name], default=None)
        known = f": the least certain is {widest}, ±{widths[widest]:.0%}" if widest and widths[widest] < 1e9 else ""
        return f"round {number} of up to {most}{known}"


def now() -> str:
    """In UTC, as results have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def check_output(output: Path | None) -> None:
    """Raise UsageError for what cannot become a file."""
    hint = "--output is the file to write the result to"
    if output is not None and output.is_dir():
        raise UsageError(f"{output} is a directory", hint)
    if output is not None and not output.absolute().parent.is_dir():
        raise UsageError(f"{output.absolute().parent} does not exist", hint)


def opened(snapshot: Snapshot) -> tuple[Stored, Model]:
    """The tensors of a model that is to be timed, and what a result says of it. Raises UsageError if they are empty."""
    stored = open_stored(snapshot)
    if not stored.bytes:
        raise UsageError(f"the tensors of {snapshot.name} have no bytes", "there is nothing to time")
    known = all(file.sha256 for file in snapshot.files)
    return stored, Model(
        snapshot.name, snapshot.commit, own_format(snapshot), len(snapshot.files), len(stored.entries), stored.bytes,
        snapshot.digest if known else None,
    )  # fmt: skip


def _kept(created: str, name: str, progress: Progress) -> Path | None:
    """Where a result is kept that nobody asked to save, beside the last few; None if nothing can be kept."""
    directory = user_directory("cache") / "weightctl" / "bench"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for old in sorted(directory.glob("*.json"))[: 1 - KEPT_RESULTS]:
            old.unlink(missing_ok=True)
        sweep(directory, f".*{storage.TEMPORARY_SUFFIX}")
    except OSError:
        return None
    word = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:80]
    path = directory / f"{created.translate({ord(c): None for c in ':-'})}-{word}-{secrets.token_hex(2)}.json"
    progress.note(f"every run is saved to {path}")
    return path


@contextlib.contextmanager
def _directories(scratch: Path | None) -> Iterator[tuple[Path, Path]]:
    """One for what is gone at the end, and one for models that were converted: the same, unless they are to be kept."""
    where = scratch or Path(tempfile.gettempdir())
    with translated_os_errors(f"write to {where}"), temporary(Path(tempfile.gettempdir())) as passing:
        if scratch is not None:
            storage.make_directories(scratch.absolute())
        yield passing, scratch.absolute() if scratch is not None else passing


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
    return in_one_file(snapshot, path)


def in_one_file(snapshot: Snapshot, path: Path) -> Snapshot:
    """The model again, all its tensors being in the file `path`; what describes it is copied beside that."""
    files = [File(path.name, path.stat().st_size, path)]
    for file in snapshot.files:
        if file.path in ("config.json", "generation_config.json"):
            with storage.atomic_write(path.parent / file.path) as stream:
                storage.write_all(stream)(memoryview(file.source.read_bytes()))
            files.append(File(file.path, file.size, path.parent / file.path))
    return Snapshot(snapshot.name, path.parent, tuple(files))


def _fingerprint(snapshot: Snapshot) -> str:
    """Changes when a file of the model does."""
    keys = [(file.path, Identity.of(file.source).key) for file in snapshot.files]
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]
