"""An OCI image layout: what other tools make of it, and what it survives."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests import models, services
from tests.command import start, weightctl
from tests.disk import as_ordinary_user, read_only_directory, small_disk
from tests.images.conformance import Image, ImagesConformance, plan, read_layout
from weightctl.config import Config
from weightctl.errors import IntegrityError, UsageError, WeightctlError
from weightctl.images import Baked, LayoutImages
from weightctl.images.oci import ImageName
from weightctl.images.plan import ImagePlan
from weightctl.progress import Progress


class TestLayout(ImagesConformance):
    backend = "layout"

    def read(self, place: str, name: ImageName, scratch: Path) -> Image:
        return read_layout(Path(place), name.tag)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return models.write_model(tmp_path / "m")


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    return tmp_path / "layout"


def bake(layout: Path, image: ImagePlan, name: str = "m:v1", workers: int = 2) -> Baked:
    return LayoutImages(str(layout)).bake(
        image, ImageName.parse(name), config=Config(workers=workers), progress=Progress()
    )


def problems(layout: Path) -> tuple[str, ...]:
    return LayoutImages(str(layout)).check(config=Config(), progress=Progress()).problems


def index(layout: Path) -> dict[str, Any]:
    return json.loads((layout / "index.json").read_text())  # type: ignore[no-any-return]


def blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / digest.replace(":", "/")


def leftovers(layout: Path) -> list[Path]:
    return list(layout.rglob("*.weightctl-tmp"))


def assert_unpacked(root: Path, model: Path) -> None:
    """The image's directory holds the model, byte for byte, as root's, from the beginning of time."""
    assert models.contents(root) == models.contents(model)
    for path in [root, *root.rglob("*")]:
        status = path.lstat()
        assert (status.st_uid, status.st_gid, status.st_mtime) == (0, 0, 0), path
        assert stat.S_IMODE(status.st_mode) == (0o755 if path.is_dir() else 0o644), path


# What others make of it.


def test_skopeo_reads_and_copies_it(layout: Path, model: Path, tmp_path: Path) -> None:
    baked = bake(layout, plan(model))
    seen = services.inspect(f"oci:{layout}:v1")
    assert seen["Digest"] == baked.digest
    assert seen["Env"] == ["WEIGHTCTL_MODEL_DIR=/models/m"]
    assert seen["Layers"] == [layer.digest for layer in baked.layers]
    assert (seen["Os"], seen["Architecture"]) == ("linux", "amd64")
    services.tool("skopeo", "copy", "--quiet", "--preserve-digests", f"oci:{layout}:v1", f"oci:{tmp_path / 'copy'}:v1")
    copy = read_layout(tmp_path / "copy", "v1")
    assert copy.digest == baked.digest
    assert copy.files == {f"/models/m/{path}": data for path, data in models.contents(model).items()}


def test_skopeo_shows_where_it_came_from_and_when_if_asked(layout: Path, tmp_path: Path) -> None:
    snapshot = models.write_hub_cache(tmp_path, {"config.json": b"{}"})
    bake(layout, plan(snapshot, created="2026-01-31T12:00:00Z"))
    assert services.inspect(f"oci:{layout}:v1")["Created"] == "2026-01-31T12:00:00Z"
    manifest = json.loads(services.tool("skopeo", "inspect", "--raw", f"oci:{layout}:v1"))
    assert manifest["annotations"] == {
        "org.opencontainers.image.created": "2026-01-31T12:00:00Z",
        "org.opencontainers.image.revision": models.COMMIT,
        "org.opencontainers.image.source": "https://huggingface.co/org/name",
    }


def test_umoci_unpacks_it(layout: Path, model: Path, tmp_path: Path) -> None:
    bake(layout, plan(model))
    assert_unpacked(services.unpack(layout, "v1", tmp_path / "bundle") / "models" / "m", model)


def test_podman_pulls_it(layout: Path, model: Path) -> None:
    bake(layout, plan(model))
    with services.podman_mount(f"oci:{layout}") as root:
        assert_unpacked(root / "models" / "m", model)


def test_a_real_model_through_other_hands(layout: Path, minilm: Path, tmp_path: Path) -> None:
    bake(layout, plan(minilm))
    assert_unpacked(services.unpack(layout, "v1", tmp_path / "bundle") / "models" / "m", minilm)


def test_of_two_images_with_one_tag_the_last_has_it_and_the_other_its_full_name(layout: Path, model: Path) -> None:
    first = bake(layout, plan(model), "first:v1")
    second = bake(layout, plan(model, "/elsewhere"), "second:v1")
    assert services.inspect(f"oci:{layout}:v1")["Digest"] == second.digest
    assert services.inspect(f"oci:{layout}:docker.io/library/first:v1")["Digest"] == first.digest
    bake(layout, plan(model), "first:v1")
    assert services.inspect(f"oci:{layout}:v1")["Digest"] == first.digest
    assert services.inspect(f"oci:{layout}:docker.io/library/second:v1")["Digest"] == second.digest
    assert len(index(layout)["manifests"]) == 2


def test_a_layout_of_another_tool_is_extended_without_loss(layout: Path, model: Path, tmp_path: Path) -> None:
    first = bake(tmp_path / "first", plan(model))
    services.tool("skopeo", "copy", "--quiet", f"oci:{tmp_path / 'first'}:v1", f"oci:{layout}:theirs")
    theirs = services.inspect(f"oci:{layout}:theirs")
    ours = bake(layout, plan(model), "m:ours")
    assert ours.digest == first.digest
    assert services.inspect(f"oci:{layout}:theirs") == theirs
    assert services.inspect(f"oci:{layout}:ours")["Digest"] == ours.digest
    again = bake(layout, plan(model, "/elsewhere"), "m:theirs")
    assert services.inspect(f"oci:{layout}:theirs")["Digest"] == again.digest
    assert problems(layout) == ()


# What it refuses.


def test_a_directory_that_is_no_layout_is_refused(layout: Path, model: Path) -> None:
    layout.mkdir()
    (layout / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="not empty and is no OCI layout"):
        bake(layout, plan(model))
    assert os.listdir(layout) == ["thesis.txt"]


def test_a_volume_is_no_layout(layout: Path, model: Path) -> None:
    layout.mkdir()
    assert weightctl("push-volume", model, layout).code == 0
    before = models.state(layout)
    with pytest.raises(UsageError, match="not empty and is no OCI layout"):
        bake(layout, plan(model))
    assert models.state(layout) == before


def test_a_file_is_no_layout(layout: Path, model: Path) -> None:
    layout.write_text("precious")
    with pytest.raises(WeightctlError, match="Not a directory"):
        bake(layout, plan(model))
    assert layout.read_text() == "precious"


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "null", '"text"', "{}", '{"manifests": 1}', '{"manifests": [1]}', '{"manifests": [{}]}',
        '{"manifests": [{"digest": 1}]}', '{"manifests": [{"digest": "x", "annotations": "y"}]}', "[" * 100_000,
        '{"manifests": ["digest"]}', "\udcff",
    ],
)  # fmt: skip
def test_a_damaged_index_is_noticed_before_the_work(layout: Path, model: Path, content: str) -> None:
    bake(layout, plan(model))
    (layout / "index.json").write_bytes(content.encode(errors="surrogateescape"))
    before = models.state(layout)
    with pytest.raises(IntegrityError, match=r"index\.json is damaged"):
        bake(layout, plan(model, "/elsewhere"))
    assert models.state(layout) == before
    with pytest.raises(IntegrityError, match=r"index\.json is damaged"):
        problems(layout)


def test_what_else_an_index_holds_is_kept(layout: Path, model: Path) -> None:
    bake(layout, plan(model))
    changed = index(layout)
    changed["annotations"] = {"who": "somebody"}
    changed["manifests"][0]["annotations"]["their"] = "note"
    changed["manifests"].append({**changed["manifests"][0], "annotations": None, "urls": ["https://example.org"]})
    (layout / "index.json").write_text(json.dumps(changed))
    bake(layout, plan(model), "other:v2")
    after = index(layout)
    assert after["annotations"] == {"who": "somebody"}
    assert after["manifests"][:2] == changed["manifests"]


# What it notices and mends.


def test_a_blob_with_a_flipped_bit_is_written_again(layout: Path, model: Path) -> None:
    baked = bake(layout, plan(model))
    models.settle(layout)
    assert all(layer.reused for layer in bake(layout, plan(model)).layers)  # remembered from here on
    models.flip_bit(blob(layout, baked.layers[0].digest), 5000)
    assert len(problems(layout)) == 1
    models.flip_bit(blob(layout, baked.digest))
    again = bake(layout, plan(model))
    assert [layer.reused for layer in again.layers] == [False, True, True]
    assert again.digest == baked.digest
    assert problems(layout) == ()


def test_a_check_tells_what_is_wrong(layout: Path, model: Path) -> None:
    baked = bake(layout, plan(model))
    flipped, cut, gone = (layer.digest for layer in baked.layers)
    models.flip_bit(blob(layout, flipped))
    os.truncate(blob(layout, cut), 1000)
    blob(layout, gone).unlink()
    found = sorted(problems(layout))
    assert len(found) == 3
    for digest, word in ((flipped, "is damaged"), (cut, "has 1000 bytes instead of"), (gone, "cannot be read")):
        assert any(digest in problem and word in problem for problem in found)


def test_a_check_needs_the_index(layout: Path, model: Path) -> None:
    bake(layout, plan(model))
    (layout / "index.json").unlink()
    assert problems(layout) == ("index.json is missing",)


def rewrite(layout: Path, manifest: object) -> None:
    """Let the layout's only name mean another manifest."""
    content = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    LayoutImages(str(layout))._write_small(content)
    changed = index(layout)
    changed["manifests"][0].update(digest=f"sha256:{hashlib.sha256(content).hexdigest()}", size=len(content))
    (layout / "index.json").write_text(json.dumps(changed))


