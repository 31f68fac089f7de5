"""Cache of refusals: what is hopeless for one request is so for those like it that come behind it."""

from __future__ import annotations

from collections.abc import Hashable

from tnxctl.protocol.errors import DeadlineExceeded
from tnxctl.protocol.wire import Predict

# Kinds of requests that are remembered at a time.
_MOST = 256


class TooLate(DeadlineExceeded):
    """Refusal on arrival: the request would not be done by its deadline.

    Attributes:
        ready_ns: when the request would have been done, with the margin that a promise needs.
    """

    def __init__(self, message: str, ready_ns: int, retry_after_s: float | None = None) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.ready_ns = ready_ns


class Refusals:
    """Cache of the refusals for want of time since batches were last formed. Until then, queues only grow.

    To refuse costs a part of what it costs to serve, and under overload there is far more to refuse than to serve: a
    request that is like one that was refused, and due no later than that would have been done, is not looked at again.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, TooLate] = {}

    def __bool__(self) -> bool:
        return bool(self._known)

    def clear(self) -> None:
        """Forget all: requests have left their queues, and there may be room."""
        self._known.clear()

    def add(self, peer: bytes, request: Predict, refusal: TooLate) -> None:
        """Remember the refusal of a request, for those of its kind."""
        if len(self._known) < _MOST:
            self._known[_kind(peer, request)] = refusal

    def find(self, peer: bytes, request: Predict, deadline_ns: int) -> TooLate | None:
        """Refusal that holds for a request with that deadline, too; None if the request has to be looked at."""
        known = self._known.get(_kind(peer, request))
        return known if known is not None and deadline_ns < known.ready_ns else None


def _kind(peer: bytes, request: Predict) -> Hashable:
    """Key of all that decides where and when a request would be done, without its deadline."""
    return (
        peer,
        request.inputs,
        request.model,
        request.priority,
        request.device,
        request.prefer_gpu,
        request.min_gpu_memory_mb,
        request.route_key,
    )
