"""The ranks of a host share the reads: each byte once between them, each about as much, and alike on all."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import ProcessGroup

from tests.loaders.samples import Shapes, entries, mark, models, write
from weightctl.loaders import windows
from weightctl.loaders.blocks import ALIGNMENT, PAGE_BYTES
from weightctl.loaders.ranks import Team
from weightctl.loaders.slices import Cut
from weightctl.loaders.windows import Asked, schedule


def team_of(size: int, rank: int) -> Team:
    return Team(cast(ProcessGroup, None), tuple(range(size)), tuple(range(size)), rank)


@settings(max_examples=60, deadline=None)
@given(
    shards=models(),
    size=st.integers(1, 5),
    dimensions=st.lists(st.integers(0, 3), max_size=40),
    part=st.sampled_from([256, 4096, 1 << 26]),
    stage=st.sampled_from([1, 100, 1 << 25]),
    pages=st.integers(2, 6),
)
def test_the_ranks_of_a_host_read_each_byte_once(
    shards: list[tuple[Shapes, int]], size: int, dimensions: list[int], part: int, stage: int, pages: int
) -> None:
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "PART_BYTES", part)
        patch.setattr(windows, "STAGE_BYTES", stage)
        file = write(Path(directory) / "model.safetensors", shards[0][0], shards[0][1])
        there = entries([file])
        found = {
            entry.name: Cut(entry.shape, dimension, size)
            for entry, dimension in zip(there, dimensions, strict=False)
            if dimension < len(entry.shape)
        }
        asked = Asked(tuple(there), "cpu", {}, found)
        read, orders, loads = bytearray(file.size), [], []
        for rank in range(size):
            team = team_of(size, rank)
            shards_of_rank, planned = schedule(asked, team, pages * PAGE_BYTES)
            stages = [shard.nbytes for shard in shards_of_rank if not shard.tensors]
            assert len(stages) <= windows.STAGES
            assert all(nbytes < stage + ALIGNMENT for nbytes in stages)
            for window in planned:
                for block in window.blocks:
                    for piece in block.pieces:
                        mark(read, block.offset + piece.start, piece.nbytes)
                        assert piece.place + piece.nbytes <= shards_of_rank[window.buffer].nbytes
            orders.append([type(window.exchange) for window in planned])
            loads.append(sum(p.nbytes for window in planned for block in window.blocks for p in block.pieces))
        assert all(order == orders[0] for order in orders)
        assert sum(read) == sum(entry.nbytes for entry in there)


def test_reads_are_spread_evenly(tmp_path: Path) -> None:
    file = write(tmp_path / "model.safetensors", [("BF16", (1000, 999)), ("F32", (7,)), ("BF16", (999, 1000))])
    there = entries([file])
    for cut in ({}, {"t0": Cut((1000, 999), 1, 4), "t2": Cut((999, 1000), 0, 4)}):
        loads = []
        for rank in range(4):
            _, planned = schedule(Asked(tuple(there), "cpu", {}, cut), team_of(4, rank), 1 << 20)
            loads.append(sum(piece.nbytes for window in planned for block in window.blocks for piece in block.pieces))
        assert max(loads) - min(loads) <= 4000
