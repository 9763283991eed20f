"""A stand-in for the Hugging Face hub on 127.0.0.1: one dataset repository, laid out as the published export is."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REPO = "someone/export"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubStandIn:
    """The repository's files, what goes wrong with them, and what was asked for.

    `.bin` files are in large file storage, whose content the hub redirects to; all others are git blobs.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = dict(files)
        self.endpoint = ""
        self.cuts: dict[str, list[int]] = {}
        """By path: bytes after which the connection breaks, one number for each coming transfer."""
        self.damaged: set[str] = set()
        """Paths that come with one bit flipped."""
        self.unlisted: set[str] = set()
        """Paths that are listed and yet not there."""
        self.status = 200
        """Of every answer."""
        self.served: Counter[str] = Counter()
        """Bytes sent, by path."""
        self.requests = 0

    def info(self, path: str) -> dict[str, Any]:
        """What the hub says of a file."""
        content = self.files[path]
        blob = hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()
        info: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob}
        if path.endswith(".bin"):
            sha256 = hashlib.sha256(content).hexdigest()
            info["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
        return info


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[HubStandIn]:
    """Serve a repository on a free port of this machine."""
    hub = HubStandIn(files)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: HubStandIn

    def do_GET(self) -> None:
        self.hub.requests += 1
        path = unquote(urlsplit(self.path).path)
        if self.hub.status != 200:
            self._answer(self.hub.status, b"{}")
        elif found := re.fullmatch(rf"/api/datasets/{REPO}(?:/revision/(.+))?", path):
            if self._knows(found[1] or "main"):
                counts = {"downloads": 0, "likes": 0, "private": False, "disabled": False, "tags": []}
                self._json({"id": REPO, "sha": COMMIT, "siblings": [], **counts})
        elif found := re.fullmatch(rf"/datasets/{REPO}/resolve/([^/]+)/(.+)", path):
            if self._knows(found[1]):
                self._resolve(found[2])
        elif path.startswith("/storage/"):
            self._content(path.removeprefix("/storage/"))
        else:
            self._missing("RepoNotFound")

    def do_POST(self) -> None:
        self.hub.requests += 1
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        found = re.fullmatch(rf"/api/datasets/{REPO}/paths-info/(.+)", self.path)
        if found and self._knows(found[1]):
            self._json([self.hub.info(path) for path in form["paths"] if path in self.hub.files])
        elif not found:
            self._missing("RepoNotFound")

    def _knows(self, revision: str) -> bool:
        known = revision in ("main", COMMIT)
        if not known:
            self._missing("RevisionNotFound")
        return known

    def _resolve(self, path: str) -> None:
        if path not in self.hub.files or path in self.hub.unlisted:
            self._missing("EntryNotFound")
        elif path.endswith(".bin"):
            self._answer(302, b"", Location=f"{self.hub.endpoint}/storage/{path}")
        else:
            self._content(path)

    def _content(self, path: str) -> None:
        content = self.hub.files[path]
        if path in self.hub.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])  # type: ignore[index]
        body = content[start:]
        cuts = self.hub.cuts.get(path)
        stop = min(cuts.pop(0), len(body)) if cuts else len(body)
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(body)))
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{self.hub.info(path)["oid"]}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        try:
            self.wfile.write(body[:stop])
            self.hub.served[path] += stop
        except OSError:  # the client went away
            self.close_connection = True
        if stop < len(body):
            self.close_connection = True

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _missing(self, code: str) -> None:
        self._answer(404, b"", **{"X-Error-Code": code})

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass
