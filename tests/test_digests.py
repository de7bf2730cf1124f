"""What was hashed before is remembered only while it cannot have changed."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from tests.disk import as_ordinary_user, read_only_directory
from tests.hub_server import git_blob_id
from weightctl.digests import RACY_NANOSECONDS, DigestCache, Identity, check_files, hash_files, unchanging
from weightctl.errors import IntegrityError, WeightctlError
from weightctl.model import File
from weightctl.progress import Progress, Task

SETTLED = Identity("", True)


class Recorder(Progress):
    """Counts the bytes that were reported."""

    def __init__(self) -> None:
        self.total = self.done = 0

    def task(self, description: str, total: int) -> Task:
        self.total += total
        recorder = self

        class Counter(Task):
            def advance(self, amount: int) -> None:
                recorder.done += amount

        return Counter()


@pytest.fixture
def cache(tmp_path: Path) -> DigestCache:
    return DigestCache(tmp_path / "cache" / "digests.sqlite3")


def settled(path: Path) -> Path:
    """Wait until nothing of the file's times is recent any more (ctime cannot be set back)."""
    while not Identity.of(path).settled:
        time.sleep(0.05)
    return path


@pytest.fixture(scope="module")
def old_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that has been left alone."""
    path = tmp_path_factory.mktemp("old") / "weights.bin"
    path.write_bytes(b"right")
    return settled(path)


def as_file(path: Path, **digests: str) -> File:
    return File(path.name, path.stat().st_size, path, **digests)


def test_a_settled_file_is_remembered(cache: DigestCache, old_file: Path) -> None:
    cache.put("sha256", old_file, Identity.of(old_file), "abc")
    assert cache.get("sha256", old_file) == "abc"
    assert cache.get("git_id", old_file) is None


def test_a_file_that_changed_just_now_is_not_remembered(cache: DigestCache, tmp_path: Path) -> None:
    path = tmp_path / "young"
    path.write_bytes(b"x")
    cache.put("sha256", path, Identity.of(path), "abc")
    assert cache.get("sha256", path) is None


def test_setting_the_clock_of_a_file_back_does_not_settle_it(tmp_path: Path) -> None:
    path = tmp_path / "young"
    path.write_bytes(b"x")
    os.utime(path, ns=(0, 0))
    assert not Identity.of(path).settled


def test_a_file_from_the_future_is_not_settled(tmp_path: Path) -> None:
    path = tmp_path / "future"
    path.write_bytes(b"x")
    future = time.time_ns() + 10 * RACY_NANOSECONDS
    os.utime(path, ns=(future, future))
    assert not Identity.of(path).settled


def test_a_changed_file_is_noticed_though_size_and_mtime_are_the_same(cache: DigestCache, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"right")
    seen = Identity.of(settled(path))
    cache.put("sha256", path, seen, "abc")
    before = path.stat()
    path.write_bytes(b"wrong")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cache.get("sha256", path) is None


def test_a_file_that_changed_while_it_was_hashed_is_not_remembered(cache: DigestCache, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"right")
    seen = Identity.of(settled(path))
    path.write_bytes(b"wrong")
    cache.put("sha256", path, seen, "abc")
    assert cache.get("sha256", path) is None


def test_one_more_link_is_no_change(tmp_path: Path) -> None:
    """A push links to files that others are reading."""
    path = tmp_path / "file"
    path.write_bytes(b"right")
    with unchanging(path) as seen:
        (tmp_path / "link").hardlink_to(path)
    assert Identity.of(path).key != seen.key
    with pytest.raises(IntegrityError, match="changed while it was read"), unchanging(path):
        path.write_bytes(b"wrong")


def test_many_at_once(cache: DigestCache, tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(5)]
    for number, file in enumerate(files):
        file.write_bytes(bytes(number))
    seen = [(file, Identity.of(settled(file)), f"value {file.name}") for file in files]
    files[3].write_bytes(b"changed since")
    files[4].unlink()
    cache.put_all("sha256", seen[:4])
    assert cache.get_all("sha256", files[:4]) == {file: f"value {file.name}" for file in files[:3]}
    assert cache.get_all("git_id", files[:4]) == {}
    cache.put_all("sha256", [(files[0], Identity.of(files[0]), "another")])
    assert cache.get_all("sha256", files[:2]) == {files[0]: "another", files[1]: "value 1"}
    cache.put_all("sha256", [])
    assert cache.get_all("sha256", []) == {}


def test_a_file_that_is_gone_forgets_the_others_at_worst(cache: DigestCache, tmp_path: Path, old_file: Path) -> None:
    cache.put("sha256", old_file, Identity.of(old_file), "value")
    cache.put_all("sha256", [(tmp_path / "gone", Identity.of(old_file), "value")])
    assert set(cache.get_all("sha256", [old_file, tmp_path / "gone"]).values()) <= {"value"}
    assert cache.get("sha256", old_file) == "value"


def test_a_cache_that_cannot_be_written_is_harmless(old_file: Path) -> None:
    with read_only_directory() as directory:
        cache = DigestCache(directory / "weightctl" / "digests.sqlite3")

        def attempt() -> None:
            cache.put("sha256", old_file, SETTLED, "abc")
            assert cache.get("sha256", old_file) is None

        as_ordinary_user(attempt)


def test_a_cache_that_is_no_database_is_harmless(tmp_path: Path, old_file: Path) -> None:
    (tmp_path / "digests.sqlite3").write_bytes(b"not a database, but long enough to be looked at as one" * 100)
    cache = DigestCache(tmp_path / "digests.sqlite3")
    cache.put("sha256", old_file, Identity.of(old_file), "abc")
    assert cache.get("sha256", old_file) is None
    assert hash_files([as_file(old_file)], 1, cache, Progress())[0].sha256 == hashlib.sha256(b"right").hexdigest()


def test_the_cache_lies_where_caches_lie(tmp_path: Path, old_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    DigestCache().put("sha256", old_file, Identity.of(old_file), "abc")
    assert (tmp_path / "weightctl" / "digests.sqlite3").is_file()


@pytest.mark.parametrize("content", [b"", b"right", os.urandom(5 << 20)], ids=len)
def test_hashes_are_those_of_sha256_and_of_git(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    progress = Recorder()
    (read,) = hash_files([as_file(path, git_id="0" * 40)], 2, None, progress)
    assert read.sha256 == hashlib.sha256(content).hexdigest()
    assert read.git_id == git_blob_id(content)
    assert progress.done == progress.total == len(content)


def test_a_remembered_file_is_not_read_again(cache: DigestCache, old_file: Path) -> None:
    cache.put("sha256", old_file, Identity.of(old_file), "remembered")
    progress = Recorder()
    assert hash_files([as_file(old_file)], 1, cache, progress)[0].sha256 == "remembered"
    assert progress.done == progress.total == len(b"right")


def test_what_is_claimed_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"right")
    right, wrong = hashlib.sha256(b"right").hexdigest(), hashlib.sha256(b"wrong").hexdigest()
    claims = [as_file(path), as_file(path, sha256=right), as_file(path, git_id=git_blob_id(b"right"))]
    lies = [as_file(path, sha256=wrong), as_file(path, git_id=git_blob_id(b"wrong"))]
    actual, bad = check_files([*claims, *lies], 2, None, Progress())
    assert bad == lies
    assert {file.sha256 for file in actual} == {right}


def test_a_file_of_another_length_is_an_integrity_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"right")
    with pytest.raises(IntegrityError):
        hash_files([File("file", 4, path)], 1, None, Progress())


def test_a_file_that_went_away_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(WeightctlError, match="gone"):
        hash_files([File("gone", 4, tmp_path / "gone")], 1, None, Progress())
