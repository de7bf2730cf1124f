"""A volume in a directory: what readers see of it, and what it survives."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import weightctl as weightctl_package
from tests import models
from tests.command import start, weightctl
from tests.disk import as_ordinary_user, fork, in_memory, lacking, open_to_all, read_only_directory, small_disk
from tests.models import SHARD_BYTES
from tests.volumes.conformance import VolumeConformance
from weightctl.config import Config
from weightctl.errors import IntegrityError, UsageError, WeightctlError
from weightctl.progress import Progress
from weightctl.sources.directory import read_directory
from weightctl.volumes import DirectoryVolume, Published, publishing


class TestDirectory(VolumeConformance):
    backend = "directory"

    def location(self, scratch: Path) -> Path:
        (scratch / "volume").mkdir()
        return scratch / "volume"


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    (tmp_path / "volume").mkdir()
    return tmp_path / "volume"


@pytest.fixture
def memory() -> Iterator[Path]:
    with in_memory() as directory:
        yield directory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return models.write_model(tmp_path / "m")


def publish(volume: Path, model: Path, name: str = "m", workers: int = 2, verify: bool = False) -> Published:
    return DirectoryVolume(volume).publish(
        read_directory(model), name, verify=verify, config=Config(workers=workers), progress=Progress()
    )


def prune(volume: Path, **options: Any) -> list[str]:
    return [version.version for version in DirectoryVolume(volume).prune(**options, progress=Progress()).removed]


def rot(path: Path) -> None:
    """Flip a bit as a disk does: no time changes."""
    before = path.stat()
    models.flip_bit(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def problems(volume: Path, name: str = "m", version: str = "latest") -> tuple[str, ...]:
    return DirectoryVolume(volume).check(name, version, config=Config(), progress=Progress()).problems


def staged(volume: Path) -> list[Path]:
    """What lies in the volume out of sight, besides locks and manifests."""
    control = volume / ".weightctl"
    return [*(control / "staging").glob("*"), *control.rglob("*.weightctl-tmp")]


def test_it_looks_as_the_design_says(volume: Path, model: Path) -> None:
    published = publish(volume, model, "org/m")
    assert published.path == volume / "org" / "m" / published.version
    assert sorted(os.listdir(volume)) == [".weightctl", "org"]
    assert sorted(os.listdir(volume / "org" / "m")) == sorted([published.version, "latest"])
    latest = volume / "org" / "m" / "latest"
    assert os.readlink(latest) == published.version
    assert models.contents(latest) == models.contents(model)
    for path in [published.path, *published.path.rglob("*")]:
        assert not path.is_symlink()
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644)
    assert staged(volume) == []


def test_a_model_in_the_hubs_cache_becomes_plain_files(volume: Path, tmp_path: Path) -> None:
    snapshot = models.write_hub_cache(tmp_path / "hub", {"config.json": b"{}", "a/model.safetensors": bytes(2 << 20)})
    published = publish(volume, snapshot)
    assert not any(path.is_symlink() for path in published.path.rglob("*"))
    assert models.contents(published.path) == models.contents(snapshot)


@pytest.mark.parametrize(("make", "message"), [(None, "does not exist"), (Path.touch, "is not a directory")])
def test_a_volume_that_is_none(tmp_path: Path, make: Any, message: str) -> None:
    if make:
        make(tmp_path / "nothing")
    with pytest.raises(UsageError, match=message) as caught:
        DirectoryVolume(tmp_path / "nothing")
    assert caught.value.hint


def test_a_latest_that_leads_elsewhere_is_not_followed_and_mended(volume: Path, model: Path) -> None:
    published = publish(volume, model)
    latest = volume / "m" / "latest"
    for target in ("/etc", "../..", "."):
        latest.unlink()
        latest.symlink_to(target)
        with pytest.raises(IntegrityError, match="names no version"):
            DirectoryVolume(volume).resolve("m")
    assert publish(volume, model).copied_bytes == 0
    assert DirectoryVolume(volume).resolve("m") == published.path


def test_a_directory_in_the_place_of_latest(volume: Path, model: Path) -> None:
    published = publish(volume, model)
    latest = volume / "m" / "latest"
    latest.unlink()
    latest.mkdir()
    with pytest.raises(IntegrityError, match="names no version"):
        DirectoryVolume(volume).resolve("m")
    with pytest.raises(WeightctlError, match=f"{latest} is a directory") as caught:
        publish(volume, model)
    assert caught.value.hint
    latest.rmdir()
    publish(volume, model)
    assert DirectoryVolume(volume).resolve("m") == published.path


def test_a_version_that_lost_a_file_is_mended(volume: Path, model: Path) -> None:
    published = publish(volume, model)
    untouched = (published.path / "model-00002-of-00002.safetensors").stat().st_ino
    (published.path / "config.json").unlink()
    (published.path / "1_Pooling" / "config.json").write_text("other")
    models.flip_bit(published.path / "model-00001-of-00002.safetensors")
    again = publish(volume, model)
    assert again.path == published.path
    assert SHARD_BYTES < again.copied_bytes < 2 * SHARD_BYTES
    assert models.contents(published.path) == models.contents(model)
    assert (published.path / "model-00002-of-00002.safetensors").stat().st_ino == untouched
    assert problems(volume) == ()


def test_a_bit_that_rotted_in_silence_is_found_and_mended_with_verify(volume: Path, model: Path) -> None:
    published = publish(volume, model)
    shard = published.path / "model-00001-of-00002.safetensors"
    rot(shard)
    assert publish(volume, model).copied_bytes == 0  # sizes and times say nothing
    assert problems(volume)
    assert publish(volume, model, verify=True).copied_bytes == shard.stat().st_size
    assert models.contents(published.path) == models.contents(model)
    assert publish(volume, model, verify=True).copied_bytes == 0


# What an earlier version has is not copied.


def test_a_file_that_an_earlier_version_has_is_linked(volume: Path, model: Path) -> None:
    first = publish(volume, model)
    models.flip_bit(model / "model-00002-of-00002.safetensors")
    second = publish(volume, model)
    assert second.version != first.version
    changed = (model / "model-00002-of-00002.safetensors").stat().st_size
    assert second.copied_bytes == changed
    assert second.reused_bytes == first.copied_bytes - changed
    assert models.contents(second.path) == models.contents(model)
    same, other = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert (first.path / same).samefile(second.path / same)
    assert not (first.path / other).samefile(second.path / other)
    third = publish(volume, model, "another/name")
    assert (third.copied_bytes, third.reused_bytes) == (0, first.copied_bytes)


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "replace"])
def test_a_damaged_file_is_not_linked(volume: Path, model: Path, harm: str) -> None:
    first = publish(volume, model)
    shard = first.path / "model-00001-of-00002.safetensors"
    if harm == "flip":
        models.flip_bit(shard)
    elif harm == "cut":
        os.truncate(shard, 1000)
    else:
        size = shard.stat().st_size
        shard.unlink()
        if harm == "replace":
            shard.write_bytes(bytes(size))
    (model / "config.json").write_text("changed")
    second = publish(volume, model)
    assert second.copied_bytes > SHARD_BYTES
    assert models.contents(second.path) == models.contents(model)
    assert problems(volume) == ()


def test_an_untouched_file_whose_time_was_changed_is_read_and_linked(volume: Path, model: Path) -> None:
    first = publish(volume, model)
    shard = first.path / "model-00001-of-00002.safetensors"
    shard.touch()
    (model / "config.json").write_text("changed")
    second = publish(volume, model)
    assert second.copied_bytes == len("changed")
    assert shard.samefile(second.path / shard.name)


def test_a_link_that_a_dead_push_left_is_never_written_through(volume: Path, model: Path) -> None:
    first = publish(volume, model)
    before = models.contents(first.path)
    (model / "config.json").write_text("changed")
    process = start("push-volume", model, volume)
    process.kill()
    process.wait()
    staging = volume / ".weightctl" / "staging" / f"m@{publishing._key(read_directory(model))}" / "files"
    staging.mkdir(parents=True)
    (staging / "config.json").hardlink_to(first.path / "config.json")
    second = publish(volume, model)
    assert models.contents(first.path) == before
    assert models.contents(second.path) == models.contents(model)


@pytest.mark.parametrize("calls", [("flock",), ("link",), ("symlink",), ("flock", "link", "symlink", "chmod")])
def test_a_filesystem_without_locks_or_links(volume: Path, model: Path, calls: tuple[str, ...]) -> None:
    def push_twice() -> None:
        lacking(*calls)
        first = publish(volume, model)
        assert publish(volume, model).copied_bytes == 0
        (model / "config.json").write_text("changed")
        second = publish(volume, model)
        assert DirectoryVolume(volume).resolve("m") == second.path
        assert (second.copied_bytes, second.reused_bytes) == (7, first.copied_bytes - 11)
        assert models.contents(second.path) == models.contents(model)
        shard = "model-00001-of-00002.safetensors"
        assert (first.path / shard).samefile(second.path / shard) == ("link" not in calls)
        with DirectoryVolume(volume).use("m", first.version):
            assert prune(volume, keep=1) == []
        assert prune(volume, keep=1) == [first.version]
        assert problems(volume) == ()
        assert staged(volume) == []

    assert os.waitstatus_to_exitcode(os.waitpid(fork(push_twice), 0)[1]) == 0


@pytest.mark.parametrize("calls", [(), ("flock",)])
def test_two_pushes_at_once_of_which_one_does_the_work(volume: Path, tmp_path: Path, calls: tuple[str, ...]) -> None:
    model = models.settle(models.write_model(tmp_path / "m", shards=4, size=8 << 20))
    counts = tmp_path / "counts"
    counts.mkdir()

    def push() -> None:
        lacking(*calls)
        (counts / str(os.getpid())).write_text(str(publish(volume, model).copied_bytes))

    children = [fork(push) for _ in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    total = sum(map(len, models.contents(model).values()))
    assert sorted(int(count.read_text()) for count in counts.iterdir()) == [0, total]
    assert staged(volume) == []


def test_a_push_does_not_wait_for_one_of_another_version(volume: Path, model: Path, tmp_path: Path) -> None:
    large = models.write_sparse_model(tmp_path / "large" / "m", 256 << 20)
    process = start("push-volume", large, volume, "--json")
    models.stop_at(process, volume / ".weightctl" / "staging", 8 << 20)
    small = publish(volume, model)
    assert DirectoryVolume(volume).versions("m") == [small.version]
    assert DirectoryVolume(volume).resolve("m") == small.path
    process.send_signal(signal.SIGCONT)
    stdout, _ = process.communicate(timeout=100)
    assert DirectoryVolume(volume).resolve("m").name == json.loads(stdout)["version"]
    assert models.contents(small.path) == models.contents(model)
    assert staged(volume) == []


# Names, numbers, sizes and rights.


def test_a_name_of_every_legal_byte(volume: Path, tmp_path: Path) -> None:
    every = bytes(byte for byte in range(1, 256) if byte != ord("/"))
    os.makedirs(os.path.join(os.fsencode(tmp_path / "m"), every))
    with open(os.path.join(os.fsencode(tmp_path / "m"), every, every), "wb") as stream:
        stream.write(b"here")
    published = publish(volume, tmp_path / "m")
    assert models.contents(published.path) == models.contents(tmp_path / "m")
    assert problems(volume) == ()
    assert publish(volume, tmp_path / "m").copied_bytes == 0


def test_ten_thousand_files(memory: Path) -> None:
    model, volume = memory / "m", memory / "volume"
    model.mkdir()
    volume.mkdir()
    for number in range(10_000):
        (model / f"{number:05}").write_bytes(b"%d" % number)
    published = publish(volume, model)
    assert models.contents(published.path) == models.contents(model)
    (model / "00000").write_bytes(b"other")
    assert publish(volume, model).copied_bytes == 5


def test_a_file_of_a_gibibyte(volume: Path, tmp_path: Path) -> None:
    """What was staged of it is compared, which writes nothing: a dead push had got as far as its last bytes."""
    size = (1 << 30) + 5
    model = models.write_sparse_model(tmp_path / "m", size)
    places = {0: b"begin", (1 << 30) - 2: b"1 GiB"}
    with (model / "model.bin").open("rb+") as stream:
        for place, mark in places.items():
            stream.seek(place)
            stream.write(mark)
    staging = volume / ".weightctl" / "staging" / f"m@{publishing._key(read_directory(model))}" / "files"
    staging.mkdir(parents=True)
    with (staging / "model.bin").open("wb") as stream:
        stream.truncate(size)
    published = publish(volume, model)
    assert (published.path / "model.bin").stat().st_size == size
    with (published.path / "model.bin").open("rb") as stream:
        for place, mark in places.items():
            assert os.pread(stream.fileno(), 5, place) == mark


def test_whatever_the_umask_readers_can_read(volume: Path, model: Path) -> None:
    before = os.umask(0o077)
    try:
        published = publish(volume, model, "org/m")
    finally:
        os.umask(before)
    volume.chmod(0o755)
    for path in (published.path, published.path.parent, published.path.parent.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o755

    def read() -> None:
        there = DirectoryVolume(volume)
        assert [version.version for version in there.contents()] == [published.version]
        assert there.check("org/m", "latest", config=Config(), progress=Progress()).problems == ()

    open_to_all(volume)
    as_ordinary_user(read)
    (volume / ".weightctl").chmod(0o700)

    def cannot_read() -> None:
        there = DirectoryVolume(volume)
        assert there.resolve("org/m") == published.path
        with pytest.raises(WeightctlError, match="Permission denied") as caught:
            there.contents()
        assert caught.value.hint

    as_ordinary_user(cannot_read)


def test_a_volume_of_another_user(model: Path, tmp_path: Path) -> None:
    snapshot = read_directory(model)
    with read_only_directory() as volume:
        volume.chmod(0o755)
        first = publish(volume, model)

        def attempt() -> None:
            there = DirectoryVolume(volume)
            assert there.resolve("m") == first.path
            assert [version.version for version in there.contents()] == [first.version]
            with pytest.raises(WeightctlError, match="Permission denied") as caught:
                there.publish(snapshot, "m", config=Config(), progress=Progress())
            assert caught.value.hint
            with pytest.raises(WeightctlError, match="cannot mark a version as in use"), there.use("m"):
                pass

        as_ordinary_user(attempt)
        assert problems(volume) == ()


@pytest.mark.parametrize("place", ["", "volume", "volume/org", "volume/org/m", "volume/.weightctl"])
def test_what_may_not_be_read(tmp_path: Path, model: Path, place: str) -> None:
    volume = tmp_path / "closed" / "volume"
    volume.mkdir(parents=True)
    publish(volume, model, "org/m")
    closed = tmp_path / "closed" / place

    asks: list[Callable[[DirectoryVolume], object]] = [
        lambda there: there.check("org/m", "latest", config=Config(), progress=Progress()),
        lambda there: there.contents(),
        lambda there: there.prune(keep=1, progress=Progress()),
        lambda there: there.use("org/m").__enter__(),
    ]
    if place != "volume/.weightctl":
        asks.append(lambda there: there.resolve("org/m"))

    def read() -> None:
        for ask in asks:
            with pytest.raises(WeightctlError, match="Permission denied") as caught:
                ask(DirectoryVolume(volume))
            assert caught.value.hint

    open_to_all(tmp_path)
    closed.chmod(0o700)
    as_ordinary_user(read)


def test_a_source_that_vanishes(volume: Path, model: Path) -> None:
    snapshot = read_directory(model)
    (model / "config.json").unlink()
    with pytest.raises(WeightctlError, match=r"cannot read .*config.json: No such file"):
        DirectoryVolume(volume).publish(snapshot, "m", config=Config(), progress=Progress())
    assert not (volume / "m").exists()


# Reading.


def test_what_is_latest_stays_until_reload(volume: Path, model: Path) -> None:
    first = publish(volume, model)
    reader = weightctl_package.Volume(str(volume))
    assert reader.resolve("m") == first.path
    models.flip_bit(model / "config.json")
    second = publish(volume, model)
    assert reader.resolve("m") == first.path
    assert reader.versions("m") == sorted([first.version, second.version])
    reader.reload()
    assert reader.resolve("m") == second.path
    assert reader.resolve("m", first.version) == first.path


def test_a_process_that_uses_a_version_keeps_it(volume: Path, model: Path) -> None:
    first = publish(volume, model)
    code = (
        "import sys, time, weightctl\n"
        "with weightctl.Volume(sys.argv[1]).use('m') as path: print(path, flush=True); time.sleep(100)"
    )
    reader = subprocess.Popen([sys.executable, "-c", code, str(volume)], stdout=subprocess.PIPE, text=True)
    assert reader.stdout
    assert reader.stdout.readline() == f"{first.path}\n"
    models.flip_bit(model / "config.json")
    publish(volume, model)
    (marked,) = [version for version in DirectoryVolume(volume).contents() if not version.latest]
    assert marked.readers == (f"{os.uname().nodename}:{reader.pid}",)
    assert prune(volume, keep=1, dry_run=True) == prune(volume, keep=1) == []
    assert first.path.is_dir()
    reader.kill()
    reader.communicate()
    assert prune(volume, keep=1) == [first.version]
    assert not first.path.exists()


def test_a_memory_map_of_an_old_version_stays_right(volume: Path, model: Path) -> None:
    first = publish(volume, model)
    shard = first.path / "model-00001-of-00002.safetensors"
    expected = shard.read_bytes()
    with shard.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        models.flip_bit(model / "model-00001-of-00002.safetensors")
        publish(volume, model)
        assert mapped[:] == expected
        assert prune(volume, keep=1) == [first.version]
        assert not shard.exists()
        assert mapped[:] == expected
    assert problems(volume) == ()


# Pruning.


def test_prune_keeps_the_newest_and_the_latest(volume: Path, model: Path) -> None:
    versions = []
    for number in range(4):
        (model / "config.json").write_text(f"{number}")
        versions.append(publish(volume, model).version)
    (model / "config.json").write_text("0")
    publish(volume, model)  # the oldest is the latest again
    listed = [version.version for version in DirectoryVolume(volume).contents()]
    assert listed == [versions[0], versions[3], versions[2], versions[1]]
    before = models.state(volume / "m")
    assert prune(volume, keep=3, dry_run=True) == [versions[1]]
    assert models.state(volume / "m") == before
    assert prune(volume) == []
    assert prune(volume, keep=3, older_than=3600) == []
    assert prune(volume, keep=3) == [versions[1]]
    assert prune(volume, older_than=0) == [versions[3], versions[2]]
    assert sorted(os.listdir(volume / "m")) == sorted([versions[0], "latest"])
    assert problems(volume) == ()
    assert staged(volume) == []


def test_prune_tells_what_it_frees(volume: Path, model: Path) -> None:
    publish(volume, model)
    (model / "config.json").write_text("changed")
    publish(volume, model)
    done = DirectoryVolume(volume).prune(keep=1, dry_run=True, progress=Progress())
    assert done.freed_bytes == len('{"seed": 0}')
    assert DirectoryVolume(volume).prune(keep=1, progress=Progress()).freed_bytes == done.freed_bytes


def test_prune_sweeps_dead_pushes_and_leaves_living_ones(volume: Path, tmp_path: Path) -> None:
    pushes = []
    for name in ("dead", "living"):
        pushes.append(start("push-volume", models.write_sparse_model(tmp_path / name, 256 << 20), volume))
        models.wait_for(lambda: len(list((volume / ".weightctl" / "staging").glob("*/files/*"))) == len(pushes))
        pushes[-1].send_signal(signal.SIGSTOP)
    pushes[0].kill()
    pushes[0].communicate()
    assert DirectoryVolume(volume).prune(progress=Progress()).leftovers == 1
    (left,) = (path for path in (volume / ".weightctl" / "staging").iterdir() if path.is_dir())
    assert left.name.startswith("living@")
    pushes[1].kill()
    pushes[1].communicate()
    assert DirectoryVolume(volume).prune(dry_run=True, progress=Progress()).leftovers == 1
    assert DirectoryVolume(volume).prune(progress=Progress()).leftovers == 1
    assert staged(volume) == []


def test_two_models_of_the_same_content_are_pruned_at_once(volume: Path, model: Path) -> None:
    for text in ("1", "2"):
        (model / "config.json").write_text(text)
        for name in ("m", "org/m"):
            publish(volume, model, name)
    assert len(prune(volume, keep=1)) == 2
    assert staged(volume) == []
    assert problems(volume) == problems(volume, "org/m") == ()


@pytest.mark.parametrize("calls", [(), ("link",)], ids=["links", "no links"])
def test_pushes_while_others_prune(memory: Path, model: Path, calls: tuple[str, ...]) -> None:
    """What a push would link or read is pruned under its hands: then it comes from the model."""
    volume, over = memory, memory / "over"

    def prune_on() -> None:
        while not over.exists():
            prune(volume, keep=1)
            DirectoryVolume(volume).contents()

    def push_on() -> None:
        lacking(*calls)
        for number in range(12):
            (model / "config.json").write_text(f"{number % 3}")
            published = publish(volume, model, verify=bool(number % 2))
            for file in published.path.glob("*.safetensors"):
                file.touch()  # so that it has to be read before it is linked
            assert models.contents(DirectoryVolume(volume).resolve("m")) == models.contents(model)

    pruners = [fork(prune_on) for _ in range(2)]
    pusher = fork(push_on)
    assert os.waitstatus_to_exitcode(os.waitpid(pusher, 0)[1]) == 0
    over.touch()
    assert [os.waitstatus_to_exitcode(os.waitpid(pruner, 0)[1]) for pruner in pruners] == [0, 0]


def test_a_damaged_file_is_not_copied_where_there_are_no_links(volume: Path, model: Path) -> None:
    """Sizes and times say nothing; its bytes do, while it is copied inside the volume."""
    first = publish(volume, model)
    rot(first.path / "model-00001-of-00002.safetensors")
    (model / "config.json").write_text("changed")

    def push() -> None:
        lacking("link")
        assert models.contents(publish(volume, model).path) == models.contents(model)

    assert os.waitstatus_to_exitcode(os.waitpid(fork(push), 0)[1]) == 0


def test_a_link_among_the_published_files_is_a_problem(volume: Path, model: Path, tmp_path: Path) -> None:
    published = publish(volume, model)
    (tmp_path / "elsewhere").mkdir()
    (published.path / "more").symlink_to(tmp_path / "elsewhere")
    assert problems(volume) == ("more was not published with this version",)


@pytest.mark.parametrize(
    "manifest",
    ["", "{", "[]", "null", "{}", '{"files": 1}', '{"files": [1]}', '{"files": [{"path": "x"}]}',
     '{"files": [{"path": "../x", "size": 1, "sha256": ""}]}', '{"files": [{"path": "x", "size": "y", "sha256": ""}]}',
     "[" * 100_000, '{"files": [{"path": "x", "size": Infinity, "sha256": ""}]}'],
)  # fmt: skip
def test_a_damaged_manifest(volume: Path, model: Path, manifest: str) -> None:
    published = publish(volume, model)
    (volume / ".weightctl" / "manifests" / "m" / f"{published.version}.json").write_text(manifest)
    with pytest.raises(IntegrityError):
        problems(volume)


def test_a_file_that_is_written_meanwhile(volume: Path, tmp_path: Path) -> None:
    weights = models.write_safetensors(tmp_path / "m" / "model.safetensors", 64 << 20)
    over = threading.Event()

    def write() -> None:
        with weights.open("rb+", buffering=0) as stream:
            while not over.is_set():
                stream.seek(60 << 20)
                stream.write(os.urandom(100))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        with pytest.raises(IntegrityError, match="changed while it was read"):
            publish(volume, tmp_path / "m")
    finally:
        over.set()
        writer.join()
    assert os.listdir(volume) == [".weightctl"]


# What it survives.

READER = """
import hashlib, json, os, pathlib, sys, time
volume, names, name = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), "m"
versions, looks = set(), 0
while not (volume / "stop").exists():
    looks += 1
    try:
        path = volume / name / os.readlink(volume / name / "latest")
    except FileNotFoundError:
        continue
    sizes = {file: os.stat(path / file).st_size for file in names}
    assert sizes == names, (path, sizes)
    if path.name not in versions:
        versions.add(path.name)
        digest = hashlib.sha256(b"".join((path / file).read_bytes() for file in sorted(names))).hexdigest()
        print(path.name, digest, flush=True)
    time.sleep(0.001)
