"""Every engine that speaks Docker's API: Docker's own, podman, and those that TEST_DOCKER_HOST names, if any."""

from __future__ import annotations

import io
import json
import os
import secrets
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest

from tests import models
from tests.benchmarks.bake_to_engine import Relay
from tests.command import weightctl
from tests.images.conformance import plan
from tests.services import docker_engine, docker_registry, podman_engine, tool
from weightctl.config import Config
from weightctl.errors import WeightctlError
from weightctl.images import Baked, DockerImages, engine_load
from weightctl.images.oci import LAYER, BaseImage, Descriptor, ImageName, WrittenLayer
from weightctl.operations.base import open_base
from weightctl.progress import Progress, Task

STARTED = {"docker": docker_engine, "podman": podman_engine}
GIVEN = os.environ.get("TEST_DOCKER_HOST", "").split()


@pytest.fixture(scope="module", params=[*STARTED, *GIVEN])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    with STARTED.get(request.param, lambda: nullcontext(request.param))() as host:
        yield host


@pytest.fixture
def name(engine: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An image's name that no other test has; what goes by it is removed."""
    monkeypatch.setenv("DOCKER_HOST", engine)
    unique = f"engines-{secrets.token_hex(8)}"
    yield unique
    for tag in ("v1", "v2", "base"):
        subprocess.run(["docker", "image", "rm", "--force", f"{unique}:{tag}"], capture_output=True, check=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return models.write_model(tmp_path / "m", seed=secrets.randbits(60))


def bake(model: Path, name: str, **options: object) -> Baked:
    image = plan(model, **options)
    return DockerImages().bake(image, ImageName.parse(name), config=Config(workers=2), progress=Progress())


def saved(name: str, scratch: Path) -> dict[str, bytes]:
    """The files of an image as the engine gives them back, but for the model's directories."""
    tool("docker", "save", "--output", scratch / "saved.tar", name)
    files = {}
    with tarfile.open(scratch / "saved.tar") as archive:
        manifest = archive.extractfile("manifest.json")
        assert manifest is not None
        for layer in json.loads(manifest.read())[0]["Layers"]:
            content = archive.extractfile(layer)
            assert content is not None
            with tarfile.open(fileobj=io.BytesIO(content.read())) as members:
                for member in members:
                    if (stream := members.extractfile(member)) is not None:
                        files[f"/{member.name}"] = stream.read()
    return files


def files_of(model: Path) -> dict[str, bytes]:
    return {f"/models/m/{path}": data for path, data in models.contents(model).items()}


def test_it_gives_the_model_back(name: str, model: Path, tmp_path: Path) -> None:
    first = bake(model, f"{name}:v1")
    assert saved(f"{name}:v1", tmp_path) == files_of(model)
    assert json.loads(tool("docker", "inspect", f"{name}:v1"))[0]["Id"] == first.digest
    again = bake(model, f"{name}:v1")
    assert again.digest == first.digest
    assert again.written_bytes in (0, first.written_bytes)


def test_a_changed_shard_changes_the_image(name: str, model: Path, tmp_path: Path) -> None:
    bake(model, f"{name}:v1")
    models.flip_bit(model / "model-00002-of-00002.safetensors")
    changed = bake(model, f"{name}:v2")
    assert not changed.layers[1].reused
    assert saved(f"{name}:v2", tmp_path) == files_of(model)


@pytest.mark.parametrize("compression", ["zstd", "gzip"])
def test_layers_are_packed_where_they_stay_so(name: str, model: Path, tmp_path: Path, compression: str) -> None:
    packed = ("--compression", compression)
    outcome = weightctl("bake", model, "--tag", f"{name}:v1", "--to", "docker", *packed)
    if "containerd" not in tool("docker", "info", "--format", "{{.DriverStatus}}"):
        assert outcome.code == 2
        assert "keeps layers unpacked" in outcome.stderr
        assert name not in tool("docker", "images")
        return
    assert outcome.code == 0, outcome.stderr
    models.flip_bit(model / "model-00002-of-00002.safetensors")
    again = weightctl("bake", model, "--tag", f"{name}:v1", "--to", "docker", *packed, "--json")
    assert [layer["reused"] for layer in again.result["layers"]] == [True, False, True]
    with docker_registry(tmp_path) as host:
        tool("docker", "tag", f"{name}:v1", f"{host}/m:v1")
        tool("docker", "push", f"{host}/m:v1")
        tool("docker", "image", "rm", f"{host}/m:v1")
        there = weightctl("verify", f"registry:{host}/m:v1", "--against", model)
        assert there.code == 0, there.stderr
        with ExitStack() as scratch:
            image = open_base(f"registry:{host}/m:v1", None, "registry", scratch, config=Config())
    assert image is not None
    assert [layer.blob.digest for layer in image.layers] == [layer["digest"] for layer in again.result["layers"]]


@pytest.mark.parametrize("spec", ["{}:base", "docker:{}:base"])
def test_an_image_there_lies_below(name: str, model: Path, tmp_path: Path, spec: str) -> None:
    with tarfile.open(tmp_path / "base.tar", "w") as archive:
        entry = tarfile.TarInfo("srv/app")
        entry.size = 3
        archive.addfile(entry, io.BytesIO(b"app"))
    tool("docker", "import", "--change", "ENV BASE=yes", tmp_path / "base.tar", f"{name}:base")
    with ExitStack() as scratch:
        base = open_base(spec.format(name), None, "docker", scratch, config=Config())
        for _ in range(2):
            bake(model, f"{name}:v1", base=base)
    assert saved(f"{name}:v1", tmp_path) == {"/srv/app": b"app", **files_of(model)}
    settings = json.loads(tool("docker", "inspect", f"{name}:v1"))[0]["Config"]["Env"]
    assert {"BASE=yes", "WEIGHTCTL_MODEL_DIR=/models/m"} <= set(settings)


MIB = 1 << 20
IN_STEPS_OF_A_MIB = """
import sys
from weightctl.images import engine_load
engine_load.STEP_BYTES = 1 << 20
from weightctl.cli.main import main
main()
"""


def unfinished() -> set[str]:
    return set(tool("docker", "images", "--quiet", "--filter", f"label={engine_load.UNFINISHED}").split())


@pytest.mark.parametrize("after", [1.5, 6.5])
def test_a_killed_bake_is_gone_on_with(engine: str, name: str, tmp_path: Path, after: float) -> None:
    model = tmp_path / "m"
    for number in range(4):
        models.write_safetensors(model / f"model-{number}.safetensors", 2 * MIB, secrets.randbits(60))
    expected = weightctl("bake", model, "--tag", "m:v1", "--to", f"archive:{tmp_path / 'm.tar'}", "--json").result
    with tempfile.TemporaryDirectory() as directory:
        relay = Relay(engine, Path(directory))
        relay.hold_after = int(after * MIB)
        command = [sys.executable, "-c", IN_STEPS_OF_A_MIB, "bake", model, "--tag", f"{name}:v1", "--to", "docker"]
        killed = subprocess.Popen(command, env={**os.environ, "DOCKER_HOST": relay.host})
        try:
            assert relay.held.wait(300)
        finally:
            killed.send_signal(signal.SIGKILL)
            killed.wait()
        relay.hold_after, sent = 0, relay.sent
        relay.go_on.set()
        kept = after // 2
        assert len(unfinished()) == kept
        done = subprocess.run(command, env={**os.environ, "DOCKER_HOST": relay.host}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert relay.sent - sent < (8 - 2 * kept + 1) * MIB
    assert unfinished() == set()
    image = json.loads(tool("docker", "inspect", f"{name}:v1"))[0]
    assert image["RootFS"]["Layers"] == [layer["digest"] for layer in expected["layers"]]
    assert saved(f"{name}:v1", tmp_path) == files_of(model)


class BreaksOff(Progress, Task):
    """Ends what reports to it after five MiB."""

    left = 5 * MIB

    def task(self, description: str, total: int) -> Task:
        return self

    def advance(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise WeightctlError("broken off")


def test_what_a_bake_left_is_kept_for_a_day(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "m"
    for number in range(3):
        models.write_safetensors(model / f"model-{number}.safetensors", 2 * MIB, secrets.randbits(60))
    monkeypatch.setattr(engine_load, "STEP_BYTES", MIB)
    with pytest.raises(WeightctlError, match="broken off"):
        DockerImages().bake(plan(model), ImageName.parse(f"{name}:v1"), config=Config(), progress=BreaksOff())
    first, _ = left = unfinished()
    bake(models.write_model(tmp_path / "other", seed=secrets.randbits(60)), f"{name}:v2")
    assert unfinished() == left
    tool("docker", "tag", first, f"{name}:v1")
    monkeypatch.setattr(engine_load, "UNFINISHED_SECONDS", -1)
    bake(models.write_model(tmp_path / "another", seed=secrets.randbits(60)), f"{name}:v2")
    assert unfinished() == {first}


def test_a_load_ends_when_it_is_large_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_load, "STEP_BYTES", 3 * MIB)
    for number in range(6):
        models.write_safetensors(tmp_path / "m" / f"model-{number}.safetensors", 2 * MIB)
    layer = WrittenLayer(Descriptor(LAYER, "sha256:0", 1), "sha256:0")
    base = BaseImage("base", {}, (layer,), lambda blob: io.BytesIO(blob.digest.encode()))
    assert list(engine_load.steps(plan(tmp_path / "m", base=base), frozenset())) == [2, 4]
    assert list(engine_load.steps(plan(tmp_path / "m", base=base), frozenset({0, 1}))) == [3, 5]
