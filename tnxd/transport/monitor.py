"""Socket monitor: libzmq's events about connections, which name a file descriptor and no peer."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import zmq

_EVENT = struct.Struct("=Hi")  # the kind, and a descriptor


class Monitor:
    """Events of the connections of one socket.

    Attributes:
        socket: readable while there are events.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], monitored: zmq.Socket[bytes]) -> None:
        self._monitored = monitored
        address = f"inproc://connections-{id(self)}"
        monitored.monitor(address, zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self.socket = context.socket(zmq.PAIR)
        self.socket.setsockopt(zmq.RCVHWM, 0)  # libzmq's thread would stand still where it is full
        self.socket.connect(address)

    def events(self) -> Iterator[tuple[int, bool]]:
        """Events in order, none of them twice: the descriptor, and whether it was accepted or has ended.

        libzmq's one thread tells of an end before it closes the descriptor, and of a connection before it reads from
        it: when a message is here, so are all events about its descriptor up to that message.
        """
        while self.socket.poll(0):
            event, descriptor = _EVENT.unpack(self.socket.recv_multipart(zmq.NOBLOCK)[0])
            yield descriptor, event == zmq.EVENT_ACCEPTED

    def close(self) -> None:
        self._monitored.disable_monitor()
        self.socket.close(0)
