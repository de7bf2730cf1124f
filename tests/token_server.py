"""A token service as docker-registry trusts it: tokens for whoever has the password, for the scopes that it allows."""

from __future__ import annotations

import base64
import json
import subprocess
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.services import tool

ISSUER, SERVICE = "the tests", "a registry"


class TokenServer:
    """`with TokenServer(directory, "user", "password") as tokens:`; `tokens.auth` is the registry's setting."""

    def __init__(self, directory: Path, username: str, password: str) -> None:
        self.login = f"Basic {base64.b64encode(f'{username}:{password}'.encode()).decode()}"
        self.refresh_token = "an-identity-token"
        self.asked: list[tuple[str, str]] = []
        """Method and scopes of each request."""
        self.issued: list[str] = []
        self.lifetime = 300
        self._key, self._certificate = directory / "key.pem", directory / "certificate.pem"
        tool(
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", self._key, "-out", self._certificate,
            "-subj", "/CN=tests", "-days", "2",
        )  # fmt: skip
        tokens = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                """Say nothing."""

            def do_GET(self) -> None:
                query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
                self._grant(query["scope"], self.headers.get("Authorization") in (None, tokens.login), "GET")

            def do_POST(self) -> None:
                form = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                self._grant(form["scope"][0].split(" "), form["refresh_token"] == [tokens.refresh_token], "POST")

            def _grant(self, scopes: list[str], known: bool, method: str) -> None:
                tokens.asked.append((method, " ".join(scopes)))
                anonymous = method == "GET" and not self.headers.get("Authorization")
                content = b"{}"
                if known:
                    name = "access_token" if method == "POST" else "token"
                    content = json.dumps(
                        {name: tokens.issue(scopes, anonymous), "expires_in": tokens.lifetime}
                    ).encode()
                self.send_response(200 if known else 401)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/token"
        self.auth = (
            f"{{token: {{realm: '{self.url}', service: {SERVICE}, issuer: {ISSUER}, "
            f"rootcertbundle: '{self._certificate}'}}}}"
        )

    def __enter__(self) -> TokenServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def issue(self, scopes: list[str], anonymous: bool) -> str:
        """A signed token. Nobody in particular may pull only."""
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":")
            granted = [action for action in actions.split(",") if action == "pull" or not anonymous]
            access.append({"type": kind, "name": name, "actions": granted})
        der = "".join(self._certificate.read_text().splitlines()[1:-1])
        now = int(time.time())
        claims = {
            "iss": ISSUER, "sub": "", "aud": SERVICE, "exp": now + self.lifetime, "nbf": now - 10, "iat": now,
            "jti": str(len(self.issued)), "access": access,
        }  # fmt: skip
        signed = f"{_encoded({'typ': 'JWT', 'alg': 'RS256', 'x5c': [der]})}.{_encoded(claims)}"
        command = ["openssl", "dgst", "-sha256", "-sign", self._key]
        signature = subprocess.run(command, input=signed.encode(), capture_output=True, check=True).stdout
        self.issued.append(f"{signed}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}")
        return self.issued[-1]


def _encoded(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()
