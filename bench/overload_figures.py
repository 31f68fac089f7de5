"""Figures of an overload: what is read off the outcomes of many requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from outcomes import ON_ARRIVAL, TAKEN_IN, Outcome, Outcomes


class Figures(msgspec.Struct, frozen=True):
    """Some requests under one load. Shares are of all that were offered, unless it says otherwise.

    Attributes:
        requests: offered, and so `offered_per_s`; sent_per_s: that the kernel took before the load was over.
        in_time_per_s: results that were here within the deadline, counted from when a request was due; where there is
            no deadline, results that were here before the load was over.
        in_time_sent_per_s: the same, but with the deadline counted from when it was sent.
        in_time_admitted: share of the admitted that were in time, from when they were due; those were admitted that
            were computed or expired. None if there was none.
        in_time_sent_admitted: the same, from when they were sent.
        refused, full, unavailable: shares turned away on arrival, see `Outcome`. late: results that were not in time.
        expired, failed, wrong, lost, cut, unsent: see `Outcome`.
        result_ms: p50 and p99 of the time from when a request was due until its result was here.
        held: share that their client did not send, since the daemon had refused others.
        refusal_ms: p99 of the time until the server's refusal was known. refusal_share: of the deadline.
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
    held: float
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
    """Figures of requests that were offered for so long. deadline_ms: None if they had none."""
    count = len(found.due)
    share = {kind: _share(_count(found.outcome == kind), count) for kind in Outcome}
    is_result = found.outcome == Outcome.RESULT
    admitted = _count(np.isin(found.outcome, TAKEN_IN))
    if deadline_ms is None:
        in_time = in_time_sent = _count(
            is_result & (found.answered <= np.min(found.due, initial=2**62) + seconds * 1e9)
        )
    else:
        in_time, in_time_sent = (
            _count(is_result & (found.answered - since <= deadline_ms * 1e6)) for since in (found.due, found.sent)
        )
    refused = np.isin(found.outcome, ON_ARRIVAL) & (found.outcome != Outcome.HELD)
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
        held=share[Outcome.HELD],
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


class Waiting(msgspec.Struct, frozen=True):
    """Requests without deadlines: how long they waited, and how right it was when to come back.

    Attributes:
        queue_ms: p50, p99 and max of what the daemon says that results have waited; None of none.
        retry_ms: p50 of the `retry_after_us` of requests that were turned away, in milliseconds; None of none.
        retry_ratio: p10, p50 and p90 of that over the time until there was room, see `retry_ratios`; None of none.
        retries: how many it is taken from.
    """

    queue_ms: dict[str, float | None]
    retry_ms: float | None
    retry_ratio: dict[str, float | None]
    retries: int


def waiting(clients: Sequence[Outcomes]) -> Waiting:
    """The waits of requests of several clients."""
    queue_ms = np.concatenate([found.queue_us[~np.isnan(found.queue_us)] for found in clients]) / 1e3
    retry_ms = np.concatenate([found.retry_after_us[~np.isnan(found.retry_after_us)] for found in clients]) / 1e3
    ratios = np.concatenate([retry_ratios(found) for found in clients])
    return Waiting(
        queue_ms={name: percentile(queue_ms, percent) for name, percent in (("p50", 50), ("p99", 99), ("max", 100))},
        retry_ms=percentile(retry_ms, 50),
        retry_ratio={name: percentile(ratios, percent) for name, percent in (("p10", 10), ("p50", 50), ("p90", 90))},
        retries=len(ratios),
    )


def retry_ratios(found: Outcomes) -> NDArray[np.float64]:
    """The advertised time to come back over the time that it took, for every request that was turned away with one.

    When there was room again is not known. It is taken to be when the client sent the first request, after it knew of
    the refusal, that was taken in. So it is no finer than the gaps between requests, and where a queue is full that
    gives up a place now and then, it is when the next place was had, not when all who were turned away would have
    found one. 1 is right; less: too early, in vain; more: later than need be. Refusals that nothing was taken in after
    are left out.
    """
    taken_in = np.sort(found.sent[np.isin(found.outcome, TAKEN_IN)])
    asked = ~np.isnan(found.retry_after_us)
    known_ns, retry_us = found.answered[asked], found.retry_after_us[asked]
    place = np.searchsorted(taken_in, known_ns)
    followed = place < len(taken_in)
    took_us = (taken_in[place[followed]] - known_ns[followed]) / 1e3
    ratios: NDArray[np.float64] = retry_us[followed] / np.maximum(took_us, 1.0)
    return ratios


def _count(chosen: NDArray[Any]) -> int:
    return int(np.count_nonzero(chosen))


def _share(part: int, whole: int) -> float:
    return round(part / whole, 5) if whole else 0.0


def _ms(values: NDArray[np.int64], chosen: NDArray[np.bool_]) -> NDArray[Any]:
    return values[chosen] / 1e6


def percentile(values: NDArray[Any], percent: float) -> float | None:
    """A percentile, to a thousandth; None of no values."""
    return round(float(np.percentile(values, percent)), 3) if len(values) else None
