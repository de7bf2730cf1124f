"""What is cached is read from the page cache, what is not past it, and every filesystem may refuse that."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from tests.disk import cannot, small_disk
from tests.loaders.samples import check, entries, gpu, write
from weightctl.benchmark.ceilings import forget_files
from weightctl.loaders.blocks import PAGE_BYTES, lay_out
from weightctl.loaders.lanes import CudaLane, SlabLane
from weightctl.loaders.pipelined import Tuning, load_shards
from weightctl.loaders.reading import Reader, Source, is_cold


def allows_direct_reads(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    forget_files([path])
    return is_cold(path, path.stat().st_size)


@pytest.mark.parametrize("device", [pytest.param("cpu"), pytest.param("cuda", marks=gpu)])
def test_a_cold_file_is_read_past_the_page_cache(tmp_path: Path, device: str) -> None:
    file = write(tmp_path / "model.safetensors", [("U8", (5,)), ("F32", (3_000_001,)), ("U8", (4099,))])
    if not allows_direct_reads(file.source):
        cannot(f"{tmp_path} lies on a filesystem without O_DIRECT, or that keeps everything in memory")
    planned = lay_out(entries([file]))
    forget_files([file.source])
    tensors = load_shards(planned, device, SlabLane if device == "cpu" else CudaLane, Tuning(3, 1 << 20, 2))
    assert is_cold(file.source, file.size)
    check(tensors, [file])
    assert not is_cold(file.source, file.size)
    check(load_shards(planned, device, SlabLane if device == "cpu" else CudaLane, Tuning(3, 1 << 20, 2)), [file])


def test_a_file_in_memory_is_not_cold(tmp_path: Path) -> None:
    with small_disk(tmp_path / "memory", 8 << 20) as directory:
        file = write(directory / "model.safetensors", [("F32", (1_000_001,))])
        assert not is_cold(file.source, file.size)
        check(load_shards(lay_out(entries([file])), "cpu", SlabLane, Tuning(2, 1 << 20, 2)), [file])


class Cold(Source):
    """One that is taken for cold without a look."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, 0)
        self._direct = True


def read_all(path: Path, view: memoryview) -> bytes:
    with contextlib.closing(Reader()) as reader:
        size = len(path.read_bytes())
        reader.fill(Cold(path), view, 0, size)
        return bytes(view[:size])


def test_a_filesystem_that_refuses_to_open_directly(tmp_path: Path) -> None:
    path = Path("/proc/version")
    with pytest.raises(OSError, match="Invalid argument"):
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    assert read_all(path, memoryview(bytearray(PAGE_BYTES))) == path.read_bytes()


def test_a_filesystem_that_refuses_to_read_directly(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(100_001))
    assert read_all(path, memoryview(bytearray(100_002))[1:]) == path.read_bytes()
