"""Volumes on real filesystems: with and without links, modes and shared locks, with quotas, and on failing disks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import models
from tests.disk import MOUNT, fork, mounted, run, small_disk
from tests.volumes.directory import problems, publish
from weightctl.config import Config
from weightctl.errors import WeightctlError
from weightctl.progress import Progress, Task
from weightctl.sources.directory import read_directory
from weightctl.volumes import DirectoryVolume, leases


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """8 MB, most of them in two shards."""
    return models.write_model(tmp_path / "model", size=4 << 20)


@pytest.mark.parametrize("kind", list(MOUNT))
def test_a_volume_on(kind: str, model: Path, tmp_path: Path) -> None:
    with mounted(kind, tmp_path / "volume") as volume:
        first = publish(volume, model)
        assert publish(volume, model).copied_bytes == 0
        (model / "config.json").write_text("changed")
        second = publish(volume, model)
        assert second.copied_bytes == len("changed")
        there = DirectoryVolume(volume)
        assert there.resolve("m").name == second.version
        assert models.contents(second.path) == models.contents(model)
        assert problems(volume, version=first.version) == problems(volume) == ()
        with there.use("m", first.version):
            (old,) = [version for version in there.contents() if not version.latest]
            assert old.readers == (f"{os.uname().nodename}:{os.getpid()}",)
            assert there.prune(keep=1, progress=Progress()).removed == ()
        (gone,) = there.prune(keep=1, progress=Progress()).removed
        assert gone.version == first.version
        assert not first.path.exists()
        assert problems(volume) == ()
        assert list((volume / ".weightctl" / "staging").iterdir()) == []


def test_blocks_are_shared_where_they_can_be(model: Path, tmp_path: Path) -> None:
    with mounted("btrfs", tmp_path / "disk") as disk:
        (disk / "volume").mkdir()
        large = models.write_safetensors(disk / "model" / "model.safetensors", 64 << 20)
        os.sync()
        before = os.statvfs(disk)
        published = publish(disk / "volume", large.parent)
        os.sync()
        after = os.statvfs(disk)
        assert published.copied_bytes >= 64 << 20
        assert (before.f_bfree - after.f_bfree) * after.f_frsize < 8 << 20
        assert problems(disk / "volume") == ()


def test_names_that_a_filesystem_takes_for_one(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("a.bin", "A.bin"):
        (tmp_path / "model" / name).write_bytes(name.encode() * 1000)
    with mounted("exfat", tmp_path / "volume") as volume:
        with pytest.raises(WeightctlError, match=r"does not keep the name '[aA].bin' apart") as caught:
            publish(volume, tmp_path / "model")
        assert caught.value.hint
        assert not (volume / "m").exists()


def test_a_quota_that_is_used_up(model: Path, tmp_path: Path) -> None:
    with mounted("btrfs", tmp_path / "volume") as volume:
        run("btrfs", "quota", "enable", volume)
        first = publish(volume, model)
        run("btrfs", "qgroup", "limit", "30M", volume)
        large = models.write_model(tmp_path / "large", size=32 << 20, seed=5)
        with pytest.raises(WeightctlError, match="Disk quota exceeded") as caught:
            publish(volume, large)
        assert "quota" in str(caught.value.hint)
        assert DirectoryVolume(volume).resolve("m") == first.path
        assert problems(volume) == ()
        run("btrfs", "qgroup", "limit", "none", volume)
        assert models.contents(publish(volume, large).path) == models.contents(large)


def test_a_disk_that_fails(model: Path, tmp_path: Path) -> None:
    """The volume's disk is an image on a mount that breaks in the middle of a push: from then on all its I/O is EIO."""
    snapshot = read_directory(models.write_model(tmp_path / "large", size=32 << 20, seed=5))
    with mounted("bindfs", tmp_path / "cable") as cable:

        class Break(Progress):
            def task(self, description: str, total: int) -> Task:
                subprocess.run(
                    ["umount", "--force", cable], check=False, capture_output=True
                )  # busy, so it only breaks
                return super().task(description, total)

        with mounted("ext4", tmp_path / "volume", image=cable / "image") as volume:
            first = publish(volume, model)
            os.sync()
            with pytest.raises(WeightctlError, match=r"Input/output error|Read-only file system") as caught:
                DirectoryVolume(volume).publish(snapshot, "m", config=Config(workers=2), progress=Break())
            assert caught.value.hint
            assert (volume / "m" / "latest").readlink() == Path(first.version)


def test_a_disk_that_is_smaller_than_it_says(model: Path, tmp_path: Path) -> None:
    """As thin volumes are: there is room until the blocks are written back, then the sync fails."""
    with (
        small_disk(tmp_path / "thin", 40 << 20) as thin,
        mounted("ext4", tmp_path / "volume", image=thin / "image") as volume,
    ):
        first = publish(volume, model)
        os.sync()
        large = models.write_model(tmp_path / "large", size=64 << 20, seed=5)
        with pytest.raises(WeightctlError, match=r"No space|Input/output error|Read-only file system") as caught:
            publish(volume, large)
        assert caught.value.hint
        assert DirectoryVolume(volume).resolve("m") == first.path
        assert problems(volume) == ()


