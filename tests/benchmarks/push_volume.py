"""Push to a volume beside cp -r and sync, rsync -a and rclone copy: seconds, bytes copied and peak memory.

    python -m tests.benchmarks.push_volume [--directory DIR] [--gib 4] [--shards 4] [--rounds 3] [--files 10000]

Everything is timed side by side in one run, round by round and in random order, from an idle disk to durable bytes.
The model is in the page cache; weightctl is run as a user runs it, the start of Python included. One 8 GiB file is
`--gib 8 --shards 1 --files 0`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.benchmarks.bake_and_push import BLOCK_BYTES, SETTLE_SECONDS, make_model

SMALL_BYTES = 4096


@dataclass(frozen=True)
class Row:
    """One thing that was timed, in every round."""

    name: str
    seconds: list[float] = field(default_factory=list)
    copied: list[int] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)


def push(model: Path, volume: Path, *options: object) -> tuple[int, int]:
    """Run weightctl; the bytes it copied and its peak resident set."""
    command = [sys.executable, "-m", "weightctl", "push-volume", model, volume, "--name", "bench", "--json", *options]
    with tempfile.TemporaryFile() as stdout:
        process = subprocess.Popen([str(part) for part in command], stdout=stdout)
        _, status, usage = os.wait4(process.pid, 0)
        if os.waitstatus_to_exitcode(status):
            sys.exit(f"{command} failed")
        stdout.seek(0)
        return json.load(stdout)["copied_bytes"], usage.ru_maxrss * 1024


def synced(*command: object) -> Callable[[Path, Path], None]:
    """A copying command, and a sync of where it copied to."""

    def copy(model: Path, destination: Path) -> None:
        subprocess.run([*map(str, command), str(model) + "/", str(destination)], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["sync", "-f", destination], check=True)

    return copy


COPIES = {
    "cp -r + sync": synced("cp", "-rT"),
    "rsync -a + sync": synced("rsync", "-a"),
    "rclone copy + sync": synced("rclone", "copy"),
}


def sha256_pass(model: Path) -> None:
    """What no verifying copy goes below, were the disk free: every byte through SHA-256, two files at a time."""

    def read(path: Path) -> None:
        with path.open("rb", buffering=0) as stream:
            digest, block = hashlib.sha256(), memoryview(bytearray(2 << 20))
            while count := stream.readinto(block):
                digest.update(block[:count])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, model.iterdir()))


def plain_write(size: int, destination: Path) -> None:
    """And were hashing free: as many bytes from memory to one file, synced."""
    block = bytes(BLOCK_BYTES)
    with destination.open("wb", buffering=0) as stream:
        for _ in range(size // BLOCK_BYTES):
            stream.write(block)
        os.fsync(stream.fileno())


def timed(row: Row, step: Callable[[], object]) -> None:
    """Wait until the disk is idle and the files are no longer new, then time one step."""
    os.sync()
    time.sleep(SETTLE_SECONDS)
    began = time.perf_counter()
    found = step()
    row.seconds.append(time.perf_counter() - began)
    if isinstance(found, tuple):
        row.copied.append(found[0])
        row.peak.append(found[1])


def compare(model: Path, scratch: Path, rows: dict[str, Row], label: str, options: tuple[object, ...]) -> Path:
    """Every way to copy `model`, once, in random order. Returns the volume it was pushed to.

    Copies of many files stay until the end: ext4 is slow to create files where as many have just been deleted.
    """
    scratch.mkdir()
    volume = scratch / "volume"
    volume.mkdir()
    copies = {name: copy for name, copy in COPIES.items() if shutil.which(name.split()[0])}
    ways: dict[str, Callable[[], object]] = {"push-volume": lambda: push(model, volume, *options)}
    for name, copy in copies.items():
        ways[name] = lambda copy=copy, name=name: copy(model, scratch / name)  # type: ignore[misc]
    for name in random.sample(list(ways), len(ways)):
        timed(rows.setdefault(label + name, Row(label + name)), ways[name])
        if not label:
            shutil.rmtree(scratch / name, ignore_errors=True)
    return volume


def run_round(model: Path, small: Path, scratch: Path, rows: dict[str, Row], options: tuple[object, ...]) -> None:
    """Everything once."""

    plain = scratch / "plain"

    def again(label: str, model: Path, *more: object) -> None:
        timed(rows.setdefault(label, Row(label)), lambda: push(model, volume, *options, *more))

    size = sum(path.stat().st_size for path in model.iterdir())
    timed(
        rows.setdefault("limit: SHA-256, two threads", Row("limit: SHA-256, two threads")), lambda: sha256_pass(model)
    )
    timed(rows.setdefault("limit: write + sync", Row("limit: write + sync")), lambda: plain_write(size, plain))
    plain.unlink()
    volume = compare(model, scratch / "large", rows, "", options)
    again("push again, unchanged", model)
    again("push again, --verify", model, "--verify")
    shard = next(path for path in sorted(model.iterdir()) if path.suffix == ".safetensors")
    with shard.open("rb+") as stream:
        stream.seek(-16, os.SEEK_END)
        stream.write(os.urandom(16))
    again("one shard changed", model)
    shutil.rmtree(volume)
    if files := len(list(small.iterdir())):
        compare(small, scratch / "small", rows, f"{files} files: ", options)


def main() -> None:
    """Make the models, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where to work (default: the temporary directory)")
    parser.add_argument("--gib", type=float, default=4)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    arguments = parser.parse_args()
    options = ("--workers", arguments.workers)
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        model, small = Path(name) / "model", Path(name) / "small"
        make_model(model, int(arguments.gib * (1 << 30)), arguments.shards)
        small.mkdir()
        for number in range(arguments.files):
            (small / f"{number:05}.bin").write_bytes(os.urandom(SMALL_BYTES))
        os.environ["XDG_CACHE_HOME"] = str(Path(name) / "cache")
        for turn in range(arguments.rounds):
            scratch = Path(name) / str(turn)
            scratch.mkdir()
            shutil.rmtree(Path(name) / "cache", ignore_errors=True)  # nothing is remembered from the round before
            run_round(model, small, scratch, rows, options)
    print(f"{arguments.gib} GiB in {arguments.shards} shards, {arguments.workers} workers, {os.cpu_count()} cores")
    print(f"{'':32} {'median s':>9} {'× cp':>6} {'copied MB':>10} {'peak MiB':>9}  every run")
    for row in rows.values():
        median = statistics.median(row.seconds)
        prefix = row.name.split(": ")[0] + ": " if " files: " in row.name else ""
        base = statistics.median(rows[prefix + "cp -r + sync"].seconds)
        copied = f"{statistics.median(row.copied) / 1e6:.1f}" if row.copied else ""
        peak = f"{max(row.peak) / 2**20:.0f}" if row.peak else ""
        runs = " ".join(f"{seconds:.2f}" for seconds in row.seconds)
        print(f"{row.name:32} {median:9.2f} {median / base:6.2f} {copied:>10} {peak:>9}  {runs}")


if __name__ == "__main__":
    main()
