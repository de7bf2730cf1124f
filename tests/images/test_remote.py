"""Images in a registry, judged by docker-registry, skopeo and podman."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests import models
from tests.chaos_proxy import ChaosProxy
from tests.command import weightctl
from tests.images.conformance import Image, ImagesConformance, files_of, plan, read_layout
from tests.services import docker_registry, podman_mount, tool
from weightctl.config import Config
from weightctl.errors import IntegrityError, UsageError
from weightctl.images import Images, RemoteImages
from weightctl.images.layers import LayerPlan
from weightctl.images.oci import DIGEST, INDEX, ImageName
from weightctl.images.plan import check_platform, plan_image
from weightctl.images.registry_client import RegistryClient
from weightctl.model import File
from weightctl.progress import Progress
from weightctl.sources.directory import read_directory

CONFIG = Config(workers=2)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry")


@pytest.fixture(scope="module")
def registry(storage: Path) -> Iterator[str]:
    with docker_registry(storage) as host:
        yield host


@pytest.fixture
def proxy(registry: str) -> Iterator[ChaosProxy]:
    with ChaosProxy(registry) as running:
        yield running


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of bytes that no other test has."""
    return models.write_model(tmp_path / "model", seed=secrets.randbits(60))


def bake(model: Path, name: str, **options: Any) -> Any:
    return RemoteImages("").bake(plan(model, **options), ImageName.parse(name), config=CONFIG, progress=Progress())


def check(name: str, against: Path | None = None) -> tuple[str, ...]:
    hashed = None
    if against:
        snapshot = read_directory(against)
        digests = {file.path: hashlib.sha256(file.source.read_bytes()).hexdigest() for file in snapshot.files}
        hashed = snapshot.replace_files(
            [File(file.path, file.size, file.source, digests[file.path]) for file in snapshot.files]
        )
    return RemoteImages(name).check(hashed, config=CONFIG, progress=Progress()).problems


def copied(name: str, destination: Path) -> Image:
    """The image as skopeo copies it out."""
    tool(
        "skopeo", "copy", "--preserve-digests", "--src-tls-verify=false", f"docker://{name}", f"oci:{destination}:copy"
    )
    return read_layout(destination, "copy")


class TestRemoteImages(ImagesConformance):
    backend = "registry"
    no_location = "name@digest"

    @pytest.fixture
    def place(self, registry: str) -> str:
        return f"{registry}/c{secrets.token_hex(8)}"

    def location(self, place: str) -> str:
        return ""

    def name(self, place: str, tag: str) -> str:
        return f"{place}/conform:{tag}"

    def to_check(self, place: str) -> Images:
        return RemoteImages(self.name(place, "v1"))

    def read(self, place: str, name: ImageName, scratch: Path) -> Image:
        return copied(str(name), scratch)


def test_podman_pulls_the_model(registry: str, model: Path) -> None:
    bake(model, f"{registry}/podman:v1")
    with podman_mount(f"docker://{registry}/podman:v1", "--tls-verify=false") as root:
        there = {path.relative_to(root / "models/m").as_posix(): path for path in (root / "models/m").rglob("*")}
        pulled = {name: hashlib.sha256(path.read_bytes()) for name, path in there.items() if path.is_file()}
        expected = {name: hashlib.sha256(data) for name, data in models.contents(model).items()}
        assert {n: h.hexdigest() for n, h in pulled.items()} == {n: h.hexdigest() for n, h in expected.items()}


def test_the_command_prints_the_digest_and_nothing_else(registry: str, model: Path, tmp_path: Path) -> None:
    done = weightctl("bake", model, "--to", "registry", "--tag", f"{registry}/command:v1", "--path", "/models/m")
    assert done.code == 0, done.stderr
    assert DIGEST.fullmatch(done.stdout.strip())
    image = copied(f"{registry}/command:v1", tmp_path / "copy")
    assert image.digest == done.stdout.strip()
    assert image.files == files_of(model)
    for target in (f"{registry}/command:v1", f"registry:{registry}/command:v1@{image.digest}"):
        verified = weightctl("verify", target, "--against", model)
        assert verified.code == 0, verified.stderr


