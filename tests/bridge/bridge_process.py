"""Bridges as processes, as users start them."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import prepared


@contextmanager
def bridge(endpoint: str, *arguments: str) -> Iterator[str]:
    """A bridge in front of a daemon: its host and port."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as placeholder:
        port = placeholder.getsockname()[1]
    command = [sys.executable, "-m", "tnxctl.cli", "bridge", "--host", endpoint, "--listen", f"127.0.0.1:{port}"]
    process = subprocess.Popen([*command, *arguments], preexec_fn=prepared.end_with_parent)
    try:
        while True:
            assert process.poll() is None, "the bridge ended"
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.02)  # nothing tells when it listens
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def ask(
    url: str, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer to one request, on a connection of its own."""
    with contextlib.closing(http.client.HTTPConnection(url, timeout=30)) as connection:
        connection.request(method, path, body or None, headers or {})
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()


def ask_json(url: str, method: str, path: str, document: Any = None) -> tuple[int, Any]:
    """Status and JSON document of the answer to one request."""
    status, _, body = ask(url, method, path, b"" if document is None else json.dumps(document).encode())
    return status, json.loads(body) if body else None
