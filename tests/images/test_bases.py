"""Images as they are read to lie below a model, and those that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.images.conformance import read_layout
from weightctl.config import Config
from weightctl.errors import IntegrityError
from weightctl.images import LayoutImages
from weightctl.images.bases import platform_of
from weightctl.images.oci import INDEX, LAYER, LAYER_GZIP, BaseImage, Descriptor, ImageName
from weightctl.images.plan import plan_image
from weightctl.progress import Progress
from weightctl.sources.directory import read_directory

CONFIG: dict[str, Any] = {"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": []}}


def put(layout: Path, value: object) -> dict[str, Any]:
    content = json.dumps(value).encode()
    blob = Descriptor.of(INDEX, content)
    path = layout / "blobs" / blob.digest.replace(":", "/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return blob.to_json()


def layout_of(layout: Path, manifest: object) -> BaseImage:
    """The base that a layout's only image is."""
    (layout / "oci-layout").parent.mkdir(exist_ok=True)
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [put(layout, manifest)]}))
    return LayoutImages(str(layout)).open_base(None, None)


def base_of(layout: Path, config: object, layers: object = ()) -> BaseImage:
    return layout_of(layout, {"config": put(layout, config), "layers": layers})


@pytest.mark.parametrize(
    "change",
    [
        {"config": 3}, {"config": [[1, 2]]}, {"config": {"Env": 3}}, {"config": {"Env": [3]}},
        {"config": {"Env": {"A": "b"}}}, {"history": 3}, {"os": 3}, {"architecture": ["amd64"]}, {"variant": [8]},
        {"rootfs": 3}, {"rootfs": {}}, {"rootfs": {"diff_ids": 3}}, {"rootfs": {"diff_ids": ["one too many"]}},
    ],
)  # fmt: skip
def test_a_hostile_config_is_an_error_of_ours(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError, match=r"malformed|its config lists") as caught:
        base_of(tmp_path / "base", {**CONFIG, **change})
    assert caught.value.hint


@pytest.mark.parametrize("layers", [3, [3], "abc", {"a": 1}, [None], [{"digest": "sha256:0", "size": 1}]])
def test_hostile_layers_are_an_error_of_ours(tmp_path: Path, layers: object) -> None:
    with pytest.raises(IntegrityError, match=r"malformed|not a descriptor"):
        base_of(tmp_path / "base", CONFIG, layers)


@pytest.mark.parametrize("manifests", [3, [3], "abc", {"a": 1}, [{"platform": 3}], None])
def test_a_hostile_index_is_an_error_of_ours(tmp_path: Path, manifests: object) -> None:
    with pytest.raises(IntegrityError, match=r"malformed|not a descriptor"):
        layout_of(tmp_path / "base", {"manifests": manifests})


HOSTILE_INDEXES = [
    b"", b"{", b"\xff", b"[" * 100_000, b"[]", b"{}", b'{"manifests":3}', b'{"manifests":[3]}', b'{"manifests":"abc"}',
    b'{"manifests":[{"digest":3}]}', b'{"manifests":{"a":1}}',
]  # fmt: skip
"""What may be an archive's index.json."""


def test_what_a_base_does_not_say(tmp_path: Path) -> None:
    assert platform_of(base_of(tmp_path / "1", {"rootfs": {"diff_ids": []}, "os": None})) == "linux/amd64"
    base = base_of(tmp_path / "2", {"rootfs": {"diff_ids": []}, "architecture": "arm64", "variant": "v8"})
    assert platform_of(base) == "linux/arm64/v8"
    model = read_directory(models.write_model(tmp_path / "m"))
    image = plan_image(model, "/models/m", platform_of(base), None, base)
    name = ImageName.parse("m:v1")
    LayoutImages(str(tmp_path / "image")).bake(image, name, config=Config(workers=2), progress=Progress())
    assert read_layout(tmp_path / "image", "v1").config["variant"] == "v8"


def test_layers_in_dockers_words_are_named_in_ocis(tmp_path: Path) -> None:
    docker = "application/vnd.docker.image.rootfs.diff.tar"
    kinds = [docker, f"{docker}.gzip", "application/x-other"]
    layers = [{"mediaType": kind, "digest": f"sha256:{number:064}", "size": 1} for number, kind in enumerate(kinds)]
    base = base_of(tmp_path / "base", {**CONFIG, "rootfs": {"diff_ids": ["a", "b", "c"]}}, layers)
    assert [layer.blob.media_type for layer in base.layers] == [LAYER, LAYER_GZIP, "application/x-other"]
