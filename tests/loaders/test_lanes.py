"""What a lane knows of processors and of pinned memory."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from tests.loaders.samples import write
from weightctl.loaders.blocks import PAGE_BYTES
from weightctl.loaders.lanes import Pinned, parse_cpus, pinned
from weightctl.loaders.pipelined import PipelinedLoader
from weightctl.sources.directory import read_directory


def test_processors_are_read_as_the_kernel_writes_them() -> None:
    assert parse_cpus("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert parse_cpus("\n") == frozenset()


def test_the_peak_of_many_threads_is_counted() -> None:
    counted = Pinned()
    together = threading.Barrier(4)

    def hold(nbytes: int) -> None:
        for _ in range(1000):
            counted.add(nbytes)
            counted.add(-nbytes)
        counted.add(nbytes)
        together.wait()
        counted.add(-nbytes)

    threads = [threading.Thread(target=hold, args=(nbytes,)) for nbytes in (1, 2, 4, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (counted.now, counted.peak) == (0, 15)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_pinned_memory_is_told(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", [("F32", (1 << 22,))])
    PipelinedLoader().load(read_directory(tmp_path), "cuda")
    assert pinned.now == 0
    assert PipelinedLoader().peak_pinned_bytes() >= PAGE_BYTES
