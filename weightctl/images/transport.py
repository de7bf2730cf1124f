"""HTTP/1.1 to one registry: as whom it wants us to be, where it sends us, and its failures as errors of ours."""

from __future__ import annotations

import contextlib
import email.utils
import json
import random
import re
import time
import urllib.parse
from collections.abc import Collection, Mapping, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import weightctl
from weightctl import storage
from weightctl.errors import IntegrityError, WeightctlError
from weightctl.images.credentials import Authorization, TokenRequest, is_loopback
from weightctl.images.oci import MAX_JSON_BYTES

if TYPE_CHECKING:
    import requests

CONNECT_SECONDS = 30
ANSWER_SECONDS = 600
"""Long: a registry may copy a whole blob before it answers the last request of an upload."""
TRIES = 7
"""With the waits between them half a minute, in which a registry that was restarted is back."""
LONGEST_WAIT_SECONDS = 120
"""A registry that asks for more with Retry-After is not waited for."""
MOST_REDIRECTS = 5
BLOCK_BYTES = 256 << 10
"""Sent at a time: the time limit on a connection is one on each block."""


class RegistryError(WeightctlError):
    """A registry refused, failed, or could not be reached."""

    def __init__(
        self, message: str, hint: str | None = None, *, status: int | None = None, code: str = "", wait: float = 0
    ) -> None:
        super().__init__(message, hint)
        self.status = status
        """Of HTTP; None if there was no answer."""
        self.code = code
        """The registry's own word for it: `DIGEST_INVALID`, `BLOB_UPLOAD_UNKNOWN`."""
        self.wait = wait
        """Seconds that the registry asks to be left alone."""

    @property
    def transient(self) -> bool:
        """Whether the same request may succeed later."""
        return self.status is None or self.status in (408, 425, 429) or self.status >= 500


class Patience:
    """How often a registry that fails is tried again."""

    def __init__(self) -> None:
        self._failures = 0

    def reset(self) -> None:
        """Something went well."""
        self._failures = 0

    def wait(self, error: RegistryError) -> None:
        """Let some time pass, at least what the registry asked for. Raises the error if it was tried often enough."""
        self._failures += 1
        if self._failures >= TRIES or error.wait > LONGEST_WAIT_SECONDS:
            raise error
        storage.pause(max(error.wait, 0.5 * 2 ** (self._failures - 1) * random.uniform(0.5, 1)))


@dataclass(frozen=True)
class Answer:
    """What a registry answered; `content` is empty for a HEAD."""

    status: int
    headers: Mapping[str, str]
    content: bytes
    url: str