def test_a_version_that_somebody_has_open_is_pruned(model: Path, tmp_path: Path) -> None:
    """FUSE and NFS keep an open file under another name in its directory, which can then not be removed."""
    with mounted("bindfs", tmp_path / "volume") as volume:
        first = publish(volume, model)
        (model / "config.json").write_text("changed")
        publish(volume, model)
        there = DirectoryVolume(volume)
        with (first.path / "config.json").open("rb") as opened:
            assert len(there.prune(keep=1, progress=Progress()).removed) == 1
            assert opened.read() == b'{"seed": 0}'
        there.prune(progress=Progress())
        assert list((volume / ".weightctl" / "staging").iterdir()) == []


# Two hosts.


@pytest.fixture
def two_mounts(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """One directory through two mounts, neither of which sees the other's locks."""
    with (
        mounted("bindfs", tmp_path / "one", below=tmp_path / "shared") as one,
        mounted("bindfs", tmp_path / "two", below=tmp_path / "shared") as two,
    ):
        yield one, two


def push_from_host(host: str, model: Path, volume: Path) -> subprocess.Popen[str]:
    """A push by a process with a hostname and process ids of its own."""
    push = [sys.executable, "-m", "weightctl", "push-volume", model, volume, "--name", "m", "--json"]
    command = ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "sh", "-c", 'hostname "$0" && exec "$@"', host]
    return subprocess.Popen([*command, *map(str, push)], stdout=subprocess.PIPE, text=True)


def test_two_hosts_push_one_model(two_mounts: tuple[Path, Path], tmp_path: Path) -> None:
    run("unshare", "--uts", "--pid", "--fork", "--mount-proc", "true")
    model = models.settle(models.write_model(tmp_path / "model", size=16 << 20))
    pushes = [push_from_host(host, model, mount) for host, mount in zip(("a", "b"), two_mounts, strict=True)]
    results = [json.loads(push.communicate()[0]) for push in pushes]
    assert results[0]["version"] == results[1]["version"]
    assert sorted(result["copied_bytes"] for result in results) == [0, results[0]["bytes"]]
    assert problems(tmp_path / "shared") == ()
    assert list((tmp_path / "shared" / ".weightctl" / "staging").iterdir()) == []


def test_two_hosts_push_two_models(two_mounts: tuple[Path, Path], tmp_path: Path) -> None:
    run("unshare", "--uts", "--pid", "--fork", "--mount-proc", "true")
    both = [models.write_model(tmp_path / str(seed), size=16 << 20, seed=seed) for seed in (50, 60)]
    pushes = [
        push_from_host(host, model, mount) for host, model, mount in zip(("a", "b"), both, two_mounts, strict=True)
    ]
    results = [json.loads(push.communicate()[0]) for push in pushes]
    for model, result in zip(both, results, strict=True):
        assert models.contents(tmp_path / "shared" / "m" / result["version"]) == models.contents(model)
    assert os.readlink(tmp_path / "shared" / "m" / "latest") in [result["version"] for result in results]


def test_a_host_is_dead_when_it_is_silent(two_mounts: tuple[Path, Path]) -> None:
    one, two = two_mounts

    def hold() -> None:
        with leases.held(one / "x.lease"):
            time.sleep(100)

    child = fork(hold)
    models.wait_for(lambda: (two / "x.lease").exists() and (two / "x.lease").stat().st_size == 512)
    with pytest.raises(BlockingIOError), leases.held(two / "x.lease", wait=False):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with pytest.raises(BlockingIOError), leases.held(two / "x.lease", wait=False):
        pass  # nobody here can know yet
    then = time.time() - leases.SILENCE_SECONDS - 1
    os.utime(two / "x.lease", (then, then))
    assert leases.owner_of(two / "x.lease") is None
    with leases.held(two / "x.lease", wait=False):
        pass


@pytest.mark.parametrize("kind", ["sshfs ahead", "sshfs behind"])
def test_a_server_whose_clock_is_wrong(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence is measured, and broken, by the server's own clock."""
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.05)
    below = tmp_path / "below"
    with mounted(kind, tmp_path / "volume", below=below) as volume:
        for name, silence in (("living", leases.SILENCE_SECONDS - 30), ("dead", leases.SILENCE_SECONDS + 1)):
            owner = leases.Owner("elsewhere", 4711, "another kernel 7", True, "token")
            (below / name).write_text(json.dumps(vars(owner)).ljust(leases.OWNER_BYTES))
            then = time.time() - silence
            os.utime(below / name, (then, then))
        assert leases.owner_of(volume / "dead") is None
        with leases.held(volume / "dead", wait=False):
            pass
        assert str(leases.owner_of(volume / "living")) == "elsewhere:4711"
        with pytest.raises(BlockingIOError), leases.held(volume / "living", wait=False):
            pass
        with leases.held(volume / "x.lease"):
            os.utime(below / "x.lease", (0, 0))
            models.wait_for(lambda: abs(time.time() - (below / "x.lease").stat().st_mtime) < 60)
        assert list(below.glob("*.clock")) == []
