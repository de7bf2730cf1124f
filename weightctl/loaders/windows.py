"""What one of several ranks brings of a model, window by window, and how each window is exchanged."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightctl.checkpoint import TensorEntry
from weightctl.loaders.blocks import ALIGNMENT, Block, Cast, Run, Shard, blocks_of, lay_out
from weightctl.loaders.buffers import Buffers
from weightctl.loaders.ranks import Team
from weightctl.loaders.safetensors import described
from weightctl.loaders.slices import Cut
from weightctl.model import File

if TYPE_CHECKING:
    import torch

PART_BYTES = 128 << 20
"""What each rank brings before it is exchanged: many blocks, so that reading goes on meanwhile, and seldom, since each
exchange costs Python as much as a few of them."""

STAGE_BYTES = 64 << 20
"""A tensor that is cut across its rows passes through so much of each rank's memory at a time. Where that has no room
for a row from every rank of the host, each reads its own stretches."""

STAGES = 3
"""While one is exchanged, the others are filled."""


@dataclass(frozen=True)
class Columns:
    """A rank's stretch of each of some rows that lie in a stage."""

    start: int
    """Of the first row, in the stage."""
    rows: int
    row_bytes: int
    first: int
    """The stretch's first byte in a row."""
    last: int
    """The byte behind its last."""
    buffer: int
    place: int
    """Where the stretches go, one after the other."""

    def views(self, stage: torch.Tensor, buffers: Buffers) -> tuple[torch.Tensor, torch.Tensor]:
        """Where they go, and they themselves, alike in shape, in words as long as they can be."""
        import torch

        place = buffers[self.buffer][self.place : self.place + self.rows * (self.last - self.first)]
        word = math.gcd(8, self.start, self.first, self.last, self.row_bytes, self.place)
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[word]
        rows = stage[self.start : self.start + self.rows * self.row_bytes].view(integer).view(self.rows, -1)
        stretch = rows[:, self.first // word : self.last // word]
        return place.view(integer).view(stretch.shape), stretch


@dataclass(frozen=True)
class Exchange:
    """Each rank of a host has brought an equal part of a stretch of a buffer, and gets the others' parts."""

    buffer: int
    first: int
    last: int
    """One byte behind the stretch."""
    columns: tuple[Columns, ...] = ()
    """What a rank then keeps of it, where the buffer is but a stage."""


@dataclass(frozen=True)
class Window:
    """What a rank brings from one file into one buffer, before it is exchanged."""

    file: File
    buffer: int
    blocks: tuple[Block, ...]
    exchange: Exchange | None = None
    """None for what the rank keeps for itself."""
    after: int = -1
    """The number of the window whose exchange must be over before, since it has the same stage."""


@dataclass(frozen=True)
class Asked:
    """What all ranks are to load, and where to on this one."""

    entries: tuple[TensorEntry, ...]
    device: str
    dtypes: Mapping[str, torch.dtype]
    """To convert."""
    cuts: Mapping[str, Cut]

    def itemsize(self, entry: TensorEntry) -> int:
        """Bytes of an element, when it has arrived."""
        return self.dtypes.get(entry.name, described(entry).dtype).itemsize

    def is_dealt(self, entry: TensorEntry, team: Team) -> bool:
        """Whether the ranks bring whole rows of it, because their stretches are too short to be read one by one."""
        cut = self.cuts[entry.name]
        return cut.rows > 1 and 0 < team.size * cut.width * self.itemsize(entry) <= STAGE_BYTES


def schedule(asked: Asked, team: Team, block_bytes: int) -> tuple[list[Shard], list[Window]]:
    """The buffers that a rank needs, and the windows that it brings, in their order.

    Those that are exchanged are alike on all ranks of the host. Raises UsageError for a dtype that torch has not.
    """
    shards: list[Shard] = []
    windows: list[Window] = []
    for file, group in itertools.groupby(asked.entries, key=lambda entry: entry.file):
        entries = list(group)
        for shard in lay_out([entry for entry in entries if entry.name not in asked.cuts], asked.dtypes):
            whole = dataclasses.replace(shard, nbytes=shard.nbytes + -shard.nbytes % (ALIGNMENT * team.size))
            shards.append(whole)
            windows += _gathers(whole, len(shards) - 1, team, block_bytes)
        cut = [entry for entry in entries if entry.name in asked.cuts]
        parts = {e.name: asked.cuts[e.name].part(team.rank, read=not asked.is_dealt(e, team)) for e in cut}
        for shard in lay_out(cut, asked.dtypes, parts):
            shards.append(shard)
            windows.append(Window(file, len(shards) - 1, tuple(blocks_of(shard.runs, block_bytes))))
            places = [
                (e, tensor.place) for e, tensor in zip(cut, shard.tensors, strict=True) if asked.is_dealt(e, team)
            ]
            windows += _deals(places, asked, len(shards) - 1, team, block_bytes)
    return _with_stages(shards, windows)


def _gathers(shard: Shard, buffer: int, team: Team, block_bytes: int) -> Iterator[Window]:
    if team.size == 1:
        yield Window(shard.file, buffer, tuple(blocks_of(shard.runs, block_bytes)))
        return
    for first in range(0, shard.nbytes, team.size * PART_BYTES):
        last = min(first + team.size * PART_BYTES, shard.nbytes)
        part = (last - first) // team.size
        begin = first + team.index * part
        runs = [run for whole in shard.runs if (run := whole.within(begin, begin + part))]
        yield Window(shard.file, buffer, tuple(blocks_of(runs, block_bytes)), Exchange(buffer, first, last))


@dataclass(frozen=True)
class _Rows:
    """Some rows of a tensor that pass through a stage, the same number of them from each rank, as far as there are."""

    entry: TensorEntry
    cast: Cast | None
    first: int
    count: int
    share: int
    read_bytes: int
    """Of a row in the file."""
    row_bytes: int
    """When it has arrived."""
    stretch: tuple[int, int]
    """This rank's first byte of a row that has arrived, and the one behind its last."""
    place: int
    """Where this rank's stretch of the first row goes."""

    @property
    def part_bytes(self) -> int:
        """What each rank's rows take in the stage."""
        nbytes = self.share * self.row_bytes
        return nbytes + -nbytes % ALIGNMENT

    def of(self, index: int) -> int:
        """How many come from the rank that is `index` on its host."""
        return max(0, min(self.share, self.count - index * self.share))

    def run(self, index: int, start: int) -> Run:
        """What that rank reads, to `start` in the stage."""
        offset = self.entry.offset + (self.first + index * self.share) * self.read_bytes
        return Run(offset, self.of(index) * self.read_bytes, start, self.cast)

    def columns(self, index: int, start: int, buffer: int) -> Columns:
        """What this rank keeps of what that one has brought to `start`."""
        first, last = self.stretch
        place = self.place + index * self.share * (last - first)
        return Columns(start, self.of(index), self.row_bytes, first, last, buffer, place)


def _deals(
    dealt: Sequence[tuple[TensorEntry, int]], asked: Asked, buffer: int, team: Team, block_bytes: int
) -> Iterator[Window]:
    """Of tensors of one file, each with its place in the buffer: small ones go together, since an exchange takes
    milliseconds."""
    together: list[_Rows] = []
    for rows in itertools.chain.from_iterable(_in_stages(entry, place, asked, team) for entry, place in dealt):
        if together and sum(one.part_bytes for one in (*together, rows)) > STAGE_BYTES // team.size:
            yield _dealt(together, buffer, team, block_bytes)
            together = []
        together.append(rows)
    if together:
        yield _dealt(together, buffer, team, block_bytes)


def _in_stages(entry: TensorEntry, place: int, asked: Asked, team: Team) -> Iterator[_Rows]:
    cut, tensor = asked.cuts[entry.name], described(entry)
    cast = Cast(tensor.dtype, asked.dtypes[entry.name]) if entry.name in asked.dtypes else None
    size = asked.itemsize(entry)
    read_bytes, row_bytes = cut.width * tensor.dtype.itemsize, cut.width * size
    start, stop = (element * size for element in cut.stretch(team.rank))
    each = STAGE_BYTES // team.size // row_bytes
    for first in range(0, cut.rows, team.size * each):
        count = min(team.size * each, cut.rows - first)
        target = place + first * (stop - start)
        yield _Rows(entry, cast, first, count, -(-count // team.size), read_bytes, row_bytes, (start, stop), target)


def _dealt(together: Sequence[_Rows], buffer: int, team: Team, block_bytes: int) -> Window:
    *starts, part = itertools.accumulate((rows.part_bytes for rows in together), initial=0)
    runs = [rows.run(team.index, team.index * part + start) for rows, start in zip(together, starts, strict=True)]
    columns = tuple(
        rows.columns(index, index * part + start, buffer)
        for rows, start in zip(together, starts, strict=True)
        for index in range(team.size)
        if rows.of(index)
    )
    exchange = Exchange(-1, 0, team.size * part, columns)
    return Window(together[0].entry.file, -1, tuple(blocks_of(runs, block_bytes)), exchange)


def _with_stages(shards: list[Shard], windows: list[Window]) -> tuple[list[Shard], list[Window]]:
    """With buffers for the rows of which each rank keeps a part, used in turn."""
    found = list(windows)
    staged = [(n, window.exchange) for n, window in enumerate(windows) if window.exchange and window.buffer < 0]
    for turn, (number, exchange) in enumerate(staged):
        stage = len(shards) + turn % STAGES
        after = staged[turn - STAGES][0] if turn >= STAGES else -1
        found[number] = dataclasses.replace(
            windows[number], buffer=stage, exchange=dataclasses.replace(exchange, buffer=stage), after=after
        )
    nbytes = max((exchange.last for _, exchange in staged), default=0)
    stages = [Shard(windows[number].file, nbytes, (), ()) for number, _ in staged[:STAGES]]
    return [*shards, *stages], found
