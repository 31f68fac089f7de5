"""Bridges for tests: real processes, started as users start them, and raw peers that say to them what they like."""

from __future__ import annotations

import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import prepared

T = TypeVar("T")

READY = re.compile(r"ready on https?://127\.0\.0\.1:(\d+)(?:, gRPC on (\S+);)?")

SECONDS = 60.0
"""Longest wait for anything of a bridge's."""


@dataclass
class Response:
    """Response. Attributes: headers: by their names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def document(self) -> Any:
        """JSON document in its body."""
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """Sentence of an error."""
        assert self.status >= 400, self
        assert self.headers["content-type"] == "application/json", self
        (sentence,) = self.document.values()
        assert isinstance(sentence, str)
        return sentence


class Peer:
    """Raw connection to a bridge."""

    def __init__(self, port: int, context: ssl.SSLContext | None = None) -> None:
        connected = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
        self.socket = connected if context is None else context.wrap_socket(connected, server_hostname="localhost")
        self._file = self.socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self.socket.close()

    def send(self, *texts: str | bytes) -> Self:
        """Send bytes as they are."""
        self.socket.sendall(b"".join(text.encode() if isinstance(text, str) else text for text in texts))
        return self

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> Response:
        """Send a request and take the response. Args: headers: with _ for - in their names."""
        self.request(method, path, body, **headers)
        return self.response(method)

    def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> None:
        """Send a request."""
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        if body or method == "POST":
            lines.append(f"Content-Length: {len(body)}")
        self.send("\r\n".join([*lines, "", ""]), body)

    def response(self, method: str = "GET") -> Response:
        """The next response. Raises ConnectionError: the bridge has ended the connection."""
        line = self._file.readline()
        if not line:
            raise ConnectionError("the bridge has ended the connection")
        status_line = line.split(b" ")
        assert status_line[0] == b"HTTP/1.1", status_line
        headers: dict[str, str] = {}
        while text := self._file.readline().decode().strip():
            name, _, value = text.partition(": ")
            assert name.lower() not in headers, text
            headers[name.lower()] = value
        body = b"" if method == "HEAD" else self._file.read(int(headers["content-length"]))
        return Response(int(status_line[1]), headers, body)

    def is_ended(self) -> bool:
        """Whether the bridge ends the connection, and sends nothing before that."""
        try:
            return not self._file.read(1)
        except ConnectionError:
            return True


@dataclass
class Bridge:
    """Running bridge. Attributes: port: of HTTP. grpc: address of gRPC, where that is served."""

    port: int
    process: subprocess.Popen[str]
    log: Path
    grpc: str = ""

    def connect(self, context: ssl.SSLContext | None = None) -> Peer:
        """Make a connection."""
        return Peer(self.port, context)

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> Response:
        """Send one request on a connection of its own, see `Peer.ask`."""
        with self.connect() as peer:
            return peer.ask(method, path, body, **headers)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal it. Returns its exit code."""
        self.process.send_signal(number)
        return self.process.wait(SECONDS)


def until(look: Callable[[], T], wanted: Callable[[T], object]) -> T:
    """Look until that is found which is wanted, and return it.

    For what a bridge gives a short time, or a client of it: that may pass where the machine stands still.
    """
    ends = time.monotonic() + SECONDS
    while not wanted(found := look()):
        assert time.monotonic() < ends, found
    return found


@contextmanager
def running_bridge(folder: Path, endpoint: str, *arguments: str) -> Iterator[Bridge]:
    """Bridge of that daemon, which waits long for it and for clients unless the arguments say otherwise.

    It has to be alive at the end, or to have ended well, and to have logged no failure.
    """
    log = folder / "bridge.log"
    patience = ["--timeout", f"{SECONDS:g}s"]
    for limit in ("header_timeout_s", "body_timeout_s"):
        patience += ["--limit", f"{limit}={SECONDS}"]
    listening = ("--host", endpoint, "--listen", "127.0.0.1:0")
    command = [sys.executable, "-m", "tnxctl.cli", "bridge", *listening, *patience, *arguments]
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, preexec_fn=prepared.end_with_parent
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = READY.search(line)
        assert found is not None, f"the bridge said {line!r} and logged:\n{log.read_text()}"
        yield Bridge(int(found[1]), process, log, found[2] or "")
        assert process.poll() in (None, 0), f"the bridge ended with {process.poll()}:\n{log.read_text()}"
        process.terminate()
        assert process.wait(SECONDS) == 0, log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
