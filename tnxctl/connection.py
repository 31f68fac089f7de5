"""The connection of a client to its daemon as a state machine: closed, connecting or open. No socket, no clock.

    may_connect(now)        whether it is time for an attempt: the interval between two grows exponentially
    connecting(now)         closed -> connecting
    opened()                connecting -> open
    handshake_begun(now)    the attempt has met somebody, whom keys are exchanged with
    handshake_failed(...)   who does not let this client in, or may not
    closed()                connecting or open -> closed
    heard(now)              a message came
    suspect(now, ...)       nothing came for too long: a probe is to be sent
    is_half_open(now)       nothing came after the probe either: close it
    is_late(now)            the attempt takes too long: end it

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

MAX_FAILED_HANDSHAKES = 3
"""Handshakes with keys that may fail in a row without a reason, each in an attempt of its own. A daemon that does not
have the key which is expected of it gives none, and neither does one that ends during a handshake. One that is silent
counts as well."""

SILENCE_S = 1.0
"""Time after which somebody who has not finished a handshake with keys is silent."""

FIRST_RETRY_S = 0.05
LAST_RETRY_S = 1.0
"""Interval between two attempts to connect: doubles from the first to the last, until a reply comes. A random time is
added to each."""


class Connection:
    """State of the connection to one endpoint.

    Attributes:
        is_open: whether the handshake is done and nothing has ended it since.
        is_connecting: whether an attempt is under way.
        is_refused: whether the last attempt showed that this client is not let in, or only by another than it expects.
        trouble: how far the last attempt came, or why it failed: a clause for error messages.
        retry_at: time before which no attempt begins.
        retry_s: interval from the next attempt to the one after it: the first again as soon as the daemon replies.
        ends_at: time at which the attempt under way is to be ended; infinite where that is not for us to do.
        half_open_at: time from which on it is half-open unless something comes; infinite without a suspicion.
        wants_probe: whether the daemon is to be asked for its health.
    """

    __slots__ = (
        "_attempt_failed",
        "_failed_handshakes",
        "_given_up",
        "_handshake_begun",
        "_handshake_failed",
        "_received_at",
        "endpoint",
        "ends_at",
        "half_open_at",
        "is_connecting",
        "is_open",
        "is_refused",
        "retry_at",
        "retry_s",
        "trouble",
        "wants_probe",
    )

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.is_open = False
        self.is_connecting = False
        self.is_refused = False
        self.trouble = "the attempt to connect is still under way"
        self.retry_at = -math.inf
        self.ends_at = math.inf
        self.half_open_at = math.inf
        self.wants_probe = False
        self._attempt_failed = False  # the last one
        self._handshake_begun = math.inf  # in the attempt under way
        self._handshake_failed = False  # likewise
        self._failed_handshakes = 0  # in a row
        self.retry_s = FIRST_RETRY_S
        self._received_at = -math.inf
        self._given_up = 0  # connections in a row, since something last came

    def may_connect(self, now: float) -> bool:
        """Whether no attempt is under way or has succeeded, and it is time for one."""
        return not (self.is_open or self.is_connecting) and now >= self.retry_at

    def connecting(self, now: float) -> None:
        """Note that an attempt to connect begins."""
        self.is_connecting = True
        self.is_refused = self._handshake_failed = False
        self._handshake_begun = math.inf
        self.retry_at = now + spread(self.retry_s)
        self.retry_s = min(2 * self.retry_s, LAST_RETRY_S)

    def is_late(self, now: float) -> bool:
        """Whether the attempt under way takes too long."""
        return now >= self.ends_at

    def note_trouble(self, trouble: str, *, begun: bool = False) -> None:
        """Note how far the attempt came, or why it failed: a clause for error messages.

        Args:
            begun: no more is known of the attempt than that it has begun. Why the last one failed says more.
        """
        if not (begun and self._attempt_failed):
            self.trouble = trouble

    def handshake_begun(self, now: float) -> None:
        """Note that the attempt has met somebody, whom keys are exchanged with."""
        self._handshake_begun = now

    def handshake_failed(self, *, refused: bool) -> None:
        """Note that the handshake has failed, which the end of the attempt is to follow.

        Args:
            refused: the other side has said that it lets this client not in, or not so. Else it may only have ended.
        """
        self._handshake_failed = True
        self._failed_handshakes += 1
        self.is_refused = refused or self._failed_handshakes >= MAX_FAILED_HANDSHAKES

    def is_silent(self, now: float) -> bool:
        """Whether the last that is known of the other side is that it has not finished a handshake with keys."""
        return self._failed_handshakes > 0 or now - self._handshake_begun >= SILENCE_S

    def opened(self) -> None:
        """Note that the attempt has succeeded."""
        self.is_connecting = self._attempt_failed = False
        self.is_open = True
        self.ends_at = math.inf

    def closed(self) -> None:
        """Note that the attempt has failed, or that the connection is no more."""
        self._attempt_failed = not self.is_open
        if not self._handshake_failed:  # nobody was there
            self._failed_handshakes, self._handshake_begun = 0, math.inf
        self.is_open = self.is_connecting = False
        self._received_at, self.half_open_at, self.ends_at = -math.inf, math.inf, math.inf
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
