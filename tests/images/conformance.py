"""What every image target has to do. A target joins with a subclass of a few lines (see test_layout.py)."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import secrets
import signal
import subprocess
import sys
import tarfile
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests import models
from weightctl.config import Config
from weightctl.errors import UsageError, WeightctlError
from weightctl.images import Baked, Images, LayoutImages, images
from weightctl.images.oci import ImageName
from weightctl.images.plan import ImagePlan, plan_image
from weightctl.model import Snapshot
from weightctl.progress import Progress
from weightctl.sources.directory import read_directory
from weightctl.storage import TEMPORARY_SUFFIX

ROOT = Path(__file__).parents[2]


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


HALF_WAY = """
import os, signal, sys
from pathlib import Path
from tests.images.conformance import plan
from weightctl.config import Config
from weightctl.images import images
from weightctl.images.oci import ImageName
from weightctl.progress import Progress, Task

class Dying(Progress):
    def task(self, description, total):
        return Mortal(description, total)

class Mortal(Task):
    def __init__(self, description, total):
        self.left = total // 2 if description != "hashing" else total + 1

    def advance(self, amount):
        self.left -= amount
        if self.left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

backend, location, name, model = sys.argv[1:]
target = images.get(backend)(location)
target.bake(plan(Path(model)), ImageName.parse(name), config=Config(workers=2), progress=Dying())
"""
"""A bake that kills itself in the middle of what it writes or sends."""


def long_names(count: int) -> bytes:
    """A tar whose only file has so many headers that give it a long name: tarfile reads each from within the last."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2
    one = header.tobuf(tarfile.GNU_FORMAT) + b"a".ljust(tarfile.BLOCKSIZE, b"\0")
    return one * count + tarfile.TarInfo("a").tobuf() + bytes(2 * tarfile.BLOCKSIZE)


HARM: dict[str, Callable[[Path], object]] = {
    "a flipped bit": models.flip_bit,
    "a cut": lambda file: os.truncate(file, 1000),
    "one byte more": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "a file that is gone": Path.unlink,
}
"""What can become of a model's file between the plan and the bake."""


def files_of(model: Path, directory: str = "/models/m") -> dict[str, bytes]:
    """The files of an image of the model."""
    return {f"{directory}/{path}": data for path, data in models.contents(model).items()}


