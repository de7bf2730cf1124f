"""Verifying whatever weightctl made or fetched."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import models
from weightctl.config import Config
from weightctl.errors import UsageError
from weightctl.operations.bake import Recipe, bake
from weightctl.operations.push_volume import push_volume
from weightctl.operations.verify import VerifyResult, verify
from weightctl.progress import Progress

WEIGHTS = "model-00001-of-00002.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return models.write_model(tmp_path / "m")


def verified(target: object) -> VerifyResult:
    return verify(str(target), config=Config(workers=2), progress=Progress())


def in_a_volume(model: Path, tmp_path: Path) -> tuple[str, Path]:
    (tmp_path / "volume").mkdir()
    pushed = push_volume(str(model), tmp_path / "volume", config=Config(), progress=Progress())
    return f"volume:{tmp_path / 'volume'}#m", pushed.path / WEIGHTS


def in_a_layout(model: Path, tmp_path: Path) -> tuple[str, Path]:
    layout = tmp_path / "layout"
    baked = bake(str(model), Recipe("m:v1", f"layout:{layout}"), config=Config(), progress=Progress())
    digest = next(layer.digest for layer in baked.layers if layer.files == (WEIGHTS,))
    return str(layout), layout / "blobs" / digest.replace(":", "/")


def in_the_hubs_cache(model: Path, tmp_path: Path) -> tuple[str, Path]:
    snapshot = models.write_hub_cache(tmp_path / "hub", models.contents(model))
    return str(snapshot), (snapshot / WEIGHTS).resolve()


def _cut(path: Path) -> None:
    os.truncate(path, 1000)


@pytest.mark.parametrize("make", [in_a_volume, in_a_layout, in_the_hubs_cache])
@pytest.mark.parametrize("harm", [models.flip_bit, _cut, Path.unlink])
def test_harm_is_found_and_named(
    model: Path,
    tmp_path: Path,
    make: Callable[[Path, Path], tuple[str, Path]],
    harm: Callable[[Path], None],
) -> None:
    target, path = make(model, tmp_path)
    clean = verified(target)
    assert clean.verified
    assert clean.problems == ()
    assert clean.bytes >= sum(map(len, models.contents(model).values()))
    harm(path)
    found = verified(target)
    assert not found.verified
    assert len(found.problems) >= 1
    assert all(path.name in problem or WEIGHTS in problem for problem in found.problems)


def test_each_harm_is_told_apart(model: Path, tmp_path: Path) -> None:
    target, path = in_a_volume(model, tmp_path)
    models.flip_bit(path)
    assert "is damaged" in verified(target).problems[0]
    _cut(path)
    assert "has 1000 bytes instead of" in verified(target).problems[0]
    path.unlink()
    assert "cannot be read: No such file" in verified(target).problems[0]


def test_an_extra_file_in_a_volume(model: Path, tmp_path: Path) -> None:
    target, path = in_a_volume(model, tmp_path)
    (path.parent / "extra.json").touch()
    assert verified(target).problems == ("extra.json was not published with this version",)


@pytest.mark.parametrize("place", ["latest", "."])
def test_a_version_may_be_written_as_its_directory(model: Path, tmp_path: Path, place: str) -> None:
    _, weights = in_a_volume(model, tmp_path)
    target = weights.parent if place == "." else weights.parent.parent / place
    assert verified(target).files == 8
    models.flip_bit(weights)  # what no header tells
    assert verified(target).problems == (f"{WEIGHTS} is damaged: its bytes are not those that were written",)


@pytest.mark.parametrize("place", [".", "m"])
def test_what_holds_several_versions_is_not_read_as_one(model: Path, tmp_path: Path, place: str) -> None:
    in_a_volume(model, tmp_path)
    with pytest.raises(UsageError, match="is part of a volume, not a version of a model") as caught:
        verified(tmp_path / "volume" / place)
    assert caught.value.hint == f"write volume:{tmp_path / 'volume'}#NAME[@VERSION]; names here: m"


def test_a_directory_of_somebody_elses_in_a_volume(model: Path, tmp_path: Path) -> None:
    in_a_volume(model, tmp_path)
    assert verified(model.rename(tmp_path / "volume" / "mine")).files == 8


def test_a_layout_may_be_written_as_bake_writes_it(model: Path, tmp_path: Path) -> None:
    target, _ = in_a_layout(model, tmp_path)
    assert verified(f"layout:{target}").verified


def test_a_plain_directory_has_only_its_headers_checked(model: Path) -> None:
    models.flip_bit(model / WEIGHTS)
    assert verified(model).verified
    models.flip_bit(model / WEIGHTS, 8)
    _cut(model / "model-00002-of-00002.safetensors")
    found = verified(model)
    assert len(found.problems) == 2
    assert found.files == 8


def test_a_header_that_lies_in_a_subdirectory(model: Path) -> None:
    models.write_safetensors(model / "unet" / "weights.safetensors")
    assert verified(model).verified
    _cut(model / "unet" / "weights.safetensors")
    assert "unet/weights.safetensors" in verified(model).problems[0]


def test_a_missing_shard(model: Path) -> None:
    weight_map = {"tensor0": WEIGHTS, "tensor1": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert verified(model).verified
    (model / WEIGHTS).unlink()
    assert WEIGHTS in verified(model).problems[0]


def test_a_format_without_headers(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.gguf").write_bytes(bytes(2 << 20))
    assert verified(tmp_path / "m").verified


def test_a_link_out_of_a_directory(model: Path) -> None:
    (model / "passwd").symlink_to("/etc/passwd")
    assert "leaves the model" in verified(model).problems[0]


@pytest.mark.parametrize("target", ["nothing", "layout:nothing", "volume:nothing#m", "volume:x"])
def test_nothing_to_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        verified(target)
    assert caught.value.hint
