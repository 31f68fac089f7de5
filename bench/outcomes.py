"""What became of the requests of an open loop: one entry for each, and the figures that are made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from tnxctl import wire
from workload import FIRST_ID, Workload

_LIMITS = wire.Limits()


class Outcome(IntEnum):
    """The end of a request.

    RESULT, WRONG: it was computed; wrongly. REFUSED: turned away on arrival, since it cannot be done in time. FULL,
    UNAVAILABLE: turned away on arrival with RESOURCE_EXHAUSTED or UNAVAILABLE. EXPIRED: taken in, and given up when
    its deadline had passed. FAILED: any other error. LOST: no answer. CUT: no answer, and its connection was ended by
    the server. UNSENT: the load was over before the socket had room for it.
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


ON_ARRIVAL = (Outcome.REFUSED, Outcome.FULL, Outcome.UNAVAILABLE)
"""Ends of requests that were not taken in."""

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


class Figures(msgspec.Struct, frozen=True):
    """Some requests under one load. Shares are of all that were offered, unless it says otherwise.

    Attributes:
        requests: offered, and so `offered_per_s`; sent_per_s: that the kernel took before the load was over.
        in_time_per_s: results that were here within the deadline, counted from when a request was due.
        in_time_sent_per_s: the same, counted from when it was sent.
        in_time_admitted: share of the admitted that were in time, from when they were due; those were admitted that
            were computed or expired. None if there was none.
        in_time_sent_admitted: the same, from when they were sent.
        refused, full, unavailable: shares turned away on arrival, see `Outcome`. late: results that were not in time.
        expired, failed, wrong, lost, cut, unsent: see `Outcome`.
        result_ms: p50 and p99 of the time from when a request was due until its result was here.
        refusal_ms: p99 of the time until it was known that it is refused. refusal_share: of the deadline.
        late_ms: p99 of how late the client came to send. blocked_ms: p99 of how long the socket had no room then.
    """

    requests: int
    offered_per_s: float
    sent_per_s: float
    in_time_per_s: float
    in_time_sent_per_s: float
    in_time_admitted: float | None
    in_time_sent_admitted: float | None
    refused: float
    full: float
    unavailable: float
    late: float
    expired: float
    failed: float
    wrong: float
    lost: float
    cut: float
    unsent: float
    result_ms: dict[str, float | None]
    refusal_ms: float | None
    refusal_share: float | None
    late_ms: float | None
    blocked_ms: float | None


def figures(found: Outcomes, seconds: float, deadline_ms: float | None) -> Figures:
    """Figures of requests that were offered for so long.

    Args:
        deadline_ms: None if they had none: every result is in time then.
    """
    count = len(found.due)
    share = {kind: _share(_count(found.outcome == kind), count) for kind in Outcome}
    is_result = found.outcome == Outcome.RESULT
    admitted = _count(is_result) + _count(np.isin(found.outcome, (Outcome.EXPIRED, Outcome.WRONG)))
    allowed_ns = math.inf if deadline_ms is None else deadline_ms * 1e6
    in_time = _count(is_result & (found.answered - found.due <= allowed_ns))
    in_time_sent = _count(is_result & (found.answered - found.sent <= allowed_ns))
    refused = np.isin(found.outcome, ON_ARRIVAL)
    refusal_ms = percentile(_ms(found.answered - found.due, refused), 99)
    results_ms = _ms(found.answered - found.due, is_result)
    return Figures(
        requests=count,
        offered_per_s=round(count / seconds, 1),
        sent_per_s=round(_count(found.sent) / seconds, 1),
        in_time_per_s=round(in_time / seconds, 1),
        in_time_sent_per_s=round(in_time_sent / seconds, 1),
        in_time_admitted=_share(in_time, admitted) if admitted else None,
        in_time_sent_admitted=_share(in_time_sent, admitted) if admitted else None,
        refused=share[Outcome.REFUSED],
        full=share[Outcome.FULL],
        unavailable=share[Outcome.UNAVAILABLE],
        late=_share(_count(is_result) - in_time, count),
        expired=share[Outcome.EXPIRED],
        failed=share[Outcome.FAILED],
        wrong=share[Outcome.WRONG],
        lost=share[Outcome.LOST],
        cut=share[Outcome.CUT],
        unsent=share[Outcome.UNSENT],
        result_ms={"p50": percentile(results_ms, 50), "p99": percentile(results_ms, 99)},
        refusal_ms=refusal_ms,
        refusal_share=None if refusal_ms is None or deadline_ms is None else round(refusal_ms / deadline_ms, 4),
        late_ms=percentile(_ms(found.tried - found.due, found.tried > 0), 99),
        blocked_ms=percentile(_ms(found.sent - found.tried, found.sent > 0), 99),
    )


def _count(chosen: NDArray[Any]) -> int:
    return int(np.count_nonzero(chosen))


def _share(part: int, whole: int) -> float:
    return round(part / whole, 5) if whole else 0.0


def _ms(values: NDArray[np.int64], chosen: NDArray[np.bool_]) -> NDArray[Any]:
    return values[chosen] / 1e6


def percentile(values: NDArray[Any], percent: float) -> float | None:
    """A percentile, to a thousandth; None of no values."""
    return round(float(np.percentile(values, percent)), 3) if len(values) else None
