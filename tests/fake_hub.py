"""A Hub on this machine: the requests that huggingface_hub makes to find and download a model, answered over HTTP.

Two servers, as in reality: the Hub, which answers for large files with a redirect, and a store that serves their bytes.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

COMMIT = "1234567890abcdef1234567890abcdef12345678"
OTHER_COMMIT = "abcdef1234567890abcdef1234567890abcdef12"


class FakeHub:
    """Serves folders as repositories.

    Attributes:
        repos: Folder by repository and revision; a commit is a revision, too.
        gated: Repositories that need a token.
        requests: (server, method, path, range header, authorization header) of every request so far.
        before: Called with server, method and path before each answer; may raise ConnectionError to cut the line.
        ignore_ranges: Answer with the whole file whatever was asked.
        xet: Say of large files that they are stored in Xet, as the Hub does of nearly all.
        forbidden: Paths that are answered with status 403 and a reason.
        failing: Names of files whose next whole download is answered with status 503.
        pieces: How the store cuts what it sends.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Path] = {}
        self.gated: set[str] = set()
        self.requests: list[tuple[str, str, str, str | None, str | None]] = []
        self.before: Callable[[str, str, str], object] = lambda server, method, path: None
        self.ignore_ranges = False
        self.xet = False
        self.forbidden: set[str] = set()
        self.failing: set[str] = set()
        self.pieces: Callable[[bytes], Iterable[bytes]] = lambda data: [data]
        self._servers = [_serve(self, "hub"), _serve(self, "store")]
        self.endpoint, self.store = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def add(self, repo: str, folder: Path, *, commit: str = COMMIT, revision: str = "main") -> None:
        """Make a folder a commit of a repository."""
        self.repos[repo, revision] = self.repos[repo, commit] = folder

    def bytes_of(self, method: str = "GET", *, suffix: str = ".safetensors") -> list[tuple[str, str | None]]:
        """Name and range of each request that got bytes of a file."""
        return [
            (path.rsplit("/", 1)[-1], wanted)
            for server, how, path, wanted, _ in self.requests
            if server == "store" and how == method and path.endswith(suffix)
        ]

    def close(self) -> None:
        """Stop answering."""
        for server in self._servers:
            server.shutdown()
            server.server_close()


def commit_of(hub: FakeHub, repo: str, revision: str) -> str:
    folder = hub.repos[repo, revision]
    return next(name for (r, name), f in hub.repos.items() if r == repo and f == folder and len(name) == 40)


def _serve(hub: FakeHub, name: str) -> ThreadingHTTPServer:
    handler = type("Handler", (_Handler,), {"hub": hub, "name": name})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    name: str
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.requests.append(
            (self.name, self.command, path, self.headers.get("Range"), self.headers.get("Authorization"))
        )
        try:
            self.hub.before(self.name, self.command, path)
            if self.name == "store" and self.headers.get("Range") is None and Path(path).name in self.hub.failing:
                self.hub.failing.discard(Path(path).name)
                self._send(503, b"", {})
            elif self.name == "store":
                self._file(Path("/" + path.lstrip("/")))
            elif path.startswith("/api/models/"):
                self._api(path.removeprefix("/api/models/"), parse_qs(url.query))
            else:
                self._resolve(path.lstrip("/"))
        except ConnectionError:
            self.close_connection = True
            self.connection.close()

    def _api(self, path: str, query: dict[str, list[str]]) -> None:
        owner, name, *rest = path.split("/")
        repo, what, revision = f"{owner}/{name}", rest[0] if rest else "revision", "/".join(rest[1:]) or "main"
        if not self._exists(repo, revision):
            return
        folder = self.hub.repos[repo, revision]
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        if what == "tree":
            self._json([_tree_entry(folder, file) for file in files])
        else:
            siblings = [{"rfilename": str(file.relative_to(folder)), "size": file.stat().st_size} for file in files]
            if "blobs" not in query:
                siblings = [{"rfilename": sibling["rfilename"]} for sibling in siblings]
            self._json({"id": repo, "sha": commit_of(self.hub, repo, revision), "siblings": siblings})

    def _resolve(self, path: str) -> None:
        head, _, tail = path.partition("/resolve/")
        revision, _, name = tail.partition("/")
        if not self._exists(head, revision):
            return
        if head in self.hub.gated and self.headers.get("Authorization") is None:
            return self._refuse(401, "GatedRepo")
        if name in self.hub.forbidden:
            return self._refuse(403, "NotAllowed")
        file = self.hub.repos[head, revision] / name
        if not file.is_file():
            return self._refuse(404, "EntryNotFound")
        headers = {"X-Repo-Commit": commit_of(self.hub, head, revision), "ETag": f'"{_digest(file)}"'}
        if file.suffix == ".safetensors":
            headers |= {"X-Linked-Size": str(file.stat().st_size), "X-Linked-Etag": headers["ETag"]}
            if self.hub.xet:
                refresh = f"{self.hub.endpoint}/api/models/{head}/xet-read-token/{revision}"
                headers |= {"X-Xet-Hash": _digest(file), "X-Xet-Refresh-Route": refresh}
            return self._send(302, b"", headers | {"Location": f"{self.hub.store}{file}"})
        return self._file(file, headers)

    def _file(self, file: Path, headers: dict[str, str] | None = None) -> None:
        data, headers = file.read_bytes(), {"Accept-Ranges": "bytes", **(headers or {})}
        wanted = self.headers.get("Range")
        if wanted is None or self.hub.ignore_ranges:
            return self._send(200, data, headers)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1 if last else None]
        range_of = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        return self._send(206, part, headers | {"Content-Range": range_of})

    def _exists(self, repo: str, revision: str) -> bool:
        if not any(name == repo for name, _ in self.hub.repos):
            self._refuse(401, "RepoNotFound")
        elif (repo, revision) not in self.hub.repos:
            self._refuse(404, "RevisionNotFound")
        return (repo, revision) in self.hub.repos

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            for piece in self.hub.pieces(data) if self.name == "store" else [data]:
                self.wfile.write(piece)


def _tree_entry(folder: Path, file: Path) -> dict[str, object]:
    entry: dict[str, object] = {
        "type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": _digest(file)[:40]
    }  # fmt: skip
    if file.suffix == ".safetensors":
        entry["lfs"] = {"size": file.stat().st_size, "oid": _digest(file), "pointerSize": 134}
    return entry


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that huggingface_hub takes for the real one, with empty caches."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _cache_assets

    server = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(_cache_assets, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between two tries
    yield server
    server.close()
