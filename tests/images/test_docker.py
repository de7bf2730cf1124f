"""The Docker engine: images streamed into a real one, run there, and taken from it as bases."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import secrets
import socket
import socketserver
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests import models
from tests.command import Outcome, weightctl
from tests.images.conformance import Image, ImagesConformance, files_of, plan, read_layout
from tests.services import docker_engine, tool
from weightctl.config import Config
from weightctl.errors import IntegrityError, UsageError, WeightctlError
from weightctl.images import Baked, DockerImages, LayoutImages
from weightctl.images.engine import connect, refusal
from weightctl.images.engine_save import _saved_layer, saved_image
from weightctl.images.oci import LAYER, LAYER_GZIP, LAYER_ZSTD, Descriptor, ImageName
from weightctl.images.plan import ImagePlan
from weightctl.operations.base import open_base
from weightctl.progress import Progress, Task


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    with docker_engine() as host:
        yield host


@pytest.fixture(autouse=True)
def environment(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", engine)


class TestDockerImages(ImagesConformance):
    backend = "docker"
    kept = (True, False, False)
    verified = False
    no_location = "somewhere"

    @pytest.fixture
    def place(self) -> str:
        return f"conform{secrets.token_hex(8)}"

    def location(self, place: str) -> str:
        return ""

    def name(self, place: str, tag: str) -> str:
        return f"{place}:{tag}"

    def read(self, place: str, name: ImageName, scratch: Path) -> Image:
        daemon = ("--src-daemon-host", os.environ["DOCKER_HOST"])
        tool("skopeo", "copy", *daemon, f"docker-daemon:{name}", f"oci:{scratch}:{name.tag}")
        return replace(read_layout(scratch, name.tag), digest=inspect(str(name))["Id"])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Bytes of its own, so that no layer of another test makes this one pass."""
    return models.write_model(tmp_path / "m", seed=secrets.randbits(60))


def bake(image: ImagePlan, name: str) -> Baked:
    return DockerImages().bake(image, ImageName.parse(name), config=Config(), progress=Progress())


def inspect(name: str) -> dict[str, Any]:
    return json.loads(tool("docker", "inspect", name))[0]  # type: ignore[no-any-return]


def import_base(name: str) -> None:
    """An image that can run: busybox, with what a base may have."""
    busybox = Path("/bin/busybox")
    if not busybox.exists():
        pytest.skip("busybox-static is not installed")
    changes = ["ENV BASE=yes", 'ENTRYPOINT ["/bin/busybox"]', "WORKDIR /srv"]
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(busybox, "bin/busybox")
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        file.write(archive.getvalue())
        file.flush()
        tool("docker", "import", *(part for change in changes for part in ("--change", change)), file.name, name)


def test_a_container_finds_the_files(model: Path, tmp_path: Path) -> None:
    import_base("engine-base:run")
    outcome = weightctl(
        "bake", model, "--tag", "engine-run:v1", "--to", "docker", "--base", "engine-base:run", "--path", "/weights"
    )
    assert outcome.code == 0, outcome.stderr
    settings = inspect("engine-run:v1")["Config"]
    assert settings["Entrypoint"] == ["/bin/busybox"]
    assert settings["WorkingDir"] == "/srv"
    assert {"BASE=yes", "WEIGHTCTL_MODEL_DIR=/weights"} <= set(settings["Env"])
    run = ["docker", "run", "--rm", "--network", "none", "engine-run:v1"]
    sums = tool(*run, "find", "/weights", "-type", "f", "-exec", "/bin/busybox", "md5sum", "{}", ";")
    assert len(sums.splitlines()) == len(models.contents(model))
    content = tool(*run, "cat", "/weights/config.json")
    assert content == (model / "config.json").read_text()


def test_a_dry_run_says_what_is_there(model: Path) -> None:
    def planned() -> Outcome:
        return weightctl("bake", model, "--tag", "engine-dry:v1", "--to", "docker", "--dry-run", "--json")

    before = planned().result
    assert not any(layer["exists"] for layer in before["layers"])
    assert before["peak_disk_bytes"] >= 2 * before["bytes"]
    bake(plan(models.settle(model), f"/models/{model.name}"), "engine-dry:v1")
    assert "engine-dry" in tool("docker", "images")


