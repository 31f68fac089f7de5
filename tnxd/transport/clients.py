"""Clients and their connections: records of who they are, what they may, and what they have under way.

A client is whoever has a key, by its name; without keys an address, or a user of this machine on ipc://. It may have
many connections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.wire import Role, Span
from tnxd.transport.rate_limit import RateLimit
from tnxd.transport.sender_clock import SenderClock

RETRY_AFTER_S = 0.05
"""The wait that a refused client is told until it is known how long room takes."""


class SharedSegment(Protocol):
    """Shared memory of one connection, as `tnxd.transport.shared_memory` makes it."""

    def check(self, span: Span) -> None:
        """Check that a span lies within. Raises InvalidArgument."""

    def read(self, span: Span) -> Array:
        """A copy of a span, as bytes. Raises InvalidArgument, and ResourceExhausted."""

    def place(self, space: Span, arrays: Sequence[Array]) -> tuple[Span, ...] | None:
        """Copy C-contiguous arrays into a space. Returns where they lie; None if it is too small."""


@dataclass(slots=True, eq=False)
class Client:
    """Client: the holder of a key, one address, or one user on ipc://, with its counts and its limits.

    Attributes:
        name: that of its key, its address, or `uid:` and a number. local: whether it is on this host by its address.
        has_key: whether it was told by a key. Then limits hold for all its connections together.
        max_requests, max_bytes: limits of its requests in flight, and of the bytes of their inputs.
        rate: limit of its requests a second; None sets no limit.
        share: of the turns of its requests, relative to those of other clients.
        checked: whether each of its requests needs a closer look: it has a rate, or may have fewer bytes than others.
        taken: number of requests that were taken in. refused: of messages that were answered with an error at once.
        received: bytes of messages of connections that have ended.
        connections: number of open ones.
        requests, nbytes: requests in flight, and their bytes.
        unsent: bytes of replies that it has not taken yet.
        shared: bytes of the memory that it shares with the daemon, maybe for longer than it is connected.
        commands: number of admin commands that wait or run.
        refused_ns: time of the loop that its refused messages took since `take_flooding`, in nanoseconds.
        full_since: when a request first found no room, by the monotonic clock in seconds; 0 since there is some.
        room_s: seconds until there is room again, as a moving average.
    """

    name: str
    local: bool
    has_key: bool = False
    max_requests: int = 0
    max_bytes: int = 0
    rate: RateLimit | None = None
    share: float = 1.0
    checked: bool = False
    taken: int = 0
    refused: int = 0
    received: int = 0
    connections: int = 0
    requests: int = 0
    nbytes: int = 0
    unsent: int = 0
    shared: int = 0
    commands: int = 0
    refused_ns: int = 0
    full_since: float = 0.0
    room_s: float = RETRY_AFTER_S


@dataclass(slots=True, eq=False)
class Connection:
    """Connection of one peer, from its first message on, with its counts.

    Attributes:
        peer: its routing id. descriptor: its file descriptor, -1 if unknown. client: whose it is.
        address: of its other end, as ZeroMQ writes it. key: the public key that it showed, in Z85; "": none.
        role: what it may do. since: when its first message came, by the monotonic clock in seconds.
        frame_bytes: most bytes that encryption adds to each of its frames on the way.
        requests: requests in flight by id, of the class that the caller of `Admission.take` has.
        nbytes: bytes of these. commands: number of admin commands that wait or run.
        unsent: bytes of replies that it has not taken yet.
        received, frames: bytes, and frames, of the messages that it has sent and that were received.
        refused_ns: as of its client.
        clock: of the sender.
        segment: the memory that it shares, if any.
        heard, filled_ns: see `FairQueue.filled_ns`.
        closed: whether it has ended, or is being cut off. cut: whether it was cut off.
    """

    peer: bytes
    descriptor: int
    client: Client
    address: str = ""
    key: str = ""
    role: Role = Role.OBSERVE
    since: float = 0.0
    frame_bytes: int = 0
    requests: dict[int, Any] = field(default_factory=dict)
    nbytes: int = 0
    commands: int = 0
    unsent: int = 0
    received: int = 0
    frames: int = 0
    refused_ns: int = 0
    clock: SenderClock = field(default_factory=SenderClock)
    segment: SharedSegment | None = None
    heard: int = 0
    filled_ns: int = 0
    closed: bool = False
    cut: bool = False
