"""Shared memory of a client and its daemon on the same host: one segment for each connection, made by the daemon.

    Sharing.ask(id)                 the message that asks for a segment, on a connection that stands
    Sharing.outgoing(call)          the frames of a call: its large inputs lie in the segment, with room for the outputs
    Sharing.incoming(reply, frames) the frames of a reply, those in the segment too
    Sharing.lost()                  the connection is no more, and so its segment

The client says where everything goes, so that it alone has to know what is free. A call has its place until its answer
comes, and the outputs have theirs for as long as the program holds an array that looks into them. What finds no place
travels as frames, as does everything until the daemon has answered `ask`, and from then on if it refuses.

How much room the outputs of a call will take is known from the last call like it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import socket
from bisect import bisect
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from tnxctl.call import Call
from tnxctl.protocol import wire
from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.shared_memory import Mapping, aligned, total_bytes
from tnxctl.protocol.wire import MIB, Span

LEAST_BYTES = 64 * 1024
"""Least size of inputs, and of outputs, that go through shared memory: smaller ones are quicker as frames."""

_FIRST_ROOM = MIB  # for the outputs of a model that nothing is known of
_MOST_KINDS = 1024  # of calls, of which the size of the outputs is remembered

_MOST_STRANGERS = 16  # that may connect before the daemon does

_log = logging.getLogger("tnxctl")


class _Segment(Mapping):
    """Segment as its client has it, with what is free in it. It lives until nothing of it is in use any more.

    Args:
        lifeline: socket by whose end the daemon knows that this segment is over.

    Attributes:
        freed: spans that are not used any more; may be appended to in any thread, and while garbage is collected.
    """

    def __init__(self, descriptor: int, nbytes: int, lifeline: socket.socket) -> None:
        self._lifeline = lifeline  # first: `__del__` closes it in any case
        super().__init__(descriptor, nbytes)
        self.freed: deque[Span] = deque()
        self._gaps = [[0, nbytes]]  # offset and size of what is free, in order

    def allocate(self, nbytes: int) -> Span | None:
        """A span of so many bytes; None: there is none."""
        while self.freed:
            self._free(self.freed.popleft())
        nbytes = aligned(nbytes)
        for index, gap in enumerate(self._gaps):
            offset, size = gap
            if size >= nbytes:
                if size == nbytes:
                    del self._gaps[index]
                else:
                    gap[0], gap[1] = offset + nbytes, size - nbytes
                return Span(offset, nbytes)
        return None

    def _free(self, span: Span) -> None:
        offset, size, gaps = span.offset, span.nbytes, self._gaps
        index = bisect(gaps, [offset, 0])
        if index < len(gaps) and gaps[index][0] == offset + size:
            size += gaps.pop(index)[1]
        if index and sum(gaps[index - 1]) == offset:
            gaps[index - 1][1] += size
        else:
            gaps.insert(index, [offset, size])

    def __del__(self) -> None:
        self._lifeline.close()


class _Block:
    """Part of a segment that holds outputs: numpy keeps it for as long as any array looks into it."""

    __slots__ = ("_segment", "_span")

    def __init__(self, segment: _Segment, span: Span) -> None:
        self._segment = segment
        self._span = span

    @property
    def __array_interface__(self) -> dict[str, Any]:
        address = self._segment.address + self._span.offset
        return {"version": 3, "shape": (self._span.nbytes,), "typestr": "|u1", "data": (address, False)}

    def __del__(self) -> None:
        self._segment.freed.append(self._span)


class _UnderWay(msgspec.Struct, frozen=True, gc=False):
    """A call whose answer has not come.

    Attributes:
        kind: of it. place: that it has, if any. space: the same, if the outputs may go there.
    """

    kind: tuple[str, tuple[wire.TensorSpec, ...]]
    place: Span | None
    space: Span | None


class Sharing:
    """Shared memory of one client with one daemon, over one connection after the other. Used from one thread at a time.

    Args:
        endpoint: of the daemon, for messages.
        header_bytes: most that the header of a message may have.

    Attributes:
        is_active: whether there is a segment now.
    """

    def __init__(self, endpoint: str, header_bytes: int) -> None:
        self._endpoint = endpoint
        self._header_bytes = header_bytes
        self._segment: _Segment | None = None
        self._asked: int | None = None  # id of the message that asks for it
        self._token = b""
        self._listener: socket.socket | None = None
        self._under_way: dict[int, _UnderWay] = {}
        # Bytes of the outputs of the last call of a kind, and the most of each model.
        self._sizes: dict[tuple[str, tuple[wire.TensorSpec, ...]], int] = {}
        self._most: dict[str, int] = {}
        self._refusal = ""  # which was logged

    @property
    def is_active(self) -> bool:
        return self._segment is not None

    # --- the segment -------------------------------------------------------------------------------------------

    def ask(self, id_: int) -> bytes | None:
        """The message that asks the daemon for a segment. None: the system has nothing left to do so with.

        Args:
            id_: of the message.
        """
        self.lost()
        token = secrets.token_hex(16)
        try:
            listener = self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            listener.setblocking(False)
            listener.bind("")  # Linux finds a free name in its abstract namespace
            listener.listen(_MOST_STRANGERS)
        except OSError as error:
            self._go_without(f"{error.strerror}")
            return None
        self._asked, self._token = id_, token.encode()
        address = "@" + listener.getsockname()[1:].decode()
        return wire.encode(wire.Share(v=wire.VERSION, id=id_, address=address, token=token))

    def _answered(self, reply: wire.Reply) -> None:
        """Take the segment that the daemon has sent by now, or its refusal."""
        listener = self._listener
        assert listener is not None
        try:
            if isinstance(reply, wire.ErrorReply):
                self._go_without(reply.message)
            elif isinstance(reply, wire.Shared):
                self._segment = _received(listener, self._token, reply.nbytes)
        except (OSError, ValueError) as error:
            self._go_without(str(error))
        listener.close()
        self._asked = self._listener = None

    def _go_without(self, why: str) -> None:
        if why != self._refusal:
            self._refusal = why
            _log.warning("%s: tensors go over the socket, and not through shared memory: %s", self._endpoint, why)

    def lost(self) -> None:
        """Forget the segment: the connection is no more. Arrays that look into it stay as they are."""
        if self._listener is not None:
            self._listener.close()
        self._segment = self._asked = self._listener = None
        self._under_way.clear()

    # --- tensors -----------------------------------------------------------------------------------------------

    def outgoing(self, call: Call[Any]) -> list[Any]:
        """The frames with which a call goes out now."""
        segment, request = self._segment, call.request
        if segment is None or not isinstance(request, wire.Predict):
            return call.frames
        kind = request.model, request.inputs
        room = self._sizes.get(kind)
        if room is None:
            room = self._most.get(request.model, _FIRST_ROOM)
        arrays = call.frames[1:] if call.nbytes >= LEAST_BYTES else []
        if room < LEAST_BYTES:
            room = 0
        # One place for both: the daemon has copied the inputs before there are outputs, and has it in its caches then.
        nbytes = max(total_bytes([array.nbytes for array in arrays]), room)
        place = segment.allocate(nbytes) if nbytes else None
        space = place if room else None
        self._under_way[call.id] = _UnderWay(kind, place, space)
        if place is None:
            return call.frames
        shared = segment.write(place.offset, arrays) if arrays else None
        fields = {name: getattr(request, name) for name in wire.Predict.__struct_fields__}
        header = wire.encode(wire.PredictShared(**fields, shared=shared, space=space))
        if len(header) > self._header_bytes:
            self._end(call.id)
            return call.frames
        return [header] if shared is not None else [header, *call.frames[1:]]

    def _end(self, call_id: int | None, *, in_use: bool = False) -> _UnderWay | None:
        """Take back the place of a call that has its answer, unless its outputs are there, so that it is in use."""
        under_way = self._under_way.pop(call_id, None)  # type: ignore[arg-type]
        if under_way is not None and under_way.place is not None and self._segment is not None and not in_use:
            self._segment.freed.append(under_way.place)
        return under_way

    def incoming(self, reply: wire.Reply, frames: Sequence[Any]) -> Sequence[Any] | None:
        """The frames of a reply that came; None if it was for no call.

        Raises:
            InvalidArgument: it has outputs in shared memory where none can be.
        """
        if reply.id is not None and reply.id == self._asked:
            self._answered(reply)
            return None
        spans = reply.shared if isinstance(reply, wire.Result) else msgspec.UNSET
        under_way = self._end(reply.id, in_use=spans is not msgspec.UNSET)
        if under_way is None or not isinstance(reply, wire.Result):
            if spans is not msgspec.UNSET:
                raise InvalidArgument("outputs in shared memory that were not asked for")
            return frames
        if isinstance(spans, msgspec.UnsetType):
            self._note(under_way, total_bytes([memoryview(frame).nbytes for frame in frames[1:]]))
            return frames
        nbytes = total_bytes([span.nbytes for span in spans])
        self._note(under_way, nbytes)
        return [frames[0], *self._views(under_way, spans, nbytes)]

    def _note(self, under_way: _UnderWay, nbytes: int) -> None:
        """Note how much room the outputs of calls of a kind take."""
        kind = under_way.kind
        if self._sizes.get(kind) != nbytes:
            if len(self._sizes) >= _MOST_KINDS:
                self._sizes.clear()
                self._most.clear()
            self._sizes[kind] = nbytes
            self._most[kind[0]] = max(self._most.get(kind[0], 0), nbytes)

    def _views(self, under_way: _UnderWay, spans: Sequence[Span], nbytes: int) -> list[Any]:
        """Arrays of bytes that look into the segment. What they leave of the space is free again."""
        segment, space = self._segment, under_way.space
        assert segment is not None
        end = 0 if space is None else space.offset + nbytes
        if (
            space is None
            or nbytes > space.nbytes
            or any(span.offset < space.offset or span.offset + span.nbytes > end for span in spans)
        ):
            if under_way.place is not None:
                segment.freed.append(under_way.place)
            raise InvalidArgument("outputs in shared memory that are not within the space for them")
        if nbytes < space.nbytes:
            segment.freed.append(Span(space.offset + nbytes, space.nbytes - nbytes))
        if not nbytes:
            return [b""] * len(spans)
        whole = np.asarray(_Block(segment, Span(space.offset, nbytes)))
        return [whole[span.offset - space.offset : span.offset - space.offset + span.nbytes] for span in spans]


def _received(listener: socket.socket, token: bytes, nbytes: int) -> _Segment:
    """The segment that the daemon has sent over a connection to a listener.

    Raises:
        OSError, ValueError: it has sent none.
    """
    for _ in range(_MOST_STRANGERS):
        try:
            lifeline, _ = listener.accept()
        except BlockingIOError:
            break
        try:
            lifeline.setblocking(False)
            said, descriptors, _, _ = socket.recv_fds(lifeline, 2 * len(token), 1, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            lifeline.close()
            continue
        if said != token or len(descriptors) != 1:  # anybody may know the address
            lifeline.close()
            for descriptor in descriptors:
                os.close(descriptor)
            continue
        with os.fdopen(descriptors[0], "rb", 0) as file:
            # What is too short, or could be shortened, would end this process by SIGBUS.
            if (
                not fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
                or os.fstat(file.fileno()).st_size < nbytes
            ):
                lifeline.close()
                raise ValueError("the daemon has sent memory that is not sealed, or too short")
            return _Segment(file.fileno(), nbytes, lifeline)
    raise ValueError("the daemon has sent none")