@pytest.mark.parametrize(
    ("repository", "cap"),
    [
        ("ghcr.io/o/m", 10 * 10**9), ("public.ecr.aws/o/m", 10_000 << 20),
        ("123456789012.dkr.ecr.eu-west-1.amazonaws.com/m", 52_000 << 20),
    ],
)  # fmt: skip
def test_a_layer_that_the_registry_does_not_take_is_refused_first(repository: str, cap: int, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with (tmp_path / "m" / "model.safetensors").open("wb") as stream:
        stream.truncate(cap + 1)
    done = weightctl("bake", tmp_path / "m", "--to", "registry", "--tag", f"{repository}:v1")
    assert done.code == 1
    for words in (
        "model.safetensors makes a layer of",
        f"takes {cap} at most",
        "smaller shards",
        "nothing was written",
    ):
        assert words in done.stderr


def test_what_is_there_is_not_sent(proxy: ChaosProxy, model: Path) -> None:
    bake(model, f"{proxy.host}/there:v1")
    proxy.body_bytes.clear()
    again = bake(model, f"{proxy.host}/there:v2")
    assert all(layer.reused for layer in again.layers)
    assert sum(proxy.body_bytes.values()) == again.written_bytes < 4096


def test_one_changed_shard_is_all_that_is_sent(proxy: ChaosProxy, model: Path) -> None:
    bake(model, f"{proxy.host}/changed:v1")
    models.flip_bit(model / "model-00002-of-00002.safetensors")
    proxy.body_bytes.clear()
    again = bake(model, f"{proxy.host}/changed:v2")
    changed = next(layer for layer in again.layers if not layer.reused)
    assert changed.files == ("model-00002-of-00002.safetensors",)
    assert changed.size < sum(proxy.body_bytes.values()) < changed.size + 4096


def test_a_blob_of_another_repository_is_mounted(proxy: ChaosProxy, model: Path, tmp_path: Path) -> None:
    bake(model, f"{proxy.host}/first/home:v1")
    proxy.body_bytes.clear()
    again = bake(model, f"{proxy.host}/second/home:v1")
    assert all(layer.reused for layer in again.layers)
    assert sum(proxy.body_bytes.values()) < 4096
    assert copied(f"{proxy.registry}/second/home:v1", tmp_path / "copy").files == files_of(model)


def test_what_may_not_be_mounted_is_sent(proxy: ChaosProxy, model: Path, tmp_path: Path) -> None:
    bake(model, f"{proxy.host}/not/to/be/read:v1")
    proxy.fault("POST", "mount=", times=-1, status=403)
    again = bake(model, f"{proxy.host}/a/reader:v1")
    assert again.written_bytes > plan(model).size
    assert copied(f"{proxy.registry}/a/reader:v1", tmp_path / "copy").files == files_of(model)


def test_a_base_is_mounted_and_keeps_its_digests(proxy: ChaosProxy, model: Path, tmp_path: Path) -> None:
    below = models.write_model(tmp_path / "below", seed=secrets.randbits(60))
    baked = bake(below, f"{proxy.host}/base:v1", directory="/app")
    base = RemoteImages(f"{proxy.host}/base:v1").open_base(None, config=CONFIG)
    proxy.body_bytes.clear()
    image = plan_image(read_directory(model), "/models/m", "linux/amd64", None, base)
    done = RemoteImages("").bake(image, ImageName.parse(f"{proxy.host}/on/base:v1"), config=CONFIG, progress=Progress())
    assert sum(proxy.body_bytes.values()) == done.written_bytes
    assert done.written_bytes < image.size + 8192
    read = copied(f"{proxy.registry}/on/base:v1", tmp_path / "copy")
    assert [layer["digest"] for layer in read.manifest["layers"][:3]] == [layer.digest for layer in baked.layers]
    assert read.files == {**{f"/app/{p}": data for p, data in models.contents(below).items()}, **files_of(model)}


def test_a_base_of_another_registry_is_copied(registry: str, model: Path, tmp_path: Path) -> None:
    below = models.write_model(tmp_path / "below", seed=secrets.randbits(60))
    (tmp_path / "other").mkdir()
    with docker_registry(tmp_path / "other") as other:
        bake(below, f"{other}/base:v1", directory="/app")
        base = RemoteImages(f"{other}/base:v1").open_base("linux/amd64", config=CONFIG)
        image = plan_image(read_directory(model), "/models/m", "linux/amd64", None, base)
        RemoteImages("").bake(image, ImageName.parse(f"{registry}/copied:v1"), config=CONFIG, progress=Progress())
    read = copied(f"{registry}/copied:v1", tmp_path / "copy")
    assert read.files == {**{f"/app/{p}": data for p, data in models.contents(below).items()}, **files_of(model)}


def test_the_command_takes_a_base_from_the_registry(registry: str, model: Path, tmp_path: Path) -> None:
    below = models.write_model(tmp_path / "below", seed=secrets.randbits(60))
    bake(below, f"{registry}/from:v1", directory="/app")
    name = f"{registry}/onto:v1"
    done = weightctl("bake", model, "--to", "registry", "--base", f"{registry}/from:v1", "--tag", name, "--json")
    assert done.code == 0, done.stderr
    assert len(copied(name, tmp_path / "copy").manifest["layers"]) == 6


def push_index(registry: str, repository: str, entries: list[dict[str, Any]]) -> str:
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}
    url = f"http://{registry}/v2/{repository}/manifests/multi"
    requests.put(url, data=json.dumps(index), headers={"Content-Type": INDEX}, timeout=300).raise_for_status()
    return f"{registry}/{repository}:multi"


