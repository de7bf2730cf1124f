"""A Hugging Face Hub on this machine: the API that huggingface_hub speaks, over real files, with faults on demand."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import select
import socket
import sys
import threading
import urllib.parse
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

LFS_BYTES = 10 << 20
"""Files from this size on are LFS files on the Hub, whatever their name."""

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx")
BLOCK_BYTES = 1 << 18
PAGE_ENTRIES = 8
"""Of a listing; the real Hub's 1000 would leave the following of pages untried."""


def git_blob_id(data: bytes) -> str:
    """What git calls a blob of these bytes (40 hex digits)."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Entry:
    """One file of a repository."""

    path: str
    content: Path | bytes

    def read(self) -> bytes:
        """Its bytes."""
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()

    @cached_property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @property
    def lfs(self) -> bool:
        """Whether git holds only a pointer to it."""
        return self.size >= LFS_BYTES or self.path.endswith(LFS_SUFFIXES)

    @cached_property
    def sha256(self) -> str:
        """64 hex digits."""
        return hashlib.sha256(self.read()).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git holds in its place."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @cached_property
    def blob_id(self) -> str:
        """The git blob id of the file, or of its pointer."""
        return git_blob_id(self.pointer if self.lfs else self.read())

    @property
    def etag(self) -> str:
        """What the Hub's cache calls it by."""
        return self.sha256 if self.lfs else self.blob_id

    def sibling(self, blobs: bool) -> dict[str, Any]:
        """As `/api/models/…` lists it."""
        if not blobs:
            return {"rfilename": self.path}
        lfs = {"sha256": self.sha256, "size": self.size, "pointerSize": len(self.pointer)}
        return {"rfilename": self.path, "size": self.size, "blobId": self.blob_id, **({"lfs": lfs} if self.lfs else {})}

    def leaf(self) -> dict[str, Any]:
        """As `/api/models/…/tree/…` lists it."""
        lfs = {"oid": self.sha256, "size": self.size, "pointerSize": len(self.pointer)}
        leaf = {"type": "file", "path": self.path, "size": self.size, "oid": self.blob_id}
        return {**leaf, "lfs": lfs} if self.lfs else leaf


@dataclass(frozen=True)
class Repository:
    """A model on the Hub: its commits, and the branches and tags that name them."""

    repo_id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Fault:
    """What goes wrong with a file, the first `times` that its bytes are asked for (None: always)."""

    cut_at: int | None = None
    """The connection breaks before this byte."""
    stall_at: int | None = None
    """At this byte's block `Hub.stalled` is set, and nothing is sent until `Hub.go_on` is, or the client goes away."""
    flip_at: int | None = None
    """The lowest bit of this byte is wrong."""
    status: int | None = None
    """Answered instead of the file."""
    times: int | None = None


@dataclass(frozen=True)
class Request:
    """What was asked for and how it went."""

    server: str
    """`hub` or `cdn`."""
    method: str
    target: str
    """The path in the URL, still quoted."""
    token: str | None
    path: str | None = None
    """The model's file, if its bytes were asked for."""
    sent: int = 0
    """Bytes of the file."""


