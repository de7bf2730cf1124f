"""The OCI image format: names, tar layers, config, manifest."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import models
from tests.images.conformance import plan, plan_of
from weightctl.digests import DigestCache
from weightctl.errors import IntegrityError, UsageError
from weightctl.images.bases import choose
from weightctl.images.layers import LayerPlan, remembered_layer, write_layer
from weightctl.images.oci import CONFIG, LAYER, Descriptor, ImageName, WrittenLayer
from weightctl.images.plan import check_created, check_directory, check_platform
from weightctl.model import File, Snapshot
from weightctl.progress import Task

EPOCH = "1970-01-01T00:00:00Z"


def written(layer: LayerPlan) -> bytes:
    stream = bytearray()
    digest = write_layer(layer, [stream.extend], Task()).blob.digest
    assert digest == f"sha256:{hashlib.sha256(stream).hexdigest()}"
    assert len(stream) == layer.size
    return bytes(stream)


def members(tar: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as archive:
        return archive.getmembers()


@pytest.mark.parametrize(
    ("text", "full", "canonical"),
    [
        ("llama", "llama:latest", "docker.io/library/llama:latest"),
        ("llama:7b", "llama:7b", "docker.io/library/llama:7b"),
        ("org/llama:v1.0_x-y", "org/llama:v1.0_x-y", "docker.io/org/llama:v1.0_x-y"),
        ("docker.io/llama", "docker.io/llama:latest", "docker.io/library/llama:latest"),
        ("index.docker.io/llama:t", "index.docker.io/llama:t", "docker.io/library/llama:t"),
        ("registry-1.docker.io/o/m:t", "registry-1.docker.io/o/m:t", "docker.io/o/m:t"),
        ("localhost/llama", "localhost/llama:latest", "localhost/llama:latest"),
        ("localhost:5000/a/b/c:t", "localhost:5000/a/b/c:t", "localhost:5000/a/b/c:t"),
        ("registry:5000/llama:t", "registry:5000/llama:t", "registry:5000/llama:t"),
        ("[fd00::1]:5000/llama:t", "[fd00::1]:5000/llama:t", "[fd00::1]:5000/llama:t"),
        ("ghcr.io/o/m__x-y--z.w:t", "ghcr.io/o/m__x-y--z.w:t", "ghcr.io/o/m__x-y--z.w:t"),
    ],
)
def test_image_names(text: str, full: str, canonical: str) -> None:
    name = ImageName.parse(text)
    assert str(name) == full
    assert name.canonical == canonical


@pytest.mark.parametrize(
    "text",
    [
        "", ":v1", "Llama", "llama:", "llama:a b", "llama:é", "llama:٣", "a//b", "/a", "a/", "-a", "a_", "a___b",
        f"a:{'x' * 129}", "a@sha256:00", "ghcr.io/A:b", "a:v1\n", "../a", "a\0b",
        "localhost:0/a", "localhost:65536/a", "[::::]/a", "[1]/a", f"{'x' * 64}.com/a",
    ],
)  # fmt: skip
def test_no_image_names(text: str) -> None:
    with pytest.raises(UsageError, match="not an image name") as caught:
        ImageName.parse(text)
    assert caught.value.hint


@given(st.text(alphabet="ab_.-/:@1", max_size=60))
def test_any_text_is_a_name_that_reads_back_or_none(text: str) -> None:
    try:
        name = ImageName.parse(text)
    except UsageError:
        return
    assert ImageName.parse(str(name)) == name


@pytest.mark.parametrize("path", ["", "models", "/", "//", "/a/", "/a//b", "/a/../b", "/./a", "/a\0b", "a/b"])
def test_no_directory_for_a_model(path: str) -> None:
    with pytest.raises(UsageError, match="not a directory for the model"):
        check_directory(path)


def test_checks_return_what_is_right() -> None:
    assert check_directory("/opt/some models/é") == "/opt/some models/é"
    assert check_platform("linux/arm64/v8") == "linux/arm64/v8"
    for time in ("2026-01-31T12:00:00Z", "2026-01-31T12:00:00.123456789+05:30"):
        assert check_created(time) == time


def entry(platform: str) -> dict[str, object]:
    os_name, architecture, *variant = platform.split("/")
    return {"platform": {"os": os_name, "architecture": architecture, "variant": variant[0] if variant else ""}}


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("linux/arm64", "linux/arm64/v8"), ("linux/arm64/v8", "linux/arm64/v8"), ("linux/amd64", "linux/amd64"),
        ("linux/amd64/v1", "linux/amd64"), ("linux/arm", "linux/arm/v7"), ("linux/arm/v6", "linux/arm/v6"),
    ],
)  # fmt: skip
def test_one_platform_goes_by_several_names(wanted: str, found: str) -> None:
    index = [entry(name) for name in ("linux/amd64", "linux/arm/v6", "linux/arm/v7", "linux/arm64/v8", "unknown/x")]
    assert choose(index, wanted, "it") == entry(found)


@pytest.mark.parametrize("wanted", ["linux/amd64/v3", "linux/arm64/v9", "windows/amd64", "linux/arm/v5"])
def test_another_variant_is_another_platform(wanted: str) -> None:
    with pytest.raises(UsageError, match="has no image for"):
        choose([entry("linux/amd64"), entry("linux/arm64"), entry("linux/arm/v7")], wanted, "it")


@pytest.mark.parametrize("platform", ["", "linux", "linux/", "Linux/AMD64", "a/b/c/d", "linux/amd64\n"])
def test_no_platforms(platform: str) -> None:
    with pytest.raises(UsageError, match="not a platform"):
        check_platform(platform)


@pytest.mark.parametrize(
    "time", ["", "now", "2026-01-31", "2026-13-31T12:00:00Z", "2026-01-31T12:00:00", "2026-01-31 12:00:00Z"]
)
def test_no_times(time: str) -> None:
    with pytest.raises(UsageError, match="not an RFC 3339 time"):
        check_created(time)


component = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="/\0"), min_size=1, max_size=90
).filter(lambda name: name not in (".", ".."))
path = st.lists(component, min_size=1, max_size=5).map("/".join)


@settings(deadline=None)
@given(st.lists(path, min_size=1, max_size=8, unique=True))
def test_any_paths_read_back(tmp_path_factory: pytest.TempPathFactory, paths: list[str]) -> None:
    """No path here may be both a file and a directory, which no filesystem would hold either."""
    paths = sorted(path for path in paths if not any(other.startswith(f"{path}/") for other in paths))
    source = tmp_path_factory.getbasetemp() / "five bytes"
    source.write_bytes(b"12345")
    layer = LayerPlan("/models/m", tuple(File(path, 5, source) for path in paths))
    tar = written(layer)
    found = members(tar)
    assert [member.name for member in found if member.isfile()] == [f"models/m/{path}" for path in paths]
    assert all(member.size == 5 for member in found if member.isfile())
    directories = [member.name for member in found if member.isdir()]
    assert directories[:2] == ["models", "models/m"]
    assert set(directories) == {parent for member in found for parent in _parents(member.name) if parent}
    for index, member in enumerate(found):  # a directory comes before what lies in it
        assert set(_parents(member.name)) <= {earlier.name for earlier in found[:index]}
    assert tar == written(layer)


def _parents(name: str) -> list[str]:
    parts = name.split("/")[:-1]
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]


@pytest.mark.parametrize("size", [(8 << 30) - 1, 8 << 30, (8 << 30) + 1, 5 << 40])
def test_a_file_too_large_for_the_old_header(tmp_path: Path, size: int) -> None:
    source = tmp_path / "large"
    with source.open("wb") as stream:
        stream.truncate(min(size, (8 << 30) + 1))  # sparse
    layer = LayerPlan("/m", (File("large.safetensors", size, source),))
    headers = b"".join(header for header, _ in layer.members())
    archive = tarfile.open(fileobj=io.BytesIO(headers), mode="r:")  # noqa: SIM115
    assert archive.next().name == "m"  # type: ignore[union-attr]
    header = tarfile.TarInfo.frombuf(headers[-512:], "utf-8", "strict")
    assert header.name == "m/large.safetensors"
    found = archive.next()
    assert found is not None
    assert (found.name, found.size, found.offset_data) == ("m/large.safetensors", size, len(headers))
    assert layer.size % tarfile.RECORDSIZE == 0
    assert 0 <= layer.size - (len(headers) + size + 1024) < tarfile.RECORDSIZE + 512


def test_a_name_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    name = b"caf\xe9.json".decode(errors="surrogateescape")
    with pytest.raises(IntegrityError, match="not UTF-8") as caught:
        written(LayerPlan("/m", (File(name, 0, tmp_path / name),)))
    assert caught.value.hint


def test_a_changed_length_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    for size in (4, 6):
        with pytest.raises(IntegrityError, match="changed while it was read"):
            write_layer(LayerPlan("/m", (File("file", size, tmp_path / "file"),)), [], Task())


def test_a_change_of_bytes_alone_is_noticed(tmp_path: Path) -> None:
    source = models.write_safetensors(tmp_path / "file", 12 << 20)
    layer = LayerPlan("/m", (File("file", source.stat().st_size, source),))
    blocks = 0

    def write_meanwhile(block: memoryview) -> None:
        nonlocal blocks
        blocks += 1
        if blocks == 4:
            models.flip_bit(source)

    with pytest.raises(IntegrityError, match="changed while it was read"):
        write_layer(layer, [write_meanwhile], Task())


def test_what_a_source_claims_is_compared_once(tmp_path: Path) -> None:
    source = tmp_path / "file"
    source.write_bytes(b"12345")
    models.settle(tmp_path)
    right = hashlib.sha256(b"12345").hexdigest()
    with pytest.raises(IntegrityError, match="damaged"):
        written(LayerPlan("/m", (File("file", 5, source, sha256="0" * 64),)))
    layer = LayerPlan("/m", (File("file", 5, source, sha256=right),))
    digest = f"sha256:{hashlib.sha256(written(layer)).hexdigest()}"
    assert DigestCache().get("sha256", source) == right
    assert (remembered := remembered_layer(layer)) is not None
    assert remembered.blob.digest == digest
    assert DigestCache().get(LayerPlan("/other", layer.files).key, source) is None
    models.flip_bit(source)
    with pytest.raises(IntegrityError, match="damaged"):
        written(layer)


def test_config_and_manifest(tmp_path: Path) -> None:
    source = tmp_path / "file"
    source.touch()
    files = (File("config.json", 0, source), File("model.safetensors", 2 << 20, source))
    snapshot = Snapshot("org/name", tmp_path, files, repo_id="org/name", revision="main", commit=models.COMMIT)
    image = plan_of(snapshot, "/models/org/name")
    assert [[file.path for file in layer.files] for layer in image.layers] == [["model.safetensors"], ["config.json"]]
    layers = [
        WrittenLayer(Descriptor(LAYER, f"sha256:{index:064}", layer.size), f"sha256:{index:064}")
        for index, layer in enumerate(image.layers)
    ]

    config = json.loads(image.config(layers))
    assert config["config"] == {"Env": ["WEIGHTCTL_MODEL_DIR=/models/org/name"]}
    assert (config["os"], config["architecture"]) == ("linux", "amd64")
    assert config["rootfs"] == {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]}
    assert len(config["history"]) == len(layers)
    assert "created" not in config

    manifest = json.loads(image.manifest(Descriptor.of(CONFIG, image.config(layers)), layers))
    assert [layer["size"] for layer in manifest["layers"]] == [layer.size for layer in image.layers]
    assert manifest["annotations"] == {
        "org.opencontainers.image.source": "https://huggingface.co/org/name",
        "org.opencontainers.image.revision": models.COMMIT,
    }

    dated = plan_of(snapshot, created=EPOCH)
    assert json.loads(dated.config(layers))["created"] == EPOCH
    assert dated.annotations["org.opencontainers.image.created"] == EPOCH


def test_a_large_file_of_any_name_has_a_layer_of_its_own(tmp_path: Path) -> None:
    for name, size in {"a.data": 16 << 20, "b.json": 15 << 20, "c.bin": 1 << 20, "d.bin": (1 << 20) - 1}.items():
        with (tmp_path / name).open("wb") as stream:
            stream.truncate(size)
    layers = plan(tmp_path).layers
    assert [[file.path for file in layer.files] for layer in layers] == [["a.data"], ["c.bin"], ["b.json", "d.bin"]]