def multi_platform(registry: str, model: Path, repository: str) -> tuple[str, dict[str, str]]:
    """An index of two platforms and an attestation, and the digest of each."""
    entries, digests = [], {}
    attestation = models.write_model(model.parent / "attestation", seed=secrets.randbits(60))
    for platform, content in {"linux/amd64": model, "linux/arm64": model, "unknown/unknown": attestation}.items():
        image = plan_image(read_directory(content), "/models/m", check_platform(platform), None)
        name = ImageName.parse(f"{registry}/{repository}:{platform.replace('/', '-')}")
        digests[platform] = RemoteImages("").bake(image, name, config=CONFIG, progress=Progress()).digest
        found = RegistryClient(name, actions="pull").manifest(name.tag)
        assert found is not None
        os_name, architecture = platform.split("/")
        entries.append({**found[0].to_json(), "platform": {"os": os_name, "architecture": architecture}})
    return push_index(registry, repository, entries), digests


def test_an_index_needs_a_platform_and_lists_them(registry: str, model: Path) -> None:
    name, _ = multi_platform(registry, model, "several")
    with pytest.raises(UsageError) as caught:
        RemoteImages(name).open_base(None, config=CONFIG)
    assert "linux/amd64, linux/arm64" in f"{caught.value} {caught.value.hint}"
    base = RemoteImages(name).open_base("linux/arm64", config=CONFIG)
    assert base.config["architecture"] == "arm64"
    with pytest.raises(UsageError, match="linux/s390x"):
        RemoteImages(name).open_base("linux/s390x", config=CONFIG)
    assert check(name, model) == ()


def test_a_digest_names_a_base_too(registry: str, model: Path) -> None:
    digest = bake(model, f"{registry}/pinned:v1").digest
    assert len(RemoteImages(f"{registry}/pinned@{digest}").open_base(None, config=CONFIG).layers) == 3
    with pytest.raises(UsageError, match="not a digest"):
        RemoteImages(f"{registry}/pinned@sha256:12")


@pytest.mark.parametrize("what", ["nothing:v1", "pinned:missing"])
def test_an_image_that_is_not_there(registry: str, what: str) -> None:
    with pytest.raises(UsageError, match="there is no image"):
        RemoteImages(f"{registry}/{what}").open_base(None, config=CONFIG)


# verify


def blob_of(storage: Path, digest: str) -> Path:
    return storage / "storage/docker/registry/v2/blobs/sha256" / digest[7:9] / digest[7:] / "data"


def test_a_flipped_bit_in_the_registry_is_found(registry: str, storage: Path, model: Path) -> None:
    baked = bake(model, f"{registry}/flipped:v1")
    models.flip_bit(blob_of(storage, baked.layers[0].digest))
    (problem,) = check(f"{registry}/flipped:v1")
    assert baked.layers[0].digest in problem
    done = weightctl("verify", f"{registry}/flipped:v1")
    assert done.code == 3
    assert baked.layers[0].digest in done.stderr


