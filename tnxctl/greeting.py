"""Greeting of a ZeroMQ listener (https://rfc.zeromq.org/spec/23/): whether it asks for keys.

A listener whose mechanism is another one than the client's ends the connection as soon as it has the client's greeting,
often before it has sent its own: libzmq then says no more than that the connection broke. Asked by somebody who says no
mechanism yet, it tells its own.
"""

from __future__ import annotations

import contextlib
import socket
import threading

_SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
_VERSION = b"\x03\x01"
_MECHANISM = slice(12, 32)
_PATIENCE_S = 2.0


class Greeting:
    """Greeting that is asked for in a thread of its own, since it may take as long as a host name is looked up.

    Args:
        endpoint: tcp://HOST:PORT.

    Attributes:
        mechanism: "NULL", "CURVE", ...; "": not known yet, or never if `is_over`.
        is_over: whether there is no more to come.
    """

    def __init__(self, endpoint: str) -> None:
        self.mechanism = ""
        self.is_over = False
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        address = host.strip("[]"), int(port)
        threading.Thread(target=self._ask, args=(address,), name="tnxctl-greeting", daemon=True).start()

    def _ask(self, address: tuple[str, int]) -> None:
        with contextlib.suppress(OSError, ValueError), socket.create_connection(address, _PATIENCE_S) as peer:
            peer.sendall(_SIGNATURE + _VERSION)
            answer = b""
            while len(answer) < _MECHANISM.stop and (part := peer.recv(64)):
                answer += part
            if answer.startswith(_SIGNATURE[:1]) and len(answer) >= _MECHANISM.stop:
                self.mechanism = answer[_MECHANISM].rstrip(b"\0").decode("ascii")
        self.is_over = True
