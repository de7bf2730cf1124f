"""A volume in a directory: what readers see of it, and what it survives."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.command import start, weightctl
from tests.disk import as_ordinary_user, read_only_directory, small_disk
from tests.volumes.conformance import VolumeConformance
from weightctl.config import Config
from weightctl.errors import IntegrityError, UsageError, WeightctlError
from weightctl.progress import Progress
from weightctl.sources.directory import read_directory
from weightctl.volumes import DirectoryVolume, Published


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
def model(tmp_path: Path) -> Path:
    return models.write_model(tmp_path / "m")


def publish(volume: Path, model: Path, name: str = "m", workers: int = 2) -> Published:
    return DirectoryVolume(volume).publish(
        read_directory(model), name, config=Config(workers=workers), progress=Progress()
    )


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
        with pytest.raises(IntegrityError, match="points out of"):
            DirectoryVolume(volume).resolve("m")
    assert publish(volume, model).copied_bytes == 0
    assert DirectoryVolume(volume).resolve("m") == published.path


def test_a_version_that_lost_a_file_is_not_taken_for_whole(volume: Path, model: Path) -> None:
    models.settle(model)
    published = publish(volume, model)
    (published.path / "config.json").unlink()
    with pytest.raises(IntegrityError, match="is damaged: files are missing") as caught:
        publish(volume, model)
    assert published.version in str(caught.value.hint)


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
        for percent in (1, 20, 50, 80, 99):
            process = start("push-volume", model, volume)
            models.kill_at(process, volume / ".weightctl" / "staging", total * percent // 100)
            killed += process.returncode == -signal.SIGKILL
        outcome = weightctl("push-volume", model, volume, "--json")
        assert outcome.code == 0, outcome.stderr
        assert outcome.result["copied_bytes"] + outcome.result["reused_bytes"] == total
    (volume / "stop").touch()
    seen = reader.communicate(timeout=60)[0].splitlines()
    assert reader.returncode == 0
    assert killed >= 4
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
