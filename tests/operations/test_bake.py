"""Baking a model: the same digest everywhere, and only bytes that are what they should be."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.disk import NOBODY, as_ordinary_user, cannot, open_to_all
from tests.images.conformance import read_layout
from weightctl.config import Config
from weightctl.errors import IntegrityError, UsageError, WeightctlError
from weightctl.operations.bake import BakeResult, Recipe, bake, plan_bake
from weightctl.operations.push_volume import push_volume
from weightctl.progress import Progress


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return models.write_model(tmp_path / "m")


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    return tmp_path / "layout"


def baked(model: object, layout: Path, tag: str = "m:v1", workers: int = 2, **options: Any) -> BakeResult:
    recipe = Recipe(tag, f"layout:{layout}", **{key: options.pop(key) for key in ("path", "created") if key in options})
    return bake(str(model), recipe, **options, config=Config(workers=workers), progress=Progress())


def test_a_real_model(minilm: Path, layout: Path) -> None:
    result = baked(minilm, layout)
    image = read_layout(layout, "v1")
    assert image.digest == result.digest
    assert image.files == {f"/models/model/{path}": data for path, data in models.contents(minilm).items()}
    assert result.bytes == sum(layer.size for layer in result.layers)
    assert result.bytes < result.written_bytes < result.bytes + 10_000
    assert (result.tag, result.target) == ("m:v1", f"layout:{layout}")
    assert result.layers[0].files == ("model.safetensors",)
    assert len(result.layers) == 2


def test_nothing_of_the_machine_is_in_the_digest(model: Path, tmp_path: Path) -> None:
    """Another directory, umask, user, time zone, locale, clock of the files, order of creation, number of threads."""
    if os.geteuid() != 0:
        cannot("another user takes root")
    here = baked(model, tmp_path / "layout", workers=1)
    other = tmp_path / "away" / "m"
    for name, data in reversed(models.contents(model).items()):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_bytes(data)
        (other / name).chmod(0o755)
        os.utime(other / name, (10**9, 10**9))
    open_to_all(tmp_path)
    place = tmp_path / "nobody"
    place.mkdir()
    os.chown(place, NOBODY, NOBODY)

    def bake_there() -> None:
        os.umask(0o077)
        os.environ.update(TZ="Asia/Kathmandu", LC_ALL="C", HOME=str(place), XDG_CACHE_HOME=str(place / ".cache"))
        time.tzset()
        assert baked(other, place / "layout", workers=5).digest == here.digest

    as_ordinary_user(bake_there)
    assert models.contents(place / "layout" / "blobs") == models.contents(tmp_path / "layout" / "blobs")


def test_the_path_is_part_of_the_image_and_the_tag_is_not(model: Path, layout: Path) -> None:
    digests = [
        baked(model, layout, "m:v1").digest,
        baked(model, layout, "other:v2").digest,
        baked(model, layout, "m:v3", path="/models/m").digest,
    ]
    assert len(set(digests)) == 1
    assert baked(model, layout, "m:v4", path="/weights").digest not in digests
    assert set(read_layout(layout, "v4").files) == {f"/weights/{path}" for path in models.contents(model)}


def test_a_time_is_in_the_image_only_if_asked_for(model: Path, layout: Path) -> None:
    noon = "2026-01-31T12:00:00Z"
    plain, dated = baked(model, layout, "m:v1"), baked(model, layout, "m:v2", created=noon)
    assert plain.digest != dated.digest
    assert [layer.digest for layer in plain.layers] == [layer.digest for layer in dated.layers]
    assert "created" not in read_layout(layout, "v1").config
    assert read_layout(layout, "v2").config["created"] == noon


def test_a_model_in_the_hubs_cache_says_where_it_came_from(layout: Path, tmp_path: Path) -> None:
    snapshot = models.write_hub_cache(tmp_path, {"config.json": b"{}", "model.safetensors": bytes(2 << 20)})
    baked(snapshot, layout)
    image = read_layout(layout, "v1")
    assert set(image.files) == {"/models/org/name/config.json", "/models/org/name/model.safetensors"}
    assert image.manifest["annotations"]["org.opencontainers.image.revision"] == models.COMMIT


def test_a_model_in_a_volume_bakes_to_the_same_digest(model: Path, layout: Path, tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    push_volume(str(model), tmp_path / "volume", config=Config(), progress=Progress())
    assert baked(f"volume:{tmp_path / 'volume'}#m", tmp_path / "one").digest == baked(model, layout).digest


def test_include_and_exclude(model: Path, layout: Path) -> None:
    result = baked(model, layout, include=["*.safetensors", "config.json"], exclude=["*-00002-*"])
    assert [layer.files for layer in result.layers] == [("model-00001-of-00002.safetensors",), ("config.json",)]


def test_a_plan_tells_what_a_bake_then_does(model: Path, layout: Path) -> None:
    plan = plan_bake(str(model), Recipe("m:v1", f"layout:{layout}"), config=Config(), progress=Progress())
    assert not layout.exists()
    result = baked(model, layout)
    assert [(layer.size, layer.files) for layer in plan.layers] == [
        (layer.size, layer.files) for layer in result.layers
    ]
    assert (plan.tag, plan.target, plan.bytes, plan.missing_bytes) == (result.tag, result.target, result.bytes, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tag": "NOT a tag"}, "not an image name"),
        ({"to": "nowhere:x"}, "unknown image target 'nowhere'"),
        ({"to": "layout"}, "needs a directory"),
        ({"platform": "amd64"}, "not a platform"),
        ({"path": "models"}, "not a directory for the model"),
        ({"created": "today"}, "not an RFC 3339 time"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_moves(
    model: Path, tmp_path: Path, change: Any, message: str
) -> None:
    layout = tmp_path / "layout"
    recipe = Recipe(**{"tag": "m:v1", "to": f"layout:{layout}", **change})
    for run in (bake, plan_bake):
        with pytest.raises(UsageError, match=message) as caught:
            run(str(model), recipe, config=Config(), progress=Progress())
        assert caught.value.hint
    assert not layout.exists()


# Models that are not what they should be.


def test_an_empty_model(layout: Path, tmp_path: Path) -> None:
    (tmp_path / "empty" / "nothing in here").mkdir(parents=True)
    with pytest.raises(UsageError, match="no files in"):
        baked(tmp_path / "empty", layout)
    assert not layout.exists()


def test_a_model_of_one_tensor_without_bytes(layout: Path, tmp_path: Path) -> None:
    models.write_safetensors(tmp_path / "m" / "model.safetensors", 0)
    baked(tmp_path / "m", layout)
    assert read_layout(layout, "v1").files == {
        "/models/m/model.safetensors": (tmp_path / "m" / "model.safetensors").read_bytes()
    }


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_flipped_bit_in_the_hubs_cache(layout: Path, tmp_path: Path, name: str) -> None:
    snapshot = models.write_hub_cache(tmp_path, {"config.json": b"{}", "model.safetensors": bytes(3 << 20)})
    baked(snapshot, layout, "m:whole")
    before = layout.joinpath("index.json").read_bytes()
    models.flip_bit(snapshot / name)
    with pytest.raises(IntegrityError, match=(snapshot / name).resolve().name) as caught:
        baked(snapshot, layout, "m:damaged")
    assert caught.value.exit_code == 3
    assert caught.value.hint
    assert layout.joinpath("index.json").read_bytes() == before
    assert list(layout.rglob("*.weightctl-tmp")) == []


def test_a_file_that_is_written_meanwhile(layout: Path, tmp_path: Path) -> None:
    weights = models.write_safetensors(tmp_path / "m" / "model.safetensors", 64 << 20)
    with (
        models.written_meanwhile(weights, 60 << 20),
        pytest.raises(IntegrityError, match=r"model\.safetensors changed while it was read") as caught,
    ):
        baked(tmp_path / "m", layout)
    assert caught.value.exit_code == 3
    assert not (layout / "index.json").exists()
    assert list((layout / "blobs" / "sha256").iterdir()) == []


def _link_out(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def _link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def _link_up(path: Path) -> None:
    path.symlink_to("..")


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path may have 107 bytes
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def _device(path: Path) -> None:
    try:
        os.mknod(path, 0o020644, os.makedev(1, 5))  # /dev/zero, which never ends
    except PermissionError:
        cannot("a device takes root")


@pytest.mark.parametrize("make", [_link_out, _link_to_nothing, _link_up, _fifo, _socket, _device])
def test_what_is_no_file_of_the_model(model: Path, layout: Path, make: Any) -> None:
    make(model / "with space" / "stranger")
    with pytest.raises(IntegrityError, match="stranger") as caught:
        baked(model, layout)
    assert caught.value.exit_code == 3
    assert not layout.exists()


def test_a_file_that_may_not_be_read(model: Path, layout: Path, tmp_path: Path) -> None:
    (model / "config.json").chmod(0o000)
    open_to_all(tmp_path)
    layout.mkdir(mode=0o777)
    layout.chmod(0o777)

    def attempt() -> None:
        with pytest.raises(WeightctlError, match=r"Permission denied \(.*config\.json\)") as caught:
            baked(model, layout)
        assert caught.value.exit_code == 1
        assert caught.value.hint

    as_ordinary_user(attempt)
    assert not (layout / "index.json").exists()
