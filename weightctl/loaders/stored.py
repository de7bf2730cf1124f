"""A model's tensors as its files hold them: what every format is written from and every load compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from weightctl.progress import Task

if TYPE_CHECKING:
    import torch

BATCH_BYTES = 64 << 20
"""Read at a time (or one tensor, where that is larger): bounds the memory of whoever goes through a whole model."""


@dataclass(frozen=True)
class Entry:
    """One tensor, not read yet."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Stored:
    """A model's tensors, which `read` fetches by name."""

    entries: tuple[Entry, ...]
    read: Callable[[Sequence[str]], dict[str, torch.Tensor]]
    ties: Mapping[str, str] = field(default_factory=dict)
    """Name → the name before it that shares its memory."""

    @property
    def bytes(self) -> int:
        """Of all tensors, the tied ones counted once."""
        return sum(entry.nbytes for entry in self.entries if entry.name not in self.ties)

    def batches(self) -> Iterator[list[Entry]]:
        """All entries in order, a few at a time: up to `BATCH_BYTES`."""
        batch: list[Entry] = []
        size = 0
        for entry in self.entries:
            if batch and size + entry.nbytes > BATCH_BYTES:
                yield batch
                batch, size = [], 0
            batch.append(entry)
            size += entry.nbytes
        if batch:
            yield batch

    def without(self, names: Collection[str]) -> Stored:
        """All but the tensors of these names."""
        ties = {name: first for name, first in self.ties.items() if name not in names}
        return Stored(tuple(entry for entry in self.entries if entry.name not in names), self.read, ties)

    def cast(self, dtypes: Mapping[str, torch.dtype]) -> Stored:
        """With the tensors named in `dtypes` converted as they are read."""

        def read(names: Sequence[str]) -> dict[str, torch.Tensor]:
            return {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in self.read(names).items()}

        def converted(entry: Entry) -> Entry:
            dtype = dtypes.get(entry.name, entry.dtype)
            return dataclasses.replace(entry, dtype=dtype, nbytes=entry.nbytes // entry.dtype.itemsize * dtype.itemsize)

        return Stored(tuple(converted(entry) for entry in self.entries), read, self.ties)


def stored(tensors: Mapping[str, torch.Tensor]) -> Stored:
    """Tensors that are in memory (or mapped) already. Tied are those with the same memory, shape and strides."""
    entries, ties, first = [], {}, dict[object, str]()
    for name, tensor in tensors.items():
        entries.append(Entry(name, tensor.dtype, tuple(tensor.shape), tensor.nbytes))
        if tensor.nbytes:
            place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if first.setdefault(place, name) != name:
                ties[name] = first[place]
    return Stored(tuple(entries), lambda names: {name: tensors[name] for name in names}, ties)


def difference(expected: Stored, actual: Stored, task: Task = Task()) -> str | None:  # noqa: B008
    """What is other in `actual`, in words; None if every tensor's name, dtype, shape and bytes are equal.

    Compares on the device of `actual`.
    """
    if other := misfit(expected.entries, actual.entries):
        return other
    for batch in expected.batches():
        if damaged := _damaged([entry.name for entry in batch], expected, actual):
            return f"the bytes of {damaged} are not the model's"
        task.advance(sum(entry.nbytes for entry in batch))
    return None


def misfit(expected: Iterable[Entry], actual: Iterable[Entry]) -> str | None:
    """Which name, dtype or shape is other in `actual`, in words; None if all are equal."""
    wanted, found = ({entry.name: entry for entry in entries} for entries in (expected, actual))
    if lacking := wanted.keys() - found.keys():
        return f"it lacks {listed(lacking)}"
    if added := found.keys() - wanted.keys():
        return f"it adds {listed(added)}"
    for name, entry in wanted.items():
        other = found[name]
        if (other.dtype, other.shape) != (entry.dtype, entry.shape):
            return f"{name} is {_words(other)}, the model's is {_words(entry)}"
    return None


def _damaged(names: Sequence[str], expected: Stored, actual: Stored) -> str | None:
    right, other = expected.read(names), actual.read(names)
    return next((name for name in names if not same_bytes(right[name], other[name])), None)


def same_bytes(right: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one dtype and shape hold the same bits (NaN equals itself), compared where `other` is."""
    import torch

    return torch.equal(as_bytes(right).to(other.device), as_bytes(other))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes in row-major order: one dimension of uint8; a copy only if it was not contiguous."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    if flat.stride(0) != 1:  # of one element, and contiguous whatever its stride
        flat = torch.empty_like(flat, memory_format=torch.contiguous_format).copy_(flat)
    return flat.view(torch.uint8)


def listed(names: Iterable[str], limit: int = 5) -> str:
    """A few names, and how many more there are."""
    names = sorted(name[:200] for name in names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _words(entry: Entry) -> str:
    return f"{str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}"
