"""ZAP handler: answers libzmq's question whether a peer may connect (https://rfc.zeromq.org/spec/27/)."""

from __future__ import annotations

from collections.abc import Callable

import zmq

DOMAIN = b"tnxd"

_REQUEST_FRAMES = 7  # at least, with the envelope and the delimiter


class ZapHandler:
    """ZAP handler of one context. Make it before the socket whose peers it lets in.

    Args:
        refusal: the reason why a peer at an address may not connect; "" if it may.

    Attributes:
        socket: readable while a peer waits for an answer.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], refusal: Callable[[str], str]) -> None:
        self._refusal = refusal
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.socket.bind("inproc://zeromq.zap.01")

    def answer(self, refresh: Callable[[], None]) -> None:
        """Answer the requests that wait. Never blocks.

        Args:
            refresh: takes in the events of connections. libzmq's one thread tells of a connection before it asks about
                it: once a request is here, so are the events of all connections up to that one.
        """
        while self.socket.poll(0):
            request = self.socket.recv_multipart(zmq.NOBLOCK)
            refresh()
            self._decide(request)

    def _decide(self, request: list[bytes]) -> None:
        if len(request) < _REQUEST_FRAMES:
            return
        envelope, _, version, id_, _, address = request[:6]
        why = self._refusal(address.decode("utf-8", "replace"))
        # 500 has a client try again: there was no room. 400 would tell it that it may not come in at all.
        status, text = (b"500", why.encode()) if why else (b"200", b"OK")
        self.socket.send_multipart([envelope, b"", version, id_, status, text, b"", b""])

    def close(self) -> None:
        self.socket.close(0)
