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
from contextlib import suppress

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
        after up to 200 kB, in either direction, so within a body); `flaky` (each connection one of these, half of them `pass`).
      seen: how many connections of each kind there were.
    """

    def __init__(self, target: int, *, seed: int = 0):
        self.target, self.mode, self.rate = target, "pass", 1 << 20
        self.seen: Counter[str] = Counter()
        self.port = free_ports(1)[0]
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
        if mode == "500":
            _answer_500(near)
            self._open.discard(near)
            return
        try:
            far = socket.create_connection(("127.0.0.1", self.target))
        except OSError:
            _cut(near)
            self._open.discard(near)
            return
        self._open.add(far)
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


def _answer_500(connection: socket.socket) -> None:
    """Reads one request whole, answers that something went wrong, and closes."""
    with suppress(OSError), connection:
        connection.settimeout(20)
        received = b""
        while b"\r\n\r\n" not in received:
            if not (data := connection.recv(_PIECE)):
                return
            received += data
        head, _, body = received.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\ncontent-length: *(\d+)", head)
        if not re.search(rb"(?i)\nexpect: *100-continue", head):
            left = int(length[1]) - len(body) if length else 0
            while left > 0 and (data := connection.recv(min(left, _PIECE))):
                left -= len(data)
        connection.sendall(
            b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/xml\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(ANSWER_500), ANSWER_500)
        )


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