def test_a_check_follows_an_index_to_its_images(layout: Path, model: Path) -> None:
    baked = bake(layout, plan(model))
    rewrite(layout, {"schemaVersion": 2, "manifests": index(layout)["manifests"]})
    assert problems(layout) == ()
    models.flip_bit(blob(layout, baked.layers[0].digest))
    assert len(problems(layout)) == 1


def test_a_check_compares_diff_ids_also_where_the_manifest_does_not_say_what_it_is(layout: Path, model: Path) -> None:
    bake(layout, plan(model))
    image = read_layout(layout, "v1")
    manifest = {key: value for key, value in image.manifest.items() if key != "mediaType"}
    manifest["layers"] = manifest["layers"][::-1]
    rewrite(layout, manifest)
    found = problems(layout)
    assert len(found) == 2
    assert all("has the diffID" in problem for problem in found)


@pytest.mark.parametrize(
    "manifest",
    [
        b"", b"[]", b"[" * 100_000, b"\xff", {}, {"layers": 1}, {"layers": [1]}, {"layers": [{}]},
        {"layers": [{"digest": "sha256:../../../../etc/passwd", "size": 1}]},
        {"layers": [{"digest": f"sha256:{'0' * 64}", "size": float("inf")}]},
        {"manifests": 5}, {"manifests": ["digest"]}, {"layers": [], "config": []},
    ],
)  # fmt: skip
def test_a_check_survives_any_manifest(layout: Path, model: Path, manifest: object) -> None:
    bake(layout, plan(model))
    rewrite(layout, manifest)
    assert len(problems(layout)) == 1


