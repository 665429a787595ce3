"""A server on loopback that speaks those calls of the Hugging Face Hub that its own client makes
here.

Repositories, their files and one commit each are in memory; another branch is a repository of its
own, `datasets/OWNER/NAME@refs/convert/parquet` for one. A private repository and every write
need the token. `requests` records method, path and range of each call.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopback_secret_0123456789"
Files = dict[str, bytes]


class HubServer:
    """The state of the server: files by path of each repository, `models/OWNER/NAME` for one."""

    def __init__(self) -> None:
        self.repositories: dict[str, Files] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.url = ""

    def add(self, repository: str, files: Files) -> None:
        self.repositories[repository] = dict(files)

    def ranges(self, path: str) -> list[str]:
        """The byte ranges that were read of files whose path ends with `path`."""
        return [r for method, p, r in self.requests if method == "GET" and r and p.endswith(path)]


def commit_of(files: Files) -> str:
    """The id of the one commit of a repository: it changes with the files."""
    digest = hashlib.sha1(usedforsecurity=False)
    for path in sorted(files):
        digest.update(path.encode() + hashlib.sha1(files[path], usedforsecurity=False).digest())
    return digest.hexdigest()


def blob_id(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: HubServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            body = b"".join(self._chunks())
        split = urlsplit(self.path)
        path = unquote(split.path)
        self.state.requests.append((self.command, path, self.headers.get("Range")))
        for pattern, method in _ROUTES:
            if match := re.fullmatch(pattern, split.path):
                groups = [group and unquote(group) for group in match.groups()]
                try:
                    getattr(self, method)(body, parse_qs(split.query), *groups)
                except KeyError:
                    self._send({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})
                return
        self._send({"error": f"unknown call {self.command} {path}"}, 404)

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().strip() or b"0", 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def _is_owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _files(self, kind: str, name: str, revision: str = "main") -> Files:
        repository = f"{kind}/{name}"
        if repository in self.state.private and not self._is_owner:
            raise KeyError(repository)
        files = self.state.repositories[repository]
        return self.state.repositories.get(f"{repository}@{revision}", files)

    def _refused(self) -> bool:
        if self._is_owner:
            return False
        self._send({"error": "a token that may write is needed"}, 401)
        return True

    def create(self, body: bytes, _: Any) -> None:
        if self._refused():
            return
        asked = json.loads(body)
        kind = f"{asked.get('type', 'model')}s"
        owner = f"{asked['organization']}/" if asked.get("organization") else "me/"
        name = asked["name"] if "/" in asked["name"] else owner + asked["name"]
        if f"{kind}/{name}" in self.state.repositories:
            answer = {"error": "You already created this repo", "url": f"{self.state.url}/{name}"}
            self._send(answer, 409)
            return
        self.state.repositories[f"{kind}/{name}"] = {}
        if asked.get("private") or asked.get("visibility") == "private":
            self.state.private.add(f"{kind}/{name}")
        self._send({"url": f"{self.state.url}/{name}", "name": name, "id": name})

    def validate(self, body: bytes, _: Any) -> None:
        self._send({"errors": [], "warnings": []})

    def preupload(self, body: bytes, _: Any, kind: str, name: str, revision: str) -> None:
        if self._refused():
            return
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        self._send({"files": files})

    def lfs(self, body: bytes, _: Any, name: str) -> None:
        objects = [
            {
                **asked,
                "actions": {"upload": {"href": f"{self.state.url}/lfs-object/{asked['oid']}"}},
            }
            for asked in json.loads(body)["objects"]
        ]
        self._send({"transfer": "basic", "objects": objects})

    def store_object(self, body: bytes, _: Any, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.state.objects[oid] = body
        self._send({})

    def commit(self, body: bytes, _: Any, kind: str, name: str, revision: str) -> None:
        if self._refused():
            return
        files = self._files(kind, name)
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.state.objects[value["oid"]]
        commit = commit_of(files)
        self._send({"commitUrl": f"{self.state.url}/{name}/commit/{commit}", "commitOid": commit})

    def repository(self, body: bytes, _: Any, kind: str, name: str, *revision: str) -> None:
        files = self._files(kind, name, *revision)
        branches = [b.partition("@")[2] for b in self.state.repositories if f"/{name}@" in b]
        if revision and revision[0] not in ("main", commit_of(files), *branches):
            self._send({"error": "no revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [{"rfilename": path} for path in sorted(files)]
        private = f"{kind}/{name}" in self.state.private
        about = {"id": name, "sha": commit_of(files), "siblings": siblings, "private": private}
        self._send({**about, "tags": [], "downloads": 0, "likes": 0, "disabled": False})

    def tree(
        self, body: bytes, query: Any, kind: str, name: str, revision: str, below: str | None
    ) -> None:
        files, folder = self._files(kind, name, revision), (below or "").strip("/")
        prefix = f"{folder}/" if folder else ""
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        found: dict[str, Any] = {}
        for path in sorted(files):
            if not path.startswith(prefix):
                continue
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)):
                if depth == 1 or recursive:
                    parent = prefix + "/".join(parts[:depth])
                    found[parent] = _folder(parent)
            if recursive or len(parts) == 1:
                found[path] = _file(path, files[path])
        if folder and not found:
            self._send({"error": "no path"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        self._send(list(found.values()))

    def paths_info(self, body: bytes, _: Any, kind: str, name: str, revision: str) -> None:
        files = self._files(kind, name, revision)
        text = body.decode()
        asked = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
        found = []
        for path in [asked] if isinstance(asked, str) else asked:
            if path in files:
                found.append(_file(path, files[path]))
            elif any(other.startswith(f"{path}/") for other in files):
                found.append(_folder(path))
        self._send(found)

    def resolve(
        self, body: bytes, _: Any, dataset: str | None, name: str, revision: str, path: str
    ) -> None:
        files = self._files("datasets" if dataset else "models", name, revision)
        if path not in files:
            self._send({"error": "no file"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        data = files[path]
        headers = {
            "X-Repo-Commit": commit_of(files),
            "ETag": f'"{blob_id(data)}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, stop = int(match[1]), int(match[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{stop}/{len(data)}"
            self._send(data[start : stop + 1], 206, headers)
            return
        self._send(data, 200, headers)


_ROUTES = [
    (r"/api/repos/create", "create"),
    (r"/api/validate-yaml", "validate"),
    (r"/api/(models|datasets)/([^/]+/[^/]+)/preupload/(.+)", "preupload"),
    (r"/api/(models|datasets)/([^/]+/[^/]+)/commit/(.+)", "commit"),
    (r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(/.*)?/?", "tree"),
    (r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/(.+)", "paths_info"),
    (r"/api/(models|datasets)/([^/]+/[^/]+)/revision/(.+)", "repository"),
    (r"/api/(models|datasets)/([^/]+/[^/]+)", "repository"),
    (r"/(?:datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs"),
    (r"/lfs-object/(\w+)", "store_object"),
    (r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
]


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": blob_id(path.encode()), "size": 0}


def _file(path: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "oid": blob_id(data), "size": len(data)}


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A running server; it stops at the end."""
    state = HubServer()
    handler = type("Handler", (_Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
