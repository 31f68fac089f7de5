"""The connection of a client to its daemon as a state machine: closed, connecting or open. No socket, no clock.

    may_connect(now)        whether it is time for an attempt: the interval between two grows exponentially
    connecting(now)         closed -> connecting
    opened()                connecting -> open
    closed()                connecting or open -> closed
    heard(now)              a message came
    suspect(now, ...)       nothing came for too long: a probe is to be sent
    is_half_open(now)       nothing came after the probe either: close it

Times come in as arguments, in seconds of any monotonic clock. `tnxctl.session` decides about the calls on the
connection, `tnxctl.link` has its sockets.

Half-open connections: a connection may stand and carry nothing. A proxy or a firewall has lost the other half, and goes
on to acknowledge. A call that times out although nothing has come since it was made raises the suspicion. The daemon
is then asked for its health, which it answers in every state. Where nothing comes in time, the connection is given up.
"""

from __future__ import annotations

import math

from tnxctl.backoff import spread

FIRST_PROBE_TIMEOUT_S = 1.0
LAST_PROBE_TIMEOUT_S = 600.0
_PROBE_TIMEOUT_S = 5.0
_SLOW_BYTES_PER_S = 1e6
"""Time to answer a probe: half as long as the call that timed out waited, from the first to the middle one. It doubles
with each connection that is given up, up to the last, until something comes. Inputs under way get as long on top as a
slow line takes for them. The last one bounds that as well: a wait of any length must have an end."""

FIRST_RETRY_S = 0.05
LAST_RETRY_S = 1.0
"""Interval between two attempts to connect: doubles from the first to the last, until a reply comes. A random time is
added to each."""


class Connection:
    """State of the connection to one endpoint.

    Attributes:
        is_open: whether the handshake is done and nothing has ended it since.
        is_connecting: whether an attempt is under way.
        trouble: how far the last attempt came, or why it failed: a clause for error messages.
        retry_at: time before which no attempt begins.
        retry_s: interval from the next attempt to the one after it: the first again as soon as the daemon replies.
        half_open_at: time from which on it is half-open unless something comes; infinite without a suspicion.
        wants_probe: whether the daemon is to be asked for its health.
    """

    __slots__ = (
        "_attempt_failed",
        "_given_up",
        "_received_at",
        "endpoint",
        "half_open_at",
        "is_connecting",
        "is_open",
        "retry_at",
        "retry_s",
        "trouble",
        "wants_probe",
    )

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.is_open = False
        self.is_connecting = False
        self.trouble = "the attempt to connect is still under way"
        self.retry_at = -math.inf
        self.half_open_at = math.inf
        self.wants_probe = False
        self._attempt_failed = False  # the last one
        self.retry_s = FIRST_RETRY_S
        self._received_at = -math.inf
        self._given_up = 0  # connections in a row, since something last came

    def may_connect(self, now: float) -> bool:
        """Whether no attempt is under way or has succeeded, and it is time for one."""
        return not (self.is_open or self.is_connecting) and now >= self.retry_at

    def connecting(self, now: float) -> None:
        """Note that an attempt to connect begins."""
        self.is_connecting = True
        self.retry_at = now + spread(self.retry_s)
        self.retry_s = min(2 * self.retry_s, LAST_RETRY_S)

    def note_trouble(self, trouble: str, *, begun: bool = False) -> None:
        """Note how far the attempt came, or why it failed: a clause for error messages.

        Args:
            begun: no more is known of the attempt than that it has begun. Why the last one failed says more.
        """
        if not (begun and self._attempt_failed):
            self.trouble = trouble

    def opened(self) -> None:
        """Note that the attempt has succeeded."""
        self.is_connecting = self._attempt_failed = False
        self.is_open = True

    def closed(self) -> None:
        """Note that the attempt has failed, or that the connection is no more."""
        self._attempt_failed = not self.is_open
        self.is_open = self.is_connecting = False
        self._received_at, self.half_open_at = -math.inf, math.inf
        self.wants_probe = False

    def retry_at_once(self) -> None:
        """Let the next attempt, should there be one, begin without delay."""
        self.retry_at = -math.inf
        self.retry_s = FIRST_RETRY_S

    def received(self, now: float) -> None:
        """Note that a message came, of any content."""
        self._received_at, self.half_open_at, self._given_up = now, math.inf, 0

    def has_received_since(self, then: float) -> bool:
        """Whether a message came over this connection after a time."""
        return self._received_at > then

    def suspect(self, now: float, timeout: float, pending_bytes: int, not_before: float) -> None:
        """Begin to probe: a call has timed out, and nothing has come meanwhile.

        Args:
            timeout: seconds that the call waited.
            pending_bytes: inputs that may still be on their way.
            not_before: earliest time at which the connection may be given up.
        """
        wait = min(max(timeout / 2, FIRST_PROBE_TIMEOUT_S), _PROBE_TIMEOUT_S) * 2**self._given_up
        until = now + min(wait + pending_bytes / _SLOW_BYTES_PER_S, LAST_PROBE_TIMEOUT_S)
        self.half_open_at = max(until, not_before)
        self.wants_probe = True

    def is_half_open(self, now: float) -> bool:
        """Whether the connection has been silent for so long that it is to be given up. Receive all messages first."""
        return self.is_open and now >= self.half_open_at

    def give_up(self) -> None:
        """Note that it is closed for being half-open: the next one gets more time."""
        self._given_up += 1
        self.trouble = "nothing came over the last connection any more, though it stood"
