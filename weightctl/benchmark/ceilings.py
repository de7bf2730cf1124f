"""What the machine can do at best: reading the files raw, mapping them, and copying from pinned memory to a device."""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from weightctl.benchmark.results import Limit, Model
from weightctl.errors import UsageError, translated_os_errors
from weightctl.loaders.reading import is_absent, is_cached
from weightctl.storage import in_parallel

BLOCK_BYTES = 8 << 20
"""The block at which parallel reading was quickest (an H100 machine: 31–37 GB/s on 8 threads)."""

PINNED_BYTES = 256 << 20

PROBES = 256
"""Pages of which it is asked whether they are cached: the share's standard error is 0.03 at most."""

DROP_CACHES = Path("/proc/sys/vm/drop_caches")

MADV_POPULATE_READ = 22
"""Linux 5.14; Python has no name for it."""

Block = tuple[Path, int]


def read_files(paths: Sequence[Path], threads: int, *, direct: bool = False) -> float:
    """Read every byte on `threads` threads into reused buffers and throw it away; bytes a second.

    `direct` reads past the page cache. Raises WeightctlError, also where the filesystem cannot.
    """
    return _timed(paths, threads, lambda blocks: _read_blocks(blocks, os.O_DIRECT if direct else 0))


def map_files(paths: Sequence[Path], threads: int) -> float:
    """Map every page into this process, which is all that a load to the CPU has to do; bytes a second."""
    return _timed(paths, threads, _map_blocks)


def _timed(paths: Sequence[Path], threads: int, work: Callable[[Sequence[Block]], None]) -> float:
    with translated_os_errors("read the model"):
        size = sum(path.stat().st_size for path in paths)
        blocks = [(path, at) for path in paths for at in range(0, path.stat().st_size, BLOCK_BYTES)]
        began = time.perf_counter()
        in_parallel(work, [blocks[start::threads] for start in range(threads)], threads)
        return size / max(time.perf_counter() - began, 1e-9)


def _read_blocks(blocks: Sequence[Block], flags: int) -> None:
    with contextlib.closing(mmap.mmap(-1, BLOCK_BYTES)) as buffer:  # on a page's boundary, as O_DIRECT asks for
        for path, here in itertools.groupby(blocks, key=lambda block: block[0]):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
            try:
                for _, offset in here:
                    os.preadv(descriptor, [buffer], offset)
            finally:
                os.close(descriptor)


def _map_blocks(blocks: Sequence[Block]) -> None:
    for path, here in itertools.groupby(blocks, key=lambda block: block[0]):
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            for _, offset in here:
                with mmap.mmap(
                    stream.fileno(), min(BLOCK_BYTES, size - offset), prot=mmap.PROT_READ, offset=offset
                ) as mapped:
                    _touch(mapped)


def _touch(mapped: mmap.mmap) -> None:
    try:
        mapped.madvise(MADV_POPULATE_READ)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        with memoryview(mapped) as view:
            bytes(view[:: mmap.PAGESIZE])


WARM_RESIDENCY, COLD_RESIDENCY = 0.95, 0.05
"""Less of the files in the page cache, and they are not warm; more, and they are not cold."""

EVICTIONS, EVICTION_SECONDS = 5, 0.2


def forget_files(paths: Sequence[Path], *, everything: bool = False) -> None:
    """Drop the files, or `everything`, from the page cache, again where the kernel was still busy with their pages.

    What is dirty is written out first. What a process has mapped stays; `residency` tells.
    """
    for _ in range(EVICTIONS):
        for path in paths:
            with translated_os_errors(f"drop {path} from the page cache"), path.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if everything:
            drop_caches()
        if not paths or residency(paths) <= COLD_RESIDENCY:
            return
        time.sleep(EVICTION_SECONDS)


def drop_caches() -> None:
    """Drop the page cache of the whole machine. Raises UsageError unless we may."""
    try:
        os.sync()
        DROP_CACHES.write_text("3")
    except OSError as error:
        raise UsageError(
            f"cannot drop the page cache: {DROP_CACHES}: {error.strerror}",
            "--drop-caches needs root, outside of a container; without it only the model's own files are dropped",
        ) from error


def residency(paths: Sequence[Path]) -> float:
    """The share of the files' pages that lie in the page cache, from `PROBES` of them, or all of fewer; 1 of none.

    The page cache is left as it was: to ask for a page brings it in, and then it is dropped.
    """
    with translated_os_errors("look for the model in the page cache"):
        pages = [-(-path.stat().st_size // mmap.PAGESIZE) for path in paths]
        asked = sorted(random.sample(range(sum(pages)), min(PROBES, sum(pages))))
        cached = start = 0
        for path, count in zip(paths, pages, strict=True):
            here = [page - start for page in asked if start <= page < start + count]
            start += count
            if here:
                with path.open("rb", buffering=0) as stream:
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # only that page is brought in
                    cached += sum(_is_resident(stream.fileno(), page * mmap.PAGESIZE) for page in here)
        return cached / len(asked) if asked else 1.0


def _is_resident(descriptor: int, offset: int) -> bool:
    if is_absent(descriptor, offset):
        return False
    if is_cached(descriptor, offset):
        return True
    os.pread(descriptor, 1, offset)  # a page that is still on its way cannot be dropped
    os.posix_fadvise(descriptor, offset, mmap.PAGESIZE, os.POSIX_FADV_DONTNEED)
    return False


def objection(cache: str, residency: float) -> str | None:
    """Why a load with so much in the page cache was not `cache`, or None if it was."""
    wrong = residency > COLD_RESIDENCY if cache == "cold" else residency < WARM_RESIDENCY
    return f"it was not {cache}: {residency * 100:.0f} % of the files was cached" if wrong else None


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


def limits(ceilings: Mapping[str, float], model: Model, file_bytes: int) -> tuple[Limit, ...]:
    """The least time for `file_bytes` of weight files and the model's tensors, of each cache state that was measured.

    On the CPU nothing is copied, and a file that is cached has only to be mapped.
    """
    found = []
    for cache in ("warm", "cold"):
        names = (f"{cache}_read", "warm_map") if cache == "warm" else (f"{cache}_read",)
        rate, quickest = max(((ceilings[name], name) for name in names if name in ceilings), default=(0.0, ""))
        if rate:
            reading = file_bytes / rate
            copying = model.bytes / ceilings["host_to_device"] if "host_to_device" in ceilings else 0.0
            seconds = max(reading, copying)
            bound = "copying" if reading < copying else "mapping" if quickest == "warm_map" else "reading"
            found.append(Limit(cache, seconds, model.bytes / seconds, bound))  # type: ignore[arg-type]
    return tuple(found)