# What it survives.


def test_kill_at_any_moment_then_bake_again(layout: Path, tmp_path: Path) -> None:
    model = models.settle(models.write_model(tmp_path / "m", shards=12, size=8 << 20))
    right = bake(tmp_path / "right", plan(model))
    killed = 0
    finished: dict[Path, int] = {}
    for percent in (10, 40, 70):
        process = start("bake", model, "--tag", "m:v1", "--path", "/models/m", "--to", f"layout:{layout}")
        models.kill_at(process, layout, right.written_bytes * percent // 100)
        killed += process.returncode == -signal.SIGKILL
        for path, inode in finished.items():
            assert path.stat().st_ino == inode, "a finished blob was written again"
        for path in (layout / "blobs" / "sha256").glob("*"):
            assert path.read_bytes() == blob(tmp_path / "right", f"sha256:{path.name}").read_bytes()
            finished[path] = path.stat().st_ino
    assert killed >= 1
    again = bake(layout, plan(model))
    assert again.digest == right.digest
    assert {path: path.stat().st_ino for path in finished} == finished
    assert leftovers(layout) == []
    assert read_layout(layout, "v1").digest == right.digest
    assert problems(layout) == ()


def test_a_disk_that_is_full_from_the_start(model: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2 << 20) as disk:
        bake(disk / "layout", plan(models.write_model(tmp_path / "small", shards=1, size=100)), "small:v1")
        before = models.state(disk)
        with pytest.raises(WeightctlError, match="not enough room") as caught:
            bake(disk / "layout", plan(model), "m:v2")
        assert caught.value.hint
        assert models.state(disk) == before


def test_a_disk_that_fills_up_in_the_middle(model: Path, tmp_path: Path) -> None:
    """As if another process took the room after the bake had looked."""
    image = plan(model)
    with small_disk(tmp_path / "disk", image.size + (512 << 10)) as disk:
        layout = disk / "layout"
        bake(layout, plan(models.write_model(tmp_path / "small", shards=1, size=100)), "small:v1")
        before = index(layout)

        class Thief(Progress):
            def task(self, description: str, total: int) -> Any:
                (disk / "stolen").write_bytes(bytes(1 << 20))
                return super().task(description, total)

        with pytest.raises(WeightctlError, match="No space left on device") as caught:
            LayoutImages(str(layout)).bake(image, ImageName.parse("m:v2"), config=Config(workers=2), progress=Thief())
        assert caught.value.exit_code == 1
        assert caught.value.hint
        assert index(layout) == before
        assert leftovers(layout) == []
        assert problems(layout) == ()
        for path in (layout / "blobs" / "sha256").iterdir():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
        (disk / "stolen").unlink()
        bake(layout, image, "m:v2")
        assert problems(layout) == ()


def test_a_layout_that_cannot_be_written(model: Path) -> None:
    with read_only_directory() as directory:
        image = plan(model)

        def attempt() -> None:
            with pytest.raises(WeightctlError, match="Permission denied") as caught:
                bake(directory / "layout", image)
            assert caught.value.exit_code == 1
            assert caught.value.hint

        as_ordinary_user(attempt)
        assert os.listdir(directory) == []


def test_two_bakes_at_once(layout: Path, model: Path, tmp_path: Path) -> None:
    other = models.write_model(tmp_path / "other", seed=5)
    bakers = [
        start("bake", source, "--tag", f"{name}:{name}", "--to", f"layout:{layout}")
        for source, name in ((model, "a"), (other, "b"), (model, "c"))
    ]
    digests = [process.communicate()[0].strip() for process in bakers]
    assert [process.returncode for process in bakers] == [0, 0, 0]
    assert [read_layout(layout, tag).digest for tag in "abc"] == digests
    assert leftovers(layout) == []


def test_waiting_for_another_bake_is_said_and_ends_with_it(layout: Path, model: Path) -> None:
    bake(layout, plan(model), "first:v1")
    holding = "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, 2); print(flush=True); time.sleep(600)"
    command = [sys.executable, "-c", holding, str(layout / ".weightctl" / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        waiting = start("bake", model, "--tag", "m:v2", "--to", f"layout:{layout}")
        assert waiting.stderr is not None
        assert "waiting for another bake into" in waiting.stderr.readline()
        holder.kill()
    waiting.communicate()
    assert waiting.returncode == 0


# What it keeps.


def test_what_only_a_replaced_image_needed_is_removed(layout: Path, model: Path, tmp_path: Path) -> None:
    first = bake(layout, plan(model), "m:v1")
    bake(layout, plan(model, "/elsewhere"), "other:keep")
    models.flip_bit(model / "model-00002-of-00002.safetensors")
    (layout / "blobs" / "sha256" / ("0" * 64)).write_bytes(b"of somebody who is not done")
    second = bake(layout, plan(model), "m:v1")
    gone = {layer.digest for layer in first.layers} - {layer.digest for layer in second.layers}
    assert len(gone) == 1
    assert not any(blob(layout, digest).exists() for digest in (*gone, first.digest))
    assert blob(layout, f"sha256:{'0' * 64}").exists()
    assert problems(layout) == ()
    assert {entry["digest"] for entry in index(layout)["manifests"]} >= {second.digest}


def test_what_another_tag_needs_stays(layout: Path, model: Path, tmp_path: Path) -> None:
    first = bake(layout, plan(model), "m:v1")
    bake(layout, plan(model), "m:v2")
    bake(layout, plan(models.write_model(tmp_path / "other", seed=7)), "m:v1")
    assert read_layout(layout, "v2").digest == first.digest
    assert problems(layout) == ()


def test_nothing_is_removed_where_an_image_cannot_be_read(layout: Path, model: Path, tmp_path: Path) -> None:
    first = bake(layout, plan(model), "m:v1")
    bake(layout, plan(model, "/elsewhere"), "damaged:v2")
    entry = next(entry for entry in index(layout)["manifests"] if entry["digest"] != first.digest)
    models.flip_bit(blob(layout, entry["digest"]))
    bake(layout, plan(models.write_model(tmp_path / "other", seed=7)), "m:v1")
    assert all(blob(layout, layer.digest).exists() for layer in first.layers)


def test_a_failure_in_one_layer_ends_the_others_soon(layout: Path, tmp_path: Path) -> None:
    model = tmp_path / "m"
    models.write_safetensors(model / "b.safetensors", 64 << 20)
    image = plan(model)
    (model / "b.safetensors").rename(tmp_path / "gone.safetensors")
    before = set(threading.enumerate())
    with pytest.raises(WeightctlError, match=r"b\.safetensors"):
        bake(layout, image)
    assert not set(threading.enumerate()) - before
    assert leftovers(layout) == []
    assert not (layout / "index.json").exists()