class Relay(socketserver.BaseRequestHandler):
    """A connection, passed on to the engine's socket."""

    def handle(self) -> None:
        with socket.socket(socket.AF_UNIX) as engine:
            engine.connect(self.server.engine.removeprefix("unix://"))  # type: ignore[attr-defined]
            threading.Thread(target=self.pump, args=(self.request, engine)).start()
            self.pump(engine, self.request)

    @staticmethod
    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


def test_the_disk_of_a_remote_engine_is_not_this_machines(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m").mkdir()
    with (tmp_path / "m" / "weights.bin").open("wb") as file:
        file.truncate(8 << 40)

    def problems() -> tuple[str, ...]:
        image = plan(tmp_path / "m")
        return DockerImages().preview(image, ImageName.parse("engine-room:v1"), config=Config()).problems

    assert "not enough room" in "".join(problems())
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Relay) as server:
        server.engine = engine  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{server.server_address[1]}")
        try:
            assert problems() == ()
        finally:
            server.shutdown()


def test_the_engine_is_the_default_target(model: Path) -> None:
    outcome = weightctl("bake", model, "--tag", "engine-default:v1")
    assert outcome.code == 0, outcome.stderr
    assert "baking to docker" in outcome.stderr
    assert outcome.stdout.strip() == inspect("engine-default:v1")["Id"]


def test_a_template_is_built_below_the_weights(model: Path, tmp_path: Path) -> None:
    import_base("engine-base:template")
    template = tmp_path / "Dockerfile.template"
    template.write_text('FROM engine-base:template\nLABEL model="{{ name }}" path="{{ path }}"\nENV APP=1\n')
    outcome = weightctl("bake", model, "--tag", "engine-app:v1", "--to", "docker", "--template", template)
    assert outcome.code == 0, outcome.stderr
    image = inspect("engine-app:v1")
    assert image["Config"]["Labels"] == {"model": "m", "path": "/models/m"}
    assert "APP=1" in image["Config"]["Env"]
    weights = image["RootFS"]["Layers"][-3:]
    template.write_text("FROM engine-base:template\nENV APP=2\n")
    layout = tmp_path / "layout"
    again = weightctl("bake", model, "--tag", "app:v2", "--to", f"layout:{layout}", "--template", template)
    assert again.code == 0, again.stderr
    assert read_layout(layout, "v2").config["rootfs"]["diff_ids"][-3:] == weights


def test_a_template_without_a_layer(model: Path, tmp_path: Path) -> None:
    template = tmp_path / "Dockerfile.template"
    template.write_text('FROM scratch\nLABEL model="{{ name }}"\n')
    layout = tmp_path / "layout"
    outcome = weightctl("bake", model, "--tag", "m:v1", "--to", f"layout:{layout}", "--template", template)
    assert outcome.code == 0, outcome.stderr
    image = read_layout(layout, "v1")
    assert image.config["config"]["Labels"] == {"model": "m"}
    assert len(image.layers) == 3


def test_a_full_engine_is_to_be_cleared() -> None:
    assert refusal("write /layer.tar: no space left on device").hint != refusal("no such image").hint
    assert "docker system prune" in str(refusal("write /layer.tar: no space left on device").hint)


def test_what_an_engine_cannot_save_is_its_own_fault(model: Path, tmp_path: Path) -> None:
    built = DockerImages().build("FROM scratch\nLABEL a=b\n", None, Progress())
    with connect() as engine, pytest.raises(WeightctlError, match="the Docker engine refuses: empty export"):
        saved_image(engine, inspect(built), built, tmp_path)


@pytest.mark.parametrize(
    ("packed", "media_type"), [(bytes, LAYER), (gzip.compress, LAYER_GZIP), (zstandard.compress, LAYER_ZSTD)]
)
def test_a_saved_layer_is_called_what_it_is(tmp_path: Path, packed: Callable[[bytes], bytes], media_type: str) -> None:
    """Engines save layers as they keep them: unpacked, or as they were pulled."""
    content = packed(bytes(10_000))
    (tmp_path / "layer").write_bytes(content)
    layer, _ = _saved_layer(tmp_path / "layer", "sha256:0")
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert (layer.blob, layer.diff_id) == (Descriptor(media_type, digest, len(content)), "sha256:0")


