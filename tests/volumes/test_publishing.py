"""Pushes beside each other, of what is there but damaged, and onto full disks."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.command import start, start_halting
from tests.disk import fork, lacking, small_disk
from tests.models import SHARD_BYTES
from tests.volumes.directory import READ, problems, publish, rot, staged, write_lease
from weightctl.config import Config
from weightctl.errors import WeightctlError
from weightctl.progress import Progress
from weightctl.sources.directory import read_directory
from weightctl.volumes import DirectoryVolume


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


@pytest.mark.parametrize("harm", ["damaged", "missing"])
def test_a_version_that_nobody_knows_any_more_is_mended(volume: Path, model: Path, harm: str) -> None:
    """No manifest tells its sizes, so the model's files are not hashed before they are copied."""
    published = publish(volume, model)
    manifest = volume / ".weightctl" / "manifests" / "m" / f"{published.version}.json"
    if harm == "damaged":
        manifest.write_text("{")
        models.flip_bit(published.path / "model-00001-of-00002.safetensors")
    else:
        manifest.unlink()
    again = publish(volume, model)
    assert again.path == published.path
    assert problems(volume) == ()
    assert models.contents(again.path) == models.contents(model)
    assert staged(volume) == []


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
    process = start_halting(signal.SIGSTOP, READ, 5, "push-volume", large, volume, "--json")
    small = publish(volume, model)
    assert DirectoryVolume(volume).versions("m") == [small.version]
    assert DirectoryVolume(volume).resolve("m") == small.path
    process.send_signal(signal.SIGCONT)
    stdout, _ = process.communicate()
    assert DirectoryVolume(volume).resolve("m").name == json.loads(stdout)["version"]
    assert models.contents(small.path) == models.contents(model)
    assert staged(volume) == []


def test_two_models_under_one_name_at_once(volume: Path, tmp_path: Path) -> None:
    both = [models.write_model(tmp_path / str(seed) / "m", shards=4, size=8 << 20, seed=seed * 50) for seed in (1, 2)]
    pushes = [start("push-volume", model, volume, "--json") for model in both]
    results = [json.loads(process.communicate()[0]) for process in pushes]
    assert [process.returncode for process in pushes] == [0, 0]
    for model, result in zip(both, results, strict=True):
        assert models.contents(Path(result["path"])) == models.contents(model)
        assert problems(volume, "m", result["version"]) == ()
    assert os.readlink(volume / "m" / "latest") in [result["version"] for result in results]
    assert staged(volume) == []


def test_a_push_that_stood_still_for_too_long_publishes_nothing(volume: Path, model: Path) -> None:
    """A host that does not see its lock has taken it for dead, and goes on where it was."""
    process = start_halting(signal.SIGSTOP, READ, 1, "push-volume", model, volume)
    (lease,) = (volume / ".weightctl" / "staging").glob("*.lease")
    write_lease(lease)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "error: this push stood still for so long that another process has taken it over" in errors
    assert not list(volume.glob(f"{model.name}/*"))
    assert lease.exists()
    assert models.contents(lease.with_suffix("") / "files") == models.contents(model)


def test_nor_does_one_whose_downloads_others_have_taken_over(volume: Path, model: Path) -> None:
    target = DirectoryVolume(volume)
    with target.downloads("m", progress=Progress()) as downloads:
        shutil.copytree(model, downloads)
        lease = downloads.parent.with_name(f"{downloads.parent.name}.lease")
        write_lease(lease)
        with pytest.raises(WeightctlError, match="another process has taken it over"):
            target.publish(
                read_directory(downloads), "m", downloads=downloads, config=Config(workers=2), progress=Progress()
            )
    assert not list(volume.glob("m/*"))
    assert models.contents(downloads) == models.contents(model)


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
                if description == "pushing":
                    thief.write(bytes(1 << 20))
                    thief.flush()
                return super().task(description, total)

        with pytest.raises(WeightctlError, match="No space left on device") as caught:
            DirectoryVolume(disk).publish(snapshot, "m", config=Config(workers=2), progress=Thief())
        assert caught.value.exit_code == 1
        assert caught.value.hint
        assert sorted(os.listdir(disk / "m")) == sorted([first.version, "latest"])
        assert staged(disk) == []  # room is worth more than work half done
        assert DirectoryVolume(disk).resolve("m") == first.path
        (disk / "stolen").unlink()
        thief.close()
        assert models.contents(publish(disk, model).path) == models.contents(model)
        assert staged(disk) == []
