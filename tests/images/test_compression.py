"""Compressed layers: the same bytes however they are written, and the same tar stream when unpacked."""

from __future__ import annotations

import gzip
import hashlib
import io
from pathlib import Path

import pytest
import zstandard

from tests import models
from tests.images.conformance import plan
from tests.services import docker_engine, podman_mount, tool
from weightctl.config import Config
from weightctl.errors import UsageError
from weightctl.images import ArchiveImages, LayoutImages
from weightctl.images.compression import PIECE_BYTES, CompressedReader, Compressor, check_compression
from weightctl.images.layers import open_layer, write_layer
from weightctl.images.oci import ImageName
from weightctl.progress import Progress, Task

KINDS = ("zstd", "gzip")
DATA = hashlib.shake_128(b"weights").digest(PIECE_BYTES + 1_000_003) + bytes(2 * PIECE_BYTES)


def compressed(kind: str, block: int, threads: int = 2) -> bytes:
    out = bytearray()
    compressor = Compressor(kind, [out.extend], threads)
    for start in range(0, len(DATA), block):
        compressor.write(memoryview(DATA)[start : start + block])
    compressor.close()
    return bytes(out)


def unpacked(kind: str, data: bytes) -> bytes:
    if kind == "gzip":
        return gzip.decompress(data)
    return zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read()


@pytest.mark.parametrize("kind", KINDS)
def test_writes_and_threads_do_not_show(kind: str) -> None:
    results = {compressed(kind, 1_000_000, 1), compressed(kind, 7_777_777, 4), compressed(kind, len(DATA))}
    assert len(results) == 1
    assert unpacked(kind, results.pop()) == DATA


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_read_as_it_is_written_from_any_offset(kind: str, tmp_path: Path) -> None:
    (layer, *_) = plan(models.write_model(tmp_path / "m", size=2 * PIECE_BYTES), compression=kind).layers
    out = bytearray()
    written = write_layer(layer, [out.extend], Task())
    assert written.blob.digest == f"sha256:{hashlib.sha256(out).hexdigest()}"
    assert written.blob.size == len(out)
    assert written.diff_id == f"sha256:{hashlib.sha256(unpacked(kind, bytes(out))).hexdigest()}"
    assert written.blob.media_type.endswith(f"tar+{kind}")
    with open_layer(layer) as reader:
        for offset in (0, len(out) // 2, 10, len(out) - 1, len(out)):
            reader.seek(offset)
            assert reader.read() == bytes(out[offset:])


def test_only_forwards_costs_nothing() -> None:
    reader = CompressedReader("zstd", io.BytesIO(DATA))  # type: ignore[arg-type]
    with pytest.raises(io.UnsupportedOperation):
        reader.seek(0, io.SEEK_END)
    assert reader.seek(0) == reader.tell() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_other_tools_unpack_it(kind: str, tmp_path: Path) -> None:
    model = models.write_model(tmp_path / "m")
    name = ImageName.parse("packed:v1")
    layout, archive = LayoutImages(str(tmp_path / "layout")), ArchiveImages(str(tmp_path / "m.tar"))
    image = plan(model, compression=kind)
    first = layout.bake(image, name, config=Config(), progress=Progress())
    assert archive.bake(image, name, config=Config(), progress=Progress()).digest == first.digest
    assert layout.bake(image, name, config=Config(workers=1), progress=Progress()).digest == first.digest
    for target in (layout, archive):
        assert target.check(config=Config(), progress=Progress()).problems == ()
    with podman_mount(f"oci:{tmp_path / 'layout'}") as root:
        assert models.contents(root / "models" / "m") == models.contents(model)


def test_docker_loads_an_archive_of_gzip(tmp_path: Path) -> None:
    image = plan(models.write_model(tmp_path / "m"), compression="gzip")
    archive = ArchiveImages(str(tmp_path / "m.tar"))
    archive.bake(image, ImageName.parse("packed:v1"), config=Config(), progress=Progress())
    with docker_engine() as host:
        tool("docker", "--host", host, "load", "--input", tmp_path / "m.tar")


def test_an_unknown_compression() -> None:
    with pytest.raises(UsageError, match="unknown compression 'xz'"):
        check_compression("xz")
