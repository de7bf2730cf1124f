"""What every volume has to do. A volume joins with a subclass of a few lines (see test_directory.py)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import pytest

from tests import models
from weightctl.config import Config
from weightctl.errors import IntegrityError, UsageError
from weightctl.model import Snapshot
from weightctl.progress import Progress
from weightctl.sources.directory import read_directory
from weightctl.volumes import Published, Volume, volumes


class VolumeConformance(ABC):
    """Make a subclass `Test…` with `backend` and `open`."""

    backend: str

    @abstractmethod
    def location(self, scratch: Path) -> Path:
        """A new, empty volume."""

    @pytest.fixture
    def volume(self, tmp_path: Path) -> Volume:
        return volumes.get(self.backend)(self.location(tmp_path))

    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        return models.write_model(tmp_path / "model")

    def publish(self, volume: Volume, model: Path | Snapshot, name: str = "m", workers: int = 2) -> Published:
        snapshot = model if isinstance(model, Snapshot) else read_directory(model)
        return volume.publish(snapshot, name, config=Config(workers=workers), progress=Progress())

    def problems(self, volume: Volume, name: str = "m", version: str = "latest") -> tuple[str, ...]:
        return volume.check(name, version, config=Config(), progress=Progress()).problems

    def test_what_is_published_can_be_read(self, volume: Volume, model: Path) -> None:
        published = self.publish(volume, model)
        assert volume.resolve("m") == volume.resolve("m", published.version)
        assert models.contents(volume.resolve("m")) == models.contents(model)
        assert published.copied_bytes == sum(map(len, models.contents(model).values()))
        assert published.reused_bytes == 0

    def test_a_second_push_copies_nothing(self, volume: Volume, model: Path) -> None:
        first = self.publish(volume, model)
        before = models.state(volume.resolve("m"))
        second = self.publish(volume, model)
        assert (second.version, second.path, second.copied_bytes) == (first.version, first.path, 0)
        assert second.reused_bytes == first.copied_bytes
        assert models.state(volume.resolve("m")) == before

    def test_equal_models_are_one_version(self, volume: Volume, model: Path, tmp_path: Path) -> None:
        first = self.publish(volume, model, workers=1)
        second = self.publish(volume, models.write_model(tmp_path / "same"), workers=4)
        assert (second.version, second.copied_bytes) == (first.version, 0)

    def test_the_latest_is_what_was_published_last(self, volume: Volume, model: Path, tmp_path: Path) -> None:
        first = self.publish(volume, model)
        second = self.publish(volume, models.write_model(tmp_path / "other", seed=7))
        assert first.version != second.version
        assert volume.resolve("m") == volume.resolve("m", second.version)
        assert models.contents(volume.resolve("m", first.version)) == models.contents(model)
        self.publish(volume, model)
        assert volume.resolve("m") == volume.resolve("m", first.version)

    def test_names_with_and_without_an_organisation(self, volume: Volume, model: Path, tmp_path: Path) -> None:
        other = models.write_model(tmp_path / "other", seed=7)
        for name in ("m", "org/m", "org--m", "m/org"):
            self.publish(volume, other if name == "m/org" else model, name)
        assert models.contents(volume.resolve("org/m")) == models.contents(volume.resolve("org--m"))
        assert models.contents(volume.resolve("m")) == models.contents(model)
        assert models.contents(volume.resolve("m/org")) == models.contents(other)

    @pytest.mark.parametrize(
        "name", ["latest", "..", ".", "", "a/b/c", "/a", "a/", "../a", "org/latest", ".weightctl", "m/0123456789abcdef"]
    )
    def test_what_is_no_name(self, volume: Volume, model: Path, name: str) -> None:
        with pytest.raises(UsageError, match="not a model name") as caught:
            self.publish(volume, model, name)
        assert caught.value.hint
        with pytest.raises(UsageError, match="not a model name"):
            volume.resolve(name)

    @pytest.mark.parametrize("version", ["..", ".", "", "0" * 16, "../..", "/", "org", "Latest"])
    def test_what_is_no_version(self, volume: Volume, model: Path, version: str) -> None:
        published = self.publish(volume, model)
        self.publish(volume, model, "m/org")
        with pytest.raises(UsageError, match="has no version") as caught:
            volume.resolve("m", version)
        assert caught.value.hint == f"versions: {published.version}"

    def test_an_unknown_name_lists_the_known(self, volume: Volume, model: Path) -> None:
        self.publish(volume, model, "org/one")
        self.publish(volume, model, "two")
        with pytest.raises(UsageError, match="has no model 'three'") as caught:
            volume.resolve("three")
        assert caught.value.hint == "names here: org/one, two"

    def test_find(self, volume: Volume, model: Path) -> None:
        snapshot = read_directory(models.settle(model))
        assert volume.find(snapshot, "m") is None
        published = self.publish(volume, snapshot)
        assert volume.find(snapshot, "m") == published.path  # what was copied is remembered
        assert volume.find(snapshot, "other") is None

    def test_a_damaged_file_is_refused_and_the_volume_unchanged(self, volume: Volume, tmp_path: Path) -> None:
        whole = models.write_hub_cache(tmp_path / "whole", {"model.safetensors": bytes(3 << 20)})
        damaged = models.write_hub_cache(tmp_path / "damaged", {"model.safetensors": b"1" * (3 << 20)})
        first = self.publish(volume, whole)
        models.flip_bit(damaged / "model.safetensors")
        with pytest.raises(IntegrityError, match=(damaged / "model.safetensors").resolve().name):
            self.publish(volume, damaged)
        assert volume.resolve("m") == volume.resolve("m", first.version)
        assert self.problems(volume) == ()

    def test_a_check_tells_what_is_wrong(self, volume: Volume, model: Path) -> None:
        self.publish(volume, model)
        assert self.problems(volume) == ()
        path = volume.resolve("m")
        models.flip_bit(path / "model-00001-of-00002.safetensors")
        (path / "model-00002-of-00002.safetensors").write_bytes(b"short")
        (path / "config.json").unlink()
        (path / "1_Pooling" / "stranger").touch()
        found = self.problems(volume)
        assert len(found) == 4
        for name, word in {
            "model-00001-of-00002.safetensors": "is damaged",
            "model-00002-of-00002.safetensors": "has 5 bytes instead of",
            "config.json": "cannot be read",
            "1_Pooling/stranger": "was not published",
        }.items():
            assert any(problem.startswith(name) and word in problem for problem in found), found
