"""Which part of each tensor a rank holds under a tensor-parallel plan."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weightctl.checkpoint import TensorEntry
from weightctl.errors import UsageError
from weightctl.loaders.blocks import Part
from weightctl.loaders.safetensors import described

Plan = Mapping[str, "int | str | None"]
"""Glob over names of tensors or of the modules that hold them → a dimension to cut them along (negative: from the
last), a style of transformers' plans (`colwise`, `rowwise`), or None, which leaves them whole on every rank, as what no
glob matches is. The first that matches counts."""

STYLES = {"colwise": 0, "rowwise": 1}
"""Of a linear layer: by its outputs or by its inputs. The dimension of its weight, which is (outputs, inputs)."""


@dataclass(frozen=True)
class Cut:
    """A tensor, cut along one dimension into a part for each rank, as `torch.chunk` does: the last may be smaller, or
    empty.

    In memory it is so many rows, each of which every rank has the same stretch of.
    """

    shape: tuple[int, ...]
    dimension: int
    ranks: int

    @property
    def rows(self) -> int:
        """As many as the dimensions before give."""
        return math.prod(self.shape[: self.dimension])

    @property
    def width(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape[self.dimension :])

    def stretch(self, rank: int) -> tuple[int, int]:
        """Where a rank's elements of a row begin, and where they end."""
        whole, inner = self.shape[self.dimension], math.prod(self.shape[self.dimension + 1 :])
        step = -(-whole // self.ranks)
        return min(rank * step, whole) * inner, min((rank + 1) * step, whole) * inner

    def part(self, rank: int, *, read: bool = True) -> Part:
        """What a rank has of it; no bytes of the file, unless it is to `read` them itself."""
        whole = self.shape[self.dimension]
        step = -(-whole // self.ranks)
        count = min((rank + 1) * step, whole) - min(rank * step, whole)
        shape = (*self.shape[: self.dimension], count, *self.shape[self.dimension + 1 :])
        first, last = self.stretch(rank)
        spans = ((row * self.width + first, last - first) for row in range(self.rows if read else 0))
        return Part(shape, tuple(spans))


def cuts(entries: Sequence[TensorEntry], plan: Plan, ranks: int) -> dict[str, Cut]:
    """How `plan` cuts each tensor that it does not leave whole, for so many ranks.

    Raises UsageError for a pattern that matches nothing, a style that is not known, or a dimension that a tensor lacks.
    """
    found: dict[str, Cut] = {}
    unused = set(plan)
    for entry in entries:
        matching = [glob for glob in plan if _matches(entry.name, glob)]
        unused.difference_update(matching)
        if matching:
            shape = described(entry).shape
            dimension = _dimension(entry.name, shape, matching[0], plan[matching[0]])
            if dimension is not None:
                found[entry.name] = Cut(shape, dimension, ranks)
    if unused:
        first = min((entry.name for entry in entries), default="")
        raise UsageError(f"the plan's {min(unused)!r} matches no tensor", f"the first that there is is {first!r}")
    return found


def _matches(name: str, glob: str) -> bool:
    return fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(name.rpartition(".")[0], glob)


def _dimension(name: str, shape: tuple[int, ...], glob: str, wanted: int | str | None) -> int | None:
    if wanted is None:
        return None
    if isinstance(wanted, str):
        if wanted not in STYLES:
            raise UsageError(
                f"the plan gives {glob!r} the unknown style {wanted!r}",
                f"known: {', '.join(STYLES)}, the number of a dimension, or None",
            )
        wanted = STYLES[wanted]
        if wanted >= len(shape):
            return None  # the bias of what is cut by its inputs is added once, to the sum of all
    if not -len(shape) <= wanted < len(shape):
        raise UsageError(f"the plan cuts {name!r} along dimension {wanted}, which the shape {list(shape)} has not")
    return wanted % len(shape)
