"""ZAP handler: answers libzmq's question whether a peer may connect (https://rfc.zeromq.org/spec/27/)."""

from __future__ import annotations

import logging
from collections.abc import Callable

import zmq
from zmq.utils import z85

from tnxd.events import event

log = logging.getLogger(__name__)

LOCAL_DOMAIN = b"tnxd"
"""ZAP domain of listeners that ask for no key."""

KEYS_DOMAIN = b"tnxd-keys"
"""ZAP domain of listeners that ask for a key."""

# How a peer of each domain shows who it is; the frames behind that are its credentials. Any other pair is refused.
_MECHANISMS = {LOCAL_DOMAIN: (b"NULL", 0), KEYS_DOMAIN: (b"CURVE", 1)}

ADMITTED, REFUSED, NO_ROOM = b"200", b"400", b"500"
"""Statuses of answers: a client that is refused asks no more on that connection; one that finds no room tries again."""

_VERSION = b"1.0"
_REQUEST_FRAMES = 8  # at least, with the envelope and the delimiter
_KEY_BYTES = 32


class ZapHandler:
    """ZAP handler of one context. Make it before the socket whose peers it lets in.

    Nobody gets in but by its word: libzmq asks about every peer, and what it asks in another way than is known here is
    refused. The user id that it gives a peer is the public key, in Z85, that the peer has shown to be its own, or "":
    each message of the peer carries it.

    Args:
        judge: answers with a status and a reason whether a peer at an address, with a public key or "", may connect.

    Attributes:
        socket: readable while a peer waits for an answer.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], judge: Callable[[str, str], tuple[bytes, str]]) -> None:
        self._judge = judge
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
        envelope, _, version, id_ = request[:4]
        key = ""
        try:
            key = _shown_key(request)
            status, why = self._judge(request[5].decode("utf-8", "replace"), key)
        except ValueError as error:
            status, why = REFUSED, str(error)
            log.warning("a peer is refused: %s", why, extra=event("peer_refused", reason=why))
        except Exception:  # a defect of ours: this peer stays outside, and the loop goes on
            status, why = NO_ROOM, "the daemon failed at this"
            log.exception("the daemon failed at letting a peer in", extra=event("defect"))
        user = key.encode() if status == ADMITTED else b""
        self.socket.send_multipart([envelope, b"", version, id_, status, why.encode(), user, b""])

    def close(self) -> None:
        self.socket.close(0)


def _shown_key(request: list[bytes]) -> str:
    """Public key that a peer has shown to be its own, in Z85; "" at a listener that asks for none.

    Raises:
        ValueError: the domain is none of ours, or the peer shows itself in another way than is asked for there.
    """
    version, domain, mechanism, credentials = request[2], request[4], request[7], request[8:]
    if version != _VERSION:
        raise ValueError(f"ZAP {version!r} is not spoken here")
    if domain not in _MECHANISMS:
        raise ValueError(f"the domain {domain!r} is none of this daemon's")
    if (mechanism, len(credentials)) != _MECHANISMS[domain]:
        raise ValueError(f"{mechanism!r} with {len(credentials)} credentials does not do for the domain {domain!r}")
    if not credentials:
        return ""
    if len(credentials[0]) != _KEY_BYTES:
        raise ValueError(f"a key of {len(credentials[0])} bytes")
    return z85.encode(credentials[0]).decode("ascii")
