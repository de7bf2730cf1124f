"""What one of several ranks brings of a model, window by window, and how each window is exchanged."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weightctl.checkpoint import TensorEntry
from weightctl.loaders.blocks import ALIGNMENT, Block, Cast, Layout, Run, Shard, blocks_of, lay_out
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

STAGE_BYTES = 32 << 20
"""A tensor that is cut across its rows passes through so much of a rank's memory at a time. Of rows that are longer,
each rank reads its own stretches."""

DEPTH = 3
"""Exchanges under way at once. Each has two stages, if it needs any."""


@dataclass(frozen=True)
class Gather:
    """Each rank has brought an equal part of a stretch of a buffer, and gets the others' parts."""

    buffer: int
    first: int
    last: int
    """One byte behind the stretch."""

    def parts(self, buffers: Buffers, team: Team) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """What goes to each rank of the host, and where what each sends goes: its own is there already."""
        parts = buffers[self.buffer][self.first : self.last].view(team.size, -1).unbind()
        return [parts[team.index]] * team.size, parts


@dataclass(frozen=True)
class Deal:
    """Each rank has brought whole rows of a tensor to a stage, and gets its stretch of everyone's rows."""

    stage: int
    """The buffer that the rows lie in. The next is for what the other ranks get of them."""
    rows: tuple[int, ...]
    """That each rank of the host brings."""
    row_bytes: int
    stretches: tuple[tuple[int, int], ...]
    """Of a row, for each rank of the host: its first byte, and the one behind its last."""
    buffer: int
    place: int
    """Where this rank's stretches go, row after row."""

    def parts(self, buffers: Buffers, team: Team) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """What goes to each rank of the host, and where what each sends goes: its own is brought there here."""
        mine, widths = self.rows[team.index], [last - first for first, last in self.stretches]
        sent = _in_turn(buffers[self.stage + 1], 0, [mine * width for width in widths])
        received = _in_turn(buffers[self.buffer], self.place, [count * widths[team.index] for count in self.rows])
        sent[team.index] = received[team.index]
        rows = buffers[self.stage][: mine * self.row_bytes].view(mine, self.row_bytes)
        for (first, last), part in zip(self.stretches, sent, strict=True):
            if part.numel():
                _copy_columns(rows, first, last, part)
        return sent, received


def _in_turn(buffer: torch.Tensor, place: int, lengths: Sequence[int]) -> list[torch.Tensor]:
    ends = list(itertools.accumulate(lengths, initial=place))
    return [buffer[first:last] for first, last in itertools.pairwise(ends)]


def _copy_columns(rows: torch.Tensor, first: int, last: int, to: torch.Tensor) -> None:
    """Copy the bytes from `first` to before `last` of each row to `to`, in words as long as they can be."""
    import torch

    word = math.gcd(8, first, last, rows.shape[1], int(to.storage_offset()))
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[word]
    stretch = rows.view(integer)[:, first // word : last // word]
    to.view(integer).view(stretch.shape).copy_(stretch)


@dataclass(frozen=True)
class Window:
    """What a rank brings from one file into one buffer, before it is exchanged."""

    file: File
    buffer: int
    blocks: tuple[Block, ...]
    exchange: Gather | Deal | None = None
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

    def is_dealt(self, entry: TensorEntry) -> bool:
        """Whether the ranks bring whole rows of it, because their stretches are too short to be read one by one."""
        cut = self.cuts[entry.name]
        return cut.rows > 1 and 0 < cut.width * self.itemsize(entry) <= STAGE_BYTES


def schedule(asked: Asked, team: Team, block_bytes: int) -> tuple[list[Shard], list[Window]]:
    """The buffers that a rank needs, and the windows that it brings, in their order.

    Those that are exchanged are alike on all ranks of the host. Raises UsageError for a dtype that torch has not.
    """
    shards: list[Shard] = []
    windows: list[Window] = []
    for file, group in itertools.groupby(asked.entries, key=lambda entry: entry.file):
        entries = list(group)
        for layout in lay_out([entry for entry in entries if entry.name not in asked.cuts], asked.dtypes):
            shards.append(layout.shard(multiple=ALIGNMENT * team.size))
            windows += _gathers(layout, len(shards) - 1, shards[-1].nbytes, team, block_bytes)
        cut = [entry for entry in entries if entry.name in asked.cuts]
        parts = {e.name: asked.cuts[e.name].part(team.rank, read=not asked.is_dealt(e)) for e in cut}
        for layout in lay_out(cut, asked.dtypes, parts):
            shards.append(layout.shard())
            windows.append(Window(file, len(shards) - 1, tuple(blocks_of(layout.runs, block_bytes))))
            for entry, placed in zip(cut, layout.tensors, strict=True):
                if asked.is_dealt(entry):
                    windows += _deals(entry, asked, len(shards) - 1, placed.place, team, block_bytes)
    return _with_stages(shards, windows)


def _gathers(layout: Layout, buffer: int, nbytes: int, team: Team, block_bytes: int) -> Iterator[Window]:
    if team.size == 1:
        yield Window(layout.file, buffer, tuple(blocks_of(layout.runs, block_bytes)))
        return
    for first in range(0, nbytes, team.size * PART_BYTES):
        last = min(first + team.size * PART_BYTES, nbytes)
        part = (last - first) // team.size
        begin = first + team.index * part
        runs = [run for whole in layout.runs if (run := whole.within(begin, begin + part))]
        yield Window(layout.file, buffer, tuple(blocks_of(runs, block_bytes)), Gather(buffer, first, last))


def _deals(entry: TensorEntry, asked: Asked, buffer: int, place: int, team: Team, block_bytes: int) -> Iterator[Window]:
    cut, tensor = asked.cuts[entry.name], described(entry)
    cast = Cast(tensor.dtype, asked.dtypes[entry.name]) if entry.name in asked.dtypes else None
    size, row = asked.itemsize(entry), cut.width * asked.itemsize(entry)
    stretches = [cut.stretch(rank) for rank in team.ranks]
    own = stretches[team.index][1] - stretches[team.index][0]
    each = max(1, STAGE_BYTES // row)
    for first in range(0, cut.rows, team.size * each):
        count = min(team.size * each, cut.rows - first)
        share = -(-count // team.size)
        rows = tuple(max(0, min(share, count - index * share)) for index in range(team.size))
        offset = entry.offset + (first + team.index * share) * cut.width * tensor.dtype.itemsize
        run = Run(offset, rows[team.index] * cut.width * tensor.dtype.itemsize, 0, cast)
        deal = Deal(
            -1, rows, row, tuple((a * size, b * size) for a, b in stretches), buffer, place + first * own * size
        )
        yield Window(entry.file, -1, tuple(blocks_of([run], block_bytes)), deal)


def _with_stages(shards: list[Shard], windows: list[Window]) -> tuple[list[Shard], list[Window]]:
    """With buffers for the rows that are dealt out, used in turn."""
    found = list(windows)
    deals = [(number, window.exchange) for number, window in enumerate(windows) if isinstance(window.exchange, Deal)]
    for turn, (number, deal) in enumerate(deals):
        stage = len(shards) + turn % DEPTH * 2
        after = deals[turn - DEPTH][0] if turn >= DEPTH else -1
        found[number] = dataclasses.replace(
            windows[number], buffer=stage, exchange=dataclasses.replace(deal, stage=stage), after=after
        )
    nbytes = max((max(deal.rows) * deal.row_bytes for _, deal in deals), default=0)
    stages = [Shard(Path(), 0, nbytes, (), ())] * (2 * min(DEPTH, len(deals)))
    return [*shards, *stages], found
