"""The ends of the requests of an open loop, one entry for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from tnxctl.protocol import wire
from workload import FIRST_ID, Workload

_LIMITS = wire.Limits()


class Outcome(IntEnum):
    """The end of a request.

    RESULT, WRONG: it was computed; wrongly. REFUSED: turned away on arrival, since it cannot be done in time. FULL,
    UNAVAILABLE: turned away on arrival with RESOURCE_EXHAUSTED or UNAVAILABLE. EXPIRED: taken in, and given up when
    its deadline had passed. FAILED: any other error. LOST: no answer. CUT: no answer, and its connection was ended by
    the server. UNSENT: the load was over before the socket had room for it. HELD: its client did not send it, since
    the server had refused others for want of time.
    """

    RESULT = 0
    REFUSED = 1
    FULL = 2
    UNAVAILABLE = 3
    EXPIRED = 4
    FAILED = 5
    WRONG = 6
    LOST = 7
    CUT = 8
    UNSENT = 9
    HELD = 10


ON_ARRIVAL = (Outcome.REFUSED, Outcome.FULL, Outcome.UNAVAILABLE, Outcome.HELD)
"""Ends of requests that were not taken in."""

TAKEN_IN = (Outcome.RESULT, Outcome.WRONG, Outcome.EXPIRED)
"""Ends of requests that were."""

# The daemon gives both the same code, and tells them apart in words.
_REFUSED_SENTENCE, _EXPIRED_SENTENCE = "cannot be done within its deadline", "has passed"


@dataclass
class Outcomes:
    """Requests in the order in which they were due. Times are in nanoseconds of the monotonic clock.

    Attributes:
        due: when it was to be sent. tried: when its client came to do so. sent: when the kernel had taken all of it.
        answered: when the client had its answer. 0 where that never was.
        outcome: of `Outcome`.
        urgent: whether its priority was 0.
        retry_after_us: that of its error, NaN if it had none. queue_us: how long a result had waited in the daemon.
    """

    due: NDArray[np.int64]
    tried: NDArray[np.int64]
    sent: NDArray[np.int64]
    answered: NDArray[np.int64]
    outcome: NDArray[np.uint8]
    urgent: NDArray[np.bool_]
    retry_after_us: NDArray[np.float64]
    queue_us: NDArray[np.float64]

    @classmethod
    def of(cls, due: Sequence[int], tried: Sequence[int], sent: Sequence[int], urgent: NDArray[np.bool_]) -> Self:
        """Requests that have no answer yet."""
        count = len(due)
        outcome = np.full(count, Outcome.UNSENT, np.uint8)
        outcome[: len(sent)] = Outcome.LOST
        return cls(
            np.array(due, np.int64),
            _padded(tried, count),
            _padded(sent, count),
            np.zeros(count, np.int64),
            outcome,
            urgent,
            np.full(count, np.nan),
            np.full(count, np.nan),
        )

    def hold(self, numbers: NDArray[np.int64]) -> None:
        """Their client held these back, at the time when it would have sent them."""
        self.outcome[numbers] = Outcome.HELD
        self.answered[numbers] = self.tried[numbers]
        self.sent[numbers] = 0

    def lose(self, first: int, stop: int) -> None:
        """The server ended the connection of these."""
        lost = self.outcome[first:stop]
        lost[lost == Outcome.LOST] = Outcome.CUT

    def answer(self, arrived_ns: int, header: bytes, tensor: bytes | None, workload: Workload) -> bool:
        """Put an answer in its place.

        Args:
            tensor: that of a result; None where it need not be looked at.

        Returns:
            Whether it belongs to a request that had none.
        """
        reply = wire.decode_reply(header, _LIMITS)
        number = -1 if reply.id is None else reply.id - FIRST_ID
        if not 0 <= number < len(self.due) or self.answered[number]:
            return False
        self.answered[number] = arrived_ns
        if isinstance(reply, wire.Result):
            right = tensor is None or workload.is_right(number, reply.outputs[0].shape, tensor)
            self.outcome[number] = Outcome.RESULT if right else Outcome.WRONG
            self.queue_us[number] = reply.timing.queue_us
        elif isinstance(reply, wire.ErrorReply):
            self.outcome[number] = kind_of(reply)
            if reply.retry_after_us is not None:
                self.retry_after_us[number] = reply.retry_after_us
        else:
            self.outcome[number] = Outcome.FAILED
        return True

    def where(self, chosen: NDArray[np.bool_]) -> Outcomes:
        """Those of the requests that are chosen."""
        return Outcomes(**{name: values[chosen] for name, values in vars(self).items()})

    def save(self, path: Path) -> None:
        """Write them to an .npz file."""
        np.savez(path, **vars(self))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read them from an .npz file."""
        with np.load(path) as found:
            return cls(**found)


def joined(parts: Sequence[Outcomes]) -> Outcomes:
    """The requests of several clients, one client after the other."""
    return Outcomes(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])})


def _padded(values: Sequence[int], count: int) -> NDArray[np.int64]:
    padded = np.zeros(count, np.int64)
    padded[: len(values)] = values
    return padded


def kind_of(error: wire.ErrorReply) -> Outcome:
    """Which end of a request an error is."""
    if error.code == "DEADLINE_EXCEEDED":
        if _REFUSED_SENTENCE in error.message:
            return Outcome.REFUSED
        if _EXPIRED_SENTENCE in error.message:
            return Outcome.EXPIRED
    return {"RESOURCE_EXHAUSTED": Outcome.FULL, "UNAVAILABLE": Outcome.UNAVAILABLE}.get(error.code, Outcome.FAILED)
