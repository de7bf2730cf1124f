"""What each way of shipping a model costs in time, storage and transfer: arithmetic alone, told in docs/advise.md."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Name = Literal["container", "volume", "serialized"]
Bound = Literal["registry", "volume", "disk", "processor", "unpacking", "loading", "start", "serializing"]
Variable = Literal["registry", "volume", "cores"]

ENGINE_DOWNLOADS = 3
"""Layers that an engine fetches at once: the default of Docker (`max-concurrent-downloads`, dockerd's reference) and of
containerd (`max_concurrent_downloads`, its CRI plugin's configuration)."""

DIRTY_SHARE = 0.2
"""Of memory, what may wait to be written before writers wait for the disk (`vm.dirty_ratio`, the kernel's default)."""

CACHED_SHARE = 0.5
"""Of memory, what a model may take for its files to be still cached when they were just written. Half: an engine has
written it twice by then."""

CLOSE = 0.1
"""Cold starts that differ by less are called equal: the model itself is no better (docs/advise.md)."""

SLOWEST, FASTEST = 1e6, 1e11
"""Bytes a second between which a bandwidth's turning points are looked for."""

MOST_CORES = 128


@dataclass(frozen=True)
class Rates:
    """What a machine does, in bytes a second (`start`: seconds)."""

    read: float
    """Local files that are not cached, raw and in parallel."""
    write: float
    """Local files, until they are on the disk."""
    sha256: float
    """By one core."""
    unpack: float
    """By one core: what an engine fetches or unpacks, each a pass over the bytes that hashes and writes them. Where no
    engine was measured, a cached file read, hashed and written: no engine does less."""
    load: float
    """From the page cache to the device."""
    load_cold: float
    """The same of files that are not cached."""
    start: float
    """Of the process that loads: Python, its imports, the device."""
    file: float | None = None
    file_cold: float | None = None
    """As `load` and `load_cold`, of the serialized file."""
    serialize: float | None = None
    """Writing that file, reading it back and comparing it. These three are None where there is no serializer."""


@dataclass(frozen=True)
class Situation:
    """What is shipped, and where."""

    shipped_bytes: int
    """All files of the model."""
    loaded_bytes: int
    """Its weight files, of the format that is loaded."""
    layers: int
    """Of its image, the one of small files left out."""
    rates: Rates
    cores: int
    memory_bytes: int
    registry: float | None = None
    """Bytes a second that one replica gets from the registry, and gives it; None: it is never what takes the time."""
    volume: float | None = None
    """The same of the volume; None: as the local disk."""
    updates: int = 1
    """New versions a month; each is deployed once, and every replica starts from nothing with it."""
    replicas: int = 1


@dataclass(frozen=True)
class Part:
    """A stretch of time, and what takes it."""

    name: str
    seconds: float
    bound: Bound


@dataclass(frozen=True)
class Option:
    """One way of shipping."""

    name: Name
    start: tuple[Part, ...]
    """From nothing to weights on the device, one after the other."""
    deploy: tuple[Part, ...]
    """What a new version takes until it can be started."""
    storage_bytes: int
    """Of one version: in the registry or the volume, and unpacked at each replica."""
    transfer_bytes: int
    """A month: deployed, and fetched by every replica."""
    start_seconds: float = field(init=False)
    deploy_seconds: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "start_seconds", sum(part.seconds for part in self.start))
        object.__setattr__(self, "deploy_seconds", sum(part.seconds for part in self.deploy))


@dataclass(frozen=True)
class Turn:
    """Where another way becomes the one to choose, if this alone changes."""

    variable: Variable
    side: Literal["below", "from"]
    value: float
    """Bytes a second, or cores."""
    instead: Name


def options(situation: Situation) -> tuple[Option, ...]:
    """Every way that can be had; `serialized` only where its rates are known."""
    found = [_container(situation), _volume(situation)]
    serialized = _serialized(situation)
    return (*found, serialized) if serialized else tuple(found)


def recommend(found: Sequence[Option]) -> Option:
    """The quickest cold start; of those within `CLOSE` of it, the one that is deployed quickest."""
    least = min(option.start_seconds for option in found)
    close = [option for option in found if option.start_seconds <= least * (1 + CLOSE)]
    return min(close, key=lambda option: (option.deploy_seconds, option.start_seconds))


def turns(situation: Situation) -> tuple[Turn, ...]:
    """The nearest value to either side of each variable's own at which the recommendation becomes another."""
    steps = [SLOWEST * (FASTEST / SLOWEST) ** (step / 200) for step in range(201)]
    cores = [float(number) for number in range(1, MOST_CORES + 1)]
    ranges: tuple[tuple[Variable, float, list[float]], ...] = (
        ("registry", situation.registry or FASTEST, steps),
        ("volume", situation.volume or situation.rates.read, steps),
        ("cores", float(situation.cores), cores),
    )
    found = []
    for variable, now, values in ranges:
        found.append(_turn(situation, variable, now, [value for value in reversed(values) if value < now]))
        found.append(_turn(situation, variable, now, [value for value in values if value > now]))
    return tuple(turn for turn in found if turn)


def _turn(situation: Situation, variable: Variable, now: float, values: Sequence[float]) -> Turn | None:
    """The first of `values`, which lead away from `now`, at which the choice is another one, then halved in on."""

    def chosen(value: float) -> Name:
        changed = {variable: int(value) if variable == "cores" else value}
        return recommend(options(dataclasses.replace(situation, **changed))).name  # type: ignore[arg-type]

    here = chosen(now)
    other = next((value for value in values if chosen(value) != here), None)
    if other is None:
        return None
    place = values.index(other)
    same = values[place - 1] if place else now
    while variable != "cores" and max(same, other) > 1.0005 * min(same, other):
        middle = math.sqrt(same * other)
        same, other = (middle, other) if chosen(middle) == here else (same, middle)
    return Turn(variable, "below", same, chosen(other)) if other < now else Turn(variable, "from", other, chosen(other))


def engine_rate(size: int, layers: int, cores: int, seconds: float) -> float:
    """The `unpack` that explains a pull of `size` bytes that took so long and waited for neither network nor disk."""
    alone = Rates(read=1, write=math.inf, sha256=1, unpack=1, load=1, load_cold=1, start=0)
    return _pull(Situation(size, size, layers, alone, cores, 0)).seconds / seconds


def _container(s: Situation) -> Option:
    size, rates = s.shipped_bytes, s.rates
    loading = rates.load if size <= CACHED_SHARE * s.memory_bytes else rates.load_cold
    sending = [Part("send", size / s.registry, "registry")] if s.registry else []
    start = (_pull(s), Part("start", rates.start, "start"), Part("load", s.loaded_bytes / loading, "loading"))
    moved = size * (1 + s.replicas)
    return Option("container", start, (_hash(s), *sending), moved, s.updates * moved)


def _pull(s: Situation) -> Part:
    """The engine fetches `at_once` layers at a time and unpacks one after the other, as they come.

    A layer is written, hashed and unpacked, hashed again: twice the work of `unpack`, on the cores that there are.
    """
    size, rates = s.shipped_bytes, s.rates
    at_once = min(ENGINE_DOWNLOADS, s.layers)
    fetching = size / min(s.registry or math.inf, min(at_once, s.cores) * rates.unpack)
    unpacking = size / rates.unpack
    overlapped = max(unpacking + fetching * at_once / s.layers, fetching + unpacking / s.layers)
    processor = 2 * size / (s.cores * rates.unpack)
    disk = max(0.0, 2 * size - DIRTY_SHARE * s.memory_bytes) / rates.write
    network = s.registry is not None and size / s.registry >= max(fetching, unpacking)
    bounds: dict[Bound, float] = {
        "processor": processor,
        "disk": disk,
        "registry" if network else "unpacking": overlapped,
    }
    bound = max(reversed(bounds), key=lambda name: bounds[name])
    return Part("pull", bounds[bound], bound)


def _volume(s: Situation) -> Option:
    start = (Part("start", s.rates.start, "start"), _read(s, s.rates.load, s.rates.load_cold))
    return Option(
        "volume",
        start,
        (_hash(s), Part("write", s.shipped_bytes / _written(s), "volume")),
        s.shipped_bytes,
        s.updates * (s.shipped_bytes + s.replicas * s.loaded_bytes),
    )


def _serialized(s: Situation) -> Option | None:
    rates = s.rates
    if rates.file is None or rates.file_cold is None or rates.serialize is None:
        return None
    start = (Part("start", rates.start, "start"), _read(s, rates.file, rates.file_cold))
    writing = s.loaded_bytes / rates.serialize
    through = s.loaded_bytes / _written(s) + s.loaded_bytes / _given(s)
    bound: Bound = "volume" if through > writing else "serializing"
    return Option(
        "serialized",
        start,
        (Part("serialize", max(writing, through), bound),),
        s.loaded_bytes,
        s.updates * s.loaded_bytes * (1 + s.replicas),
    )


def _read(s: Situation, warm: float, cold: float) -> Part:
    """Read and loaded at once: no quicker than from the page cache, and no larger a share of what the volume gives
    than of what the local disk does."""
    rate = min(1.0, cold / s.rates.read) * _given(s)
    return Part("load", s.loaded_bytes / min(rate, warm), "volume" if rate < warm else "loading")


def _hash(s: Situation) -> Part:
    """A deployment reads and hashes first: the digest decides what has to be sent, and one disk is read and written."""
    rate = _hashing(s)
    return Part("hash", s.shipped_bytes / rate, "disk" if rate == s.rates.read else "processor")


def _hashing(s: Situation) -> float:
    return min(s.rates.read, min(s.cores, s.layers) * s.rates.sha256)


def _given(s: Situation) -> float:
    """What one reader gets from the volume."""
    return s.volume or s.rates.read


def _written(s: Situation) -> float:
    """What a writer gets, as much slower than a reader as on the local disk."""
    return _given(s) * min(1.0, s.rates.write / s.rates.read)