def test_another_image_under_the_name_is_noticed(model: Path, tmp_path: Path) -> None:
    bake(plan(models.write_model(tmp_path / "other", seed=3)), "engine-other:v1")

    class Taken(Task):
        def close(self) -> None:
            tool("docker", "tag", "engine-other:v1", "engine-taken:v1")

    class Rival(Progress):
        def task(self, description: str, total: int) -> Task:
            return Taken()

    with pytest.raises(IntegrityError, match="the engine holds other layers under engine-taken:v1 than were sent"):
        DockerImages().bake(plan(model), ImageName.parse("engine-taken:v1"), config=Config(), progress=Rival())


def test_a_template_that_does_not_build(model: Path, tmp_path: Path) -> None:
    template = tmp_path / "Dockerfile.template"
    template.write_text("FROM scratch\nNONSENSE\n")
    outcome = weightctl("bake", model, "--tag", "m:v1", "--to", "docker", "--template", template)
    assert outcome.code == 1
    assert "NONSENSE" in outcome.stderr
    both = weightctl("bake", model, "--tag", "m:v1", "--template", template, "--base", "x")
    assert both.code == 2
    assert "leave out --base" in both.stderr


def test_an_engine_image_below_a_layout(model: Path, tmp_path: Path) -> None:
    import_base("engine-base:layout")
    layout = tmp_path / "layout"
    outcome = weightctl(
        "bake", model, "--tag", "m:v1", "--to", f"layout:{layout}", "--base", "docker:engine-base:layout"
    )
    assert outcome.code == 0, outcome.stderr
    image = read_layout(layout, "v1")
    assert image.files["/bin/busybox"] == Path("/bin/busybox").read_bytes()
    assert image.config["config"]["Entrypoint"] == ["/bin/busybox"]
    assert weightctl("verify", layout, "--against", model).code == 0


def test_a_layer_that_the_engine_image_has_twice(model: Path, tmp_path: Path) -> None:
    below = LayoutImages(str(tmp_path / "below"))
    app = models.write_model(tmp_path / "app", seed=secrets.randbits(60))
    below.bake(plan(app, "/app"), ImageName.parse("below:v1"), config=Config(), progress=Progress())
    once = below.open_base("v1", None)
    twice = replace(once, layers=once.layers * 2, config={**once.config, "history": []})
    bake(plan(model, base=twice), "engine-twice:v1")
    with ExitStack() as scratch:
        base = open_base("docker:engine-twice:v1", None, "layout", scratch, config=Config())
        above = LayoutImages(str(tmp_path / "above"))
        name = ImageName.parse("above:v1")
        above.bake(plan(model, "/again", base=base), name, config=Config(), progress=Progress())
    files = read_layout(tmp_path / "above", "v1").files
    assert files == {**files_of(app, "/app"), **files_of(model), **files_of(model, "/again")}


def test_no_engine(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for host, why in {"foo://bar": "Invalid bind address", "unix:///nowhere/docker.sock": "No such file"}.items():
        monkeypatch.setenv("DOCKER_HOST", host)
        with pytest.raises(WeightctlError, match=f"no Docker engine answers at {host}: {why}"):
            bake(plan(model), "m:v1")
    outcome = weightctl("bake", model, "--tag", "org/m:v1", cwd=tmp_path)
    assert outcome.code == 0
    assert "baking to layout:./m.oci, since no Docker engine answers" in outcome.stderr
    with pytest.raises(UsageError):
        DockerImages("somewhere")


def test_an_unknown_base(model: Path) -> None:
    outcome = weightctl("bake", model, "--tag", "m:v1", "--to", "docker", "--base", "docker:no-such-image:v1")
    assert outcome.code == 2
    assert "the engine has no image" in outcome.stderr


def test_120_layers_at_most_and_docker_takes_them(tmp_path: Path) -> None:
    directory = tmp_path / "m"
    for number in range(130):
        models.write_safetensors(directory / f"model-{number:05}.safetensors", (1 << 20) + number, number + 5000)
    image = plan(directory)
    assert len(image.layers) == 120
    assert image == plan(directory)
    assert len(inspect_layers(bake(image, "engine-many:v1"))) == 120


def inspect_layers(baked: Baked) -> list[str]:
    return list(inspect(baked.digest)["RootFS"]["Layers"])


def test_what_looks_like_a_credential_is_refused(model: Path) -> None:
    (model / ".netrc").write_text("machine x login y password z")
    outcome = weightctl("bake", model, "--tag", "m:v1", "--to", "docker")
    assert outcome.code == 2
    assert ".netrc looks like a credential" in outcome.stderr
    assert weightctl("bake", model, "--tag", "m:v1", "--to", "docker", "--exclude", ".netrc").code == 0
