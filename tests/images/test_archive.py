"""The archive: one tar that Docker, podman and containerd load, and that is a layout when unpacked."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

from tests import models
from tests.disk import small_disk
from tests.images.conformance import Image, ImagesConformance, long_names, plan, read_layout
from tests.images.test_bases import HOSTILE_INDEXES
from tests.services import docker_engine, tool
from weightctl.config import Config
from weightctl.errors import IntegrityError, UsageError, WeightctlError
from weightctl.images import ArchiveImages, Baked, LayoutImages
from weightctl.images.archive import TarWriter
from weightctl.images.oci import ImageName
from weightctl.images.plan import ImagePlan
from weightctl.progress import Progress


class TestArchive(ImagesConformance):
    backend = "archive"
    kept = (False, False, False)
    holds_several = False

    def read(self, place: str, name: ImageName, scratch: Path) -> Image:
        tool("skopeo", "copy", "--preserve-digests", f"oci-archive:{place}:{name.tag}", f"oci:{scratch}:{name.tag}")
        return read_layout(scratch, name.tag)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return models.write_model(tmp_path / "m")


def bake(image: ImagePlan, archive: Path, name: str = "m:v1") -> Baked:
    return ArchiveImages(str(archive)).bake(image, ImageName.parse(name), config=Config(), progress=Progress())


def unpacked(archive: Path, directory: Path, tag: str = "v1") -> Image:
    with tarfile.open(archive, "r:") as tar:
        tar.extractall(directory, filter="data")
    return read_layout(directory, tag)


def test_it_is_a_layout_with_the_same_digest(model: Path, tmp_path: Path) -> None:
    baked = bake(plan(model), tmp_path / "m.tar")
    layout = LayoutImages(str(tmp_path / "layout"))
    same = layout.bake(plan(model), ImageName.parse("m:v1"), config=Config(), progress=Progress())
    assert baked.digest == same.digest
    image = unpacked(tmp_path / "m.tar", tmp_path / "unpacked")
    assert image.digest == baked.digest
    assert image.files == {f"/models/m/{path}": data for path, data in models.contents(model).items()}
    assert baked.written_bytes == (tmp_path / "m.tar").stat().st_size


def test_the_same_bytes_from_another_directory(model: Path, tmp_path: Path) -> None:
    bake(plan(model), tmp_path / "1.tar")
    bake(plan(models.write_model(tmp_path / "other")), tmp_path / "2.tar")
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "2.tar").read_bytes()


def test_docker_loads_it(model: Path, tmp_path: Path) -> None:
    with docker_engine() as host:
        bake(plan(model), tmp_path / "m.tar", "archive-test:v1")
        assert "archive-test:v1" in tool("docker", "--host", host, "load", "--input", tmp_path / "m.tar")


def test_podman_loads_it(model: Path, tmp_path: Path) -> None:
    bake(plan(model), tmp_path / "m.tar", "archive-test:v1")
    with tempfile.TemporaryDirectory() as store:
        options = ["--root", f"{store}/root", "--runroot", f"{store}/run", "--storage-driver", "vfs"]
        loaded = tool("podman", *options, "load", "--input", tmp_path / "m.tar", as_root=True)
        assert "archive-test:v1" in loaded
        tool("podman", *options, "image", "rm", "--all", "--force", as_root=True)


def test_containerd_imports_it(model: Path, tmp_path: Path) -> None:
    bake(plan(model), tmp_path / "m.tar", "archive-test:v1")
    with docker_engine() as host:
        address = Path(host.removeprefix("unix://")).parent / "exec" / "containerd" / "containerd.sock"
        tool("ctr", "--address", address, "images", "import", tmp_path / "m.tar")
        listed = tool("ctr", "--address", address, "images", "list", "--quiet")
    assert "docker.io/library/archive-test:v1" in listed


def test_a_full_disk(model: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2 << 20) as disk:
        with pytest.raises(WeightctlError, match="not enough room"):
            bake(plan(model), disk / "m.tar")
        assert list(disk.iterdir()) == []


def test_a_directory_is_no_archive(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names no file"):
        ArchiveImages(str(tmp_path))


def test_a_member_larger_than_8_gib_keeps_its_size(tmp_path: Path) -> None:
    size = 9 << 30
    with (tmp_path / "large.tar").open("wb+", buffering=0) as stream:
        tar = TarWriter(stream)
        with tar.member("small name", 0) as header:
            pass
        tar.rename(header, "blobs/sha256/" + "0" * 64, size)
    with tarfile.open(tmp_path / "large.tar", "r|", ignore_zeros=True) as tar_file:
        assert (member := tar_file.next()) is not None
        assert (member.name, member.size) == ("blobs/sha256/" + "0" * 64, size)


def test_verify_tells_a_flipped_bit(model: Path, tmp_path: Path) -> None:
    archive = tmp_path / "m.tar"
    bake(plan(model), archive)
    good = ArchiveImages(str(archive)).check(config=Config(), progress=Progress())
    assert good.problems == ()
    models.flip_bit(archive, 100_000)
    bad = ArchiveImages(str(archive)).check(config=Config(), progress=Progress())
    assert any("damaged" in problem for problem in bad.problems)
    assert json.dumps(bad.problems)
    with archive.open("rb+") as stream:
        stream.truncate(200_000)
    cut = ArchiveImages(str(archive)).check(config=Config(), progress=Progress())
    assert cut.problems
    assert subprocess.run(["tar", "tf", archive], capture_output=True, check=False).returncode != 0


@pytest.mark.parametrize("index", HOSTILE_INDEXES)
def test_a_hostile_index_is_an_error_of_ours(tmp_path: Path, index: bytes) -> None:
    with (tmp_path / "m.tar").open("wb", buffering=0) as stream:
        tar = TarWriter(stream)
        tar.add("index.json", index)
        tar.close()
    with contextlib.suppress(IntegrityError):
        assert ArchiveImages(str(tmp_path / "m.tar")).check(config=Config(), progress=Progress()).problems


def test_headers_upon_headers_are_a_problem_and_no_crash(tmp_path: Path) -> None:
    (tmp_path / "m.tar").write_bytes(long_names(3000))
    (problem,) = ArchiveImages(str(tmp_path / "m.tar")).check(config=Config(), progress=Progress()).problems
    assert "is no tar, or is cut" in problem
