"""Models made for a test, and the harm that is done to them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.hub_server import git_blob_id

SHARD_BYTES = 1_500_000
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_safetensors(path: Path, size: int = SHARD_BYTES, seed: int = 0) -> Path:
    """A valid file with one tensor of `size` random bytes, the same for the same seed."""
    header = json.dumps({f"tensor{seed}": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for start in range(0, size, 1 << 20):
            block = hashlib.shake_128(f"{seed}:{start}".encode()).digest(1 << 16) * 16
            stream.write(block[: min(size - start, 1 << 20)])
    return path


def write_model(directory: Path, shards: int = 2, size: int = SHARD_BYTES, seed: int = 0) -> Path:
    """A model as they come: shards, small files in a directory of their own, an empty file, names of every kind."""
    for shard in range(shards):
        write_safetensors(directory / f"model-{shard + 1:05}-of-{shards:05}.safetensors", size, seed + shard)
    for name, text in {
        "config.json": f'{{"seed": {seed}}}',
        "1_Pooling/config.json": "{}",
        "with space/ünïcödé ☃.txt": "snow",
        "empty.txt": "",
        f"{'long ' * 30}.txt": "a name of more than 100 characters",
        f"{'deep/' * 60}leaf.txt": "a path of more than 255 characters",
    }.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory


def write_sparse_model(directory: Path, size: int) -> Path:
    """A model of one file of zeros, which takes no room."""
    directory.mkdir(parents=True)
    with (directory / "model.bin").open("wb") as stream:
        stream.truncate(size)
    return directory


def write_hub_cache(cache: Path, files: Mapping[str, bytes], *, repo: str = "org/name") -> Path:
    """A snapshot in the Hub's cache; files of 1 MiB and more are LFS files. Returns the snapshot's directory."""
    repository = cache / f"models--{repo.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for name, data in files.items():
        large = len(data) >= 1 << 20
        blob = repository / "blobs" / (hashlib.sha256(data).hexdigest() if large else git_blob_id(data))
        link = snapshot / name
        for parent in (blob.parent, link.parent):
            parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


def flip_bit(path: Path, offset: int = -1) -> None:
    """Change one bit of a file in place (of its last byte, unless told)."""
    with path.open("rb+") as stream:
        stream.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory (links followed), by its path there."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def state(directory: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and mtime of everything below a directory: equal as long as nobody wrote there."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        found[path.relative_to(directory).as_posix()] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def bytes_in(*directories: Path) -> int:
    """Bytes of the files below, while somebody writes, renames and removes them."""
    total = 0
    for parent, _, names in (found for directory in directories for found in os.walk(directory)):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def settle(directory: Path) -> Path:
    """Wait until what lies there is old enough for its digests to be remembered."""
    newest = max(path.stat().st_ctime for path in [directory, *directory.rglob("*")])
    time.sleep(max(0.0, newest + 2.1 - time.time()))
    return directory


@contextlib.contextmanager
def written_meanwhile(path: Path, place: int) -> Iterator[None]:
    """Somebody writes at that place of the file all the time, until the block ends."""
    over = threading.Event()

    def write() -> None:
        with path.open("rb+", buffering=0) as stream:
            while not over.is_set():
                stream.seek(place)
                stream.write(os.urandom(100))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield
    finally:
        over.set()
        writer.join()


def wait_for(condition: Callable[[], object], seconds: float = 300) -> None:
    """Until the condition holds, or so long that something hangs: nothing here takes as long, on whatever machine."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


def kill_at(process: subprocess.Popen[str], directory: Path, size: int) -> None:
    """Kill the process when it has written that many bytes below the directory, if it has not ended before."""
    wait_for(lambda: process.poll() is not None or bytes_in(directory) >= size)
    process.kill()
    process.communicate()
