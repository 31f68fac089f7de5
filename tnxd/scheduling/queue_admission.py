"""Admission to the queue: which requests the queue takes, by its limits and by their deadlines."""

from __future__ import annotations

from tnxctl.protocol.errors import ResourceExhausted
from tnxd.scheduling.accounts import Accounts
from tnxd.scheduling.device import Device
from tnxd.scheduling.lane_choice import next_curve
from tnxd.scheduling.refusals import TooLate
from tnxd.scheduling.request import NEVER, Request
from tnxd.scheduling.request_queue import RequestQueue
from tnxd.scheduling.times import milliseconds

BEHIND_NS = 200_000
"""Time that a message waits before it is taken in, beyond which the caller is behind with its work."""

# Where it is, the reserve is that part of a deadline. With twice as much so few would wait that batches were small, and
# each request took more of the caller's time: 20,000 requests of `mlp` per second in place of 28,000.
_BEHIND_SHARE = 0.5

# Where nothing runs, nothing is learned: what was slow for a while would be refused for good. So if nothing waits, and
# the fastest batch would have been in time, a refusal casts doubt on the costs, as often as this.
_DOUBT_NS = 1_000_000_000


class AdmissionControl:
    """Limits of what may wait, and the check of deadlines.

    Args:
        max_requests, max_bytes: most that may wait, over all devices.
        max_per_model, max_bytes_per_model: most that may wait for one model; None: as in all.
    """

    __slots__ = ("_max_bytes", "_max_bytes_per_model", "_max_per_model", "max_requests")

    def __init__(
        self, max_requests: int, max_bytes: int, max_per_model: int | None, max_bytes_per_model: int | None
    ) -> None:
        self.max_requests = max_requests
        self._max_bytes = max_bytes
        self._max_per_model = max_per_model or max_requests
        self._max_bytes_per_model = max_bytes_per_model or max_bytes

    def admit(
        self,
        accounts: Accounts,
        request: Request,
        device: Device,
        queue: RequestQueue,
        wait_us: float,
        run_us: float,
        now_ns: int,
    ) -> None:
        """Refuse a request that may not wait in that queue of a device, or would be late.

        Args:
            wait_us, run_us: predicted microseconds until its batch starts, and of that batch.

        Raises:
            ResourceExhausted: the queue is full. The message tells the predicted wait.
            TooLate: the request would not be done by its deadline. The message tells the predicted wait.
        """
        limit, load = "", queue.placement.load
        if accounts.queued >= self.max_requests:
            limit = f"{accounts.queued} requests are queued, which is the limit"
        elif accounts.queued_bytes + request.nbytes > self._max_bytes:
            limit = (
                f"{accounts.queued_bytes} bytes are queued and {request.nbytes} more exceed the limit, "
                f"{self._max_bytes}"
            )
        elif load.queued >= self._max_per_model:
            limit = f"{load.queued} requests for {request.model!r} are queued, which is the limit"
        elif load.queued_bytes + request.nbytes > self._max_bytes_per_model:
            limit = (
                f"{load.queued_bytes} bytes are queued for {request.model!r} and {request.nbytes} more exceed the "
                f"limit, {self._max_bytes_per_model}"
            )
        if limit:
            room_s = max(
                wait_us / max(load.queued, 1) * (queue.placement.row_limit(request.max_batch_size) or 1), run_us
            )
            raise ResourceExhausted(
                f"{limit}; the predicted wait is {milliseconds(wait_us)}", retry_after_s=room_s / 1e6
            )
        if request.deadline_ns != NEVER:
            curve = next_curve(device, queue, request.rows)
            margin_us = curve.spread(request.rows)
            needs_us = wait_us + run_us + margin_us
            came_ns = request.came_ns or now_ns
            allowed_us = (request.deadline_ns - came_ns) / 1e3
            behind = now_ns - came_ns > BEHIND_NS
            if wait_us or behind:  # nothing unforeseen waits where nothing waits
                forecast = queue.placement.forecast
                if behind:
                    reserve_us = forecast.extra_us + _BEHIND_SHARE * forecast.reserve * allowed_us
                else:
                    reserve_us = needs_us * forecast.reserve / (1.0 - forecast.reserve)
                margin_us += reserve_us
                needs_us += reserve_us
            left_us = (request.deadline_ns - now_ns) / 1e3
            if needs_us > left_us:
                if not wait_us and curve.least(request.rows) <= left_us and now_ns >= queue.doubted_ns + _DOUBT_NS:
                    queue.doubted_ns = now_ns
                    curve.doubt()
                    queue.placement.forecast.extra_us /= 2
                left = f"{milliseconds(left_us)} from now" if left_us > 0 else f"past for {milliseconds(-left_us)}"
                raise TooLate(
                    f"it cannot be done within its deadline, {left}: the predicted wait is "
                    f"{milliseconds(wait_us)} and then {milliseconds(run_us)}, "
                    f"with a margin of {milliseconds(margin_us)}",
                    now_ns + int(needs_us * 1e3),
                    # It says nothing about one that would be late though nothing waits, here or in its socket.
                    retry_after_s=(needs_us - left_us) / 1e6 if wait_us or needs_us <= allowed_us else None,
                )
