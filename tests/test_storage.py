"""Nothing is half-written: hash-while-copy, atomic writes, locks, full disks, killed writers."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.disk import as_ordinary_user, mounted, read_only_directory, small_disk
from weightctl import storage
from weightctl.errors import IntegrityError, WeightctlError, translated_os_errors
from weightctl.progress import Task


class Counter(Task):
    def __init__(self) -> None:
        self.total = 0

    def advance(self, amount: int) -> None:
        self.total += amount


class Named(io.BytesIO):
    """A stream with a name, which may give fewer bytes than asked, as a pipe does."""

    name = "stream"

    def __init__(self, data: bytes, most: int = 1 << 30) -> None:
        super().__init__(data)
        self.most = most

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        return super().readinto(buffer[: self.most])


def pumped(data: bytes, size: int, most: int = 1 << 30) -> tuple[bytes, str, int]:
    copy, digest, counter = bytearray(), hashlib.sha256(), Counter()
    storage.pump(Named(data, most), size, [copy.extend, digest.update], counter)
    return bytes(copy), digest.hexdigest(), counter.total


@pytest.mark.parametrize("size", [0, 1, storage.BLOCK_BYTES - 1, storage.BLOCK_BYTES, 2 * storage.BLOCK_BYTES + 5])
def test_pump_gives_every_byte_to_every_sink_in_order(size: int) -> None:
    data = os.urandom(size)
    assert pumped(data, size) == (data, hashlib.sha256(data).hexdigest(), size)


@given(st.binary(max_size=500), st.integers(1, 50))
def test_pump_survives_short_reads(data: bytes, most: int) -> None:
    assert pumped(data, len(data), most)[0] == data


@pytest.mark.parametrize("size", [9, 11])
def test_pump_notices_a_file_that_changed_its_length(size: int) -> None:
    with pytest.raises(IntegrityError, match="changed while it was read"):
        pumped(bytes(10), size)


def test_pump_hands_on_what_a_sink_raises() -> None:
    def full(block: memoryview) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        storage.pump(Named(bytes(10)), 10, [full], Task())


def test_write_all_finishes_what_a_short_write_began() -> None:
    class Short(io.RawIOBase):
        def __init__(self) -> None:
            self.data = bytearray()

        def write(self, block: memoryview) -> int:  # type: ignore[override]
            self.data += block[:3]
            return min(3, len(block))

    stream = Short()
    storage.write_all(stream)(memoryview(b"0123456789"))  # type: ignore[arg-type]
    assert stream.data == b"0123456789"


def test_in_parallel_keeps_the_order() -> None:
    assert storage.in_parallel(lambda n: n * n, range(50), 4) == [n * n for n in range(50)]


def test_in_parallel_stops_at_the_first_failure() -> None:
    begun: list[int] = []

    def work(n: int) -> None:
        begun.append(n)
        if n == 0:
            raise WeightctlError("the first one failed")
        time.sleep(0.01)  # so that there is something left to stop

    with pytest.raises(WeightctlError, match="the first one failed"):
        storage.in_parallel(work, range(1000), 1)
    assert len(begun) < 1000


def test_a_failure_stops_what_is_being_pumped_beside_it(tmp_path: Path) -> None:
    begun = threading.Event()

    class Endless(Named):
        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            begun.set()
            return len(buffer)

    def work(fails: bool) -> None:
        if fails:
            begun.wait(300)
            raise WeightctlError("the other one failed")
        storage.pump(Endless(b""), 1 << 60, [], Task())

    with pytest.raises(WeightctlError, match="the other one failed"):
        storage.in_parallel(work, [False, True], 2)


def test_a_failure_ends_a_pause_beside_it() -> None:
    begun = threading.Event()

    def work(fails: bool) -> None:
        begun.wait(300) if fails else begun.set()
        if fails:
            raise WeightctlError("the other one failed")
        storage.pause(3600)

    with pytest.raises(WeightctlError, match="the other one failed"):
        storage.in_parallel(work, [False, True], 2)


def test_in_parallel_of_nothing() -> None:
    assert storage.in_parallel(str, [], 4) == []


def test_atomic_write_replaces_only_when_the_block_ends(tmp_path: Path) -> None:
    destination = tmp_path / "file"
    destination.write_bytes(b"old")
    with storage.atomic_write(destination) as stream:
        stream.write(b"new")
        assert destination.read_bytes() == b"old"
    assert destination.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_atomic_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    destination = tmp_path / "file"
    destination.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), storage.atomic_write(destination) as stream:
        stream.write(b"half" * (stream.write(b"half") // 0))
    assert destination.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_atomic_write_can_stage_out_of_sight(tmp_path: Path) -> None:
    staging = tmp_path / "staging"
    staging.mkdir()
    with storage.atomic_write(tmp_path / "file", staging) as stream:
        stream.write(b"new")
        assert sorted(os.listdir(tmp_path)) == ["staging"]
        assert len(os.listdir(staging)) == 1
    assert (tmp_path / "file").read_bytes() == b"new"
    assert os.listdir(staging) == []


def test_atomic_write_takes_the_longest_names(tmp_path: Path) -> None:
    destination = tmp_path / ("n" * 255)
    with storage.atomic_write(destination) as stream:
        stream.write(b"new")
    assert destination.read_bytes() == b"new"


def test_atomic_write_takes_the_longest_unicode_names(tmp_path: Path) -> None:
    destination = tmp_path / ("\N{SNOWMAN}" * 85)
    with storage.atomic_write(destination) as stream:
        stream.write(b"new")
    assert destination.read_bytes() == b"new"


def test_a_staged_file_has_its_name_only_once_it_is_published(tmp_path: Path) -> None:
    staging = tmp_path / "staging"
    staging.mkdir()
    with storage.staged_file(staging) as staged:
        staged.stream.write(b"new")
        assert os.listdir(tmp_path) == ["staging"]
        staged.publish(tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == b"new"
    assert os.listdir(staging) == []


def test_a_staged_file_that_is_not_published_is_gone(tmp_path: Path) -> None:
    with storage.staged_file(tmp_path) as staged:
        staged.stream.write(b"new")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    def write(destination: Path) -> None:
        with storage.atomic_write(destination) as stream:
            storage.write_all(stream)(memoryview(bytes(2 << 20)))

    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        with pytest.raises(WeightctlError, match="No space left on device") as caught, translated_os_errors("write it"):
            write(disk / "file")
        assert caught.value.hint
        assert os.listdir(disk) == []


def test_a_directory_to_stage_in_goes_when_it_was_used(tmp_path: Path) -> None:
    destination = tmp_path / ("\N{SNOWMAN}" * 85)
    with storage.staging_beside(destination) as staging, storage.atomic_write(destination, staging) as stream:
        stream.write(b"new")
    assert os.listdir(tmp_path) == [destination.name]


def test_a_directory_to_stage_in_is_rid_of_what_a_killed_writer_left(tmp_path: Path) -> None:
    process = run(STAGER, tmp_path / "file")
    with pytest.raises(WeightctlError, match="another process is writing") as caught:
        storage.staging_beside(tmp_path / "file").__enter__()
    assert caught.value.hint
    kill(process)
    assert not (tmp_path / "file").exists()
    with storage.staging_beside(tmp_path / "file") as staging:
        assert os.listdir(staging) == []
    assert os.listdir(tmp_path) == []


def test_a_directory_that_cannot_be_written_is_an_error_with_a_hint() -> None:
    with read_only_directory() as directory:

        def attempt() -> None:
            with (
                pytest.raises(WeightctlError, match="Permission denied") as caught,
                translated_os_errors(f"write {directory / 'file'}"),
                storage.atomic_write(directory / "file") as stream,
            ):
                stream.write(b"new")
            assert caught.value.hint

        as_ordinary_user(attempt)
        assert os.listdir(directory) == []


def run(program: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a program that prints a line when it has got as far as it should."""
    process = subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


