"""A plan reads what is wanted, each byte of it once, and gives it an aligned place."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.loaders.samples import Shapes, entries, mark, models, write
from weightctl.loaders.blocks import ALIGNMENT, GAP_BYTES, PAGE_BYTES, Piece, blocks_of, lay_out


@settings(max_examples=100, deadline=None)
@given(shards=models(), pages=st.integers(2, 6), wanted=st.sets(st.integers(0, 40)), cast=st.booleans())
def test_a_plan_reads_and_places_each_wanted_byte_once(
    shards: list[tuple[Shapes, int]], pages: int, wanted: set[int], cast: bool
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        file = write(Path(directory) / "model.safetensors", shards[0][0], shards[0][1])
        there = {entry.name: entry for entry in entries([file]) if int(entry.name[1:]) in wanted}
        dtypes = {name: torch.float16 for name, entry in there.items() if cast and entry.dtype in ("F32", "F64")}
        for shard in lay_out(there.values(), dtypes):
            assert {tensor.name for tensor in shard.tensors} == there.keys()
            end = 0
            for tensor in shard.tensors:
                assert tensor.place % ALIGNMENT == 0
                assert tensor.place >= end
                end = tensor.place + tensor.nbytes
            assert end <= shard.nbytes < end + ALIGNMENT
            read = bytearray(file.size)
            written = bytearray(shard.nbytes)
            for block in blocks_of(shard.runs, pages * PAGE_BYTES):
                assert block.offset % PAGE_BYTES == 0
                assert block.nbytes <= pages * PAGE_BYTES
                assert block.nbytes == block.pieces[-1].end
                for piece in block.pieces:
                    mark(read, block.offset + piece.start, piece.nbytes)
                    mark(written, piece.place, arrived(piece))
            for entry in there.values():
                assert read[entry.offset : entry.offset + entry.nbytes] == b"\1" * entry.nbytes
            assert sum(read) == sum(entry.nbytes for entry in there.values())
            assert sum(written) == sum(tensor.nbytes for tensor in shard.tensors)


def arrived(piece: Piece) -> int:
    if piece.cast is None:
        return piece.nbytes
    assert piece.nbytes % piece.cast.source.itemsize == 0
    return piece.nbytes // piece.cast.source.itemsize * piece.cast.target.itemsize


def test_a_file_without_oddities_is_copied_block_by_block(tmp_path: Path) -> None:
    file = write(tmp_path / "model.safetensors", [("BF16", (4096, 64)), ("BF16", (128,)), ("F32", (4096, 8))])
    (shard,) = lay_out(entries([file]))
    pieces = [len(block.pieces) for block in blocks_of(shard.runs, 64 * PAGE_BYTES)]
    assert pieces == [1] * -(-file.size // (64 * PAGE_BYTES))


def test_what_is_not_wanted_is_not_read(tmp_path: Path) -> None:
    far = GAP_BYTES + 1
    file = write(
        tmp_path / "model.safetensors", [("U8", (9,)), ("U8", (far,)), ("U8", (9,)), ("U8", (far - 1,)), ("U8", (9,))]
    )
    (shard,) = lay_out(entry for entry in entries([file]) if entry.name in ("t0", "t2", "t4"))
    assert [len(block.pieces) for block in blocks_of(shard.runs, 64 * PAGE_BYTES)] == [1, 2]
    assert shard.nbytes == 3 * ALIGNMENT
