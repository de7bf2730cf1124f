"""A volume's directory: where `latest` leads, what others put there, and what rights allow."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import models
from tests.disk import as_ordinary_user, open_to_all, read_only_directory
from tests.volumes.directory import problems, prune, publish
from weightctl.config import Config
from weightctl.errors import IntegrityError, WeightctlError
from weightctl.progress import Progress
from weightctl.sources.directory import read_directory
from weightctl.volumes import DirectoryVolume


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


# Links that somebody else has put there.


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A directory outside of the volume."""
    models.write_model(tmp_path / "precious")
    return tmp_path / "precious"


@pytest.mark.parametrize("place", ["", "staging", "locks", "manifests", "readers"])
def test_a_link_where_weightctl_keeps_its_own(volume: Path, model: Path, precious: Path, place: str) -> None:
    publish(volume, model)
    before = models.state(precious)
    control = volume / ".weightctl" / place
    if control.exists():
        control.rename(volume.parent / "away")
    control.symlink_to(precious)
    for act in (lambda: publish(volume, model), lambda: prune(volume, keep=1)):
        with pytest.raises(IntegrityError, match="is a link") as caught:
            act()
        assert caught.value.hint
    assert models.state(precious) == before


def test_a_link_in_the_place_of_a_models_versions(volume: Path, model: Path, precious: Path) -> None:
    first = publish(volume, model)
    (model / "config.json").write_text("changed")
    publish(volume, model)
    (volume / "m").rename(precious / "m")
    (volume / "m").symlink_to(precious / "m")
    before = models.state(precious)
    for act in (lambda: publish(volume, model), lambda: prune(volume, keep=1)):
        with pytest.raises(IntegrityError, match="is a link that leaves the volume"):
            act()
    assert models.state(precious) == before
    assert (precious / "m" / first.version).is_dir()


def test_a_link_inside_a_version_is_not_mended_through(volume: Path, model: Path, precious: Path) -> None:
    published = publish(volume, model)
    models.flip_bit(precious / "1_Pooling" / "config.json")
    (published.path / "1_Pooling").rename(volume.parent / "away")
    (published.path / "1_Pooling").symlink_to(precious / "1_Pooling")
    before = models.contents(precious)
    with pytest.raises(IntegrityError, match="1_Pooling is a link"):
        publish(volume, model)
    assert models.contents(precious) == before


# Rights.


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
