"""A plan cuts as torch and transformers do, or is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightctl.checkpoint import TensorEntry
from weightctl.errors import UsageError
from weightctl.loaders.slices import Cut, Plan, cuts
from weightctl.model import File


@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=4), dimension=st.integers(0, 3), size=st.integers(1, 6))
def test_a_cut_is_that_of_torch(shape: list[int], dimension: int, size: int) -> None:
    dimension %= len(shape)
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    cut = Cut(tuple(shape), dimension, size)
    chunks = whole.chunk(size, dimension)
    for rank in range(size):
        part = cut.part(rank)
        right = chunks[rank] if rank < len(chunks) else whole.narrow(dimension, 0, 0)
        assert part.shape == tuple(right.shape)
        numbers = [number for first, count in part.spans for number in range(first, first + count)]
        assert numbers == right.flatten().tolist()


def entry(name: str, *shape: int) -> TensorEntry:
    return TensorEntry(name, File("f", 0, Path("/f")), 0, 0, "F32", shape)


def test_a_plan_names_modules_or_tensors() -> None:
    there = [entry("model.layers.0.q_proj.weight", 4, 6), entry("model.layers.0.q_proj.bias", 4)]
    there += [entry("model.layers.0.o_proj.weight", 6, 4), entry("model.layers.0.o_proj.bias", 6), entry("head", 9, 4)]
    plan: Plan = {"model.layers.*.o_proj": "rowwise", "*.q_proj.bias": None, "*.q_proj": "colwise", "head": -1}
    assert {name: cut.dimension for name, cut in cuts(there, plan, 2).items()} == {
        "model.layers.0.q_proj.weight": 0,
        "model.layers.0.o_proj.weight": 1,
        "head": 1,
    }


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"*.v_proj": 0}, "'\\*.v_proj' matches no tensor"),
        ({"q_proj": "packed"}, "unknown style 'packed'"),
        ({"q_proj": 2}, "'q_proj.weight' along dimension 2"),
        ({"q_proj": -3}, "'q_proj.weight' along dimension -3"),
    ],
)
def test_a_plan_that_cannot_be(plan: Plan, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cuts([entry("q_proj.weight", 4, 6)], plan, 2)
