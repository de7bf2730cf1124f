"""Uploads through everything that can happen on the way: judged by what the registry then has, and by bytes sent."""

from __future__ import annotations

import io
import re
import secrets
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.chaos_proxy import ChaosProxy
from tests.command import interrupt, start, weightctl
from tests.images.conformance import files_of, plan
from tests.images.test_remote import bake, check, copied
from tests.services import docker_registry
from weightctl import storage
from weightctl.config import Config
from weightctl.errors import IntegrityError, WeightctlError
from weightctl.images import RemoteImages, registry_client, transport
from weightctl.images.layers import known_layer, open_layer
from weightctl.images.oci import Descriptor, ImageName
from weightctl.images.registry_client import RegistryClient
from weightctl.images.transport import Transport
from weightctl.images.uploads import Memory, Upload
from weightctl.progress import Progress, Task

MIB = 1 << 20
SHARD = 5 * MIB


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as host:
        yield host


@pytest.fixture
def proxy(registry: str) -> Iterator[ChaosProxy]:
    with ChaosProxy(registry) as running:
        yield running


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return models.write_model(tmp_path / "model", size=SHARD, seed=secrets.randbits(60))


@pytest.fixture
def name(proxy: ChaosProxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """An image's name behind the proxy; blobs go in chunks of 1 MiB."""
    monkeypatch.setattr(registry_client, "CHUNK_BYTES", MIB)
    return f"{proxy.host}/r{secrets.token_hex(8)}:v1"


def assert_arrived(name: str, model: Path, proxy: ChaosProxy) -> None:
    """The registry has the whole image, byte for byte."""
    plain = name.replace(proxy.host, proxy.registry)
    assert check(plain, model) == ()
    assert copied(plain, model.parent / "copy").files == files_of(model)


CHUNKS = 2 * (SHARD // MIB)

SURVIVED: dict[str, list[dict[str, Any]]] = {
    "a failing registry": [{"method": "PATCH", "path": "", "status": 503, "skip": 2, "times": 2}],
    "failures everywhere": [
        {"method": method, "path": "", "status": 502} for method in ("GET", "HEAD", "POST", "PATCH", "PUT")
    ],
    "an error page without end": [{"method": "PATCH", "path": "", "status": 502, "body": bytes(5 * MIB)}],
    "a limit": [{"method": "POST", "path": "", "status": 429, "headers": {"Retry-After": "1"}}],
    "a cut in the middle of a chunk": [{"method": "PATCH", "path": "", "skip": 3, "cut_after": 300_000}],
    "a cut in every third chunk": [
        {"method": "PATCH", "path": "", "skip": 3 * turn, "cut_after": 300_000} for turn in range(3)
    ],
    "a chunk that arrives without an answer": [{"method": "PATCH", "path": "", "skip": 3, "drop_reply": True}],
    "a blob that is complete without an answer": [{"method": "PUT", "path": "uploads", "drop_reply": True}],
    "a manifest that arrives without an answer": [{"method": "PUT", "path": "manifests", "drop_reply": True}],
    "a blob that another push is just ending": [
        {
            "method": "PUT",
            "path": "manifests",
            "status": 400,
            "body": b'{"errors":[{"code":"DIGEST_INVALID"},{"code":"MANIFEST_BLOB_UNKNOWN"}]}',
        }
    ],
    "a forgotten upload": [
        {
            "method": "PATCH",
            "path": "",
            "skip": 3,
            "status": 404,
            "body": b'{"errors":[{"code":"BLOB_UPLOAD_UNKNOWN"}]}',
        }
    ],
    "a flipped bit on the way": [{"method": "PATCH", "path": "", "skip": 3, "flip": True}],
    "chunks that are always joined wrongly": [{"method": "PATCH", "path": "", "flip": True, "times": -1}],
    "a flipped bit in what is sent whole": [{"method": "PUT", "path": "uploads", "least": 4096, "flip": True}],
    "no chunks, 416": [{"method": "PATCH", "path": "", "status": 416, "times": -1}],
    "no chunks, 405": [{"method": "PATCH", "path": "", "status": 405, "times": -1}],
    "no chunks but the first": [{"method": "PATCH", "path": "", "skip": 1, "status": 400, "times": -1}],
    "a registry that has moved": [
        {"method": "POST", "path": "", "status": 307, "headers": {"Location": "?moved=1"}, "times": 2},
        {"method": "PUT", "path": "manifests", "status": 308, "headers": {"Location": "?moved=1"}},
    ],
    "a range that is stuck": [
        {"method": "PATCH", "path": "", "times": -1, "reply_headers": {"Range": f"0-{MIB - 1}"}},
    ],
    "a relative location": [
        {"method": method, "path": "", "times": -1, "relative": True} for method in ("POST", "PATCH")
    ],
}


@pytest.mark.parametrize("faults", SURVIVED.values(), ids=SURVIVED.keys())
def test_survived(faults: list[dict[str, Any]], proxy: ChaosProxy, name: str, model: Path) -> None:
    for fault in faults:
        proxy.fault(**fault)
    bake(model, name)
    assert not [fault for fault in proxy.faults if fault.times > 0], "the fault was not met"
    assert all("Content-Length" in seen.headers for seen in proxy.seen if seen.method in ("PATCH", "POST", "PUT"))
    assert_arrived(name, model, proxy)


def test_a_cut_costs_the_one_blob_again(proxy: ChaosProxy, name: str, model: Path) -> None:
    proxy.fault("PATCH", "", skip=CHUNKS - 3, cut_after=300_000)
    bake(model, name)
    sent = proxy.body_bytes["PATCH"]
    assert 2 * SHARD < sent < 3 * SHARD + 2 * MIB
    assert_arrived(name, model, proxy)


def test_a_chunk_that_is_not_taken_is_all_that_is_sent_again(proxy: ChaosProxy, name: str, model: Path) -> None:
    proxy.fault("PATCH", "", status=503)
    bake(model, name)
    assert sum(proxy.body_bytes.values()) < plan(model).size + MIB + 10_000
    assert_arrived(name, model, proxy)


def test_what_goes_well_in_between_gives_new_patience(
    proxy: ChaosProxy, name: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "TRIES", 2)
    for turn in range(3):
        proxy.fault("PATCH", "", status=503, skip=2 * turn + 1)
    RemoteImages("").bake(plan(model), ImageName.parse(name), config=Config(workers=1), progress=Progress())
    assert not [fault for fault in proxy.faults if fault.times]
    assert_arrived(name, model, proxy)


def test_smaller_chunks_where_the_registry_wants_them(
    proxy: ChaosProxy, name: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_client, "CHUNK_BYTES", 64 * MIB)
    for method in ("PATCH", "PUT"):
        proxy.fault(method, "", status=413, least=MIB + 1, times=-1)
    bake(model, name)
    assert len(proxy.requests("PATCH")) >= CHUNKS
    assert_arrived(name, model, proxy)


def test_larger_chunks_where_the_registry_wants_them(proxy: ChaosProxy, name: str, model: Path) -> None:
    proxy.fault("POST", "", times=-1, reply_headers={"OCI-Chunk-Min-Length": str(3 * MIB)})
    bake(model, name)
    assert max(seen.length for seen in proxy.requests("PATCH")) == 3 * MIB
    assert_arrived(name, model, proxy)


def test_a_registry_that_takes_neither_chunks_nor_the_whole(proxy: ChaosProxy, name: str, model: Path) -> None:
    proxy.fault("PATCH", "", status=416, times=-1)
    proxy.fault("PUT", "", status=413, times=-1)
    with pytest.raises(WeightctlError, match="413") as caught:
        bake(model, name)
    assert "have that limit raised" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("host", "chunked"),
    [
        ("ghcr.io", False), ("gcr.io", False), ("us.gcr.io", False), ("asia.gcr.io", False),
        ("us-docker.pkg.dev", False), ("europe-west1-docker.pkg.dev", False),
        ("quay.io", True), ("docker.io", True), ("org.azurecr.io", True), ("registry.gitlab.com", True),
        ("123456789012.dkr.ecr.eu-west-1.amazonaws.com", True), ("ghcr.io.example.com", True), ("notghcr.io", True),
        ("docker.pkg.dev.example.com", True), ("localhost:5000", True),
    ],
)  # fmt: skip
def test_who_is_sent_chunks(host: str, chunked: bool) -> None:
    assert registry_client.takes_chunks(host) is chunked


def test_a_registry_that_is_known_to_take_no_chunks(
    proxy: ChaosProxy, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_client, "CHUNK_BYTES", MIB)
    monkeypatch.setenv("http_proxy", f"http://{proxy.host}")  # so that the proxy hears what is said to any host
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    image = plan(model)
    config = Config(workers=2, plain_http=True)
    RemoteImages("").bake(image, ImageName.parse("ghcr.io/org/whole:v1"), config=config, progress=Progress())
    assert not proxy.requests("PATCH")
    sent = [seen.length for seen in proxy.requests("PUT", "uploads")]
    assert sorted(sent)[-2:] == sorted(layer.size for layer in image.layers)[-2:]
    assert_arrived(f"{proxy.host}/org/whole:v1", model, proxy)


def test_a_registry_that_forgets_what_it_finds_too_much_is_an_error(
    proxy: ChaosProxy, name: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "TRIES", 3)
    proxy.fault("POST", "", times=-1, reply_headers={"OCI-Chunk-Min-Length": str(4 * MIB)})
    proxy.fault("PATCH", "", times=-1, status=413)
    proxy.fault("GET", "uploads", times=-1, status=404)
    with pytest.raises(WeightctlError, match="413"):
        bake(model, name)


@pytest.mark.parametrize("url", ["{", "file:///etc/passwd", "http://127.0.0.1:1/gone"])
def test_an_upload_that_cannot_be_gone_on_with_begins_anew(
    proxy: ChaosProxy, name: str, model: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "TRIES", 2)
    blob = known_layer(plan(model).layers[0], Task()).blob
    repository = name.split("/")[1].split(":")[0]
    with Memory(proxy.host).upload(repository, blob.digest) as record:
        record.write(url)
    bake(model, name)
    assert_arrived(name, model, proxy)


class Waiting(io.BytesIO):
    """A file that is not read until something else is over."""

    def __init__(self, size: int) -> None:
        super().__init__(bytes(size))
        self.begun, self.over = threading.Event(), threading.Event()

    def readinto(self, buffer: Any) -> int:
        self.begun.set()
        assert self.over.wait(60)
        return super().readinto(buffer)


def test_a_whole_blob_that_is_no_longer_wanted_is_given_up(proxy: ChaosProxy, name: str) -> None:
    client = RegistryClient(ImageName.parse(name), actions="pull,push")
    client.chunked = False
    source = Waiting(8 * MIB)
    blob = Descriptor.of("", source.getvalue())

    def send() -> None:
        with Memory(proxy.host).upload(client.repository, blob.digest) as record:
            Upload(client, blob, lambda: source, record, Task()).run(None)

    def fail() -> None:
        assert source.begun.wait(60)
        raise WeightctlError("over")

    def notice() -> None:
        try:
            while True:
                storage.pause(0.01)
        finally:
            source.over.set()

    with pytest.raises(WeightctlError, match="over"):
        storage.in_parallel(lambda task: task(), [send, fail, notice], 3)
    assert proxy.body_bytes.get("PUT", 0) < blob.size


def test_bytes_that_never_arrive_right_are_an_error(proxy: ChaosProxy, name: str, model: Path) -> None:
    for method in ("PATCH", "PUT"):
        proxy.fault(method, "uploads", least=4096, flip=True, times=-1)
    with pytest.raises(IntegrityError, match="twice"):
        bake(model, name)
    assert not proxy.requests("PUT", "manifests")


def test_a_registry_that_always_fails_is_an_error(
    proxy: ChaosProxy, name: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "TRIES", 2)
    proxy.fault("PATCH", "", status=503, times=-1, body=b'{"errors":[{"code":"UNAVAILABLE","message":"disk"}]}')
    with pytest.raises(WeightctlError, match="fails: HTTP 503: UNAVAILABLE disk"):
        bake(model, name)
    assert not proxy.requests("PUT", "manifests")


def test_a_registry_that_is_gone_in_the_middle_is_an_error(
    proxy: ChaosProxy, name: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "TRIES", 2)
    proxy.fault("PATCH", "", times=-1, cut_after=1)
    with pytest.raises(WeightctlError, match="cannot reach") as caught:
        bake(model, name)
    assert caught.value.hint == "it answered before: try again later, what is done is kept"
    assert not proxy.requests("PUT", "manifests")


def test_a_repository_that_has_to_be_created_first(proxy: ChaosProxy, name: str, model: Path) -> None:
    proxy.fault("POST", "", status=404, body=b'{"errors":[{"code":"NAME_UNKNOWN"}]}', times=-1)
    with pytest.raises(WeightctlError, match="NAME_UNKNOWN") as caught:
        bake(model, name)
    assert caught.value.hint == "create the repository there first"


def test_a_limit_of_an_hour_is_not_waited_for(proxy: ChaosProxy, name: str, model: Path) -> None:
    proxy.fault("POST", "", status=429, headers={"Retry-After": "3600"}, times=-1)
    with pytest.raises(WeightctlError, match="429") as caught:
        bake(model, name)
    assert "later" in str(caught.value.hint)
    assert len(proxy.requests("POST")) <= 2, "once for each worker"


@pytest.mark.parametrize("host", ["127.0.0.1:1", "[::1]:1"])
def test_a_registry_that_is_not_there(host: str, model: Path) -> None:
    with pytest.raises(WeightctlError, match=re.escape(f"cannot reach {host}: ")):
        bake(model, f"{host}/a:v1")


@pytest.mark.parametrize("location", ["/up?load=1", "http://localhost:80/up?load=1", "https://LocalHost:443/up?load=1"])
def test_a_location_with_the_default_port_is_the_registry_itself(location: str) -> None:
    registry = Transport("localhost", "a", actions="pull", plain_http=False)
    assert registry.follow(f"{registry.origin}/v2/", location) == f"{registry.origin}/up?load=1"


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd", "ftp://127.0.0.1/x", "http://user:word@127.0.0.1/x", "http://192.0.2.1/x", "//[",
        "http://a:99999999/",
    ],
)  # fmt: skip
def test_a_location_where_no_registry_is(proxy: ChaosProxy, name: str, model: Path, location: str) -> None:
    proxy.fault("POST", "", times=-1, reply_headers={"Location": location})
    with pytest.raises(WeightctlError, match="where nothing of a registry can be"):
        bake(model, name)


