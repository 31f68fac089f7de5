"""Raw bytes of ZMTP, as tests of faults send and read them."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from headers import pack, predict_header
from tnxctl.protocol import wire
from tnxctl.protocol.wire import Limits
from zmtp import Peer, message

ROW = bytes(1024)


def good(request_id: int = 7, **changes: object) -> bytes:
    """Good request, as it goes over the wire."""
    return message(pack(predict_header(id=request_id, **changes)), ROW)


def reply(peer: Peer) -> wire.Reply:
    """Header of the next message."""
    return wire.decode_reply(peer.read_message()[0], Limits(header_bytes=1 << 20))


@contextlib.contextmanager
def connected(endpoint: str, count: int) -> Iterator[list[socket.socket]]:
    """Bare TCP connections, so many of them, open within the block."""
    host, port = endpoint.removeprefix("tcp://").rsplit(":", 1)
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection((host, int(port)), 10)) for _ in range(count)]
