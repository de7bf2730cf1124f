"""What a bench found, as plain data, and the file it is kept in: JSON of a version, described in docs/bench.md."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from weightctl import storage
from weightctl.errors import UsageError, translated_os_errors

SCHEMA = 1
"""The version of the file. A reader of it ignores keys that it does not know; another version may mean other things."""

MAX_FILE_BYTES = 64 << 20

LEAST, MOST = 1e-12, 1e18
"""A time is longer, and every number is smaller, so that what is reckoned from them stays a number."""

PHASES = ("start", "imports", "device", "loading", "construction")
"""What the time of a process goes to, in this order: Python's own start, imports, bringing up the device, the load, and
with `Settings.construct` a model around the tensors."""


@dataclass(frozen=True)
class Run:
    """One load in a process of its own."""

    round: int
    """0 is the warm-up."""
    status: Literal["ok", "failed"]
    reason: str | None = None
    """Why it failed."""
    mark: str | None = None
    """Why it is not counted though it did not fail: it was the warm-up, or the page cache was not as it should be."""
    seconds: float | None = None
    """From the call until every byte is on the device; only of a load that was right."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds by the names in `PHASES`; `seconds` is that of `loading`."""
    residency: float | None = None
    """The share of the model's files that was in the page cache when the clock started, from 0 to 1."""
    peak_host_bytes: int | None = None
    """The process's largest resident set, its libraries included."""
    peak_pinned_bytes: int | None = None
    """Page-locked memory; None where the strategy's library does not tell."""
    peak_device_bytes: int | None = None

    @property
    def counts(self) -> bool:
        """Whether its time goes into the row."""
        return self.status == "ok" and self.mark is None


@dataclass(frozen=True)
class Interval:
    """Where the true median lies, in seconds."""

    low: float
    high: float
    confidence: float
    """How often such an interval holds it: what was asked for or more; less, from few runs."""


@dataclass(frozen=True)
class Row:
    """One strategy with one state of the page cache. The first ten keys are a contract."""

    strategy: str
    cache: Literal["warm", "cold"]
    status: Literal["ok", "unavailable", "failed"]
    reason: str | None = None
    seconds: tuple[float, ...] = ()
    """Of every run that counts, in their order."""
    median_seconds: float | None = None
    bytes_per_second: float | None = None
    """Of the model's tensors, at the median."""
    verified: bool = False
    """Whether every run loaded the model's own bytes."""
    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None
    peak_pinned_bytes: int | None = None
    """Each peak is the largest of all runs."""
    interval: Interval | None = None
    share: float | None = None
    """The least time possible, divided by the median: 1 is as fast as the machine."""
    outliers: tuple[float, ...] = ()
    """Those of `seconds` that lie far from the rest. They stay counted: a median hardly feels them."""
    residency: float | None = None
    """The median over the runs that count."""
    phases: dict[str, float] = field(default_factory=dict)
    """The median of each phase over the runs that count."""
    runs: tuple[Run, ...] = ()
    """Every run, the warm-up and those that do not count too."""


@dataclass(frozen=True)
class Stage:
    """A stretch of a deployment or of a cold start."""

    name: str
    """`bake`, `push`, `serialize`; `pull`, `unpack`, `copy`, `start`, `load`."""
    bytes: int
    """What it moves; 0 where it moves nothing."""
    seconds: float


@dataclass(frozen=True)
class ColdStart:
    """From nothing to weights on the device, once."""

    round: int
    status: Literal["ok", "failed"]
    reason: str | None = None
    mark: str | None = None
    """Why it is not counted though it did not fail: its files were in the page cache."""
    stages: tuple[Stage, ...] = ()
    """One after the other."""

    @property
    def seconds(self) -> float:
        """Of all its stages."""
        return sum(stage.seconds for stage in self.stages)


