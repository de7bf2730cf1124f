"""What the machine can do at best: reading the files raw, and copying from pinned memory to the device."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path

from weightctl.errors import translated_os_errors
from weightctl.storage import in_parallel

BLOCK_BYTES = 8 << 20
"""The block at which parallel reading was quickest (an H100 machine: 31–37 GB/s on 8 threads)."""

PINNED_BYTES = 256 << 20


def read_files(paths: Sequence[Path], threads: int) -> float:
    """Read every byte on `threads` threads into reused buffers and throw it away; bytes a second."""
    with translated_os_errors("read the model"):
        blocks = [(path, at) for path in paths for at in range(0, path.stat().st_size, BLOCK_BYTES)]
        began = time.perf_counter()
        in_parallel(_read_blocks, [blocks[start::threads] for start in range(threads)], threads)
        seconds = time.perf_counter() - began
        return sum(path.stat().st_size for path in paths) / max(seconds, 1e-9)


def _read_blocks(blocks: Sequence[tuple[Path, int]]) -> None:
    buffer = memoryview(bytearray(BLOCK_BYTES))
    for path, here in itertools.groupby(blocks, key=lambda block: block[0]):
        with path.open("rb", buffering=0) as stream:
            for _, offset in here:
                os.preadv(stream.fileno(), [buffer], offset)


def forget_files(paths: Sequence[Path]) -> None:
    """Ask the kernel to drop the files from its page cache, after writing out what is still dirty."""
    for path in paths:
        with translated_os_errors(f"drop {path} from the page cache"), path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_to_device(device: str) -> float:
    """Copy pinned host memory to the CUDA `device`, the best of a few; bytes a second."""
    import torch

    source = torch.empty(PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(PINNED_BYTES, dtype=torch.uint8, device=device)
    best = 0.0
    for _ in range(5):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(4):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)
        best = max(best, 4 * PINNED_BYTES / (time.perf_counter() - began))
    return best