WRITER = """
import pathlib, sys, time
from weightctl import storage
with storage.atomic_write(pathlib.Path(sys.argv[1])) as stream:
    stream.write(b"half")
    print("ready", flush=True)
    time.sleep(60)
"""

STAGER = """
import pathlib, sys, time
from weightctl import storage
destination = pathlib.Path(sys.argv[1])
with storage.staging_beside(destination) as staging, storage.atomic_write(destination, staging) as stream:
    stream.write(b"half")
    print("ready", flush=True)
    time.sleep(60)
"""

HOLDER = """
import pathlib, sys, time
from weightctl import storage
with storage.lock(pathlib.Path(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(60)
"""


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_killed_writer_leaves_nothing_under_the_final_name_and_is_swept(tmp_path: Path) -> None:
    process = run(WRITER, tmp_path / "file")
    kill(process)
    assert not (tmp_path / "file").exists()
    assert len(os.listdir(tmp_path)) == 1
    storage.sweep_temporaries(tmp_path)
    assert os.listdir(tmp_path) == []


def test_sweeping_spares_what_is_no_leftover(tmp_path: Path) -> None:
    (tmp_path / ".hidden").touch()
    (tmp_path / "file").touch()
    storage.sweep_temporaries(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "file"]


def test_a_lock_keeps_others_out_until_its_holder_dies(tmp_path: Path) -> None:
    process = run(HOLDER, tmp_path / "lock")
    entered = threading.Event()

    def enter() -> None:
        with storage.lock(tmp_path / "lock"):
            entered.set()

    waiting = threading.Thread(target=enter, daemon=True)
    waiting.start()
    assert not entered.wait(0.2)
    kill(process)
    assert entered.wait(300)
    waiting.join()


