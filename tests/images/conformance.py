"""What every image target has to do. A target joins with a subclass of a few lines (see test_layout.py)."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import models
from weightctl.config import Config
from weightctl.errors import IntegrityError, UsageError
from weightctl.images import Baked, Images, images
from weightctl.images.oci import ImageName
from weightctl.images.plan import ImagePlan, plan_image
from weightctl.model import Snapshot
from weightctl.progress import Progress
from weightctl.sources.directory import read_directory


@dataclass(frozen=True)
class Image:
    """An image as somebody else reads it."""

    digest: str
    manifest: dict[str, Any]
    config: dict[str, Any]
    layers: tuple[tuple[tarfile.TarInfo, ...], ...]
    files: dict[str, bytes]


def read_layout(layout: Path, tag: str) -> Image:
    """Read an image from a layout with nothing of weightctl, every blob compared with its digest and size."""

    def blob(descriptor: dict[str, Any]) -> bytes:
        data = (layout / "blobs" / descriptor["digest"].replace(":", "/")).read_bytes()
        assert f"sha256:{hashlib.sha256(data).hexdigest()}" == descriptor["digest"]
        assert len(data) == descriptor["size"]
        return data

    assert json.loads((layout / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    entries = json.loads((layout / "index.json").read_text())["manifests"]
    named = [e for e in entries if e.get("annotations", {}).get("org.opencontainers.image.ref.name") == tag]
    assert len(named) == 1, entries
    manifest = json.loads(blob(named[0]))
    config = json.loads(blob(manifest["config"]))
    layers, files = [], {}
    for descriptor, diff_id in zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True):
        data = blob(descriptor)
        data = gzip.decompress(data) if descriptor["mediaType"].endswith("gzip") else data
        assert f"sha256:{hashlib.sha256(data).hexdigest()}" == diff_id
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            members = tuple(archive.getmembers())
            for member in members:
                if (stream := archive.extractfile(member)) is not None:
                    files[f"/{member.name}"] = stream.read()
        layers.append(members)
    return Image(named[0]["digest"], manifest, config, tuple(layers), files)


def plan(model: Path, directory: str = "/models/m", **options: Any) -> ImagePlan:
    """The image of a model that lies in a directory."""
    return plan_of(read_directory(model), directory, **options)


def plan_of(snapshot: Snapshot, directory: str = "/models/m", **options: Any) -> ImagePlan:
    """The image of a snapshot."""
    return plan_image(snapshot, directory, "linux/amd64", options.pop("created", None), **options)


class ImagesConformance(ABC):
    """Make a subclass `Test…` with `backend` and `location`; `read` fetches an image for the judges."""

    backend: str

    @abstractmethod
    def location(self, scratch: Path) -> str:
        """What follows the backend's name in `--to`."""

    @abstractmethod
    def read(self, location: str, name: ImageName, scratch: Path) -> Image:
        """The image of that name, or AssertionError if there is none."""

    @pytest.fixture
    def place(self, tmp_path: Path) -> str:
        return self.location(tmp_path)

    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        return models.write_model(tmp_path / "model")

    def open(self, place: str) -> Images:
        return images.get(self.backend)(place)

    def bake(self, place: str, image: ImagePlan, name: str, workers: int = 2) -> Baked:
        return self.open(place).bake(image, ImageName.parse(name), config=Config(workers=workers), progress=Progress())

    def test_the_image_holds_the_model(self, place: str, model: Path, tmp_path: Path) -> None:
        baked = self.bake(place, plan(model), "conform:v1")
        image = self.read(place, ImageName.parse("conform:v1"), tmp_path)
        assert image.digest == baked.digest
        assert image.files == {f"/models/m/{path}": data for path, data in models.contents(model).items()}
        assert "WEIGHTCTL_MODEL_DIR=/models/m" in image.config["config"]["Env"]
        for member in (member for layer in image.layers for member in layer):
            assert (member.uid, member.gid, member.mtime) == (0, 0, 0)
            assert member.mode == (0o755 if member.isdir() else 0o644)
            assert member.isdir() or member.isfile()

    def test_a_layer_for_each_weight_file_and_one_for_the_rest(self, place: str, model: Path) -> None:
        baked = self.bake(place, plan(model), "conform:v1")
        shards = [("model-00001-of-00002.safetensors",), ("model-00002-of-00002.safetensors",)]
        assert [layer.files for layer in baked.layers[:-1]] == shards
        assert set(baked.layers[-1].files) == set(models.contents(model)) - {shard for (shard,) in shards}
        assert [layer.size for layer in baked.layers] == [layer.size for layer in plan(model).layers]

    def test_equal_models_give_equal_images(self, place: str, model: Path, tmp_path: Path) -> None:
        other = models.write_model(tmp_path / "elsewhere")
        one = self.bake(place, plan(model), "conform:v1", workers=1)
        two = self.bake(place, plan(other), "conform:v2", workers=4)
        assert one.digest == two.digest
        assert all(layer.reused for layer in two.layers)

    def test_a_second_bake_writes_nothing(self, place: str, model: Path) -> None:
        first = self.bake(place, plan(model), "conform:v1")
        assert first.written_bytes > plan(model).size
        second = self.bake(place, plan(model), "conform:v1")
        assert second.digest == first.digest
        assert second.written_bytes == 0
        assert all(layer.reused for layer in second.layers)

    def test_one_changed_shard_is_one_new_layer(self, place: str, model: Path, tmp_path: Path) -> None:
        self.bake(place, plan(model), "conform:v1")
        models.flip_bit(model / "model-00002-of-00002.safetensors")
        again = self.bake(place, plan(model), "conform:v2")
        assert [layer.reused for layer in again.layers] == [True, False, True]
        image = self.read(place, ImageName.parse("conform:v2"), tmp_path)
        assert image.files == {f"/models/m/{path}": data for path, data in models.contents(model).items()}

    def test_a_second_tag_keeps_the_first(self, place: str, model: Path, tmp_path: Path) -> None:
        first = self.bake(place, plan(model), "conform:v1")
        other = models.write_model(tmp_path / "other", seed=7)
        second = self.bake(place, plan(other), "conform:v2")
        assert self.read(place, ImageName.parse("conform:v1"), tmp_path / "1").digest == first.digest
        assert self.read(place, ImageName.parse("conform:v2"), tmp_path / "2").digest == second.digest

    def test_the_same_tag_is_replaced(self, place: str, model: Path, tmp_path: Path) -> None:
        self.bake(place, plan(model), "conform:v1")
        second = self.bake(place, plan(models.write_model(tmp_path / "other", seed=7)), "conform:v1")
        assert self.read(place, ImageName.parse("conform:v1"), tmp_path).digest == second.digest

    def test_a_damaged_file_is_refused_and_the_name_not_given(self, place: str, tmp_path: Path) -> None:
        snapshot = models.write_hub_cache(tmp_path / "hub", {"config.json": b"{}", "model.safetensors": bytes(3 << 20)})
        blob = (snapshot / "model.safetensors").resolve()
        models.flip_bit(blob)
        with pytest.raises(IntegrityError, match=blob.name):
            self.bake(place, plan(snapshot), "damaged:v1")
        with pytest.raises((AssertionError, OSError)):
            self.read(place, ImageName.parse("damaged:v1"), tmp_path)

    def test_nothing_but_an_empty_file(self, place: str, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "model.safetensors").touch()
        self.bake(place, plan(tmp_path / "empty"), "conform:v1")
        assert self.read(place, ImageName.parse("conform:v1"), tmp_path).files == {"/models/m/model.safetensors": b""}

    def test_what_was_baked_passes_the_check(self, place: str, model: Path) -> None:
        baked = self.bake(place, plan(model), "conform:v1")
        found = self.open(place).check(config=Config(), progress=Progress())
        assert found.problems == ()
        assert found.files == len(baked.layers) + 2
        assert found.bytes == baked.written_bytes

    def test_without_a_location_it_says_what_it_wants(self) -> None:
        with pytest.raises(UsageError) as caught:
            self.open("")
        assert self.backend in str(caught.value.hint)
