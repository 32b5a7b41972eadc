"""An HTTP proxy in front of an S3 server that fails on request, so that tests see what a client sees of a bad network.

Requests pass unchanged, the Host header too, so that their signatures hold. A fault is for the next requests of one
kind (GET, LIST, HEAD, PUT, DELETE) whose path contains a text; all others pass. A judge may decide over each request
instead, and end the client at any of them.
"""

import contextlib
import http.client
import select
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

# Before or after the store has done what was asked
BEFORE, AFTER = "before", "after"
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}


@dataclass
class Fault:
    """One way to fail.

    `action`  status: an error answer · timeout: none at all · reset: the connection breaks · truncate: half of the
              answer's body, then the connection breaks · flip: one byte of the body is another (a PUT's on its way to
              the store, a GET's on its way back) · hook: nothing, but `hook` is called · late: no answer, and the store
              hears of the request only when the proxy is told to let go of what is late
    `when`    whether status, timeout, reset and `hook` come before the store hears of the request, or after it was
              applied
    `hook`    called then, whatever the action
    """

    action: str
    when: str = BEFORE
    status: int = 500
    code: str = "InternalError"
    hook: Callable[[], None] | None = None

    def call_hook(self, now: str) -> None:
        """Call the hook, if there is one for this moment."""
        if self.hook is not None and self.when == now:
            self.hook()


INTERNAL_ERROR = Fault("status")
INTERNAL_ERROR_AFTER = Fault("status", AFTER)
SLOW_DOWN = Fault("status", status=503, code="SlowDown")
TIMEOUT = Fault("timeout")
TIMEOUT_AFTER = Fault("timeout", AFTER)
RESET = Fault("reset")
RESET_AFTER = Fault("reset", AFTER)
TRUNCATED = Fault("truncate")
FLIPPED = Fault("flip")


def denied(code: str) -> Fault:
    """The answer 403 with this code."""
    return Fault("status", status=403, code=code)


@dataclass
class _Script:
    kind: str
    path: str
    fault: Fault
    times: int


@dataclass
class Logged:
    """A request. `headers`: their names in lower case; `status`: None where the client got no answer; `applied`: the
    store's own answer, None where it heard nothing."""

    kind: str
    path: str
    headers: set[str]
    status: int | None = None
    applied: int | None = None


@dataclass
class _Answer:
    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes


@dataclass
class FaultProxy:
    """A running proxy, with a log of each request in the order in which they came."""

    upstream: tuple[str, int]
    endpoint: str = ""
    log: list[Logged] = field(default_factory=list)
    judge: Callable[[Logged], Fault | None] | None = None  # asked for each request, one at a time, before the scripts
    let_go: threading.Event = field(default_factory=threading.Event)  # of what is late
    num_late: int = 0  # that are still held
    ignores_conditions: bool = False  # the store never hears of If-None-Match, as some stores don't
    _scripts: list[_Script] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: threading.Event = field(default_factory=threading.Event)

    @classmethod
    @contextlib.contextmanager
    def in_front_of(cls, endpoint: str) -> "Iterator[FaultProxy]":
        """Run a proxy of this server for the time of the block."""
        address = urlsplit(endpoint)
        proxy = cls((str(address.hostname), int(address.port or 80)))
        server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy}))
        server.daemon_threads = True
        proxy.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy._stopped.set()
            server.shutdown()
            server.server_close()
            thread.join(5)

    def fail(self, kind: str, fault: Fault, *, path: str = "", times: int = 1) -> None:
        """The next `times` requests of this kind whose path contains this text fail so."""
        with self._lock:
            self._scripts.append(_Script(kind, path, fault, times))

    def forget(self) -> None:
        """Fail no more, and begin a new log."""
        with self._lock:
            self._scripts, self.log = [], []

    def asked(self, kind: str) -> list[str]:
        """The paths of all requests of one kind so far."""
        return [one.path for one in self.log if one.kind == kind]

    def _next_fault(self, request: Logged) -> Fault | None:
        with self._lock:
            judged = self.judge(request) if self.judge else None
            if judged is not None:
                return judged
            for script in self._scripts:
                if script.times and script.kind == request.kind and script.path in request.path:
                    script.times -= 1
                    return script.fault
        return None


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that breaks its connection is no error here."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client, and the one that goes on to the server."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave in one piece; Nagle would hold back the second
    disable_nagle_algorithm = True
    proxy: FaultProxy
    _logged: Logged
    _onward: http.client.HTTPConnection | None = None

    def do_GET(self) -> None:
        """Any request."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = "LIST" if self.command == "GET" and "list-type=2" in self.path else self.command
        self._logged = Logged(kind, self.path, {name.lower() for name in self.headers})
        self.proxy.log.append(self._logged)
        fault = self.proxy._next_fault(self._logged) or Fault("none")
        fault.call_hook(BEFORE)
        if fault.action == "flip" and kind == "PUT":
            body = _flip(body)
        if fault.action == "late":
            self._forward_late(body)
        elif fault.action in ("status", "timeout", "reset"):
            if fault.when == AFTER:
                self._forward(body)
                fault.call_hook(AFTER)
            self._fail(fault)
        else:
            answer = self._forward(body)
            fault.call_hook(AFTER)
            if fault.action == "flip" and kind != "PUT":
                answer.body = _flip(answer.body)
            self._send(answer, cut=fault.action == "truncate")

    do_PUT = do_POST = do_HEAD = do_DELETE = do_GET  # noqa: N815

    def handle_expect_100(self) -> bool:
        """Ask for the body, at once: a client waits for this a second."""
        super().handle_expect_100()
        self.wfile.flush()
        return True

    def _forward_late(self, body: bytes) -> None:
        self.close_connection = True
        with self.proxy._lock:
            self.proxy.num_late += 1
        self.proxy.let_go.wait()
        self._forward(body)
        with self.proxy._lock:
            self.proxy.num_late -= 1

    def _forward(self, body: bytes) -> _Answer:
        if self._onward is None:
            self._onward = http.client.HTTPConnection(*self.proxy.upstream, timeout=60)
        try:
            return self._ask(self._onward, body)
        except (http.client.HTTPException, OSError):  # the kept connection has been closed meanwhile
            self._onward.close()
            return self._ask(self._onward, body)

    def _ask(self, onward: http.client.HTTPConnection, body: bytes) -> _Answer:
        onward.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() == "if-none-match" and self.proxy.ignores_conditions:
                continue
            if name.lower() not in _HOP_BY_HOP or (name.lower() == "content-length"):
                onward.putheader(name, value)
        onward.endheaders(body or None)
        answer = onward.getresponse()
        self._logged.applied = answer.status
        return _Answer(answer.status, answer.reason, answer.getheaders(), answer.read())

    def _send(self, answer: _Answer, *, cut: bool = False) -> None:
        self._logged.status = answer.status
        length = next((value for name, value in answer.headers if name.lower() == "content-length"), "0")
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.headers:
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[:len(answer.body) // 2] if cut else answer.body)
        self.wfile.flush()
        self.close_connection = self.close_connection or cut

    def _fail(self, fault: Fault) -> None:
        if fault.action == "status":
            body = f'<?xml version="1.0"?><Error><Code>{fault.code}</Code><Message>Told so.</Message></Error>'.encode()
            body = b"" if self.command == "HEAD" else body
            self._send(_Answer(fault.status, "Fault", [("Content-Type", "application/xml")], body))
            return
        self.close_connection = True
        if fault.action == "timeout":
            self._wait_until_the_client_gives_up()
        else:
            # with a linger time of zero, closing sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _wait_until_the_client_gives_up(self) -> None:
        while not self.proxy._stopped.is_set() and not select.select([self.connection], [], [], 0.05)[0]:
            pass

    def finish(self) -> None:
        """Close both connections."""
        if self._onward is not None:
            self._onward.close()
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing on stderr."""


def _flip(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1:]