print("looks", looks)
"""


def digest_of(model: Path) -> str:
    return hashlib.sha256(b"".join(data for _, data in sorted(models.contents(model).items()))).hexdigest()


def test_a_reader_never_sees_a_part_of_a_version_however_pushes_die(volume: Path, tmp_path: Path) -> None:
    first = models.write_model(tmp_path / "m", shards=12, size=8 << 20, seed=10)
    second = models.write_model(tmp_path / "second" / "m", shards=12, size=8 << 20, seed=30)
    sizes = {name: len(data) for name, data in models.contents(first).items()}
    models.settle(second)
    total = sum(sizes.values())
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(volume), json.dumps(sizes)], stdout=subprocess.PIPE, text=True
    )
    killed = 0
    for model in (first, second):
        for percent in (1, 60):
            process = start("push-volume", model, volume)
            models.kill_at(process, volume / ".weightctl" / "staging", total * percent // 100)
            killed += process.returncode == -signal.SIGKILL
        outcome = weightctl("push-volume", model, volume, "--json")
        assert outcome.code == 0, outcome.stderr
        assert outcome.result["copied_bytes"] + outcome.result["reused_bytes"] == total
    (volume / "stop").touch()
    seen = reader.communicate(timeout=60)[0].splitlines()
    assert reader.returncode == 0
    assert killed
    assert [line.split()[1] for line in seen[:-1]] == [digest_of(first), digest_of(second)]
    assert staged(volume) == []
    assert problems(volume) == ()


def test_a_push_takes_up_what_a_dead_one_has_staged(volume: Path, tmp_path: Path) -> None:
    model = models.settle(models.write_model(tmp_path / "m", shards=6, size=16 << 20))
    process = start("push-volume", model, volume, "--workers", 1)
    models.kill_at(process, volume / ".weightctl" / "staging", 3 * (16 << 20) + 1)
    half = [path for path in (volume / ".weightctl" / "staging").rglob("*-00001-of-*") if path.is_file()]
    inode = half[0].stat().st_ino
    result = weightctl("push-volume", model, volume, "--json").result
    assert result["reused_bytes"] >= 16 << 20
    assert result["copied_bytes"] + result["reused_bytes"] == result["bytes"]
    assert (Path(result["path"]) / half[0].name).stat().st_ino == inode
    assert models.contents(Path(result["path"])) == models.contents(model)


def test_what_is_staged_is_not_trusted(volume: Path, tmp_path: Path) -> None:
    model = models.settle(models.write_model(tmp_path / "m", shards=3, size=16 << 20))
    process = start("push-volume", model, volume, "--workers", 1)
    models.kill_at(process, volume / ".weightctl" / "staging", 2 * (16 << 20) + 1)
    (half,) = [path for path in (volume / ".weightctl" / "staging").rglob("*-00001-of-*") if path.is_file()]
    models.flip_bit(half)
    (half.parent / "stranger").touch()
    published = publish(volume, model)
    assert models.contents(published.path) == models.contents(model)


def test_a_push_of_another_model_clears_away_what_a_dead_one_has_staged(volume: Path, tmp_path: Path) -> None:
    model = models.write_model(tmp_path / "m", shards=3, size=16 << 20)
    process = start("push-volume", model, volume)
    models.kill_at(process, volume / ".weightctl" / "staging", 16 << 20 + 1)
    assert staged(volume)
    publish(volume, models.write_model(tmp_path / "other", seed=9))
    assert staged(volume) == []


def test_a_disk_that_is_full_from_the_start(model: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2 << 20) as disk:
        first = publish(disk, models.write_model(tmp_path / "small", shards=1, size=100))
        with pytest.raises(WeightctlError, match="not enough room") as caught:
            publish(disk, model)
        assert caught.value.exit_code == 1
        assert caught.value.hint
        assert DirectoryVolume(disk).resolve("m") == first.path
        assert problems(disk) == ()


def test_a_disk_that_fills_up_in_the_middle(model: Path, tmp_path: Path) -> None:
    """As if another process took the room after the push had looked."""
    snapshot = read_directory(model)
    with small_disk(tmp_path / "disk", snapshot.bytes + (512 << 10)) as disk:
        first = publish(disk, models.write_model(tmp_path / "small", shards=1, size=100))
        thief = (disk / "stolen").open("wb")

        class Thief(Progress):
            def task(self, description: str, total: int) -> Any:
                thief.write(bytes(1 << 20))
                thief.flush()
                return super().task(description, total)

        with pytest.raises(WeightctlError, match=r"No space left on device|not enough room") as caught:
            DirectoryVolume(disk).publish(snapshot, "m", config=Config(workers=2), progress=Thief())
        assert caught.value.exit_code == 1
        assert caught.value.hint
        assert sorted(os.listdir(disk / "m")) == sorted([first.version, "latest"])
        assert DirectoryVolume(disk).resolve("m") == first.path
        (disk / "stolen").unlink()
        thief.close()
        assert models.contents(publish(disk, model).path) == models.contents(model)
        assert staged(disk) == []


def test_a_volume_that_cannot_be_written(model: Path) -> None:
    snapshot = read_directory(model)
    with read_only_directory() as directory:

        def attempt() -> None:
            with pytest.raises(WeightctlError, match="Permission denied") as caught:
                DirectoryVolume(directory).publish(snapshot, "m", config=Config(), progress=Progress())
            assert caught.value.exit_code == 1
            assert caught.value.hint

        as_ordinary_user(attempt)
        assert os.listdir(directory) == []


def test_two_pushes_of_one_model_at_once(volume: Path, tmp_path: Path) -> None:
    model = models.settle(models.write_model(tmp_path / "m", shards=4, size=16 << 20))
    pushes = [start("push-volume", model, volume, "--json") for _ in range(2)]
    results = [json.loads(process.communicate(timeout=60)[0]) for process in pushes]
    assert [process.returncode for process in pushes] == [0, 0]
    assert results[0]["path"] == results[1]["path"]
    assert sorted(result["copied_bytes"] for result in results) == [0, results[0]["bytes"]]
    assert problems(volume) == ()
    assert staged(volume) == []


def test_two_models_under_one_name_at_once(volume: Path, tmp_path: Path) -> None:
    both = [models.write_model(tmp_path / str(seed) / "m", shards=4, size=8 << 20, seed=seed * 50) for seed in (1, 2)]
    pushes = [start("push-volume", model, volume, "--json") for model in both]
    results = [json.loads(process.communicate(timeout=60)[0]) for process in pushes]
    assert [process.returncode for process in pushes] == [0, 0]
    for model, result in zip(both, results, strict=True):
        assert models.contents(Path(result["path"])) == models.contents(model)
        assert problems(volume, "m", result["version"]) == ()
    assert os.readlink(volume / "m" / "latest") in [result["version"] for result in results]
    assert staged(volume) == []