class ImagesConformance(ABC):
    """Make a subclass `Test…` with `backend` and `read`, which fetches an image for the judges."""

    backend: str
    kept: ClassVar[tuple[bool, ...]] = (True, False, True)
    """Which of three layers are reused when the file in the second has changed."""
    holds_several: ClassVar[bool] = True
    """Whether it keeps images of more than one name."""
    verified: ClassVar[bool] = True
    """Whether it reads what it has, and compares; else it says so."""
    no_location: ClassVar[str] = ""
    """What cannot follow the backend's name in `--to`."""

    @abstractmethod
    def read(self, place: str, name: ImageName, scratch: Path) -> Image:
        """The image of that name, by another tool where one can; AssertionError or OSError if there is none."""

    @pytest.fixture
    def place(self, tmp_path: Path) -> str:
        """Where nothing is yet."""
        return str(tmp_path / "place")

    def location(self, place: str) -> str:
        """What follows the backend's name in `--to`."""
        return place

    def name(self, place: str, tag: str) -> str:
        """The name of an image there."""
        return f"conform:{tag}"

    @pytest.fixture
    def seed(self) -> int:
        """Of bytes that no other test has, lest they be there."""
        return secrets.randbits(60)

    @pytest.fixture
    def model(self, tmp_path: Path, seed: int) -> Path:
        return models.write_model(tmp_path / "model", seed=seed)

    def bake(self, place: str, image: ImagePlan, tag: str = "v1", workers: int = 2) -> Baked:
        target, name = images.get(self.backend)(self.location(place)), ImageName.parse(self.name(place, tag))
        return target.bake(image, name, config=Config(workers=workers), progress=Progress())

    def to_check(self, place: str) -> Images:
        return images.get(self.backend)(self.location(place))

    def image(self, place: str, scratch: Path, tag: str = "v1") -> Image:
        return self.read(place, ImageName.parse(self.name(place, tag)), Path(tempfile.mkdtemp(dir=scratch)))

    def assert_absent(self, place: str, scratch: Path) -> None:
        with pytest.raises((AssertionError, OSError)):
            self.image(place, scratch)

    def test_the_image_holds_the_model(self, place: str, model: Path, tmp_path: Path) -> None:
        baked = self.bake(place, plan(model))
        image = self.image(place, tmp_path)
        assert image.digest == baked.digest
        assert image.files == files_of(model)
        assert "WEIGHTCTL_MODEL_DIR=/models/m" in image.config["config"]["Env"]
        for member in (member for layer in image.layers for member in layer):
            assert (member.uid, member.gid, member.mtime) == (0, 0, 0)
            assert member.mode == (0o755 if member.isdir() else 0o644)
            assert member.isdir() or member.isfile()
        shards = [("model-00001-of-00002.safetensors",), ("model-00002-of-00002.safetensors",)]
        assert [layer.files for layer in baked.layers[:-1]] == shards
        assert set(baked.layers[-1].files) == set(models.contents(model)) - {shard for (shard,) in shards}
        assert [layer.size for layer in baked.layers] == [layer.size for layer in plan(model).layers]

    def test_equal_models_give_equal_images(self, place: str, model: Path, tmp_path: Path, seed: int) -> None:
        first = self.bake(place, plan(model), workers=1)
        assert first.written_bytes >= plan(model).size
        assert not any(layer.reused for layer in first.layers)
        again = self.bake(place, plan(models.write_model(tmp_path / "elsewhere", seed=seed)), "v1", workers=4)
        assert again.digest == first.digest
        assert {layer.reused for layer in again.layers} == {self.kept[0]}
        assert again.written_bytes == (0 if self.kept[0] else first.written_bytes)

    def test_one_changed_shard_is_one_new_layer(self, place: str, model: Path, tmp_path: Path) -> None:
        first = self.bake(place, plan(model))
        models.flip_bit(model / "model-00002-of-00002.safetensors")
        again = self.bake(place, plan(model), "v2")
        assert tuple(layer.reused for layer in again.layers) == self.kept
        assert self.image(place, tmp_path, "v2").files == files_of(model)
        if self.holds_several:
            assert self.image(place, tmp_path, "v1").digest == first.digest
        else:
            self.assert_absent(place, tmp_path)

    def test_the_same_tag_is_replaced(self, place: str, model: Path, tmp_path: Path, seed: int) -> None:
        self.bake(place, plan(model))
        other = models.write_model(tmp_path / "other", seed=seed + 7)
        second = self.bake(place, plan(other))
        image = self.image(place, tmp_path)
        assert (image.digest, image.files) == (second.digest, files_of(other))

    def test_a_base_lies_below_as_it_was(self, place: str, model: Path, tmp_path: Path, seed: int) -> None:
        below = models.write_model(tmp_path / "below", seed=seed + 7)
        layout = LayoutImages(str(tmp_path / "base"))
        config = Config(workers=2)
        layout.bake(plan(below, "/app"), ImageName.parse("base:v1"), config=config, progress=Progress())
        base = layout.open_base("v1", None)
        baked = self.bake(place, plan(model, base=base))
        assert baked.written_bytes >= sum(layer.blob.size for layer in base.layers) + plan(model).size
        image = self.image(place, tmp_path)
        assert image.files == {**files_of(below, "/app"), **files_of(model)}
        assert image.config["rootfs"]["diff_ids"][:3] == [layer.diff_id for layer in base.layers]

    @pytest.mark.parametrize("harm", HARM.values(), ids=HARM.keys())
    def test_a_file_that_is_harmed_is_refused(
        self, place: str, tmp_path: Path, seed: int, harm: Callable[[Path], object]
    ) -> None:
        data = models.write_safetensors(tmp_path / "data", 3 << 20, seed).read_bytes()
        snapshot = models.write_hub_cache(tmp_path / "hub", {"config.json": b"{}", "model.safetensors": data})
        image = plan(snapshot)
        file = (snapshot / "model.safetensors").resolve()
        harm(file)
        with pytest.raises(WeightctlError, match=file.name) as caught:
            self.bake(place, image)
        assert caught.value.hint
        self.assert_absent(place, tmp_path)

    def test_killed_half_way_it_has_no_name_and_the_next_one_makes_it_whole(
        self, place: str, tmp_path: Path, seed: int
    ) -> None:
        model = models.write_model(tmp_path / "model", size=9 << 20, seed=seed)
        command = [self.backend, self.location(place), self.name(place, "v1"), model]
        killed = subprocess.run([sys.executable, "-c", HALF_WAY, *command], cwd=ROOT, check=False)
        assert killed.returncode == -signal.SIGKILL
        self.assert_absent(place, tmp_path)
        baked = self.bake(place, plan(model))
        image = self.image(place, tmp_path)
        assert (image.digest, image.files) == (baked.digest, files_of(model))
        assert not list(tmp_path.rglob(f"*{TEMPORARY_SUFFIX}"))

    def test_nothing_but_an_empty_file(self, place: str, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "model.safetensors").touch()
        self.bake(place, plan(tmp_path / "empty"))
        assert self.image(place, tmp_path).files == {"/models/m/model.safetensors": b""}

    def test_what_was_baked_passes_the_check(self, place: str, model: Path) -> None:
        baked = self.bake(place, plan(model))
        target = self.to_check(place)
        if not self.verified:
            with pytest.raises(UsageError, match="cannot be verified"):
                target.check(config=Config(), progress=Progress())
            return
        found = target.check(config=Config(), progress=Progress())
        assert found.problems == ()
        assert found.files >= len(baked.layers)
        assert found.bytes >= plan(model).size

    def test_a_location_that_cannot_be_one(self) -> None:
        with pytest.raises(UsageError) as caught:
            images.get(self.backend)(self.no_location)
        assert caught.value.hint
