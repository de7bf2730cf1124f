"""Bake to a layout and push to a volume, against passes of read + SHA-256 + write + fsync over the same bytes.

    python -m tests.benchmarks.bake_and_push [--directory DIR] [--gib 2] [--rounds 3] [--workers N]

Everything is timed side by side in one run, round by round; weightctl as a user runs it, the start of Python included.
The model is in the page cache: this measures hashing and writing, not the disk that the model comes from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BLOCK_BYTES = 4 << 20
SHARDS = 4
SETTLE_SECONDS = 2.5
"""Of a file that was written a moment ago nothing is remembered; to bake twice within seconds is not the case here."""


def make_model(directory: Path, size: int, shards: int = SHARDS) -> None:
    """`size` bytes of random bf16 in so many safetensors shards."""
    directory.mkdir()
    shard_bytes = size // shards
    for shard in range(shards):
        entry = {"dtype": "BF16", "shape": [shard_bytes // 2], "data_offsets": [0, shard_bytes]}
        header = json.dumps({f"layer.{shard}.weight": entry}).encode()
        with (directory / f"model-{shard + 1:05}-of-{shards:05}.safetensors").open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            for _ in range(shard_bytes // BLOCK_BYTES):
                stream.write(os.urandom(BLOCK_BYTES))
            stream.write(os.urandom(shard_bytes % BLOCK_BYTES))
    (directory / "config.json").write_text("{}")


def copy_file(source: Path, destination: Path) -> None:
    """The plainest loop that reads, hashes, writes and syncs."""
    digest = hashlib.sha256()
    with source.open("rb", buffering=0) as reader, destination.open("wb", buffering=0) as writer:
        while block := reader.read(BLOCK_BYTES):
            digest.update(block)
            writer.write(block)
        os.fsync(writer.fileno())


def one_pass(model: Path, destination: Path, threads: int) -> None:
    """Every file through `copy_file`, so many at a time."""
    destination.mkdir()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda path: copy_file(path, destination / path.name), sorted(model.iterdir())))


def weightctl(*arguments: object) -> int:
    """Run the command; its peak resident set in bytes."""
    process = subprocess.Popen(
        [sys.executable, "-m", "weightctl", *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"weightctl {arguments} failed")
    return usage.ru_maxrss * 1024


def copy_and_sync(model: Path, destination: Path) -> None:
    """What a person types."""
    subprocess.run(["cp", "-r", model, destination], check=True)
    subprocess.run(["sync", "-f", destination], check=True)


def run_round(model: Path, scratch: Path, workers: int) -> dict[str, tuple[float, int]]:
    """Every measurement once: seconds, and the peak resident set where it is weightctl's."""
    layout, volume = scratch / "layout", scratch / "volume"
    volume.mkdir()
    bake = ("bake", model, "--tag", "bench:v1", "--to", f"layout:{layout}", "--workers", workers)
    push = ("push-volume", model, volume, "--name", "bench", "--workers", workers)
    steps: list[tuple[str, Callable[[], int | None]]] = [
        ("one pass, 1 thread", lambda: one_pass(model, scratch / "one", 1)),
        (f"one pass, {workers} threads", lambda: one_pass(model, scratch / "many", workers)),
        ("cp -r and sync", lambda: copy_and_sync(model, scratch / "copy")),
        ("bake", lambda: weightctl(*bake)),
        ("bake again", lambda: weightctl(*bake)),
        ("bake a third time", lambda: weightctl(*bake)),
        ("push-volume", lambda: weightctl(*push)),
        ("push-volume again", lambda: weightctl(*push)),
    ]
    found = {}
    for name, step in steps:
        os.sync()
        time.sleep(SETTLE_SECONDS)
        began = time.perf_counter()
        peak = step()
        found[name] = (time.perf_counter() - began, peak or 0)
        for done in ("one", "many", "copy"):
            shutil.rmtree(scratch / done, ignore_errors=True)
    return found


def show(rounds: list[dict[str, tuple[float, int]]], size: int) -> None:
    """The table: medians, and their ratios to the two passes."""
    medians = {name: statistics.median(each[name][0] for each in rounds) for name in rounds[0]}
    single, threaded = list(medians.values())[:2]
    print(f"{'':20} {'median s':>9} {'all runs':>22} {'GB/s':>6} {'× 1 thread':>11} {'× threads':>10} {'peak MB':>8}")
    for name, median in medians.items():
        runs = " ".join(f"{each[name][0]:.2f}" for each in rounds)
        peak = max(each[name][1] for each in rounds) / 1e6
        print(
            f"{name:20} {median:9.2f} {runs:>22} {size / median / 1e9:6.2f} {median / single:11.2f} "
            f"{median / threaded:10.2f} {f'{peak:.0f}' if peak else '':>8}"
        )


def main() -> None:
    """Make the model, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where to work (default: the temporary directory)")
    parser.add_argument("--gib", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    options = parser.parse_args()
    size = int(options.gib * (1 << 30))
    rounds = []
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        model = Path(name) / "model"
        make_model(model, size)
        for turn in range(options.rounds):
            scratch = Path(name) / str(turn)
            scratch.mkdir()
            os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")  # nothing is remembered from the round before
            rounds.append(run_round(model, scratch, options.workers))
            shutil.rmtree(scratch)
    print(f"{size} bytes of random bf16 in {SHARDS} shards, {options.workers} workers, {os.cpu_count()} cores")
    show(rounds, size)


if __name__ == "__main__":
    main()
