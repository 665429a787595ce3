"""The part of Ray's job server that `fae submit` talks to, without a cluster; jobs never run."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import ray


class JobServer(ThreadingHTTPServer):
    """Keeps what was submitted as PENDING; tests set a job's status themselves."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.jobs: dict[str, dict[str, Any]] = {}
        self.dropped = 0
        """Requests for a job that end without an answer, as when a port-forward ends."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def job_server() -> Iterator[JobServer]:
    with JobServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: JobServer

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/jobs/")
        if self.path == "/api/version":
            self.answer({"version": "4", "ray_version": ray.__version__, "ray_commit": ""})
        elif self.path == "/api/jobs/":
            self.answer(list(self.server.jobs.values()))
        elif self.path.startswith("/api/jobs/") and self.server.dropped:
            self.server.dropped -= 1
        elif name in self.server.jobs:
            self.answer(self.server.jobs[name])
        else:  # a log's stream is refused, and no package is there yet
            self.answer({}, 404)

    def do_PUT(self) -> None:
        self.body()
        self.answer({})

    def do_POST(self) -> None:
        asked = json.loads(self.body())
        kept = {key: asked.get(key) for key in ("submission_id", "entrypoint", "metadata")}
        self.server.jobs[asked["submission_id"]] = {
            **kept,
            "type": "SUBMISSION",
            "status": "PENDING",
        }
        self.answer({"job_id": asked["submission_id"], "submission_id": asked["submission_id"]})

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def answer(self, value: Any, status: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass
