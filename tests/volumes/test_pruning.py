"""Old versions removed beside pushes, readers and other prunes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.disk import fork, lacking, small_disk
from tests.volumes.directory import problems, prune, publish, staged
from weightctl import storage
from weightctl.digests import check_files
from weightctl.errors import UsageError
from weightctl.progress import Progress
from weightctl.volumes import DirectoryVolume, pruning, publishing
from weightctl.volumes.mount import Mount


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


def test_a_version_that_is_read_or_the_latest_since_it_was_listed_does_not_move(
    volume: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = publish(volume, model)
    config = (model / "config.json").read_text()
    (model / "config.json").write_text("changed")
    publish(volume, model)
    mount = Mount(volume)
    (listed,) = [version for version in mount.contents() if not version.latest]
    with DirectoryVolume(volume).use("m", first.version), monkeypatch.context() as patch:
        patch.setattr(storage, "rename", None)  # not for a moment
        assert pruning._discard(mount, listed, tmp_path) is None
    (model / "config.json").write_text(config)
    assert publish(volume, model).version == first.version
    assert pruning._discard(mount, listed, tmp_path) is None
    assert problems(volume) == ()


def test_a_version_that_is_pruned_while_a_push_reads_it(
    volume: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = publish(volume, model)
    config = (model / "config.json").read_text()
    (model / "config.json").write_text("changed")
    publish(volume, model)
    (model / "config.json").write_text(config)

    def prune_and_check(*arguments: Any) -> Any:
        prune(volume, keep=1)
        return check_files(*arguments)

    monkeypatch.setattr(publishing, "check_files", prune_and_check)
    assert publish(volume, model, verify=True).version == first.version
    assert problems(volume) == ()


def test_a_reader_comes_between_where_locks_do_not_hold(
    volume: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either the version comes back or the reader is told that it is gone."""
    first = publish(volume, model)
    (model / "config.json").write_text("changed")
    publish(volume, model)
    monkeypatch.setattr(Mount, "naming", lambda mount, name: contextlib.nullcontext())
    rename, mark = storage.rename, Mount.mark
    with contextlib.ExitStack() as reading, monkeypatch.context() as patch:

        def rename_and_mark(source: Path, destination: Path) -> None:
            rename(source, destination)
            reading.enter_context(mark(Mount(volume), "m", first.version))

        patch.setattr(storage, "rename", rename_and_mark)
        assert prune(volume, keep=1) == []
        assert first.path.is_dir()

    def prune_and_mark(mount: Mount, name: str, version: str) -> contextlib.AbstractContextManager[None]:
        assert prune(volume, keep=1) == [version]
        return mark(mount, name, version)

    monkeypatch.setattr(Mount, "mark", prune_and_mark)
    with pytest.raises(UsageError, match="has no version"), DirectoryVolume(volume).use("m", first.version):
        pass


def test_a_full_disk_can_be_pruned(model: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 16 << 20) as disk:
        first = publish(disk, models.write_model(tmp_path / "old", seed=5))
        second = publish(disk, model)
        with pytest.raises(OSError, match="No space"):
            (disk / "all of it").write_bytes(bytes(16 << 20))
        assert prune(disk, keep=1) == [first.version]
        assert DirectoryVolume(disk).resolve("m") == second.path
        assert staged(disk) == []


def test_the_marks_of_dead_readers_go(volume: Path, model: Path) -> None:
    first = publish(volume, model)
    marks = volume / ".weightctl" / "readers"

    def die_reading() -> None:
        mark = DirectoryVolume(volume).use("m")
        mark.__enter__()
        os._exit(0)

    assert os.waitpid(fork(die_reading), 0)[1] == 0
    assert len(list(marks.rglob("*.lease"))) == 1
    with DirectoryVolume(volume).use("m"):
        assert prune(volume) == []
        assert len(list(marks.rglob("*.lease"))) == 1
    (model / "config.json").write_text("changed")
    publish(volume, model)
    assert prune(volume, keep=1) == [first.version]
    assert list(marks.iterdir()) == []
