"""Who we are to a registry: Docker's logins, and the Authorization header that a registry asks for."""

from __future__ import annotations

import base64
import ipaddress
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field

from weightctl.errors import UsageError, WeightctlError

_CHALLENGE = re.compile(r"(?i:(?:^|,)\s*(basic|bearer)\b)")
_PARAMETER = re.compile(r'(\w+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')
_TOKEN = re.compile(r"[\x21-\x7e]+")
LEAST_SECONDS = 60
"""How long a token lasts that does not say so: what the specification of Docker's token service names."""


@dataclass(frozen=True)
class Credentials:
    """A login. Its secret shows in no repr."""

    username: str
    secret: str = field(repr=False)
    is_identity_token: bool = False

    @property
    def basic(self) -> str:
        """The header of basic authentication."""
        return f"Basic {base64.b64encode(f'{self.username}:{self.secret}'.encode()).decode()}"


def find_credentials(registry: str) -> Credentials | None:
    """What `docker login` left for the registry: in Docker's config.json, or in the helper that it names.

    Raises UsageError if the file or the helper is broken; what they hold is in no message.
    """
    import docker.auth
    import docker.errors

    malformed = (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError)
    try:
        found = docker.auth.load_config().resolve_authconfig(registry) or {}
    except (docker.errors.DockerException, *malformed):
        raise UsageError(
            f"no login for {registry} can be read: Docker's config.json or the credential helper that it names fails",
            f"log in again: docker login {registry}",
        ) from None
    values = {str(key).lower(): value for key, value in found.items() if isinstance(value, str)}
    if token := values.get("identitytoken"):
        return Credentials("<token>", token, is_identity_token=True)
    if values.get("username") and values.get("password"):
        return Credentials(values["username"], values["password"])
    return None


def is_loopback(host: str | None) -> bool:
    """Whether a host's name can only mean this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class TokenRequest:
    """What to ask a token service: with GET, or with POST if there is a form."""

    url: str
    headers: dict[str, str] = field(repr=False)
    form: dict[str, str] | None = field(default=None, repr=False)


class Authorization:
    """The header that one registry wants: nothing until it asks, then basic or a token, which is renewed in time.

    `ask` sends a TokenRequest and returns the answer's body. `plain_http`: also without TLS, as to the registry.
    """

    def __init__(self, registry: str, ask: Callable[[TokenRequest], bytes], *, plain_http: bool = False) -> None:
        self._registry = registry
        self._ask = ask
        self._plain_http = plain_http
        self._lock = threading.RLock()
        self._credentials: Credentials | None = None
        self._looked = False
        self._basic: str | None = None
        self._service: tuple[str, str] | None = None
        self._tokens: dict[tuple[str, ...], tuple[str, float]] = {}
        self._named: dict[tuple[str, ...], list[str]] = {}

    def header(self, scopes: tuple[str, ...]) -> str | None:
        """For a request in these scopes (`repository:NAME:ACTIONS`)."""
        with self._lock:
            if self._service is None:
                return self._basic
            token, end = self._tokens.get(scopes, ("", 0.0))
            if time.monotonic() >= end:
                token, end = self._tokens[scopes] = self._fetch(scopes)
            return f"Bearer {token}"

    def challenged(self, challenge: str, scopes: tuple[str, ...], sent: str | None) -> bool:
        """Take in what a registry answered with 401 to the header `sent`. Whether there is something else to send."""
        with self._lock:
            scheme, parameters = _parse_challenge(challenge)
            if scheme == "bearer":
                realm = _checked_realm(parameters.get("realm", ""), plain_http=self._plain_http)
                self._service = (realm, parameters.get("service", self._registry))
                if sent == f"Bearer {self._tokens.get(scopes, ('', 0.0))[0]}":
                    del self._tokens[scopes]
                    # Amazon's public registry wants "aws"; one behind a proxy may go by another path than ours.
                    self._named[scopes] = parameters.get("scope", "").split()
                return True
            credentials = self._login() if scheme == "basic" else None
            self._basic = credentials.basic if credentials else None
            return self._basic not in (None, sent)

    @property
    def advice(self) -> str:
        """Why the registry wants somebody else."""
        return "the login that Docker keeps for it is not enough" if self._credentials else "log in"

    def redact(self, text: str) -> str:
        """The text without anything that is secret: a registry might send back what it was sent."""
        with self._lock:
            secrets = [token for token, _ in self._tokens.values()]
            if self._credentials:
                secrets += [self._credentials.secret, self._credentials.basic.removeprefix("Basic ")]
        for secret in filter(None, secrets):
            text = text.replace(secret, "***")
        return text

    def _login(self) -> Credentials | None:
        if not self._looked:
            self._credentials, self._looked = find_credentials(self._registry), True
        return self._credentials

    def _fetch(self, scopes: tuple[str, ...]) -> tuple[str, float]:
        """A token, and when to stop using it."""
        assert self._service is not None
        realm, service = self._service
        wanted = tuple(dict.fromkeys((*scopes, *self._named.get(scopes, ()))))
        began = time.monotonic()
        try:
            answer = json.loads(self._ask(_token_request(realm, service, wanted, self._login())))
            token = answer.get("token") or answer["access_token"]
            seconds = max(float(answer.get("expires_in") or 0), LEAST_SECONDS)
            if not isinstance(token, str) or not _TOKEN.fullmatch(token):
                raise ValueError
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
            raise WeightctlError(f"the token service of {self._registry} answers with no token") from None
        return token, began + 0.8 * seconds


def _token_request(realm: str, service: str, scopes: tuple[str, ...], credentials: Credentials | None) -> TokenRequest:
    if credentials and credentials.is_identity_token:
        form = {"grant_type": "refresh_token", "service": service, "client_id": "weightctl", "scope": " ".join(scopes)}
        return TokenRequest(realm, {}, {**form, "refresh_token": credentials.secret})
    query = urllib.parse.urlencode([("service", service), *(("scope", scope) for scope in scopes)])
    url = f"{realm}{'&' if '?' in realm else '?'}{query}"
    return TokenRequest(url, {"Authorization": credentials.basic} if credentials else {})


def _parse_challenge(text: str) -> tuple[str, dict[str, str]]:
    """The scheme that a WWW-Authenticate header asks for, bearer before basic, and its parameters."""
    pieces = _CHALLENGE.split(text)
    schemes = {
        scheme.lower(): {name.lower(): quoted or plain for name, quoted, plain in _PARAMETER.findall(rest)}
        for scheme, rest in zip(pieces[1::2], pieces[2::2], strict=True)
    }
    return next(((name, schemes[name]) for name in ("bearer", "basic") if name in schemes), ("", {}))


def _checked_realm(realm: str, *, plain_http: bool) -> str:
    """The token service's URL, if a password may be sent there."""
    try:
        parts = urllib.parse.urlsplit(realm)
        safe = parts.scheme == "https" or (parts.scheme == "http" and (plain_http or is_loopback(parts.hostname)))
        if safe and parts.hostname and parts.username is None and not parts.fragment:
            return realm
    except ValueError:
        pass
    raise WeightctlError(f"the registry sends us to {realm[:200]!r} for a token, which is not HTTPS")
