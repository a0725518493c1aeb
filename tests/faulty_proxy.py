"""A proxy on loopback between boto3 and the S3 server of the tests, which does what networks and servers do on bad days.

It passes bytes on as they are, the Host header included, so that signatures stay valid. What it does wrong is chosen a
connection at a time: `mode` for those that are opened from now on, and `cut` for those that are open.
"""

from __future__ import annotations

import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.object_store import environment, free_ports

_PIECE = 1 << 16
ANSWER_500 = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>a bad day</Message></Error>"


class Proxy:
    """Listens while it is open.

    Args:
      target: the server's port.
      seed: of what `flaky` does to which connection.

    Attributes:
      mode: `pass`; `slow` (`rate` bytes a second each way); `500` (every request answered so); `drop` (a connection ends
        after up to 200 kB, in either direction, so within a body); `flaky` (each connection one of these, half of them `pass`);
        `other` (a server of another make: what `refuse` says of a request is its answer).
      refuse: of mode `other`: takes a `Request`, returns `(status, code)`, or None where the server answers it.
      seen: how many connections of each kind, and refusals of each code, there were.
    """

    def __init__(self, target: int, *, seed: int = 0):
        self.target, self.mode, self.rate = target, "pass", 1 << 20
        self.seen: Counter[str] = Counter()
        self.refuse: Callable[[Request], tuple[int, str] | None] = lambda _: None
        self.port = free_ports(1)[0]
        self.requests: list[Request] = []  # of mode `other`
        self._random = random.Random(seed)
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.port)

    def __enter__(self) -> Proxy:
        self.come_back()
        return self

    def __exit__(self, *_: object) -> None:
        self.go_away()

    def come_back(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def go_away(self) -> None:
        """Nothing listens any more: connections are refused, open ones cut."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept
            listener.close()
        self.cut()

    def cut(self) -> None:
        """Ends what is open, so that a new mode holds for everything."""
        for connection in list(self._open):
            _cut(connection)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:  # closed
                return
            mode = self.mode
            if mode == "flaky":
                mode = self._random.choice(["pass", "pass", "pass", "500", "drop", "slow"])
            self.seen[mode] += 1
            threading.Thread(target=self._serve, args=(near, mode), daemon=True).start()

    def _serve(self, near: socket.socket, mode: str) -> None:
        self._open.add(near)
        head = b""
        if mode == "500" or (mode == "other" and not (head := self._accepted(near))):
            if mode == "500":
                _answer(near, _read_head(near), 500, ANSWER_500)
            near.close()
            self._open.discard(near)
            return
        try:
            far = socket.create_connection(("127.0.0.1", self.target))
        except OSError:
            _cut(near)
            self._open.discard(near)
            return
        self._open.add(far)
        far.sendall(head)
        allowed = self._random.randrange(200_000) if mode == "drop" else None
        rate = self.rate if mode == "slow" else None
        pairs = ((near, far), (far, near))
        ways = [threading.Thread(target=_pass_on, args=(*pair, allowed, rate), daemon=True) for pair in pairs]
        for way in ways:
            way.start()
        for way in ways:
            way.join()
        for connection in (near, far):
            self._open.discard(connection)
            connection.close()


    def _accepted(self, near: socket.socket) -> bytes:
        """The beginning of a request that the server may answer, and the last one of its connection; b"" where it was refused."""
        received = _read_head(near)
        if not received:
            return b""
        request = Request.of(received)
        self.requests.append(request)
        if refused := self.refuse(request):
            status, code = refused
            self.seen[code] += 1
            _answer(near, received, status, f"<Error><Code>{code}</Code><Message>not here</Message></Error>".encode())
            return b""
        return received.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)


class Request(NamedTuple):
    """What a server of another make looks at."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]  # by names in lower case

    @classmethod
    def of(cls, received: bytes) -> Request:
        first, *lines = received.partition(b"\r\n\r\n")[0].decode().split("\r\n")
        method, target, _ = first.split(" ")
        parts = urlsplit(target)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        pairs = (line.split(":", 1) for line in lines if not line.lower().startswith("connection:"))
        return cls(method, unquote(parts.path), query, {name.lower(): value.strip() for name, value in pairs})


def _pass_on(source: socket.socket, target: socket.socket, allowed: int | None, rate: int | None) -> None:
    """One direction, until it ends, fails, or `allowed` bytes went through."""
    try:
        while data := source.recv(_PIECE if rate is None else max(1, rate // 50)):
            if allowed is not None and (allowed := allowed - len(data)) <= 0:
                _cut(source)
                _cut(target)
                return
            target.sendall(data)
            if rate is not None:
                time.sleep(len(data) / rate)
        target.shutdown(socket.SHUT_WR)
    except OSError:  # one side is gone; so goes the other
        _cut(source)
        _cut(target)


def _read_head(connection: socket.socket) -> bytes:
    """A request as far as its headers, and what came with them; b"" where there is none."""
    received = b""
    with suppress(OSError):
        connection.settimeout(20)
        while b"\r\n\r\n" not in received:
            if not (data := connection.recv(_PIECE)):
                return b""
            received += data
        connection.settimeout(None)
    return received


def _answer(connection: socket.socket, received: bytes, status: int, content: bytes) -> None:
    """Reads the rest of a request, answers, and closes."""
    with suppress(OSError), connection:
        connection.settimeout(20)
        head, _, body = received.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\ncontent-length: *(\d+)", head)
        if not re.search(rb"(?i)\nexpect: *100-continue", head):
            left = int(length[1]) - len(body) if length else 0
            while left > 0 and (data := connection.recv(min(left, _PIECE))):
                left -= len(data)
        if head.startswith(b"HEAD "):
            content = b""
        connection.sendall(
            b"HTTP/1.1 %d Refused\r\nContent-Type: application/xml\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (status, len(content), content)
        )


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