@dataclass(frozen=True)
class Scenario:
    """One way of shipping a model, with all its cold starts."""

    scenario: Literal["image", "volume", "file", "model"]
    way: str
    """The engine that pulls the image, or what is done with the files: `in place`, `copied`."""
    jobs: int | None
    """Layers that the engine was told to fetch at once; None: it was told nothing."""
    status: Literal["ok", "unavailable", "failed"]
    reason: str | None = None
    strategy: str | None = None
    """How the weights are loaded in the end."""
    deploy: tuple[Stage, ...] = ()
    """What was done once, before the first cold start."""
    seconds: tuple[float, ...] = ()
    """Of every cold start that counts."""
    median_seconds: float | None = None
    interval: Interval | None = None
    stages: tuple[Stage, ...] = ()
    """The median of each stage over the cold starts that count."""
    starts: tuple[ColdStart, ...] = ()
    """All of them."""
    layers: int | None = None
    """Of the image, the one of small files left out."""


@dataclass(frozen=True)
class Limit:
    """The least time in which this machine could load this model, were reading and copying perfectly overlapped."""

    cache: Literal["warm", "cold"]
    seconds: float
    bytes_per_second: float
    """Of the model's tensors, in that time."""
    bound: Literal["reading", "mapping", "copying"]
    """What takes that long."""


@dataclass(frozen=True)
class Model:
    """What was loaded."""

    name: str
    commit: str | None
    format: str
    files: int
    tensors: int
    bytes: int
    """Of the tensors, the tied ones counted once."""
    digest: str | None = None
    """SHA-256 over all its files; None where it is not known."""


@dataclass(frozen=True)
class Settings:
    """What was asked for."""

    device: str
    strategies: tuple[str, ...]
    caches: tuple[str, ...]
    runs: int
    """At most, of each row."""
    precision: float
    """The rounds end when every interval reaches no farther than this share of its median to either side."""
    confidence: float
    timeout: int
    workers: int
    drop_caches: bool = False
    construct: bool = False
    """Whether a model was built around the tensors, after each load."""


@dataclass(frozen=True)
class Change:
    """What became of one row since an older bench."""

    strategy: str
    cache: Literal["warm", "cold"]
    verdict: Literal["same", "slower", "faster", "unclear", "broken", "fixed", "added", "gone"]
    """`unclear`: too few runs to tell. `broken`, `fixed`: it had times only before, or only now. The last two: a row
    that only one of the benches has."""
    before_seconds: float | None = None
    """The medians."""
    after_seconds: float | None = None
    ratio: float | None = None
    """How many times as long a run takes now as then."""
    ratio_low: float | None = None
    ratio_high: float | None = None
    """Where the true ratio lies."""


@dataclass(frozen=True)
class Comparison:
    """This bench beside an older one."""

    created: str
    """When the older one began."""
    changes: tuple[Change, ...]
    differences: tuple[str, ...] = ()
    """What else is not the same (`gpu: A → B`), and may be the reason."""


@dataclass(frozen=True)
class BenchResult:
    """Every raw time, with what is needed to read it."""

    schema: int
    created: str
    """When it began, in UTC: `2026-11-22T04:00:00Z`."""
    environment: dict[str, str | int | float | None]
    """Versions, processors, memory, device, bus, filesystem: nothing that names a host, a user or a path."""
    ceilings: dict[str, float]
    """Bytes a second, the best of the rounds: `warm_read` and `cold_read` (of those asked for), `warm_map` (CPU) and
    `host_to_device` (CUDA)."""
    limits: tuple[Limit, ...]
    """One of each cache state."""
    model: Model
    settings: Settings
    results: tuple[Row, ...]
    complete: bool = True
    """Whether the bench came to its end; not, if it was interrupted or is still going on."""
    comparison: Comparison | None = None
    scenarios: tuple[Scenario, ...] = ()
    """Whole cold starts, where they were asked for instead of strategies."""

    @property
    def device(self) -> str:
        """What it loaded to: a GPU by its name, or `cpu`."""
        return str(self.environment.get("gpu") or self.environment.get("device") or self.settings.device)

    def limit(self, cache: str) -> Limit | None:
        """That of a cache state."""
        return next((limit for limit in self.limits if limit.cache == cache), None)

    def row(self, strategy: str, cache: str) -> Row | None:
        """That of a strategy and a cache state."""
        return next((row for row in self.results if (row.strategy, row.cache) == (strategy, cache)), None)