def test_a_cut_and_a_missing_blob_are_found(registry: str, storage: Path, model: Path) -> None:
    baked = bake(model, f"{registry}/cut:v1")
    os.truncate(blob_of(storage, baked.layers[0].digest), 1000)
    blob_of(storage, baked.layers[1].digest).unlink()
    problems = check(f"{registry}/cut:v1")
    assert len(problems) == 2
    assert all(baked.layers[number].digest in problem for number, problem in enumerate(problems))


def test_a_base_that_is_cut_is_said_to_be(registry: str, storage: Path, model: Path) -> None:
    bake(model, f"{registry}/cut/base:v1")
    base = RemoteImages(f"{registry}/cut/base:v1").open_base(None, config=CONFIG)
    os.truncate(blob_of(storage, base.layers[0].blob.digest), 1000)
    with base.open(base.layers[0].blob) as source, pytest.raises(IntegrityError, match="has 1000 bytes instead of"):
        source.read()


def test_what_the_model_has_and_the_image_has_not(registry: str, model: Path) -> None:
    bake(model, f"{registry}/differs:v1")
    models.flip_bit(model / "model-00001-of-00002.safetensors")
    (model / "config.json").rename(model / "renamed.json")
    assert set(check(f"{registry}/differs:v1", model)) == {
        "model-00001-of-00002.safetensors is another file than the model's in the image",
        "renamed.json is missing from the image",
        "/models/m/config.json is in the image but not in the model",
    }


def test_layers_that_another_tool_compressed(registry: str, model: Path) -> None:
    bake(model, f"{registry}/plain:v1")
    layout = model.parent / "layout"
    tool("skopeo", "copy", "--src-tls-verify=false", f"docker://{registry}/plain:v1", f"oci:{layout}:v1")
    push_layout(layout, registry, "packed")
    found = RemoteImages(f"{registry}/packed:v1").open_base(None, config=CONFIG)
    assert all("gzip" in layer.blob.media_type for layer in found.layers)
    assert check(f"{registry}/packed:v1", model) == ()
    bake(model, f"{registry}/on/packed:v1")


def push_layout(layout: Path, registry: str, repository: str) -> None:
    """Push as the specification says it. (skopeo would find the layers that it compressed itself, uncompressed.)"""
    url = f"http://{registry}/v2/{repository}"
    (entry,) = json.loads((layout / "index.json").read_text())["manifests"]
    manifest = (layout / "blobs" / entry["digest"].replace(":", "/")).read_bytes()
    for blob in (json.loads(manifest)["config"], *json.loads(manifest)["layers"]):
        upload = requests.post(f"{url}/blobs/uploads/", timeout=300).headers["Location"]
        data = (layout / "blobs" / blob["digest"].replace(":", "/")).read_bytes()
        requests.put(f"{upload}&digest={blob['digest']}", data=data, timeout=300).raise_for_status()
    headers = {"Content-Type": entry["mediaType"]}
    requests.put(f"{url}/manifests/v1", data=manifest, headers=headers, timeout=300).raise_for_status()


# a registry that lies


def test_a_manifest_of_other_bytes_is_refused(proxy: ChaosProxy, model: Path) -> None:
    bake(model, f"{proxy.host}/lies:v1")
    proxy.fault("GET", "manifests/v1", times=-1, reply_body=lambda content: content + b" ")
    with pytest.raises(IntegrityError, match="other bytes"):
        RemoteImages(f"{proxy.host}/lies:v1").open_base(None, config=CONFIG)


def test_a_manifest_without_end_is_refused(proxy: ChaosProxy, model: Path) -> None:
    bake(model, f"{proxy.host}/endless:v1")
    proxy.fault("GET", "manifests/v1", times=-1, reply_body=lambda content: bytes(5 << 20))
    with pytest.raises(IntegrityError, match="more than 4194304 bytes"):
        RemoteImages(f"{proxy.host}/endless:v1").open_base(None, config=CONFIG)


@pytest.mark.parametrize("change", [lambda content: content + b" ", lambda content: content[:-1] + b" "])
def test_a_config_of_other_bytes_is_refused(proxy: ChaosProxy, model: Path, change: Any) -> None:
    bake(model, f"{proxy.host}/config:v1")
    proxy.fault("GET", "blobs/", times=-1, reply_body=change)
    with pytest.raises(IntegrityError, match="config"):
        RemoteImages(f"{proxy.host}/config:v1").open_base(None, config=CONFIG)


