"""A client of the OCI distribution API, HTTP/1.1: blobs, manifests and uploads of one repository."""

from __future__ import annotations

import email.utils
import io
import json
import random
import re
import time
import urllib.parse
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import weightctl
from weightctl import storage
from weightctl.errors import IntegrityError, WeightctlError, translated_os_errors
from weightctl.images.credentials import Authorization, TokenRequest, is_loopback
from weightctl.images.oci import INDEX, MANIFEST, MAX_JSON_BYTES, Descriptor, ImageName

if TYPE_CHECKING:
    import requests

DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
MANIFEST_TYPES = (MANIFEST, INDEX, DOCKER_MANIFEST, DOCKER_LIST)

CHUNK_BYTES = 32 << 20
CONNECT_SECONDS = 30
ANSWER_SECONDS = 600
"""Long: a registry may copy a whole blob before it answers the last request of an upload."""
TRIES = 5
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


@dataclass(frozen=True)
class Session:
    """An upload that a registry has begun: where it goes on, and how many bytes of the blob have arrived."""

    url: str
    offset: int = 0


class Part:
    """Bytes of a file as the body of a request, read while they are sent, and again if they are sent again."""

    def __init__(self, source: BinaryIO, start: int, length: int, report: Callable[[int], None]) -> None:
        """`report` is told each offset that was reached."""
        self._source = source
        self._report = report
        self.start = start
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[memoryview]:
        position, end = self.start, self.start + self.length
        buffer = memoryview(bytearray(min(BLOCK_BYTES, self.length)))
        while position < end:
            # An OSError of the file must not be taken for one of the connection.
            with translated_os_errors("read what is to be sent"):
                self._source.seek(position)
                count = self._source.readinto(buffer[: end - position])  # type: ignore[attr-defined]
            if not count:
                raise IntegrityError("what is to be sent became shorter", "run this when nothing writes the model")
            yield buffer[:count]
            position += count
            self._report(position)