class Hub:
    """Repositories behind two servers: the Hub itself, and the CDN that it sends clients to for LFS files."""

    def __init__(self, port: int = 0) -> None:
        self.repositories: dict[str, Repository] = {}
        self.tokens: dict[str, set[str]] = {}
        """Token → the private and gated repositories that it opens."""
        self.faults: dict[str, Fault] = {}
        """By the path of a file; "/api/" stands for what is asked about repositories."""
        self.requests: list[Request] = []
        self.stalled = threading.Event()
        self.go_on = threading.Event()
        self._closing = threading.Event()
        self._lock = threading.Condition()
        self._running = 0
        # Two addresses of the loopback: to a client they are different hosts.
        self._servers = [_Server(("127.0.0.1", port), self, "hub"), _Server(("127.0.0.2", 0), self, "cdn")]
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        """For HF_ENDPOINT."""
        return self._servers[0].url

    @property
    def cdn_url(self) -> str:
        """Where LFS files come from."""
        return self._servers[1].url

    def close(self) -> None:
        """Stop both servers."""
        self._closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def __enter__(self) -> Hub:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def add(
        self,
        repo_id: str,
        files: Path | Mapping[str, Path | bytes],
        *revisions: str,
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Commit `files` (path → content, or a directory) to `repo_id` as `revisions` (`main`); return the commit."""
        if isinstance(files, Path):
            files = {str(p.relative_to(files)): p for p in sorted(files.rglob("*")) if p.is_file()}
        entries = {path: Entry(path, content) for path, content in files.items()}
        commit = hashlib.sha1(json.dumps([repo_id, [e.leaf() for e in entries.values()]]).encode()).hexdigest()
        repository = self.repositories.setdefault(repo_id, Repository(repo_id, private, gated))
        repository.commits[commit] = entries
        repository.revisions.update(dict.fromkeys(revisions or ("main",), commit))
        return commit

    def fetched(self) -> dict[str, int]:
        """Path → bytes sent of it, of every file of which any byte was asked for."""
        found: dict[str, int] = {}
        with self._lock:
            # A client may have its answer before the request counts as over here.
            assert self._lock.wait_for(lambda: not self._running, timeout=300)
            for request in self.requests:
                if request.path is not None:
                    found[request.path] = found.get(request.path, 0) + request.sent
        return found

    def begin(self) -> None:
        """A request has come in."""
        with self._lock:
            self._running += 1

    def end(self, request: Request) -> None:
        """It is over."""
        with self._lock:
            self._running -= 1
            self.requests.append(request)
            self._lock.notify_all()

    def take_fault(self, path: str) -> Fault:
        """The fault to show now; it is used up once."""
        with self._lock:
            fault = self.faults.get(path, Fault())
            if fault.times is not None:
                left = dataclasses.replace(fault, times=fault.times - 1)
                self.faults[path] = left if left.times else Fault()
            return fault

    def stall(self, connection: socket.socket) -> None:
        """Wait for `go_on`, or for the client to go away, or for the hub to close."""
        with self._lock:
            self._running -= 1
            self._lock.notify_all()
        self.stalled.set()
        try:
            while not self.go_on.wait(0.02) and not self._closing.is_set():
                readable, _, _ = select.select([connection], [], [], 0)
                if readable and not connection.recv(1, socket.MSG_PEEK):
                    break
        finally:  # a client that was killed resets the connection
            self.begin()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], hub: Hub, name: str) -> None:
        self.hub, self.name = hub, name
        super().__init__(address, _Handler)
        self.url = f"http://{address[0]}:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is not worth a traceback; anything else is a bug of these tests."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Answer(Exception):  # noqa: N818
    """Ends a request with a status and headers, as the Hub words them."""

    def __init__(self, status: int, message: str = "", code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {**headers, **({"X-Error-Message": message} if message else {})}
        if code:
            self.headers["X-Error-Code"] = code


_API = re.compile(r"/api/models/(?P<repo>[^/]+(/[^/]+)?)(/(?P<what>revision|tree)/(?P<revision>[^/]+)(/.*)?)?")
_SMALL = re.compile(r"/api/resolve-cache/models/(?P<repo>[^/]+(/[^/]+)?)/(?P<revision>[0-9a-f]{40})/(?P<path>.+)")
_RESOLVE = re.compile(r"/(?P<repo>[^/]+(/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        split = urllib.parse.urlsplit(self.path)
        self.target, self.query = split.path, dict(urllib.parse.parse_qsl(split.query))
        token = self.headers.get("Authorization")
        self.token = token.removeprefix("Bearer ") if token else None
        self.seen = Request(self.server.name, self.command, self.target, self.token)
        self.server.hub.begin()
        try:
            self._route()
        except _Answer as answer:
            body = json.dumps({"error": answer.message}).encode() if answer.message else b""
            self._send(answer.status, body, answer.headers)
        finally:
            self.server.hub.end(self.seen)

    def _route(self) -> None:
        if self.server.name == "cdn":
            if self.token:
                raise _Answer(400, "a token was sent to the CDN")
            match = _RESOLVE.fullmatch(self.target)
            assert match, self.target
            return self._content(self._entry(match)[1], {})
        if match := _SMALL.fullmatch(self.target):
            commit, entry = self._entry(match)
            return self._content(entry, {"X-Repo-Commit": commit, "ETag": f'"{entry.etag}"'})
        if match := _RESOLVE.fullmatch(self.target):
            return self._resolve(match)
        if match := _API.fullmatch(self.target):
            fault = self.server.hub.take_fault("/api/")
            if fault.status:
                raise _Answer(fault.status, "the Hub is unwell")
            if fault.stall_at is not None:
                self.server.hub.stall(self.connection)
            repository, commit = self._revision(match)
            return self._tree(repository, commit) if match["what"] == "tree" else self._info(repository, commit)
        raise _Answer(404, "no such page")

    def _repository(self, repo_id: str) -> Repository:
        hub = self.server.hub
        if self.token is not None and self.token not in hub.tokens:
            raise _Answer(401, "Invalid credentials in Authorization header")
        repository = hub.repositories.get(urllib.parse.unquote(repo_id))
        if repository is None or (repository.private and not self._opens(repository)):
            if self.token:
                raise _Answer(404, "Repository not found", "RepoNotFound")
            raise _Answer(401, "Invalid username or password.", "RepoNotFound")
        return repository

    def _opens(self, repository: Repository) -> bool:
        return repository.repo_id in self.server.hub.tokens.get(self.token or "", ())

    def _revision(self, match: re.Match[str]) -> tuple[Repository, str]:
        repository = self._repository(match["repo"])
        revision = urllib.parse.unquote(match["revision"] or "main")
        commit = repository.revisions.get(revision, revision)
        if commit not in repository.commits:
            raise _Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository, commit

    def _entry(self, match: re.Match[str]) -> tuple[str, Entry]:
        if self.server.name == "cdn":  # its URLs are signed: whoever has one is let in
            repository = self.server.hub.repositories[urllib.parse.unquote(match["repo"])]
            commit = match["revision"]
        else:
            repository, commit = self._revision(match)
            if repository.gated and not self._opens(repository):
                raise _Answer(403 if self.token else 401, "Access to this model is restricted.", "GatedRepo")
        path = urllib.parse.unquote(match["path"])
        if path not in repository.commits[commit]:
            raise _Answer(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit})
        return commit, repository.commits[commit][path]

    def _info(self, repository: Repository, commit: str) -> None:
        entries = repository.commits[commit].values()
        self._send_json({
            "_id": commit[:24], "id": repository.repo_id, "modelId": repository.repo_id, "sha": commit,
            "private": repository.private, "gated": "auto" if repository.gated else False, "disabled": False,
            "tags": [], "downloads": 0, "likes": 0, "lastModified": "2024-01-01T00:00:00.000Z",
            "siblings": [entry.sibling("blobs" in self.query) for entry in entries],
        })  # fmt: skip

    def _tree(self, repository: Repository, commit: str) -> None:
        entries = repository.commits[commit].values()
        folders = sorted({str(parent) for e in entries for parent in Path(e.path).parents if str(parent) != "."})
        leaves = [{"type": "directory", "path": path, "size": 0, "oid": git_blob_id(path.encode())} for path in folders]
        leaves += [entry.leaf() for entry in entries]
        start = int(self.query.get("cursor", 0))
        headers = {}
        if start + PAGE_ENTRIES < len(leaves):
            query = urllib.parse.urlencode({**self.query, "cursor": start + PAGE_ENTRIES})
            headers["Link"] = f'<{self.server.hub.url}{self.target}?{query}>; rel="next"'
        self._send_json(leaves[start : start + PAGE_ENTRIES], headers)

    def _resolve(self, match: re.Match[str]) -> None:
        commit, entry = self._entry(match)
        fault = self.server.hub.faults.get(entry.path, Fault())
        if fault.status:
            raise _Answer(self.server.hub.take_fault(entry.path).status or 500, "the Hub is unwell")
        repo, path = match["repo"], match["path"]
        headers = {"X-Repo-Commit": commit, "X-Linked-Size": str(entry.size), "X-Linked-ETag": f'"{entry.etag}"'}
        if entry.lfs:
            headers["Location"] = f"{self.server.hub.cdn_url}/{repo}/resolve/{commit}/{path}?X-Amz-Signature=signed"
            return self._send(302, b"", headers)
        headers["Location"] = f"/api/resolve-cache/models/{repo}/{commit}/{path}"
        return self._send(307, b"", headers)

    def _content(self, entry: Entry, headers: dict[str, str]) -> None:
        start = 0
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(wanted[1])
            if start >= entry.size:
                raise _Answer(416, "Range not satisfiable", **{"Content-Range": f"bytes */{entry.size}"})
            headers["Content-Range"] = f"bytes {start}-{entry.size - 1}/{entry.size}"
        self.send_response(206 if start else 200)
        headers = {"Accept-Ranges": "bytes", "Content-Length": str(entry.size - start), **headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self._send_bytes(entry, start, self.server.hub.take_fault(entry.path))

    def _send_bytes(self, entry: Entry, start: int, fault: Fault) -> None:
        data = bytearray(entry.read())
        if fault.flip_at is not None:
            data[fault.flip_at] ^= 1
        end = entry.size if fault.cut_at is None else max(start, fault.cut_at)
        self.seen = dataclasses.replace(self.seen, path=entry.path)
        for offset in range(start, end, BLOCK_BYTES):
            if fault.stall_at is not None and offset <= fault.stall_at < offset + BLOCK_BYTES:
                self.server.hub.stall(self.connection)
            block = memoryview(data)[offset : min(offset + BLOCK_BYTES, end)]
            self.wfile.write(block)
            self.seen = dataclasses.replace(self.seen, sent=self.seen.sent + len(block))
        if end < entry.size:
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def _send_json(self, value: object, headers: Mapping[str, str] = {}) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def main() -> None:
    """Serve every ROOT/ORG/NAME as a repository until interrupted; the URL is the first line of stdout."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--root", type=Path, required=True, help="directory that holds ORG/NAME/ directories")
    parser.add_argument("--port", type=int, default=0, help="of the Hub's server (0: any)")
    arguments = parser.parse_args()
    with Hub(arguments.port) as hub:
        for directory in sorted(arguments.root.glob("*/*/")):
            hub.add(f"{directory.parent.name}/{directory.name}", directory)
        print(hub.url, flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