@pytest.mark.parametrize(
    ("start", "problem"), [(1_000_000, ""), (2_000_000, "without the bytes that follow the first 1500000")]
)
def test_a_range_that_is_not_the_one_asked_for(
    proxy: ChaosProxy, name: str, model: Path, start: int, problem: str
) -> None:
    blob = bake(model, name).layers[0]
    with open_layer(plan(model).layers[0]) as layer:
        content = layer.read()[start:]
    headers = {"Content-Range": f"bytes {start}-{blob.size - 1}/{blob.size}"}
    proxy.fault("GET", blob.digest, cut_reply_after=1_500_000)
    proxy.fault("GET", blob.digest, status=206, headers=headers, body=content)
    assert [problem in found for found in check(name)] == ([True] if problem else [])


def test_an_answer_that_is_cut_is_asked_for_again(proxy: ChaosProxy, name: str, model: Path) -> None:
    digest = bake(model, name).digest
    proxy.fault("GET", "manifests", times=2, cut_reply_after=100)
    assert check(name, model) == ()
    assert bake(model, name).digest == digest


def test_reading_goes_on_where_the_connection_broke(proxy: ChaosProxy, name: str, model: Path) -> None:
    baked = bake(model, name)
    proxy.fault("GET", baked.layers[0].digest, times=3, cut_reply_after=1_500_000)
    assert check(name, model) == ()
    ranges = [seen.headers.get("Range") for seen in proxy.requests("GET", baked.layers[0].digest)]
    assert ranges == [None, "bytes=1500000-", "bytes=3000000-", "bytes=4500000-"]