class RegistryClient:
    """One repository of one registry. May be used by several threads at once."""

    def __init__(self, name: ImageName, *, actions: str, plain_http: bool = False) -> None:
        """`actions` are those that tokens are asked for: `pull` or `pull,push`."""
        import requests
        from requests.adapters import HTTPAdapter

        registry, _, rest = name.canonical.partition("/")
        self.registry = registry
        self.repository = rest.rpartition(":")[0]
        self.chunk_bytes = CHUNK_BYTES
        """Sent in one request; becomes less where a registry says that it is too much."""
        self.chunked = True
        """Whether blobs may be sent in chunks; becomes false where a registry refuses the first of them."""
        self._scope = f"repository:{self.repository}:{actions}"
        self._plain_http = plain_http
        self._reached = False
        self._session = requests.Session()
        self._session.cookies.set_policy(_NoCookies())
        self._session.headers["Accept-Encoding"] = "identity"
        for scheme in ("https://", "http://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=64))
        self._authorization = Authorization(registry, self._ask_token_service)
        self._origin = self._find_origin("registry-1.docker.io" if registry == "docker.io" else registry)

    def __str__(self) -> str:
        return f"{self.registry}/{self.repository}"

    # blobs

    def has_blob(self, blob: Descriptor) -> bool:
        """Whether the repository has the blob, as far as it says."""
        answer = self._call("HEAD", f"blobs/{blob.digest}", expect=(200, 404))
        return answer.status == 200 and answer.headers.get("Content-Length") in (None, str(blob.size))

    def open_blob(self, blob: Descriptor) -> BinaryIO:
        """The blob's bytes, from any offset; whoever reads them checks the digest."""
        return BlobReader(self, blob)  # type: ignore[return-value]

    def stream(self, blob: Descriptor, offset: int) -> requests.Response:
        """The blob's bytes from `offset` on: 206, or 200 with all of them."""
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        response = self._open("GET", self._url(f"blobs/{blob.digest}"), headers=headers)
        if response.status_code in (404, 416):
            response.close()
            raise IntegrityError(f"{self} lacks the blob {blob.digest}, or some of its {blob.size} bytes")
        return self._expect(response, (200, 206))

    # manifests

    def manifest(self, reference: str) -> tuple[Descriptor, bytes] | None:
        """The manifest or index with a tag or digest, or None. Raises IntegrityError for other bytes than its."""
        answer = self._call(
            "GET", f"manifests/{reference}", expect=(200, 404), headers={"Accept": ", ".join(MANIFEST_TYPES)}
        )
        if answer.status == 404:
            return None
        found = Descriptor.of(answer.headers.get("Content-Type", "").partition(";")[0].strip(), answer.content)
        named = reference if ":" in reference else answer.headers.get("Docker-Content-Digest", found.digest)
        if named.startswith("sha256:") and named != found.digest:
            raise IntegrityError(f"{self} has other bytes as the manifest {named}: they hash to {found.digest}")
        return found, answer.content

    def put_manifest(self, tag: str, content: bytes) -> None:
        """Let the tag mean this manifest. Raises IntegrityError if the registry gives back another one."""
        self._put_manifest(f"manifests/{tag}", content)
        digest = Descriptor.of(MANIFEST, content).digest
        stored = self.manifest(digest)
        if stored is None or stored[1] != content:
            raise IntegrityError(f"{self} did not keep the manifest {digest} as it was sent", "bake again")

    def delete_manifest(self, digest: str) -> None:
        """Forget a manifest and every tag of it; its blobs go when the registry collects them.

        Raises RegistryError where the registry does not let images be deleted.
        """
        self._call("DELETE", f"manifests/{digest}", expect=(200, 202, 404))

    def _put_manifest(self, path: str, content: bytes) -> None:
        patience = Patience()
        while True:
            try:
                self._call("PUT", path, expect=(200, 201, 202), headers={"Content-Type": MANIFEST}, body=content)
                return
            except RegistryError as error:
                # docker-registry does not find a blob at the moment when another push of it ends and rewrites its link.
                if error.code not in ("BLOB_UNKNOWN", "DIGEST_INVALID", "MANIFEST_BLOB_UNKNOWN"):
                    raise
                patience.wait(error)

    # uploads

    def begin_upload(self, blob: Descriptor, mount_from: str | None) -> Session | None:
        """Begin an upload; None if the registry mounts the blob from its repository `mount_from` instead."""
        query = f"?{urllib.parse.urlencode({'mount': blob.digest, 'from': mount_from})}" if mount_from else ""
        scopes = (f"repository:{mount_from}:pull",) if mount_from else ()
        try:
            answer = self._call("POST", f"blobs/uploads/{query}", expect=(201, 202), body=b"", scopes=scopes)
        except RegistryError as error:
            if not mount_from or error.transient:
                raise
            return self.begin_upload(blob, None)  # it may not read the other repository
        if answer.status == 201 and mount_from:
            return None
        least = answer.headers.get("OCI-Chunk-Min-Length", "")
        if least.isdecimal():
            self.chunk_bytes = max(self.chunk_bytes, min(int(least[:12]), blob.size))
        return Session(self._location(answer))

    def upload_status(self, session: Session, size: int) -> Session | None:
        """How far an upload got; None if the registry has forgotten it."""
        try:
            answer = self._call("GET", session.url, expect=(200, 202, 204))
        except RegistryError as error:
            if error.transient or error.status in (401, 403):
                raise
            return None
        last = re.fullmatch(r"(?:bytes=)?0-(\d{1,19})", answer.headers.get("Range", ""))
        if last is None or int(last[1]) >= size:
            return None
        # Nothing at all reads 0-0 too. Of what was a single byte, the digest at the end would tell.
        return Session(self._location(answer, session.url), int(last[1]) and int(last[1]) + 1)

    def send_chunk(self, session: Session, part: Part) -> Session:
        """Send the next bytes of an upload. Tried once: ask for the status before sending them again.

        What the answer says of the bytes that have arrived is not looked at, since ECR's is stale
        (github.com/aws/containers-roadmap/issues/2831): the digest at the end is what counts.
        """
        end = part.start + part.length
        headers = {"Content-Type": "application/octet-stream", "Content-Range": f"{part.start}-{end - 1}"}
        response = self._open("PATCH", session.url, headers=headers, body=part)
        answer = self._answer(self._expect(response, (200, 201, 202, 204)))
        return Session(self._location(answer, session.url), end)

    def finish_upload(self, session: Session, blob: Descriptor, part: Part) -> None:
        """Send the rest, and have it be the blob. Tried once."""
        url = f"{session.url}{'&' if '?' in session.url else '?'}{urllib.parse.urlencode({'digest': blob.digest})}"
        headers = {"Content-Type": "application/octet-stream"}
        self._answer(self._expect(self._open("PUT", url, headers=headers, body=part), (200, 201, 204)))

    # HTTP

    def _find_origin(self, host: str) -> str:
        """Scheme and host. HTTPS, unless plain HTTP is allowed and nobody answers HTTPS there."""
        import requests

        if not (self._plain_http or is_loopback(urllib.parse.urlsplit(f"//{host}").hostname)):
            return f"https://{host}"
        try:
            self._send("GET", f"https://{host}/v2/", {}, None).close()
        except requests.RequestException as error:
            return f"{'https' if _is_bad_certificate(error) else 'http'}://{host}"
        return f"https://{host}"

    def _url(self, path: str) -> str:
        return f"{self._origin}/v2/{self.repository}/{path}" if "://" not in path else path

    def _call(
        self,
        method: str,
        path: str,
        *,
        expect: Collection[int],
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        scopes: tuple[str, ...] = (),
    ) -> Answer:
        """A small request, tried again when that may help."""
        patience = Patience()
        while True:
            try:
                response = self._open(method, self._url(path), headers=headers or {}, body=body, scopes=scopes)
                return self._answer(self._expect(response, expect))
            except RegistryError as error:
                if not (error.transient and self._reached):
                    raise
                patience.wait(error)

    def _open(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | Part | None = None,
        scopes: tuple[str, ...] = (),
    ) -> requests.Response:
        """One request, as whom the registry wants us to be; a GET or HEAD goes where the answer redirects it.

        The Authorization header goes to the registry and to nobody else.
        """
        import requests

        scopes = (self._scope, *scopes)
        refusals = redirects = 0
        while True:
            ours = urllib.parse.urlsplit(url)[:2] == urllib.parse.urlsplit(self._origin)[:2]
            header = self._authorization.header(scopes) if ours else None
            try:
                response = self._send(method, url, {**headers, **({"Authorization": header} if header else {})}, body)
            except (requests.RequestException, OSError) as error:
                raise self._unreachable(url, error) from error
            self._reached = True
            if response.status_code == 401 and ours and refusals < 2:
                refusals += 1
                challenge = response.headers.get("WWW-Authenticate", "")
                if not self._authorization.challenged(challenge, scopes, header):
                    return response
            elif method in ("GET", "HEAD") and response.is_redirect and redirects < MOST_REDIRECTS:
                redirects += 1
                url = self._follow(url, response.headers["Location"])
            else:
                return response
            response.close()

    def _send(self, method: str, url: str, headers: Mapping[str, str], body: Any) -> requests.Response:
        return self._session.request(
            method,
            url,
            headers={"User-Agent": f"weightctl/{weightctl.__version__}", **headers},
            data=body,
            auth=_as_it_is,
            allow_redirects=False,
            stream=True,
            timeout=(CONNECT_SECONDS, ANSWER_SECONDS),
        )

    def _ask_token_service(self, request: TokenRequest) -> bytes:
        import requests

        try:
            response = self._send("POST" if request.form else "GET", request.url, request.headers, request.form)
        except (requests.RequestException, OSError) as error:
            raise self._unreachable(request.url, error) from error
        return self._answer(self._expect(response, (200,), "the token service of ")).content

    def _expect(self, response: requests.Response, statuses: Collection[int], whose: str = "") -> requests.Response:
        """The response, if it is one of those expected; RegistryError otherwise."""
        status = response.status_code
        if status in statuses:
            return response
        code, message = _registry_error(self._answer(response).content)
        words = self._authorization.redact(" ".join(filter(None, (code, message[:300]))))
        reason = f"HTTP {status}{f': {words}' if words else ''}"
        hints = {
            401: f"log in: docker login {self.registry}",
            403: f"check what the account may do there, or log in as another: docker login {self.registry}",
            429: "it limits how often it may be asked: try again later",
        }
        hint = hints.get(status, "try again later: what was sent is kept" if status >= 500 else None)
        raise RegistryError(
            f"{whose}{self} refuses: {reason}" if status < 500 else f"{whose}{self} fails: {reason}",
            hint,
            status=status,
            code=code,
            wait=_retry_after(response.headers.get("Retry-After", "")),
        )

    def _answer(self, response: requests.Response) -> Answer:
        """The response, read to its end. Raises IntegrityError if it is larger than anything but a blob can be."""
        import urllib3

        try:
            with response:
                content = response.raw.read(MAX_JSON_BYTES + 1, decode_content=False)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise self._unreachable(response.url, error) from error
        if len(content) > MAX_JSON_BYTES:
            raise IntegrityError(f"{self} answers with more than {MAX_JSON_BYTES} bytes, which no manifest has")
        return Answer(response.status_code, response.headers, content, response.url)

    def _location(self, answer: Answer, otherwise: str | None = None) -> str:
        location = answer.headers.get("Location", otherwise)
        if not location:
            raise RegistryError(f"{self} does not say where to upload to", status=answer.status)
        return self._follow(answer.url, location)

    def _follow(self, url: str, location: str) -> str:
        """Where an answer to `url` sends us: by HTTPS, or by HTTP if that is how this registry is spoken to."""
        here = urllib.parse.urlsplit(self._origin)
        try:
            target = urllib.parse.urlsplit(urllib.parse.urljoin(url, location))
            if target.netloc == here.netloc:  # a registry behind a proxy may not know that it is spoken to by HTTPS
                target = target._replace(scheme=here.scheme)
            plain = here.scheme == "http" and (self._plain_http or is_loopback(target.hostname))
            if target.scheme in ("https", *(["http"] if plain else [])) and target.hostname and target.username is None:
                return target.geturl()
        except ValueError:
            pass
        where = location.partition("?")[0][:200]
        raise WeightctlError(f"{self} sends us to {where!r}, where nothing of a registry can be")

    def _unreachable(self, url: str, error: Exception) -> WeightctlError:
        """In words of ours: the library's own show the URL, which may hold a signature."""
        host = urllib.parse.urlsplit(url).netloc
        if _is_bad_certificate(error):
            hint = "have its certificate's authority trusted: set REQUESTS_CA_BUNDLE"
            return WeightctlError(f"the certificate of {host} is not one to trust", hint)
        if "WRONG_VERSION_NUMBER" in str(error) or "record layer" in str(error):
            return WeightctlError(f"{host} does not speak HTTPS", "if its network is safe, add --plain-http")
        return RegistryError(f"cannot reach {host}: {_reason(error)}", "check its name and the network")


class BlobReader(io.RawIOBase):
    """A registry's blob as a file, gone on with where a connection broke."""

    def __init__(self, client: RegistryClient, blob: Descriptor) -> None:
        self._client = client
        self._blob = blob
        self._position = 0
        self._response: requests.Response | None = None
        self._patience = Patience()
        self.name = f"{blob.digest} in {client}"

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """The offset of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to an offset, as any file does."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._blob.size}[whence]
        if origin + offset != self._position:
            self._disconnect()
            self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Up to one byte more than the blob should have: whoever reads it sees that it has too many."""
        import urllib3

        view = memoryview(buffer).cast("B")[: self._blob.size + 1 - self._position]
        while len(view):
            try:
                data = self._connected().raw.read(len(view), decode_content=False)
            except (urllib3.exceptions.HTTPError, OSError) as error:
                self._fail(f"the connection broke: {_reason(error)}")
                continue
            if not data and self._position < self._blob.size:
                raise IntegrityError(f"{self.name} has {self._position} bytes instead of {self._blob.size}")
            if data:
                self._patience.reset()
            view[: len(data)] = data
            self._position += len(data)
            return len(data)
        return 0

    def close(self) -> None:
        """Also ends the connection."""
        self._disconnect()
        super().close()

    def _connected(self) -> requests.Response:
        while self._response is None:
            try:
                self._response = self._client.stream(self._blob, self._position)
            except RegistryError as error:
                if not error.transient:
                    raise
                self._patience.wait(error)
                continue
            skip = self._position if self._response.status_code == 200 else 0
            while skip and (data := self._response.raw.read(min(skip, BLOCK_BYTES), decode_content=False)):
                skip -= len(data)
        return self._response

    def _fail(self, reason: str) -> None:
        self._disconnect()
        self._patience.wait(RegistryError(f"cannot read {self.name}: {reason}", "try again later"))

    def _disconnect(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


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


def _is_bad_certificate(error: BaseException) -> bool:
    return "CERTIFICATE_VERIFY_FAILED" in str(error)


def _reason(error: BaseException) -> str:
    """The system's own word for what broke, which lies deep in what the library raises."""
    seen: BaseException | None = error
    while seen is not None:
        inner = next((arg for arg in seen.args if isinstance(arg, BaseException)), None)
        reason = getattr(seen, "reason", None)
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        seen = inner or (reason if isinstance(reason, BaseException) else None) or seen.__cause__ or seen.__context__
    return "the connection broke"