HOSTILE = [
    b"[]", b"{}", b"null", b"{", b"\xff", b'{"schemaVersion":2,"config":{},"layers":[]}', b"[" * 100_000,
    b'{"config":{"mediaType":"x","digest":"sha256:../../etc/passwd","size":1},"layers":[]}',
    b'{"config":{"mediaType":"x","digest":"sha256:%s","size":-1},"layers":[]}' % (b"0" * 64),
    b'{"config":{"mediaType":"x","digest":"sha256:%s","size":1e400},"layers":[]}' % (b"0" * 64),
    b'{"config":{"mediaType":"x","digest":"sha256:%s","size":99999999999},"layers":[]}' % (b"0" * 64),
    b'{"manifests":[]}', b'{"manifests":[3]}', b'{"manifests":{"a":1}}', b'{"manifests":[{"platform":3}]}',
    b'{"manifests":[{"mediaType":"x","digest":"sha256:%s","size":3}]}' % (b"0" * 64),
]  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE)
def test_a_hostile_manifest_is_an_error_of_ours(proxy: ChaosProxy, content: bytes) -> None:
    headers = {"Content-Type": INDEX}
    proxy.fault("GET", "manifests/v1", times=-1, status=200, body=content, headers=headers)
    for command in (
        lambda image: image.open_base(None, config=CONFIG),
        lambda image: image.open_base("linux/amd64", config=CONFIG),
        lambda image: image.check(config=CONFIG, progress=Progress()),
    ):
        try:
            found = command(RemoteImages(f"{proxy.host}/hostile:v1"))
        except (IntegrityError, UsageError):
            continue
        assert found.problems or content == b'{"manifests":[]}'


def test_a_registry_that_keeps_another_manifest_is_caught(proxy: ChaosProxy, model: Path) -> None:
    proxy.fault("GET", "manifests/sha256", times=-1, reply_body=lambda content: content + b"\n")
    with pytest.raises(IntegrityError, match="other bytes"):
        bake(model, f"{proxy.host}/keeps:v1")


def test_a_registry_that_keeps_no_manifest_is_caught(proxy: ChaosProxy, model: Path) -> None:
    proxy.fault("GET", "manifests/sha256", times=-1, status=404)
    with pytest.raises(IntegrityError, match="did not keep the manifest sha256") as caught:
        bake(model, f"{proxy.host}/keeps/nothing:v1")
    assert caught.value.hint


# before any byte moves


def preview(name: str, size: int) -> Any:
    image = plan_image(read_directory(Path(__file__).parent), "/models/m", "linux/amd64", None)
    shard = File("big.safetensors", size, Path("/nonexistent"))
    return RemoteImages("").preview(
        type(image)((LayerPlan("/models/m", (shard,)),), "/models/m", "linux/amd64", {}),
        ImageName.parse(name), config=CONFIG,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("registry_name", "limit"),
    [
        ("ghcr.io", 10 * 10**9),
        ("123456789012.dkr.ecr.eu-west-1.amazonaws.com", 52_000 << 20),
        ("public.ecr.aws", 10_000 << 20),
    ],
)
def test_a_layer_that_the_registry_will_not_take(registry_name: str, limit: int) -> None:
    assert preview(f"{registry_name}/org/model:v1", limit - 20_000).problems == ()
    (problem,) = preview(f"{registry_name}/org/model:v1", limit).problems
    assert "big.safetensors" in problem
    assert str(limit) in problem


def test_a_dry_run_says_what_is_there(registry: str, model: Path, proxy: ChaosProxy) -> None:
    models.settle(model)
    name = f"{proxy.host}/dry:v1"
    command = ("bake", model, "--to", "registry", "--tag", name, "--json")
    before = weightctl(*command, "--dry-run")
    assert not any(layer["exists"] for layer in before.result["layers"])
    assert not proxy.requests("POST")
    assert weightctl(*command).code == 0
    after = weightctl(*command, "--dry-run")
    assert [layer["exists"] for layer in after.result["layers"]] == [True, True, False]
    assert after.result["write_bytes"] < 100_000