# a process that dies


BIG = 80 * MIB


@pytest.fixture
def big(tmp_path: Path) -> Path:
    models.write_safetensors(tmp_path / "big" / "model.safetensors", BIG, secrets.randbits(60))
    return tmp_path / "big"


def sent_to(proxy: ChaosProxy) -> int:
    return sum(proxy.body_bytes.values())


def interrupted(proxy: ChaosProxy, big: Path, how: signal.Signals) -> tuple[int, int]:
    """Bytes of the blob that are sent until the process ends in its second chunk, and by another process then."""
    command = ("bake", big, "--to", "registry", "--tag", f"{proxy.host}/r{big.parent.name.lower()}:v1")
    proxy.hold_after = 40 * MIB
    process = start(*command)
    assert proxy.held.wait(300)
    if how == signal.SIGINT:
        interrupt(process)
    else:
        process.kill()
        process.wait()
    proxy.go_on.set()
    process.communicate()
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    models.wait_for(lambda: not proxy.active)
    before = sent_to(proxy)
    done = weightctl(*command, "--path", "/models/big")
    assert done.code == 0, done.stderr
    assert check(str(command[-1]), big) == ()
    return before, sent_to(proxy) - before


def test_killed_before_a_registry_that_forgets(proxy: ChaosProxy, big: Path) -> None:
    # docker-registry gives an upload up when a chunk arrives in part: the blob starts anew.
    before, after = interrupted(proxy, big, signal.SIGKILL)
    assert 40 * MIB <= before <= 64 * MIB
    assert BIG < after < BIG + MIB


def test_killed_before_a_registry_that_remembers(registry: str, big: Path) -> None:
    # A proxy that takes in whole requests, as nginx does, keeps the torn chunk from it: the upload goes on.
    with ChaosProxy(registry, buffered=True) as proxy:
        _, after = interrupted(proxy, big, signal.SIGKILL)
    assert BIG - 32 * MIB < after < BIG - 31 * MIB


def test_interrupted_it_ends_the_chunk_and_sends_nothing_twice(proxy: ChaosProxy, big: Path) -> None:
    before, after = interrupted(proxy, big, signal.SIGINT)
    assert before == 64 * MIB
    assert BIG < before + after < BIG + MIB


def test_two_bakes_at_once(proxy: ChaosProxy, big: Path) -> None:
    command = ("bake", big, "--to", "registry", "--tag", f"{proxy.host}/two/at/once:v1")
    processes = [start(*command) for _ in range(2)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len({digest for digest, _ in outputs}) == 1
    assert check(f"{proxy.host}/two/at/once:v1", big) == ()
