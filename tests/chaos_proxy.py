"""A proxy before a registry that does what networks do: cuts, refuses, forgets, redirects, waits; and keeps count."""

from __future__ import annotations

import contextlib
import http.client
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BLOCK_BYTES = 64 << 10


@dataclass(frozen=True)
class Seen:
    """A request as it arrived."""

    method: str
    path: str
    headers: Mapping[str, str]
    length: int
    """What it announced."""


@dataclass
class Fault:
    """What happens to requests of a method whose path matches, `times` times (-1: always)."""

    method: str
    path: str
    times: int = 1
    status: int = 0
    """Answer this, without asking the registry."""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut_after: int | None = None
    """Pass on so many bytes of the body, then cut both connections."""
    flip: bool = False
    """Flip the first bit of the body."""
    reply_headers: dict[str, str] = field(default_factory=dict)
    """Replace these in the registry's answer."""
    reply_body: Callable[[bytes], bytes] | None = None
    """Change the body of the registry's answer."""
    cut_reply_after: int | None = None
    """Pass on so many bytes of the registry's answer, then cut the connection."""
    drop_reply: bool = False
    """Let the registry do it, and cut the connection without a word."""
    relative: bool = False
    """Take the host out of the answer's Location."""
    skip: int = 0
    """Let so many pass before."""
    least: int = 0
    """Only for bodies of more bytes than that."""


class ChaosProxy:
    """`with ChaosProxy("127.0.0.1:5000") as proxy:` listens at `proxy.host`."""

    def __init__(self, registry: str, *, buffered: bool = False, address: str = "127.0.0.1") -> None:
        """`buffered`: take in a whole request before the registry hears of it, as nginx does by default."""
        self.registry = registry
        self.buffered = buffered
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.body_bytes: dict[str, int] = {}
        """Method → bytes of bodies that arrived."""
        self.hold_after: int | None = None
        """PATCH bodies stop here, after so many bytes together, until `go_on`."""
        self.held = threading.Event()
        self.go_on = threading.Event()
        self.active = 0
        """Requests that are being served."""
        self.lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            chaos = proxy

        self._server = ThreadingHTTPServer((address, 0), Handler)
        self._server.daemon_threads = True
        self.host = f"{address}:{self._server.server_port}"

    def __enter__(self) -> ChaosProxy:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()

    def requests(self, method: str, path: str = "") -> list[Seen]:
        """Those of a method whose path matches."""
        return [seen for seen in self.seen if seen.method == method and re.search(path, seen.path)]

    def fault(self, method: str, path: str, **what: object) -> None:
        """Add a Fault."""
        self.faults.append(Fault(method, path, **what))  # type: ignore[arg-type]

    def take_fault(self, seen: Seen) -> Fault | None:
        """The fault that this request is to meet."""
        with self.lock:
            for fault in self.faults:
                meant = fault.method == seen.method and seen.length >= fault.least
                if not (meant and fault.times and re.search(fault.path, seen.path)):
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def count(self, method: str, size: int) -> None:
        """Bytes of a body have arrived."""
        with self.lock:
            self.body_bytes[method] = self.body_bytes.get(method, 0) + size
            hold = method == "PATCH" and self.hold_after is not None and self.body_bytes[method] >= self.hold_after
        if hold and not self.go_on.is_set():
            self.held.set()
            self.go_on.wait()


class _Handler(BaseHTTPRequestHandler):
    chaos: ChaosProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _serve(self) -> None:
        with self.chaos.lock:
            self.chaos.active += 1
        try:
            self._pass_on()
        finally:
            with self.chaos.lock:
                self.chaos.active -= 1

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815

    def _pass_on(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        seen = Seen(self.command, self.path, dict(self.headers), length)
        self.chaos.seen.append(seen)
        fault = self.chaos.take_fault(seen) or Fault("", "")
        self.close_connection = True  # one request a connection keeps a cut one simple
        if fault.status:
            for _ in self._body(length):
                pass
            self._reply(fault.status, {**fault.headers, "Content-Length": str(len(fault.body))}, fault.body, fault)
            return
        upstream = http.client.HTTPConnection(self.chaos.registry, timeout=600)
        with contextlib.closing(upstream), contextlib.suppress(OSError, http.client.HTTPException):
            if not self._forward(upstream, length, fault):
                self.connection.close()
                return
            answer = upstream.getresponse()
            headers = {name: value for name, value in answer.getheaders() if name.lower() != "connection"}
            content = answer.read()
            if fault.drop_reply:
                self.connection.close()
                return
            if fault.relative:
                headers["Location"] = headers["Location"].partition(self.headers["Host"])[2]
            if fault.reply_body:
                content = fault.reply_body(content)
                headers["Content-Length"] = str(len(content))
            self._reply(answer.status, {**headers, **fault.reply_headers}, content, fault)

    def _forward(self, upstream: http.client.HTTPConnection, length: int, fault: Fault) -> bool:
        """Whether the whole request went through."""
        blocks = self._body(length)
        if self.chaos.buffered:
            whole = list(blocks)
            if sum(map(len, whole)) != length:
                return False
            blocks = iter(whole)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() != "connection":
                upstream.putheader(name, value)
        upstream.endheaders()
        passed = 0
        for block in blocks:
            if fault.flip and not passed:
                block = bytes([block[0] ^ 1]) + block[1:]
            upstream.send(block)
            passed += len(block)
            if fault.cut_after is not None and passed >= fault.cut_after:
                return False
        return passed == length

    def _body(self, length: int) -> Iterator[bytes]:
        left = length
        while left:
            block = self.rfile.read1(min(left, BLOCK_BYTES))  # type: ignore[attr-defined]
            if not block:
                return
            left -= len(block)
            self.chaos.count(self.command, len(block))
            yield block

    def _reply(self, status: int, headers: Mapping[str, str], content: bytes, fault: Fault) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: fault.cut_reply_after])
