"""What an earlier version has is linked, or copied inside the volume, and never believed unread."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import models
from tests.disk import fork, lacking
from tests.models import SHARD_BYTES
from tests.volumes.directory import problems, prune, publish, rot, staged
from weightctl.sources.directory import read_directory
from weightctl.volumes import DirectoryVolume, publishing


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


def test_a_damaged_file_is_not_copied_where_there_are_no_links(volume: Path, model: Path) -> None:
    """Sizes and times say nothing; its bytes do, while it is copied inside the volume."""
    first = publish(volume, model)
    rot(first.path / "model-00001-of-00002.safetensors")
    (model / "config.json").write_text("changed")

    def push() -> None:
        lacking("link")
        assert models.contents(publish(volume, model).path) == models.contents(model)

    assert os.waitstatus_to_exitcode(os.waitpid(fork(push), 0)[1]) == 0