def write_result(result: BenchResult, path: Path) -> None:
    """Write it as JSON, in one step."""
    path = path.absolute()
    encoded = json.dumps(asdict(result), indent=2).encode() + b"\n"
    with (
        translated_os_errors(f"write {path}"),
        storage.staging_beside(path) as staging,
        storage.atomic_write(path, staging) as stream,
    ):
        storage.write_all(stream)(memoryview(encoded))


def read_result(path: Path) -> BenchResult:
    """Read a file that `write_result` wrote. Raises UsageError for any other, with what is wrong in it."""
    with translated_os_errors(f"read {path}"), path.open("rb") as stream:
        data = stream.read(MAX_FILE_BYTES + 1)
    try:
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"it is larger than {MAX_FILE_BYTES} bytes")
        return parse_result(json.loads(data.decode(), parse_constant=_no_number))
    except (ArithmeticError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} is no result of weightctl bench: {str(error)[:200]}", "weightctl bench --output FILE writes one"
        ) from error


def parse_result(value: object) -> BenchResult:
    """The result in a JSON value. Raises ValueError, naming the place, for what cannot be one."""
    schema = value.get("schema") if isinstance(value, dict) else None
    if type(schema) is not int:
        raise ValueError("it has no schema")
    if schema != SCHEMA:
        raise ValueError(f"its schema is {schema}, this weightctl reads {SCHEMA}")
    result = _parsed(BenchResult, value, "it")
    for row in result.results:
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,63}", row.strategy):
            raise ValueError(f"{row.strategy[:80]!r} is no name of a strategy")
        _check_times(row, f"{row.strategy}, {row.cache}")
    for scenario in result.scenarios:
        _check_times(scenario, f"{scenario.scenario}, {scenario.way[:80]}")
    if len({(row.strategy, row.cache) for row in result.results}) != len(result.results):
        raise ValueError("it has a row twice")
    return result


def _check_times(found: Row | Scenario, what: str) -> None:
    if (found.status == "ok") != bool(found.seconds) or (found.median_seconds is None) != (not found.seconds):
        raise ValueError(f"{what} is {found.status} with {len(found.seconds)} times")
    if found.seconds and min((*found.seconds, found.median_seconds or 0)) < LEAST:
        raise ValueError(f"{what} took no time")


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number")


T = TypeVar("T")


def _parsed(kind: type[T], value: object, where: str) -> T:
    """`value` as the dataclass `kind`: every field checked against its annotation, unknown keys left out."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no object")
    hints = typing.get_type_hints(kind)
    found: dict[str, Any] = {}
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        if item.name in value:
            found[item.name] = _value(hints[item.name], value[item.name], item.name)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where} has no {item.name}")
    return kind(**found)


def _value(hint: Any, value: object, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _parsed(hint, value, where)
    if origin is types.UnionType:
        if value is None and types.NoneType in arguments:
            return None
        rest = [argument for argument in arguments if argument is not types.NoneType]
        kind = next((argument for argument in rest if argument is type(value)), rest[-1])
        return _value(kind, value, where)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_value(arguments[0], item, where) for item in value)
    if origin is dict and isinstance(value, dict):
        return {key: _value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and type(value) in (int, float) and 0 <= (number := float(value)) < MOST:  # type: ignore[arg-type]
        return number
    if hint in (int, bool, str) and type(value) is hint and not (hint is int and not 0 <= value < 1 << 63):  # type: ignore[operator]
        return value
    raise ValueError(f"{where} is {json.dumps(value)[:60]}")