class Transport:
    """Requests about one repository of a registry. May be used by several threads at once."""

    def __init__(self, registry: str, repository: str, *, actions: str, plain_http: bool) -> None:
        """`actions` are those that tokens are asked for: `pull` or `pull,push`."""
        import requests
        from requests.adapters import HTTPAdapter

        self._registry = registry
        self._name = f"{registry}/{repository}"
        self._scope = f"repository:{repository}:{actions}"
        self._plain_http = plain_http
        self._reached = False
        self._session = requests.Session()
        self._session.cookies.set_policy(_NoCookies())
        self._session.headers["Accept-Encoding"] = "identity"
        for scheme in ("https://", "http://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=64))
        self.origin = self._find_origin("registry-1.docker.io" if registry == "docker.io" else registry)
        """Scheme and host."""
        plain = plain_http and self.origin.startswith("http:")
        self._authorization = Authorization(registry, self._ask_token_service, plain_http=plain)

    def _find_origin(self, host: str) -> str:
        """HTTPS, unless plain HTTP is allowed and nobody answers HTTPS there."""
        if not (self._plain_http or is_loopback(urllib.parse.urlsplit(f"//{host}").hostname)):
            return f"https://{host}"
        try:
            self._send("GET", f"https://{host}/v2/", {}, None).close()
        except WeightctlError as error:
            return f"{'https' if _is_bad_certificate(error.__cause__) else 'http'}://{host}"
        return f"https://{host}"

    def call(self, method: str, url: str, **request: Any) -> Answer:
        """A small request as `send` sends it, tried again when that may help."""
        patience = Patience()
        while True:
            try:
                return self.send(method, url, **request)
            except RegistryError as error:
                if not (error.transient and self._reached):
                    raise
                patience.wait(error)

    def send(self, method: str, url: str, *, expect: Collection[int], **request: Any) -> Answer:
        """A request as `open` opens it, tried once, and its answer. Raises RegistryError for a status not expected."""
        return self._read(self._expect(self.open(method, url, **request), expect))

    def stream(self, url: str, headers: Mapping[str, str], expect: Collection[int]) -> requests.Response:
        """What a GET answers, yet to be read. Raises RegistryError for a status that is not expected."""
        return self._expect(self.open("GET", url, headers=headers), expect)

    def open(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Sized | None = None,
        scopes: tuple[str, ...] = (),
    ) -> requests.Response:
        """One request, as whom the registry wants us to be; it goes where the answer redirects it.

        A `body` is bytes, or an iterable of them that can be read again. The Authorization header goes to the registry
        and to nobody else.
        """
        scopes = (self._scope, *scopes)
        refusals = redirects = 0
        while True:
            ours = url.startswith(f"{self.origin}/")
            header = self._authorization.header(scopes) if ours else None
            own = {"Authorization": header} if header else {}
            response = self._send(method, url, {**(headers or {}), **own}, body)
            self._reached = True
            # A body may only be sent to another place where the answer says that it is to be sent there again.
            movable = method in ("GET", "HEAD") or response.status_code in (307, 308)
            if response.status_code == 401 and ours and refusals < 2:
                refusals += 1
                challenge = response.headers.get("WWW-Authenticate", "")
                if not self._authorization.challenged(challenge, scopes, header):
                    return response
            elif movable and response.is_redirect and redirects < MOST_REDIRECTS:
                redirects += 1
                url = self.follow(url, response.headers["Location"])
            else:
                return response
            response.close()

    def follow(self, url: str, location: str) -> str:
        """Where an answer to `url` sends us: by HTTPS, or by HTTP if that is how this registry is spoken to."""
        here = urllib.parse.urlsplit(self.origin)
        try:
            target = urllib.parse.urlsplit(urllib.parse.urljoin(url, location))
            nameless = target.hostname and target.username is None
            # A registry behind a proxy may not know that it is spoken to by HTTPS, or names the default port.
            if nameless and (target.hostname, _own_port(target)) == (here.hostname, _own_port(here)):
                return target._replace(scheme=here.scheme, netloc=here.netloc).geturl()
            plain = here.scheme == "http" and (self._plain_http or is_loopback(target.hostname))
            if nameless and target.scheme in ("https", *(["http"] if plain else [])):
                return target.geturl()
        except ValueError:
            pass
        where = location.partition("?")[0][:200]
        raise WeightctlError(f"{self._name} sends us to {where!r}, where nothing of a registry can be")

    def _send(self, method: str, url: str, headers: Mapping[str, str], body: Any) -> requests.Response:
        """One request to one place. Raises RegistryError without an answer, WeightctlError if there cannot be one."""
        import requests
        import urllib3

        loopback = is_loopback(urllib.parse.urlsplit(url).hostname)
        try:
            return self._session.request(
                method,
                url,
                headers={"User-Agent": f"weightctl/{weightctl.__version__}", **headers},
                data=body or None,  # an empty body has the length 0, where the library would send one without a length
                auth=_as_it_is,
                allow_redirects=False,
                stream=True,
                timeout=(CONNECT_SECONDS, ANSWER_SECONDS),
                proxies={"http": "", "https": ""} if loopback else None,  # a proxy's loopback is not ours
            )
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise self._unreachable(url, error) from error

    def _ask_token_service(self, request: TokenRequest) -> bytes:
        response = self._send("POST" if request.form else "GET", request.url, request.headers, request.form)
        return self._read(self._expect(response, (200,), "the token service of ")).content

    def _expect(self, response: requests.Response, statuses: Collection[int], whose: str = "") -> requests.Response:
        """The response, if it is one of those expected; RegistryError otherwise."""
        status = response.status_code
        if status in statuses:
            return response
        content = b""
        with contextlib.suppress(IntegrityError):  # a page without end does not say more
            content = self._read(response).content
        code, message = _registry_error(content)
        words = self._authorization.redact(" ".join(filter(None, (code, message[:300]))))
        hints = {
            401: f"{self._authorization.advice}: docker login {self._registry}",
            403: f"check what the account may do there, or log in as another: docker login {self._registry}",
            413: "it, or a proxy before it, takes no request so large: have that limit raised",
            429: "it limits how often it may be asked: try again later",
        }
        hint = hints.get(status, f"try again later: {_KEPT}" if status >= 500 else None)
        failed = "refuses" if status < 500 else "fails"
        raise RegistryError(
            f"{whose}{self._name} {failed}: HTTP {status}{f': {words}' if words else ''}",
            "create the repository there first" if code == "NAME_UNKNOWN" else hint,
            status=status,
            code=code,
            wait=_retry_after(response.headers.get("Retry-After", "")),
        )

    def _read(self, response: requests.Response) -> Answer:
        """The response, read to its end. Raises IntegrityError if it is larger than anything but a blob can be."""
        import urllib3

        try:
            with response:
                content = response.raw.read(MAX_JSON_BYTES, decode_content=False)
                more = response.raw.read(1, decode_content=False)  # only this tells the end from a cut
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise self._unreachable(response.url, error) from error
        if more:
            raise IntegrityError(f"{self._name} answers with more than {MAX_JSON_BYTES} bytes, which no manifest has")
        return Answer(response.status_code, response.headers, content, response.url)

    def _unreachable(self, url: str, error: Exception) -> WeightctlError:
        """In words of ours: the library's own show the URL, which may hold a signature."""
        import requests

        host = urllib.parse.urlsplit(url).netloc
        if _is_bad_certificate(error):
            hint = "have its certificate's authority trusted: set REQUESTS_CA_BUNDLE"
            return WeightctlError(f"the certificate of {host} is not one to trust", hint)
        if "WRONG_VERSION_NUMBER" in str(error) or "record layer" in str(error):
            return WeightctlError(f"{host} does not speak HTTPS", "if its network is safe, add --plain-http")
        if isinstance(error, requests.exceptions.ProxyError):
            return RegistryError(f"the proxy does not reach {host}: {reason(error)}", "check HTTPS_PROXY and NO_PROXY")
        hint = f"it answered before: try again later, {_KEPT}" if self._reached else "check its name and the network"
        return RegistryError(f"cannot reach {host}: {reason(error)}", hint)


_KEPT = "what is done is kept"


def reason(error: BaseException, otherwise: str = "the connection broke") -> str:
    """The system's own word for what broke, or a proxy's, which lies deep in what the library raises."""
    if refused := re.search(r"Tunnel connection failed: (\d+[\w ]*)", str(error)):
        return f"it answers {refused[1]}"
    seen: BaseException | None = error
    while seen is not None:
        inner = next((arg for arg in seen.args if isinstance(arg, BaseException)), None)
        below = getattr(seen, "reason", None)
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        seen = inner or (below if isinstance(below, BaseException) else None) or seen.__cause__ or seen.__context__
    return otherwise


def _as_it_is(request: Any) -> Any:
    """Sends a request with the headers that it has: without this, the library adds a password of ~/.netrc."""
    return request


class _NoCookies:
    """A registry has no business with cookies."""

    netscape = True
    rfc2965 = hide_cookie2 = False

    def return_ok(self, *_: object) -> bool:
        return False

    set_ok = domain_return_ok = path_return_ok = return_ok


def _registry_error(content: bytes) -> tuple[str, str]:
    """Code and message of a registry's first error."""
    try:
        error = json.loads(content)["errors"][0]
        return str(error.get("code", "")), str(error.get("message", ""))
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return "", ""


def _retry_after(value: str) -> float:
    """Seconds: given as such, or as the date when they are over."""
    if value.isdecimal():
        return float(value[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (OverflowError, TypeError, ValueError):
        return 0.0


def _own_port(url: urllib.parse.SplitResult) -> int | None:
    """The port, unless it is one of the defaults."""
    return None if url.port in (80, 443) else url.port


def _is_bad_certificate(error: BaseException | None) -> bool:
    return "CERTIFICATE_VERIFY_FAILED" in str(error)
