"""What is in an image's layers: unpacked, laid over each other, compared; and layers made to harm."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.images.conformance import long_names
from weightctl.images.contents import check_image
from weightctl.images.oci import LAYER, LAYER_GZIP, LAYER_ZSTD, BaseImage, Descriptor, WrittenLayer
from weightctl.model import File, Snapshot
from weightctl.progress import Progress

Entry = tuple[str, bytes | str | None]


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def tar(*entries: Entry) -> bytes:
    """Files (bytes), directories (None) and symbolic links (str)."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in entries:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            elif content is None:
                member.type = tarfile.DIRTYPE
                archive.addfile(member)
            else:
                member.type, member.linkname = tarfile.SYMTYPE, content
                archive.addfile(member)
    return stream.getvalue()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def image(*layers: tuple[str, bytes, bytes], environment: str = "WEIGHTCTL_MODEL_DIR=/m") -> BaseImage:
    """An image of layers: media type, blob, tar stream."""
    blobs = {digest(blob): blob for _, blob, _ in layers}

    def opened(blob: Descriptor) -> BinaryIO:
        return io.BytesIO(blobs[blob.digest])

    written = tuple(WrittenLayer(Descriptor(kind, digest(b), len(b)), digest(plain)) for kind, b, plain in layers)
    return BaseImage("test", {"config": {"Env": [environment]}}, written, opened)


def plain(*layers: bytes) -> BaseImage:
    return image(*((LAYER, layer, layer) for layer in layers))


def model(**files: bytes) -> Snapshot:
    named = {name.replace("_", "."): data for name, data in files.items()}
    listed = [File(name, len(data), Path("/"), hashlib.sha256(data).hexdigest()) for name, data in named.items()]
    return Snapshot("m", Path("/"), tuple(listed))


def problems(base: BaseImage, against: Snapshot | None = None, progress: Progress | None = None) -> tuple[str, ...]:
    return check_image(base, against, workers=2, progress=progress or Progress()).problems


def zstd(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    return bytes(zstandard.ZstdCompressor().compress(data[:512])) + bytes(
        zstandard.ZstdCompressor().compress(data[512:])
    )


@pytest.mark.parametrize(
    ("kind", "compress"),
    [
        (LAYER, bytes), (LAYER_GZIP, gzip.compress), (LAYER_ZSTD, zstd),
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", gzip.compress),
    ],
)  # fmt: skip
def test_every_compression(kind: str, compress: Callable[[bytes], bytes]) -> None:
    layer = tar(("m", None), ("m/a.bin", b"weights" * 1000))
    packed = compress(layer)
    assert problems(image((kind, packed, layer)), model(a_bin=b"weights" * 1000)) == ()
    other = tar(("m/a.bin", b"other"))
    (problem,) = problems(image((kind, packed, other)))
    assert digest(other) in problem
    (problem,) = problems(image((kind, packed, layer)), model(a_bin=b"other"))
    assert "a.bin" in problem


def test_a_layer_that_cannot_be_unpacked_is_noted() -> None:
    notes = Notes()
    assert problems(image(("application/x-unknown", b"1", b"1")), progress=notes) == ()
    assert "application/x-unknown" in notes.notes[0]
    if importlib.util.find_spec("zstandard") is None:
        problems(image((LAYER_ZSTD, b"1", b"1")), progress=notes)
        assert LAYER_ZSTD in notes.notes[1]


@pytest.mark.parametrize(
    ("upper", "expected"),
    [
        ([("m/a", b"new")], ["a is another file than the model's in the image"]),
        ([("m/.wh.a", b"")], ["a is missing from the image"]),
        ([(".wh.m", b"")], ["a is missing from the image", "b is missing from the image"]),
        ([("m/.wh..wh..opq", b""), ("m/b", b"B")], ["a is missing from the image"]),
        ([("m", "/elsewhere")], ["a is missing", "b is missing", "/m is in the image but not in the model"]),
        ([("m/a", "b")], ["a is a link in the image"]),
        ([("m/c", b"more")], ["/m/c is in the image but not in the model"]),
        ([("./m/../m/a", b"new")], ["a is another file than the model's in the image"]),
        ([("/m/a", b"new")], ["a is another file than the model's in the image"]),
        ([("mm/a", b"elsewhere"), ("a", b"elsewhere")], []),
        ([("m/a", b"new"), ("m/a", b"A")], []),
        ([("m/c/d/e", b"below"), ("m/c", b"C")], ["/m/c is in the image but not in the model"]),
        ([("m/c/d", b"D"), ("m/.wh.c", b"")], ["/m/c/d is in the image but not in the model"]),
        ([(".wh..wh..opq", b"")], ["a is missing from the image", "b is missing from the image"]),
    ],
)
def test_layers_lie_over_each_other(upper: list[Entry], expected: list[str]) -> None:
    base = plain(tar(("m", None), ("m/a", b"A"), ("m/b", b"B")), tar(*upper))
    found = problems(base, model(a=b"A", b=b"B"))
    assert len(found) == len(expected)
    assert all(problem.startswith(start) for problem, start in zip(found, expected, strict=True))


def test_an_image_that_does_not_say_where_its_model_is() -> None:
    base = image((LAYER, tar(("m/a", b"A")), tar(("m/a", b"A"))), environment="PATH=/bin")
    (problem,) = problems(base, model(a=b"A"))
    assert "WEIGHTCTL_MODEL_DIR" in problem


def test_a_header_of_gigabytes_is_not_read() -> None:
    giant = tarfile.TarInfo("x")
    giant.type, giant.size = tarfile.XHDTYPE, 1 << 33
    layer = giant.tobuf(tarfile.GNU_FORMAT) + bytes(10240)
    (problem,) = problems(plain(layer), model(a=b"A"))[:1]
    assert "a header is too large" in problem


def test_headers_upon_headers_are_a_problem_and_no_crash() -> None:
    (problem, *_) = problems(plain(long_names(3000)), model(a=b"A"))
    assert "cannot be unpacked" in problem


@given(st.binary(max_size=2000), st.sampled_from([LAYER, LAYER_GZIP, LAYER_ZSTD]))
def test_anything_is_a_problem_and_no_crash(data: bytes, kind: str) -> None:
    assert problems(image((kind, data, b"something else")), model(a=b"A"))


@given(st.integers(0, 3000), st.binary(min_size=1, max_size=8))
def test_a_damaged_tar_is_a_problem_and_no_crash(where: int, what: bytes) -> None:
    layer = tar(("m", None), ("m/a", b"A" * 600), ("m/ünï" * 40, b"B"))
    damaged = layer[:where] + what + layer[where + len(what) :]
    if damaged != layer:
        assert problems(image((LAYER, damaged, layer)), model(a=b"A" * 600))
