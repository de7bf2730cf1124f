"""Files of every name, number and size, copied in blocks and compared with what a dead push had staged."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests import models
from tests.command import start_halting, weightctl
from tests.volumes.directory import READ, problems, publish
from weightctl.config import Config
from weightctl.errors import IntegrityError, WeightctlError
from weightctl.progress import Progress
from weightctl.sources.directory import read_directory
from weightctl.volumes import DirectoryVolume, publishing


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


def test_a_source_that_vanishes(volume: Path, model: Path) -> None:
    snapshot = read_directory(model)
    (model / "config.json").unlink()
    with pytest.raises(WeightctlError, match=r"cannot read .*config.json: No such file"):
        DirectoryVolume(volume).publish(snapshot, "m", config=Config(), progress=Progress())
    assert not (volume / "m").exists()


def test_a_file_that_is_written_meanwhile(volume: Path, tmp_path: Path) -> None:
    weights = models.write_safetensors(tmp_path / "m" / "model.safetensors", 64 << 20)
    with (
        models.written_meanwhile(weights, 60 << 20),
        pytest.raises(IntegrityError, match="changed while it was read"),
    ):
        publish(volume, tmp_path / "m")
    assert os.listdir(volume) == [".weightctl"]


def test_a_push_takes_up_what_a_dead_one_has_staged(volume: Path, tmp_path: Path) -> None:
    model = models.settle(models.write_model(tmp_path / "m", shards=6, size=16 << 20))
    start_halting(signal.SIGKILL, READ, 26, "push-volume", model, volume, "--workers", 1)
    half = [path for path in (volume / ".weightctl" / "staging").rglob("*-00001-of-*") if path.is_file()]
    inode = half[0].stat().st_ino
    result = weightctl("push-volume", model, volume, "--json").result
    assert result["reused_bytes"] >= 16 << 20
    assert result["copied_bytes"] + result["reused_bytes"] == result["bytes"]
    assert (Path(result["path"]) / half[0].name).stat().st_ino == inode
    assert models.contents(Path(result["path"])) == models.contents(model)


def test_what_is_staged_is_not_trusted(volume: Path, tmp_path: Path) -> None:
    model = models.settle(models.write_model(tmp_path / "m", shards=3, size=16 << 20))
    start_halting(signal.SIGKILL, READ, 18, "push-volume", model, volume, "--workers", 1)
    (half,) = [path for path in (volume / ".weightctl" / "staging").rglob("*-00001-of-*") if path.is_file()]
    models.flip_bit(half)
    with half.open("ab") as stream:
        stream.write(b"more")
    (half.parent / "stranger").touch()
    published = publish(volume, model)
    assert models.contents(published.path) == models.contents(model)
