"""A bare DEALER that speaks the protocol with nothing in between: what a test sends is what goes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import zmq

from tnxctl.protocol import wire
from tnxctl.protocol.datatypes import Array, datatype_of
from tnxctl.protocol.frames import view_tensors
from tnxctl.protocol.strings import encode
from tnxctl.protocol.wire import Limits, TensorSpec

LIMITS = Limits(header_bytes=1 << 20)


class Dealer:
    """One connection. Every receive has a time limit and fails the test when it passes.

    Args:
        prepare: sets options of the socket before it connects.
    """

    def __init__(
        self,
        endpoint: str,
        kind: int = zmq.DEALER,
        prepare: Callable[[zmq.Socket[bytes]], None] = lambda socket: None,
    ) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(kind)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        prepare(self.socket)
        self.socket.connect(endpoint)
        self._next_id = 0

    def __enter__(self) -> Dealer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.context.destroy(linger=0)

    def predict(self, *arrays: Array, names: Sequence[str] = ("",), **fields: Any) -> int:
        """Send a predict request; returns its id."""
        fields.setdefault("id", self._next_id)
        self._next_id = fields["id"] + 1
        specs = tuple(
            TensorSpec(name, str(datatype_of(array.dtype)), array.shape)
            for name, array in zip(names, arrays, strict=True)
        )
        header = wire.encode(wire.Predict(v=wire.VERSION, inputs=specs, **fields))
        frames = [encode(array) if array.dtype.hasobject else array for array in arrays]
        self.socket.send_multipart([header, *frames])
        return int(fields["id"])

    def receive(self, seconds: float = 60.0) -> tuple[wire.Reply, tuple[Array, ...]]:
        """The next reply and its tensors."""
        assert self.socket.poll(int(seconds * 1000)), "no reply came"
        header, *frames = self.socket.recv_multipart()
        reply = wire.decode_reply(header, LIMITS)
        specs = reply.outputs if isinstance(reply, wire.Result) else ()
        return reply, view_tensors(specs, frames, LIMITS)

    def result(self, seconds: float = 60.0) -> tuple[wire.Result, tuple[Array, ...]]:
        """The next reply, which must be a result."""
        reply, outputs = self.receive(seconds)
        assert isinstance(reply, wire.Result), reply
        return reply, outputs

    def error(self, seconds: float = 60.0) -> wire.ErrorReply:
        """The next reply, which must be an error."""
        reply, _ = self.receive(seconds)
        assert isinstance(reply, wire.ErrorReply), reply
        return reply

    def health(self) -> wire.HealthReport:
        """Ask for health and return the answer, which must be the next reply."""
        self.socket.send(wire.encode(wire.Health(v=wire.VERSION, id=wire.MAX_ID)))
        reply, _ = self.receive()
        assert isinstance(reply, wire.HealthReport), reply
        return reply

    def await_health(self, **expected: object) -> wire.HealthReport:
        """Ask until these fields of the report have these values; the test's own time limit ends the asking."""
        while True:
            report = self.health()
            if all(getattr(report, name) == value for name, value in expected.items()):
                return report


def rows(count: int, width: int = 256, fill: float = 0.5) -> Array:
    """An FP32 input `[count, width]`."""
    return np.full((count, width), fill, np.float32)
