"""What dead pushes leave behind is swept, what the living do is not."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from tests import models
from tests.command import start_halting
from tests.volumes.directory import READ, publish, staged, write_lease
from weightctl.progress import Progress
from weightctl.sources.directory import read_directory
from weightctl.volumes import DirectoryVolume, publishing
from weightctl.volumes.staging import Staging


def test_prune_sweeps_dead_pushes_and_leaves_living_ones(volume: Path, tmp_path: Path) -> None:
    pushes = []
    for name in ("dead", "living"):
        model = models.write_sparse_model(tmp_path / name, 8 << 20)
        pushes.append(start_halting(signal.SIGSTOP, READ, 3, "push-volume", model, volume))
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


def test_what_another_has_taken_over_is_its_own(tmp_path: Path) -> None:
    """Even where the disk is full."""
    staging = Staging(tmp_path)
    with pytest.raises(OSError, match="No space left"), staging.work("m@1") as work:  # noqa: PT012
        write_lease(tmp_path / "m@1.lease")
        assert not staging.is_ours(work)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert work.is_dir()
    assert (tmp_path / "m@1.lease").exists()


def test_a_push_of_another_model_clears_away_what_a_dead_one_has_staged(volume: Path, tmp_path: Path) -> None:
    model = models.write_model(tmp_path / "m", shards=3, size=16 << 20)
    start_halting(signal.SIGKILL, READ, 10, "push-volume", model, volume)
    assert staged(volume)
    publish(volume, models.write_model(tmp_path / "other", seed=9))
    assert staged(volume) == []


def test_whatever_lies_there_is_swept_once(volume: Path, model: Path, tmp_path: Path) -> None:
    """A probe of the clock by a process that was killed, and what somebody else has put there."""
    publish(volume, model)
    staging = volume / ".weightctl" / "staging"
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (staging / "0123.clock").touch()
    (staging / "m@link").symlink_to(tmp_path / "precious")
    assert DirectoryVolume(volume).prune(progress=Progress()).leftovers == 2
    assert staged(volume) == []
    assert (tmp_path / "precious" / "file").exists()


@pytest.mark.parametrize("place", [".", "files", "files/1_Pooling"])
def test_nothing_is_written_through_a_link(volume: Path, model: Path, tmp_path: Path, place: str) -> None:
    work = volume / ".weightctl" / "staging" / f"m@{publishing._key(read_directory(model))}"
    (tmp_path / "precious").mkdir()
    (work / place).parent.mkdir(parents=True)
    (work / place).symlink_to(tmp_path / "precious")
    published = publish(volume, model)
    assert models.contents(published.path) == models.contents(model)
    assert list((tmp_path / "precious").iterdir()) == []
    assert not any(path.is_symlink() for path in published.path.rglob("*"))
