"""Shared memory of the daemon and its clients on this host: one segment for each connection that asks for one.

A segment is a file in memory (memfd) without a name. The daemon makes it, seals it against being shortened, and passes
its descriptor to the process at the other end of the ipc:// connection, and to no other. So it is open to the users of
both ends alone, nothing lies in a file system, and the kernel frees it with the last process that has it.

The client keeps a Unix socket open for as long as it has anything in a segment, results that its program holds
included: by that the daemon knows when the segment is over, however the client ended. Then its memory is freed, even
where another process has got hold of the descriptor.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import socket
from collections.abc import Sequence

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import AlreadyExists, FailedPrecondition, ResourceExhausted
from tnxctl.protocol.shared_memory import Mapping, total_bytes
from tnxctl.protocol.wire import MIB, Span
from tnxd.transport import descriptors
from tnxd.transport.access import is_ipc
from tnxd.transport.clients import Client, Connection

_SEGMENT_BYTES = 64 * MIB
_PAGE_BYTES = mmap.PAGESIZE

_LEAST_SEGMENTS = 4  # that the memory is for: so many connections have one at least
_CLIENT_SHARE = 0.75  # of the memory that one client may have, as of the queue

_EVENTS = 64  # that one look takes


class Segment(Mapping):
    """Segment of one connection.

    Args:
        descriptor: of a file in memory, this object's own from now on.
        connection: whose it is. lifeline: the socket that its client keeps open for as long as it has the segment.
    """

    def __init__(self, descriptor: int, nbytes: int, connection: Connection, lifeline: socket.socket) -> None:
        super().__init__(descriptor, nbytes)
        self.connection = connection
        self._lifeline = lifeline
        self._descriptor = descriptor
        self._allocated = 0

    def read(self, span: Span) -> Array:
        """A copy of a span, as bytes, which the client cannot change any more.

        Raises:
            InvalidArgument: it does not lie within.
            ResourceExhausted: the system has no memory for it.
        """
        self.check(span)
        self._allocate(span.offset, span.nbytes)
        try:
            return super().read(span)
        except MemoryError:
            raise ResourceExhausted(f"there is no memory for a copy of {span.nbytes} bytes") from None

    def place(self, space: Span, arrays: Sequence[Array]) -> tuple[Span, ...] | None:
        """Copy C-contiguous arrays into a space, which lies within. Returns where they lie; None if it is too small."""
        nbytes = total_bytes([array.nbytes for array in arrays])
        if nbytes > space.nbytes:
            return None
        try:
            self._allocate(space.offset, nbytes)
        except ResourceExhausted:
            return None
        return self.write(space.offset, arrays)

    def _allocate(self, offset: int, nbytes: int) -> None:
        """Have the kernel find the memory for some bytes, which it does once. Without any, an access would be SIGBUS.

        Raises:
            ResourceExhausted: it has none left.
        """
        end = offset + nbytes
        if end <= self._allocated or not nbytes:
            return
        end = min(-(-end // _PAGE_BYTES) * _PAGE_BYTES, self.nbytes)
        follows = offset <= self._allocated  # a client fills a segment from its beginning; others pay for each access
        begin = self._allocated if follows else offset
        try:
            os.posix_fallocate(self._descriptor, begin, end - begin)
        except OSError as error:
            raise ResourceExhausted(f"there is no memory left to share: {error.strerror}") from None
        if follows:
            self._allocated = end

    def close(self) -> None:
        """Free the memory, for whoever may still have it, too."""
        self.connection.segment = None
        with contextlib.suppress(OSError):
            self.memory.madvise(mmap.MADV_REMOVE)
        os.close(self._descriptor)
        self._lifeline.close()


class SharedMemory:
    """Segments of all connections.

    Args:
        limit_bytes: most that they may have together; 0: no memory is shared.

    Attributes:
        nbytes: of all segments.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.nbytes = 0
        self._limit_bytes = limit_bytes
        self._segments: dict[int, Segment] = {}  # by the descriptors of their lifelines
        self._lifelines: select.epoll | None = None

    def share(self, connection: Connection, address: str, token: str) -> int:
        """Give a connection a segment. Returns its bytes.

        Args:
            address, token: as in `tnxctl.protocol.requests.Share`.

        Raises:
            FailedPrecondition: this daemon shares none, not with this peer, or it does not listen at that address.
            AlreadyExists: it has one.
            ResourceExhausted: its client has too many, or all together have, or the system has no memory left.
        """
        if not self._limit_bytes:
            raise FailedPrecondition("this daemon shares no memory, clients.shared_memory_mb is 0")
        if not is_ipc(connection.address):
            raise FailedPrecondition("memory is shared with clients on ipc:// alone")
        if connection.segment is not None:
            raise AlreadyExists("this connection has shared memory already")
        self.release()
        nbytes = self._nbytes_for(connection.client)
        lifeline = _connected(connection, address)
        descriptor = -1
        try:
            descriptor = _create(nbytes)
            segment = Segment(descriptor, nbytes, connection, lifeline)
            if self._lifelines is None:
                self._lifelines = select.epoll()
            self._lifelines.register(lifeline, select.EPOLLRDHUP)
            socket.send_fds(lifeline, [token.encode()], [descriptor])
        except OSError as error:
            lifeline.close()
            if descriptor >= 0:
                os.close(descriptor)
            raise ResourceExhausted(f"no memory can be shared: {error.strerror}") from None
        self._segments[lifeline.fileno()] = connection.segment = segment
        self.nbytes += nbytes
        connection.client.shared += nbytes
        return nbytes

    def _nbytes_for(self, client: Client) -> int:
        nbytes = min(_SEGMENT_BYTES, self._limit_bytes // _LEAST_SEGMENTS // _PAGE_BYTES * _PAGE_BYTES)
        if client.shared + nbytes > self._limit_bytes * _CLIENT_SHARE:
            most = int(self._limit_bytes * _CLIENT_SHARE)
            raise ResourceExhausted(f"{client.name} shares {client.shared} bytes of memory, the limit is {most}")
        if self.nbytes + nbytes > self._limit_bytes:
            raise ResourceExhausted(f"{self.nbytes} bytes of memory are shared, the limit is {self._limit_bytes}")
        return nbytes

    def release(self) -> None:
        """Free the segments that their clients have let go. Never blocks. To be called at times."""
        if self._lifelines is None or not self._segments:
            return
        for lifeline, _ in self._lifelines.poll(0, _EVENTS):
            segment = self._segments.pop(lifeline)
            self._lifelines.unregister(lifeline)
            self.nbytes -= segment.nbytes
            segment.connection.client.shared -= segment.nbytes
            segment.close()


def _connected(connection: Connection, address: str) -> socket.socket:
    """A socket that is connected to the process at the other end of a connection, by an address that it named.

    Raises:
        FailedPrecondition: that process does not listen there.
        ResourceExhausted: no socket can be made.
    """
    try:
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise ResourceExhausted(f"no memory can be shared: {error.strerror}") from None
    try:
        peer.connect("\0" + address[1:])
    except OSError as error:
        peer.close()
        raise FailedPrecondition(f"nothing of this host's network listens at {address}: {error.strerror}") from None
    # User, group and process, as the kernel says: a client could name the socket of somebody else.
    if descriptors.peer_address(peer.fileno()) != connection.address:
        peer.close()
        raise FailedPrecondition(f"another process than this client listens at {address}")
    return peer


def _create(nbytes: int) -> int:
    """The descriptor of a new file in memory, whose length nobody can change."""
    descriptor = os.memfd_create("tnxd-shared", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, nbytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
