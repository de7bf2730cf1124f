"""What to read from which file, in blocks, and where in memory each byte of them belongs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from weightctl.checkpoint import TensorEntry
from weightctl.loaders.safetensors import described
from weightctl.model import File

if TYPE_CHECKING:
    import torch

PAGE_BYTES = 4096
"""Blocks begin at a multiple of it in their file, as O_DIRECT asks for."""

ALIGNMENT = 256
"""What a tensor's place is a multiple of: cudaMalloc gives no less, and kernels choose themselves by it."""

GAP_BYTES = 128 << 10
"""Unwanted bytes up to this are read along: cheaper than one more read."""


@dataclass(frozen=True)
class Cast:
    """A conversion on the way."""

    source: torch.dtype
    target: torch.dtype


class Piece(NamedTuple):
    """Bytes of a block that go to one place. (A tuple, like Block: of a large model there are thousands to make.)"""

    start: int
    """Of its first byte, in the block."""
    nbytes: int
    place: int
    """Where it goes: the byte in the shard's buffer."""
    cast: Cast | None = None
    """Its bytes are whole elements, and more or fewer when they arrive."""

    @property
    def end(self) -> int:
        """Where it ends in the block."""
        return self.start + self.nbytes


class Block(NamedTuple):
    """Bytes of one file that are read at once."""

    offset: int
    """Of its first byte, in the file: a multiple of PAGE_BYTES."""
    nbytes: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Placed:
    """One tensor, as it lies in its shard's buffer at the end."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    place: int
    """A multiple of ALIGNMENT."""
    nbytes: int


@dataclass(frozen=True)
class Part:
    """What is wanted of a tensor."""

    shape: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    """The first element and how many, in the tensor's own order: they follow one another at its place."""


@dataclass(frozen=True)
class Run:
    """Bytes of a file, and where they go."""

    offset: int
    nbytes: int
    place: int
    cast: Cast | None

    def within(self, first: int, last: int) -> Run | None:
        """What of it goes to the places from `first` to before `last`, neither of which divides an element."""
        source, target = (self.cast.source.itemsize, self.cast.target.itemsize) if self.cast else (1, 1)
        first, last = max(first, self.place), min(last, self.place + self.nbytes // source * target)
        if first >= last:
            return None
        skipped = (first - self.place) // target * source
        return Run(self.offset + skipped, (last - first) // target * source, first, self.cast)


@dataclass(frozen=True)
class Shard:
    """One file of a model, and the one buffer that its tensors are views of."""

    file: File
    nbytes: int
    """Of the buffer: a multiple of ALIGNMENT."""
    tensors: tuple[Placed, ...]
    runs: tuple[Run, ...]
    """What goes there, ordered by offset."""


def lay_out(
    entries: Iterable[TensorEntry],
    dtypes: Mapping[str, torch.dtype] | None = None,
    parts: Mapping[str, Part] | None = None,
) -> list[Shard]:
    """Find a place for each of `entries` (ordered by file, then by offset), or for that of it which `parts` names.

    Tensors that follow one another in the file do so in the buffer, so that one copy brings many, except where the
    next place would be misaligned. Raises UsageError for a dtype that torch has not.
    """
    shards = []
    for file, group in itertools.groupby(entries, key=lambda entry: entry.file):
        tensors, runs, end = [], [], 0
        for entry in group:
            tensor = described(entry)
            cast = Cast(tensor.dtype, dtypes[entry.name]) if dtypes and entry.name in dtypes else None
            dtype = cast.target if cast else tensor.dtype
            part = parts[entry.name] if parts else Part(tensor.shape, ((0, math.prod(tensor.shape)),))
            end += -end % ALIGNMENT
            tensors.append(Placed(entry.name, dtype, part.shape, end, math.prod(part.shape) * dtype.itemsize))
            place = end
            for first, count in part.spans:
                offset = entry.offset + first * tensor.dtype.itemsize
                runs.append(Run(offset, count * tensor.dtype.itemsize, place, cast))
                place += count * dtype.itemsize
            end += tensors[-1].nbytes
        shards.append(Shard(file, end + -end % ALIGNMENT, tuple(tensors), tuple(runs)))
    return shards


def blocks_of(runs: Iterable[Run], block_bytes: int) -> Iterator[Block]:
    """The blocks that bring `runs` (ordered by offset), each of up to `block_bytes` (a multiple of PAGE_BYTES, two at
    least)."""
    pieces: list[Piece] = []
    first = end = 0  # of the block that is being filled, in the file
    for run in _joined(runs):
        at, stop, place, cast = run.offset, run.offset + run.nbytes, run.place, run.cast
        while at < stop:
            if pieces and at - end > GAP_BYTES:
                yield Block(first, end - first, tuple(pieces))
                pieces = []
            if not pieces:
                first = at // PAGE_BYTES * PAGE_BYTES
            count = min(stop, first + block_bytes) - at
            if cast and at + count < stop:
                count -= count % cast.source.itemsize
            if count <= 0:
                yield Block(first, end - first, tuple(pieces))
                pieces = []
                continue
            pieces.append(Piece(at - first, count, place, cast))
            at = end = at + count
            place += count if cast is None else count // cast.source.itemsize * cast.target.itemsize
    if pieces:
        yield Block(first, end - first, tuple(pieces))


def _joined(runs: Iterable[Run]) -> Iterator[Run]:
    """Those that follow one another in the file and in memory as one, so that one copy brings them."""
    last: Run | None = None
    for run in runs:
        if last and not (last.cast or run.cast) and run.offset - last.offset == run.place - last.place == last.nbytes:
            last = Run(last.offset, last.nbytes + run.nbytes, last.place, None)
        else:
            if last:
                yield last
            last = run
    if last:
        yield last
