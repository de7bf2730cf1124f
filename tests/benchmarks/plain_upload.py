"""The plainest upload to a registry: python -m tests.benchmarks.plain_upload HOST:PORT FILE=SHA256 …, all at once."""

from __future__ import annotations

import http.client
import sys
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def upload(host: str, path: Path, digest: str) -> None:
    """One POST, and one PUT of the whole file."""
    connection = http.client.HTTPConnection(host, blocksize=1 << 20)
    connection.request("POST", "/v2/plain/blobs/uploads/", b"")
    begun = connection.getresponse()
    begun.read()
    place = urllib.parse.urlsplit(begun.headers["Location"])
    with path.open("rb") as source:
        headers = {"Content-Length": str(path.stat().st_size)}
        connection.request("PUT", f"{place.path}?{place.query}&digest=sha256:{digest}", source, headers)
    if connection.getresponse().status != 201:
        sys.exit(f"{path} was refused")


if __name__ == "__main__":
    files = [argument.rsplit("=", 1) for argument in sys.argv[2:]]
    with ThreadPoolExecutor(len(files)) as pool:
        list(pool.map(lambda file: upload(sys.argv[1], Path(file[0]), file[1]), files))
