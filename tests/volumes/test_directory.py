"""A volume in a directory: what readers see of it."""

from __future__ import annotations

import mmap
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import weightctl
from tests import models
from tests.disk import mounted
from tests.volumes.conformance import VolumeConformance
from tests.volumes.directory import problems, prune, publish, staged
from weightctl.config import Config
from weightctl.errors import UsageError, WeightctlError
from weightctl.progress import Progress
from weightctl.volumes import DirectoryVolume


class TestDirectory(VolumeConformance):
    backend = "directory"

    def location(self, scratch: Path) -> Path:
        (scratch / "volume").mkdir()
        return scratch / "volume"


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


def test_what_is_latest_stays_until_reload(volume: Path, model: Path) -> None:
    first = publish(volume, model)
    reader = weightctl.Volume(str(volume))
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


def test_a_link_among_the_published_files_is_a_problem(volume: Path, model: Path, tmp_path: Path) -> None:
    published = publish(volume, model)
    (tmp_path / "elsewhere").mkdir()
    (published.path / "more").symlink_to(tmp_path / "elsewhere")
    (published.path / "config.json").rename(tmp_path / "config.json")
    (published.path / "config.json").symlink_to(tmp_path / "config.json")
    assert problems(volume) == tuple(f"{name} was not published with this version" for name in ("config.json", "more"))


@pytest.mark.parametrize("name", ["..", "a\0b", "latest", "/m"])
def test_what_is_no_name_is_not_used(volume: Path, name: str) -> None:
    with pytest.raises(UsageError, match="not a model name"), DirectoryVolume(volume).use(name):
        pass
    assert list(volume.iterdir()) == []


def test_a_mount_that_has_failed(model: Path, tmp_path: Path) -> None:
    with mounted("bindfs", tmp_path / "volume") as mount:
        publish(mount, model)
        there = DirectoryVolume(mount)
        there.resolve("m")
        with (mount / "m" / "latest" / "config.json").open():  # so that it only breaks
            subprocess.run(["umount", "--force", mount], check=False, capture_output=True)

        def refused(ask: Callable[[str], object]) -> bool:
            try:
                ask("m")
            except WeightctlError as error:
                return bool(error.hint)
            return False

        for ask in (there.resolve, there.versions, lambda name: there.use(name).__enter__()):
            models.wait_for(partial(refused, ask))  # the kernel remembers each thing for a second
        with pytest.raises(WeightctlError):
            there.check("m", "latest", config=Config(), progress=Progress())