def test_a_lock_that_is_held_can_be_passed_by(tmp_path: Path) -> None:
    process = run(HOLDER, tmp_path / "lock")
    with pytest.raises(BlockingIOError):
        storage.lock(tmp_path / "lock", wait=False).__enter__()
    kill(process)
    with storage.lock(tmp_path / "lock", wait=False):
        pass


def test_make_directories(tmp_path: Path) -> None:
    storage.make_directories(tmp_path / "a" / "b" / "c")
    storage.make_directories(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()


@pytest.mark.parametrize("count", [1, storage.SYNC_TOGETHER])
def test_sync_files(tmp_path: Path, count: int) -> None:
    """A few by one fsync each, many by one flush of their filesystem; names in directories too."""
    (tmp_path / "directory").mkdir()
    paths = [tmp_path / "directory" / str(number) for number in range(count)]
    for path in paths:
        path.write_bytes(os.urandom(5000))
    storage.sync_files([*paths, tmp_path / "directory"], workers=2)
    storage.sync_files([], workers=2)
    with pytest.raises(FileNotFoundError):
        storage.sync_files([tmp_path / "gone"] * count, workers=2)


def test_syncing_reports_what_could_not_be_written(tmp_path: Path) -> None:
    """Many small files on a disk that is smaller than it says: syncfs fails as fsync does, or a write before it."""

    def write(paths: list[Path]) -> None:
        for path in paths:
            path.write_bytes(os.urandom(512 << 10))
        storage.sync_files(paths, workers=2)

    with (
        small_disk(tmp_path / "thin", 24 << 20) as thin,
        mounted("ext4", tmp_path / "disk", image=thin / "image") as disk,
        pytest.raises(OSError, match=r"No space|Input/output|Read-only"),
    ):
        write([disk / str(number) for number in range(2 * storage.SYNC_TOGETHER)])


def test_check_space(tmp_path: Path) -> None:
    storage.check_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(WeightctlError, match="not enough room") as caught:
        storage.check_space(tmp_path / "not" / "there" / "yet", 1 << 62)
    assert caught.value.hint


def test_a_staging_directory_that_is_removed_at_this_moment_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever had it removes it as they end, between our opening and our locking it."""
    flock, staging = fcntl.flock, tmp_path / ".x.weightctl-tmp"
    descriptors: list[int] = []

    def remove_and_lock(descriptor: int, how: int) -> None:
        if not descriptors:
            staging.rmdir()
        descriptors.append(descriptor)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", remove_and_lock)
    with storage.staging_beside(tmp_path / "x") as found:
        assert found == staging
        assert staging.is_dir()


def test_memory_is_not_flushed_like_a_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "memory", 1 << 20) as memory:
        assert not storage._sync_filesystem(memory)
