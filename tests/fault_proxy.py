"""An HTTP proxy on loopback that misbehaves on request: what stands between a test and its S3
server.

Faults are real ones: 503 answers, latency, a frozen endpoint, one that is not there for a while,
and connections that are cut before a request's body or the answer's is through. It counts requests
and bytes, which shows what was read.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

CHUNK = 16 * 1024
HOP_HEADERS = ("connection", "keep-alive", "transfer-encoding", "expect", "content-length")
Kind = Literal["503", "cut upload", "cut answer", "answer lost"]


@dataclass
class _Fault:
    kind: Kind
    left: int
    matches: Callable[[str, str], bool]


class FaultProxy:
    """Forwards `url` to `upstream` (both http://host:port); use it as a context manager."""

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.latency = 0.0
        """Seconds before each request is passed on."""
        self.busy = False
        """Every request is answered 503 SlowDown while it is set."""
        self.put_limit: int | None = None
        """Bytes that one PUT may have; a larger one is answered 400 EntityTooLarge."""
        self.ignores_ranges = False
        """Answers have the whole object, whatever range was asked for."""
        self.refusal: tuple[int, str, str] | None = None
        """(status, code, word): the answer to every request whose path has the word."""
        self.last_headers: Mapping[str, str] = {}
        """Of the last request."""
        self.requests: Counter[str] = Counter()
        """By method, and by "METHOD status"."""
        self.bytes_down = 0
        """Bytes of answers' bodies, as passed to clients."""
        self.injected: Counter[str] = Counter()
        """Faults by kind that clients have met."""
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        self._flowing = threading.Event()
        self._flowing.set()
        self.num_held = 0
        """Requests that wait for `release`."""
        self._held_method = ""
        self._released = threading.Event()
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        self.start()
        self.url = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *exception: object) -> None:
        self.thaw()
        self.release()
        self.stop()

    def start(self) -> None:
        """Listen, after `stop` on the same port again."""
        self._server = _Server(("127.0.0.1", self._port), _handler_of(self))
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Close the port: clients are refused, as by a server that restarts."""
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server.hang_up()
            self._server = None

    def freeze(self) -> None:
        """Stop passing bytes; connections stay open and new ones are accepted, as by a stopped
        process."""
        self._flowing.clear()

    def thaw(self) -> None:
        self._flowing.set()

    def hold(self, method: str) -> None:
        """Keep all requests of `method` waiting, counted by `num_held`, until `release`."""
        self._released.clear()
        self._held_method = method

    def release(self) -> None:
        self._held_method = ""
        self._released.set()

    def inject(
        self, kind: Kind, times: int, matches: Callable[[str, str], bool] = lambda m, p: True
    ) -> None:
        """Let the next `times` requests whose (method, path) match meet a fault.

        503: the server says SlowDown. cut upload: reset in the middle of the request's body. cut
        answer: reset in the middle of the answer's body. answer lost: the server has done it, and
        the client never hears of it.
        """
        with self._lock:
            self._faults.append(_Fault(kind, times, matches))

    def take(self, method: str, path: str) -> Kind | None:
        with self._lock:
            if self.busy:
                self.injected["503"] += 1
                return "503"
            for fault in self._faults:
                if fault.left and fault.matches(method, path):
                    fault.left -= 1
                    self.injected[fault.kind] += 1
                    return fault.kind
        return None

    def count(self, *names: str, down: int = 0) -> None:
        with self._lock:
            self.requests.update(names)
            self.bytes_down += down

    def pass_or_wait(self) -> None:
        self._flowing.wait()

    def pass_or_be_held(self, method: str) -> None:
        if method != self._held_method:
            return
        with self._lock:
            self.num_held += 1
        self._released.wait()
        with self._lock:
            self.num_held -= 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(address, handler)
        self.connections: set[socket.socket] = set()

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        self.connections.add(request)
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        self.connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is what these tests are about."""


def _handler_of(proxy: FaultProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle_expect_100(self) -> bool:
            proxy.pass_or_wait()
            return super().handle_expect_100()

        def forward(self) -> None:
            proxy.count(self.command)
            proxy.last_headers = self.headers
            if proxy.latency:
                time.sleep(proxy.latency)
            proxy.pass_or_wait()
            proxy.pass_or_be_held(self.command)
            if proxy.refusal and proxy.refusal[2] in self.path:
                status, code, _ = proxy.refusal
                body = f"<Error><Code>{code}</Code></Error>".encode() * (self.command != "HEAD")
                return self.answer(status, {"Content-Type": "application/xml"}, body, None)
            fault = proxy.take(self.command, self.path)
            length = int(self.headers.get("Content-Length") or 0)
            if fault == "cut upload":
                self.rfile.read(length // 2)
                return self.reset()
            body = self.read_body(length)
            if self.command == "PUT" and len(body) > (proxy.put_limit or len(body)):
                return self.answer(400, {"Content-Type": "application/xml"}, TOO_LARGE, None)
            if fault == "503":
                return self.answer(503, {"Content-Type": "application/xml"}, SLOW_DOWN, fault)
            upstream = http.client.HTTPConnection(proxy.upstream, timeout=60)
            try:
                dropped = (*HOP_HEADERS, "range") if proxy.ignores_ranges else HOP_HEADERS
                headers = {k: v for k, v in self.headers.items() if k.lower() not in dropped}
                if body or self.command in ("PUT", "POST"):
                    headers["Content-Length"] = str(len(body))
                upstream.request(self.command, self.path, body=body, headers=headers)
                response = upstream.getresponse()
                content = response.read()
                kept = {k: v for k, v in response.getheaders() if k.lower() not in HOP_HEADERS}
                if self.command == "HEAD":
                    kept["Content-Length"] = response.getheader("Content-Length") or "0"
            finally:
                upstream.close()
            if fault == "answer lost":
                return self.reset()
            self.answer(response.status, kept, content, fault)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

        def read_body(self, length: int) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(length)
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline() not in (b"\r\n", b""):
                pass
            return b"".join(parts)

        def answer(
            self, status: int, headers: dict[str, str], body: bytes, fault: Kind | None
        ) -> None:
            proxy.pass_or_wait()
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if self.command != "HEAD" and status not in (204, 304):
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            end = len(body) // 2 if fault == "cut answer" else len(body)
            # Counted before it is sent: the client may look at the counts as soon as it has all.
            proxy.count(f"{self.command} {status}")
            for start in range(0, end, CHUNK):
                proxy.pass_or_wait()
                piece = body[start : min(start + CHUNK, end)]
                proxy.count(down=len(piece))
                self.wfile.write(piece)
            if fault == "cut answer":
                self.reset()

        def reset(self) -> None:
            # With no linger time, closing sends RST: the client sees "connection reset by peer".
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler


SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
TOO_LARGE = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>EntityTooLarge</Code>'
    b"<Message>Your proposed upload exceeds the maximum allowed size.</Message></Error>"
)
