"""Logins: Docker's config.json, credential helpers, basic and bearer; and that no secret goes where it should not."""

from __future__ import annotations

import base64
import json
import os
import secrets
import socket
import traceback
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from tests import models
from tests.chaos_proxy import ChaosProxy
from tests.command import Outcome, weightctl
from tests.images.conformance import plan
from tests.images.test_remote import bake, check
from tests.services import docker_registry
from tests.token_server import TokenServer
from weightctl.config import Config
from weightctl.errors import UsageError, WeightctlError
from weightctl.images import RemoteImages, transport
from weightctl.images.credentials import Credentials, find_credentials, is_loopback
from weightctl.images.oci import ImageName
from weightctl.progress import Progress

PASSWORD = "the-pass-word"
HTPASSWD = "user:$2y$05$xzpZ/VTeF4JGvFOF.nDiAek72APU9tJ1eSEDwwBr.tOYhkbnvDrEe\n"
BASIC = base64.b64encode(f"user:{PASSWORD}".encode()).decode()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry behind a password."""
    directory = tmp_path_factory.mktemp("guarded")
    (directory / "htpasswd").write_text(HTPASSWD)
    with docker_registry(directory, f"{{htpasswd: {{realm: tests, path: '{directory / 'htpasswd'}'}}}}") as host:
        yield host


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenServer]:
    with TokenServer(tmp_path_factory.mktemp("tokens"), "user", PASSWORD) as running:
        yield running


@pytest.fixture(scope="module")
def tokened(tokens: TokenServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry that wants tokens."""
    with docker_registry(tmp_path_factory.mktemp("tokened"), tokens.auth) as host:
        yield host


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return models.write_model(tmp_path / "model", seed=secrets.randbits(60))


@pytest.fixture
def docker_config(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Docker keeps its logins: none yet."""
    monkeypatch.setenv("DOCKER_CONFIG", str(home / "docker"))
    (home / "docker").mkdir()
    return home / "docker" / "config.json"


def log_in(docker_config: Path, host: str, password: str = PASSWORD) -> None:
    auth = base64.b64encode(f"user:{password}".encode()).decode()
    docker_config.write_text(json.dumps({"auths": {host: {"auth": auth}}}))


def helper(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A credential helper called `fake`."""
    path = directory / "docker-credential-fake"
    path.write_text(f"#!/bin/sh\nread server\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


def assert_silent(outcome: Outcome, *others: str) -> None:
    for secret in (PASSWORD, BASIC, *others):
        assert secret not in outcome.stdout + outcome.stderr


def push(model: Path, name: str) -> Outcome:
    return weightctl("bake", model, "--to", "registry", "--tag", name)


def test_the_login_in_config_json(guarded: str, docker_config: Path, model: Path) -> None:
    log_in(docker_config, guarded)
    done = push(model, f"{guarded}/basic:v1")
    assert done.code == 0, done.stderr
    assert_silent(done)
    assert check(f"{guarded}/basic:v1", model) == ()


@pytest.mark.parametrize("setting", ["credsStore", "credHelpers"])
def test_a_credential_helper(
    guarded: str, docker_config: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    answer = json.dumps({"ServerURL": guarded, "Username": "user", "Secret": PASSWORD})
    helper(tmp_path, monkeypatch, f"""[ "$1 $server" = "get {guarded}" ] && echo '{answer}'""")
    docker_config.write_text(json.dumps({setting: "fake" if setting == "credsStore" else {guarded: "fake"}}))
    done = push(model, f"{guarded}/helped:v1")
    assert done.code == 0, done.stderr
    assert_silent(done)


@pytest.mark.parametrize(
    "script", [f"echo {PASSWORD}; exit 1", f"echo {PASSWORD}", f"""echo '{{"Secret": "{PASSWORD}"}}'""", "echo 3"]
)
def test_a_helper_that_fails(docker_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    helper(tmp_path, monkeypatch, script)
    docker_config.write_text(json.dumps({"credsStore": "fake"}))
    with pytest.raises(UsageError, match="credential helper") as caught:
        find_credentials("a.registry")
    assert caught.value.hint == "log in again: docker login a.registry"
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "content", ['{"auths": 3}', '{"auths": {"x": 3}}', '{"auths": {"a.registry": {"auth": "%"}}}', '{"credHelpers": 3}']
)
def test_a_malformed_config(docker_config: Path, content: str) -> None:
    docker_config.write_text(content)
    with pytest.raises(UsageError, match=r"config\.json") as caught:
        find_credentials("a.registry")
    assert "docker login" in str(caught.value.hint)


def test_without_a_login(guarded: str, docker_config: Path, model: Path) -> None:
    done = push(model, f"{guarded}/nobody:v1")
    assert done.code == 1
    assert f"log in: docker login {guarded}" in done.stderr


def test_with_a_wrong_password(guarded: str, docker_config: Path, model: Path) -> None:
    log_in(docker_config, guarded, "a-wrong-word")
    done = push(model, f"{guarded}/wrong:v1")
    assert done.code == 1
    assert f"the login that Docker keeps for it is not enough: docker login {guarded}" in done.stderr
    assert "a-wrong-word" not in done.stderr


def test_a_password_of_netrc_is_not_sent(guarded: str, home: Path, docker_config: Path, model: Path) -> None:
    (home / ".netrc").write_text(f"machine 127.0.0.1 login user password {PASSWORD}\n")
    (home / ".netrc").chmod(0o600)
    with ChaosProxy(guarded) as proxy:
        assert push(model, f"{proxy.host}/netrc:v1").code == 1
    assert not [seen for seen in proxy.seen if "Authorization" in seen.headers]


# tokens


def test_a_token_for_pushing_and_one_for_mounting(
    tokened: str, tokens: TokenServer, docker_config: Path, model: Path
) -> None:
    log_in(docker_config, tokened)
    tokens.asked.clear()
    for repository in ("first/one", "second"):
        done = push(model, f"{tokened}/{repository}:v1")
        assert done.code == 0, done.stderr
        assert_silent(done, *tokens.issued)
    assert ("GET", "repository:first/one:pull,push") in tokens.asked
    assert ("GET", "repository:second:pull,push repository:first/one:pull") in tokens.asked
    assert check(f"{tokened}/second:v1", model) == ()


def test_an_identity_token(tokened: str, tokens: TokenServer, docker_config: Path, model: Path) -> None:
    docker_config.write_text(json.dumps({"auths": {tokened: {"identitytoken": tokens.refresh_token}}}))
    tokens.asked.clear()
    done = push(model, f"{tokened}/identity:v1")
    assert done.code == 0, done.stderr
    assert {method for method, _ in tokens.asked} == {"POST"}
    assert_silent(done, tokens.refresh_token, *tokens.issued)


def test_nobody_may_pull_but_not_push(tokened: str, docker_config: Path, model: Path) -> None:
    log_in(docker_config, tokened)
    assert push(model, f"{tokened}/public:v1").code == 0
    docker_config.unlink()
    assert check(f"{tokened}/public:v1", model) == ()
    done = push(model, f"{tokened}/mine:v1")
    assert done.code == 1
    assert "docker login" in done.stderr


def test_a_token_that_ends_in_the_middle(tokened: str, tokens: TokenServer, docker_config: Path, model: Path) -> None:
    with ChaosProxy(tokened) as proxy:
        log_in(docker_config, proxy.host)
        challenge = f'Bearer realm="{tokens.url}",service="a registry",scope="repository:by/another/path:pull"'
        proxy.fault("PUT", "uploads", skip=1, status=401, headers={"WWW-Authenticate": challenge})
        before = len(tokens.issued)
        baked = bake(model, f"{proxy.host}/ends:v1")
        assert len(tokens.issued) == before + 2
        assert tokens.asked[-1] == ("GET", "repository:ends:pull,push repository:by/another/path:pull")
        assert baked.written_bytes == sum(proxy.body_bytes.values())
        used = {seen.headers.get("Authorization") for seen in proxy.seen}
        assert used == {None, *(f"Bearer {token}" for token in tokens.issued[before:])}


def test_a_token_that_is_refused_at_once(tokened: str, tokens: TokenServer, docker_config: Path, model: Path) -> None:
    with ChaosProxy(tokened) as proxy:
        log_in(docker_config, proxy.host)
        challenge = f'Bearer realm="{tokens.url}",service="a registry",scope="repository:its/own/name:pull"'
        proxy.fault("GET", "manifests", skip=1, status=401, headers={"WWW-Authenticate": challenge})
        bake(model, f"{proxy.host}/refused:v1")
    assert ("GET", "repository:refused:pull,push repository:its/own/name:pull") in tokens.asked


# where a secret may go


def test_a_redirect_to_another_host_gets_no_authorization(guarded: str, docker_config: Path, model: Path) -> None:
    with ChaosProxy(guarded) as proxy, ChaosProxy(guarded) as other:
        log_in(docker_config, proxy.host)
        baked = bake(model, f"{proxy.host}/elsewhere:v1")
        proxy.fault(
            "GET", baked.layers[0].digest, status=307, headers={"Location": f"http://{other.host}/signed?key=1"}
        )
        other.fault("GET", "signed", status=200, body=b"other bytes")
        (problem,) = check(f"{proxy.host}/elsewhere:v1")
        assert baked.layers[0].digest in problem
        assert "Authorization" in proxy.requests("GET", baked.layers[0].digest)[0].headers
        (redirected,) = other.seen
        assert "Authorization" not in redirected.headers


def test_an_upload_to_another_host_gets_no_authorization(
    guarded: str, docker_config: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "TRIES", 2)
    with ChaosProxy(guarded) as proxy, ChaosProxy(guarded) as other:
        log_in(docker_config, proxy.host)
        proxy.fault("POST", "", times=-1, reply_headers={"Location": f"http://{other.host}/up?load=1"})
        other.fault("PUT", "up", times=-1, status=201)
        with pytest.raises(WeightctlError, match="MANIFEST_BLOB_UNKNOWN"):
            bake(model, f"{proxy.host}/away:v1")
        assert other.requests("PUT", "load=1&digest=sha256")
        assert not [seen for seen in other.seen if "Authorization" in seen.headers]


def test_what_is_sent_is_not_sent_elsewhere_on_an_old_redirect(guarded: str, docker_config: Path, model: Path) -> None:
    with ChaosProxy(guarded) as proxy, ChaosProxy(guarded) as other:
        log_in(docker_config, proxy.host)
        proxy.fault("PUT", "manifests", times=-1, status=302, headers={"Location": f"http://{other.host}/v2/"})
        with pytest.raises(WeightctlError, match="refuses: HTTP 302"):
            bake(model, f"{proxy.host}/moved:v1")
        assert not other.seen


def test_cookies_are_not_kept(guarded: str, docker_config: Path, model: Path) -> None:
    with ChaosProxy(guarded) as proxy:
        log_in(docker_config, proxy.host)
        proxy.fault("GET", "", times=-1, reply_headers={"Set-Cookie": "session=1; Path=/"})
        bake(model, f"{proxy.host}/cookies:v1")
        assert not [seen for seen in proxy.seen if "Cookie" in seen.headers]


def test_a_redirect_without_end(guarded: str, docker_config: Path, model: Path) -> None:
    with ChaosProxy(guarded) as proxy:
        proxy.fault("GET", "manifests", times=-1, status=302, headers={"Location": "/v2/a/manifests/v1"})
        with pytest.raises(WeightctlError, match="302"):
            bake(model, f"{proxy.host}/a:v1")
        assert len(proxy.requests("GET")) == 6


@pytest.mark.parametrize(
    "realm", ["http://192.0.2.1/token", "ftp://127.0.0.1/x", "", "/token", "http://[", "https://u:p@example.com/"]
)
def test_a_token_service_that_is_not_safe_hears_nothing(
    guarded: str, docker_config: Path, model: Path, realm: str
) -> None:
    with ChaosProxy(guarded) as proxy:
        log_in(docker_config, proxy.host)
        headers = {"WWW-Authenticate": f'Bearer realm="{realm}",service="s"'}
        proxy.fault("GET", "", times=-1, status=401, headers=headers)
        with pytest.raises(WeightctlError, match="not HTTPS"):
            bake(model, f"{proxy.host}/unsafe:v1")


@pytest.mark.parametrize("answer", [b"", b"{", b"[]", b'{"token": 3}', b'{"token": "a\\r\\nb"}', b'{"token": ""}'])
def test_a_token_service_that_talks_nonsense(guarded: str, docker_config: Path, model: Path, answer: bytes) -> None:
    with ChaosProxy(guarded) as proxy:
        headers = {"WWW-Authenticate": f'Bearer realm="http://{proxy.host}/token",service="s"'}
        proxy.fault("GET", "v2", times=-1, status=401, headers=headers)
        proxy.fault("GET", "token", times=-1, status=200, body=answer)
        with pytest.raises(WeightctlError, match="no token"):
            bake(model, f"{proxy.host}/nonsense:v1")


def test_a_registry_that_says_back_what_it_was_sent(guarded: str, docker_config: Path, model: Path) -> None:
    with ChaosProxy(guarded) as proxy:
        log_in(docker_config, proxy.host)
        echo = json.dumps({"errors": [{"code": "DENIED", "message": f"not {PASSWORD}, nor {BASIC}"}]}).encode()
        proxy.fault("POST", "", times=-1, status=403, body=echo)
        done = push(model, f"{proxy.host}/echo:v1")
    assert done.code == 1
    assert "DENIED not ***, nor ***" in done.stderr
    assert_silent(done)


def test_a_secret_is_in_no_repr() -> None:
    assert PASSWORD not in repr(Credentials("user", PASSWORD))


def test_docker_hub_goes_by_its_old_name(docker_config: Path) -> None:
    log_in(docker_config, "https://index.docker.io/v1/")
    assert find_credentials("docker.io") == Credentials("user", PASSWORD)
    assert find_credentials("quay.io") is None


# TLS


def own_address() -> str:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        return str(probe.getsockname()[0])


def test_plain_http_is_for_loopback_or_on_request(guarded: str, docker_config: Path, model: Path) -> None:
    address = own_address()
    if is_loopback(address):
        pytest.skip("this machine has no address but loopback")
    with ChaosProxy(guarded, address=address) as proxy:
        log_in(docker_config, proxy.host)
        name = f"{proxy.host}/plain:v1"
        done = push(model, name)
        assert done.code == 1
        assert "--plain-http" in done.stderr
        assert not proxy.seen
        done = weightctl("bake", model, "--to", "registry", "--tag", name, "--plain-http")
        assert done.code == 0, done.stderr
        assert weightctl("verify", name, "--plain-http").code == 0


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True), ("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("10.0.0.1", False),
        ("localhost.example.com", False), ("127.0.0.1.example.com", False), ("0.0.0.0", False), ("", False),
    ],
)  # fmt: skip
def test_what_loopback_is(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_plain_http_is_for_the_registrys_token_service_too(
    tokened: str, tokens: TokenServer, docker_config: Path, model: Path
) -> None:
    address = own_address()
    service = tokens.url.split("/")[2]
    with ChaosProxy(tokened, address=address) as proxy, ChaosProxy(service, address=address) as asked:
        log_in(docker_config, proxy.host)
        challenge = f'Bearer realm="http://{asked.host}/token"'
        proxy.fault("GET", "manifests", reply_headers={"WWW-Authenticate": challenge})
        image = ImageName.parse(f"{proxy.host}/plain/tokens:v1")
        RemoteImages("").bake(plan(model), image, config=Config(plain_http=True), progress=Progress())
        assert f"service={quote(proxy.host, safe='')}" in asked.seen[0].path


# proxies


@pytest.fixture
def dead_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)


@pytest.mark.usefixtures("dead_proxy")
def test_loopback_is_spoken_to_without_a_proxy(guarded: str, docker_config: Path, model: Path) -> None:
    log_in(docker_config, guarded)
    bake(model, f"{guarded}/unproxied:v1")


@pytest.mark.usefixtures("dead_proxy")
def test_a_proxy_that_fails_is_said_to(guarded: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightctlError, match=r"the proxy does not reach example\.com: Connection refused") as caught:
        bake(model, "example.com/a:v1")
    assert "HTTPS_PROXY" in str(caught.value.hint)
    with ChaosProxy(guarded) as proxy:
        monkeypatch.setenv("https_proxy", f"http://user:{PASSWORD}@{proxy.host}")
        with pytest.raises(WeightctlError, match=r"the proxy does not reach example\.com: it answers 501"):
            bake(model, "example.com/a:v1")


def test_where_to_is_said_by_the_tag_alone(model: Path) -> None:
    done = weightctl("bake", model, "--to", "registry:127.0.0.1:5000/x", "--tag", "x:v1")
    assert done.code == 2
    assert "write --to registry" in done.stderr
