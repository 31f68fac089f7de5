"""Scheduling: where a request goes, and which batch runs next. Pure policy: no tensor, thread, clock or socket.

A request is routed to a device when it arrives and waits there with others of its model and shape group
(`request_queue`). A lane of that device takes what is waiting the moment it is free, up to the model's batch limit:
nothing waits for company, unless the model asks for a delay.

One caller owns a Scheduler and tells it the time, in nanoseconds of a monotonic clock; it returns what to do and does
nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heapify, heappop, heappush

from tnxctl.protocol.errors import ResourceExhausted
from tnxd.scheduling.costs import CostCurve, CostModel
from tnxd.scheduling.device import BACKGROUND, INLINE, Batch, Device
from tnxd.scheduling.forecast import Forecast
from tnxd.scheduling.placement import Placement
from tnxd.scheduling.refusals import TooLate
from tnxd.scheduling.request import LEVELS, NEVER, Request
from tnxd.scheduling.request_queue import RequestQueue
from tnxd.scheduling.routing import Routing

# A request without a deadline, or with a later one, takes its place in the order as if it had to be done in a second:
# among others of its kind that is the order of arrival, and none with a later deadline overtakes it.
_PATIENCE_NS = 1_000_000_000

# How far to look for a batch that is cheap enough to run inline while all lanes are busy.
_MAX_PASSED_OVER = 8

# Where many more wait than fit, the next batch leaves out what would be done just in time: it may take a little longer
# than expected, and the place would be lost. So much of the spread of its cost counts as a little.
_CLOSE = 0.5

# Where a message has waited for longer before it was taken in, the caller is behind with its work.
_BEHIND_NS = 200_000

# A batch that is taken over has so large a part of the rows that it might have, at most. The device may be slower, and
# what comes next must not find it busy for long.
_STEAL_SHARE = 0.5


class Scheduler:
    """Routes requests to devices and forms batches for free lanes.

    Args:
        devices: in order of preference among equals.
        costs: predicts how long a batch takes, and learns from those that ran.
        max_requests, max_bytes: most that may wait, over all devices.
        max_per_model, max_bytes_per_model: most that may wait for one model; None: as in all.

    Attributes:
        queued, queued_bytes: requests that wait, and their inputs. running: in batches that run; a spare batch counts
            as one. background: spare batches that run.
    """

    def __init__(
        self,
        devices: Iterable[Device],
        costs: CostModel,
        *,
        max_requests: int,
        max_bytes: int,
        max_per_model: int | None = None,
        max_bytes_per_model: int | None = None,
    ) -> None:
        self._routing = Routing(devices, costs)
        self.devices = self._routing.devices
        self.queued = 0
        self.queued_bytes = 0
        self.running = 0
        self.background = 0
        self._costs = costs
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._max_per_model = max_per_model or max_requests
        self._max_bytes_per_model = max_bytes_per_model or max_bytes
        self._serial = 0
        self._deadlines: list[tuple[int, int, Request]] = []
        self._delayed: list[tuple[int, int, Device, RequestQueue]] = []

    @property
    def room(self) -> int:
        """The number of requests that the queue still has room for."""
        return self._max_requests - self.queued

    # --- models that come and go -------------------------------------------------------------------------------

    def outstanding(self, model: str) -> int:
        """Requests of a model that wait or run, on all devices; a spare batch of it counts as one."""
        load = self._routing.loads.get(model)
        return load.queued + load.running if load is not None else 0

    def is_hung(self, model: str) -> bool:
        """Whether all that is outstanding of a model has been given up."""
        load = self._routing.loads.get(model)
        return load is not None and 0 < load.hung == load.queued + load.running

    def forget(self, model: str) -> None:
        """Drop all that is kept about a model: to be called when it is on no device and nothing of it is outstanding.

        Its lane limit and what was learned about it are gone, too, in case it comes back.
        """
        assert not self.outstanding(model)
        assert not any(model in device.models for device in self.devices.values())
        self._routing.loads.pop(model, None)
        for device in self.devices.values():
            device.placements.pop(model, None)
            device.queues = {key: queue for key, queue in device.queues.items() if key[0] != model}
        self._costs.forget(model)

    def set_lane_limit(self, model: str, lanes: int) -> None:
        """Let so many lanes of each device at most, the caller's thread included, run this model at a time; 0: all."""
        self._routing.load(model).max_lanes = lanes
        for device in self.devices.values():
            placement = device.placements.get(model)
            if placement is not None:
                self._release(device, placement)

    def limit_rows(self, device: str, model: str, rows: int) -> None:
        """A forward of this model ran out of memory there, and one of `rows` worked, or none (0): form smaller batches.

        Requests with more rows are still taken, to be run in pieces (`Batch.max_rows`). The ceiling rises again as
        batches work, see `Placement.count_worked`.
        """
        self._routing.placement(self.devices[device], model).lower_ceiling(rows)

    def bound_rows(self, device: str, model: str, rows: int) -> None:
        """A forward of this model with more rows must never be tried there: the same, but the ceiling does not rise."""
        self._routing.placement(self.devices[device], model).bound_ceiling(rows)

    def _release(self, device: Device, placement: Placement) -> None:
        """A lane that ran the model is free: queues that were held for that take turns again."""
        for queue, level in device.held.pop(placement, ()):
            if not device.turns[level].members:
                device.wake(level)
            self._enter(device, queue, level)

    def route(self, request: Request, now_ns: int) -> tuple[Device, str]:
        """The device where a request would run now, and the reason in words. Raises as `add` does."""
        return self._routing.route(request, now_ns)

    # --- in ----------------------------------------------------------------------------------------------------

    def add(self, request: Request, now_ns: int) -> None:
        """Take a request in and route it.

        Raises:
            InvalidArgument: it names a device that there is not.
            Unavailable: no device that it may use has the model.
            ResourceExhausted: the queue is full. The sentence tells the predicted wait.
            TooLate: it would not be done in time. The sentence tells the predicted wait.
        """
        due_ns = now_ns + _PATIENCE_NS
        request.due_ns = due_ns if due_ns < request.deadline_ns else request.deadline_ns
        device, queue, reason, (wait_us, run_us, share_us, _) = self._routing.choose(request, now_ns)
        self._admit(request, queue, wait_us, run_us, now_ns)
        if request.excluded:
            tried = ", ".join([f"{name} had no memory left for it" for name in sorted(request.excluded)])
            reason = f"{tried}; {reason}"
        request.device, request.reason = device.name, reason
        request.predicted_us = wait_us + run_us
        request.wait_us = wait_us
        request.added_ns = now_ns
        request.cost_us = share_us
        request.serial = self._serial = self._serial + 1
        request.waiting = True
        if request.deadline_ns != NEVER:
            self._watch(request)
        if queue.add(request) or request.max_delay_ns:
            self._offer(device, queue, request, now_ns)
        device.enqueue(request.priority, request.rows, share_us)
        placement = queue.placement
        placement.queued += 1
        placement.backlog_us[request.priority] += share_us
        load = placement.load
        load.queued += 1
        load.queued_bytes += request.nbytes
        self.queued += 1
        self.queued_bytes += request.nbytes

    def start(self, request: Request, now_ns: int) -> Batch | None:
        """Take a request in that need not wait: a batch of it alone, INLINE. None: `add` it. Raises as `add` does.

        Comes to the same as to add it and ask for the next batches, without the way through queues and turns. The
        caller runs the batch before it comes with another request.
        """
        routing = self._routing
        if self.queued or request.max_delay_ns or request.wanted == "auto" or (request.prefer_gpu and routing.gpus):
            return None
        device, reason = routing.route(request, now_ns)
        if not device.inline_limit_us or device.busy_until_ns:
            return None
        queue = routing.queue(device, request.model, request.group)
        costs, placement, rows = queue.costs, queue.placement, request.rows
        if (placement.load.max_lanes and placement.has_all_lanes) or not costs.fits_inline(rows):
            return None
        run_us = costs.inline.mean(rows)
        self._admit(request, queue, 0.0, run_us, now_ns)
        request.device, request.reason, request.predicted_us = device.name, reason, run_us
        device.wake(request.priority)
        device.charge(request.priority, run_us)
        return self._batch(device, INLINE, queue, [request], rows, now_ns, 0)

    def _admit(self, request: Request, queue: RequestQueue, wait_us: float, run_us: float, now_ns: int) -> None:
        limit, load = "", queue.placement.load
        if self.queued >= self._max_requests:
            limit = f"{self.queued} requests are queued, which is the limit"
        elif self.queued_bytes + request.nbytes > self._max_bytes:
            limit = (
                f"{self.queued_bytes} bytes are queued and {request.nbytes} more exceed the limit, {self._max_bytes}"
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
                f"{limit}; the predicted wait is {wait_us / 1e3:.3g} ms", retry_after_s=room_s / 1e6
            )
        if request.deadline_ns != NEVER:
            margin_us = queue.costs.curve(request.rows).spread(request.rows)
            needs_us = wait_us + run_us + margin_us
            allowed_us = (request.deadline_ns - request.came_ns) / 1e3
            if wait_us or now_ns - request.came_ns > _BEHIND_NS:  # nothing unforeseen waits where nothing waits
                forecast = queue.placement.forecast
                reserve_us = forecast.extra_us + forecast.reserve * allowed_us
                margin_us += reserve_us
                needs_us += reserve_us
            left_us = (request.deadline_ns - now_ns) / 1e3
            if needs_us > left_us:
                raise TooLate(
                    f"it cannot be done within its deadline, {left_us / 1e3:.3g} ms from now: the predicted wait is "
                    f"{wait_us / 1e3:.3g} ms and then {run_us / 1e3:.3g} ms, with a margin of {margin_us / 1e3:.3g} ms",
                    now_ns + int(needs_us * 1e3),
                    # It says nothing about one that would be late though nothing waits, here or in its socket.
                    retry_after_s=(needs_us - left_us) / 1e6 if wait_us or needs_us <= allowed_us else None,
                )

    def _offer(self, device: Device, queue: RequestQueue, request: Request, now_ns: int) -> None:
        """Let the queue take part in the turns of its device, now or when it has waited for company."""
        delay_ns = request.max_delay_ns
        if delay_ns and queue.rows < queue.placement.row_limit(request.max_batch_size):
            if queue.count == 1:
                queue.ready_ns = now_ns + delay_ns
                heappush(self._delayed, (queue.ready_ns, request.serial, device, queue))
            if now_ns < queue.ready_ns:
                return
        self._enter(device, queue, request.priority)

    def _enter(self, device: Device, queue: RequestQueue, level: int) -> None:
        head = queue.head(level)
        if head is not None:
            device.turns[level].offer(queue, head.due_ns, head.serial)

    # --- out ---------------------------------------------------------------------------------------------------

    def next_batches(self, now_ns: int) -> tuple[list[Batch], list[Request]]:
        """Batches for the lanes that are free now, at most one of them INLINE, and requests that are too late.

        The caller runs the first and answers the second.
        """
        while self._delayed and self._delayed[0][0] <= now_ns:
            ready_ns, _, device, queue = heappop(self._delayed)
            if ready_ns == queue.ready_ns:  # else it was emptied meanwhile, and waits anew
                for level in range(LEVELS):
                    self._enter(device, queue, level)
        batches: list[Batch] = []
        late: list[Request] = []
        for device in self.devices.values():
            if device.queued:
                self._fill_lanes(device, now_ns, batches, late)
        for device in self.devices.values():
            if self.queued and device.free_lanes and not device.error:
                self._steal_from_others(device, now_ns, batches)
        return batches, late

    def _fill_lanes(self, device: Device, now_ns: int, batches: list[Batch], late: list[Request]) -> None:
        inline_free = device.inline_limit_us > 0
        passed_over: list[tuple[RequestQueue, int]] = []
        while (inline_free or device.free_lanes) and (level := device.next_level()) is not None:
            queue = device.turns[level].first()
            assert queue is not None  # the level has members
            head = queue.head(level)
            if head is None:
                device.turns[level].withdraw(queue)  # all its requests of this level are cancelled or late
                continue
            costs, placement = queue.costs, queue.placement
            if placement.load.max_lanes and placement.has_all_lanes:
                held = device.held.setdefault(placement, set())
                if device.queued == sum([other.queued for other in device.held]):
                    break  # nothing else waits
                device.turns[level].withdraw(queue)
                held.add((queue, level))
                continue
            limit = head.max_batch_size
            if placement.max_rows:
                limit = placement.row_limit(limit)
            rows = max(head.rows, min(limit, queue.rows))
            fits = inline_free and costs.fits_inline(rows)
            if inline_free and not fits and queue.has_light_connection(level):
                # Who asks for little does not wait until a lane is done with what others have sent.
                within = costs.rows_inline(rows)
                if within >= head.rows > 0:
                    limit, rows, fits = within, within, True
            if fits:
                lane, curve, inline_free = INLINE, costs.inline, False
            elif device.free_lanes:
                lane, curve = device.free_lanes.pop(), costs.lane
            elif len(passed_over) == _MAX_PASSED_OVER:
                break
            else:  # no lane for this one; perhaps there is a cheap one behind it
                device.turns[level].withdraw(queue)
                passed_over.append((queue, level))
                continue
            planned, run_us = rows, curve.mean(rows)
            if now_ns + run_us * 1e3 > head.deadline_ns:
                limit, run_us = self._shrink_for_deadline(queue, curve, level, head, limit, run_us, now_ns)
            ends_ns = now_ns + int(run_us * 1e3)
            if head.deadline_ns != NEVER:
                close_ns = ends_ns + int(_CLOSE * curve.spread(rows) * 1e3)
                if head.deadline_ns < close_ns and queue.rows - queue.rows_due(level, close_ns) >= (limit or 1):
                    ends_ns = close_ns
            first_late = len(late)
            in_time = queue.take(level, limit, ends_ns, late)
            self._dequeue(device, queue, in_time)
            if len(late) > first_late:
                self._dequeue(device, queue, late[first_late:])
                placement.forecast.fared(len(late) - first_late, 0)
            self._end_turn(device, queue, level)
            rows = sum([request.rows for request in in_time])
            if not in_time:
                inline_free = inline_free or lane == INLINE
                if lane != INLINE:
                    device.free_lanes.append(lane)
                continue
            micros = run_us if rows == planned else curve.mean(rows)
            device.charge(level, micros)
            batches.append(self._batch(device, lane, queue, in_time, rows, now_ns, micros))
        for queue, level in passed_over:
            self._enter(device, queue, level)

    def _steal_from_others(self, device: Device, now_ns: int, batches: list[Batch]) -> None:
        """A device with free lanes and nothing for them takes over what others have too much of."""
        for other in self.devices.values():
            while device.free_lanes and other.queued and other is not device:
                batch = self._steal(device, other, now_ns)
                if batch is None:
                    break
                batches.append(batch)

    def _steal(self, device: Device, other: Device, now_ns: int) -> Batch | None:
        """A batch of requests that may go anywhere and wait elsewhere, if this device is done with it before that one.

        What is too urgent for this device stays where it is. Of the others the most urgent go first.
        """
        level = other.next_level()
        queue = other.turns[level].first() if level is not None else None
        if level is None or queue is None or not queue.stealable:
            return None
        head = queue.head(level)
        if head is None or head.model not in device.models:
            return None
        mine = self._routing.queue(device, *queue.key)
        curve, placement = mine.costs.lane, mine.placement
        if placement.load.max_lanes and placement.has_all_lanes:
            return None
        limit = placement.row_limit(head.max_batch_size)
        most = max(int(_STEAL_SHARE * limit), min(head.rows, limit), 1)
        rows, most = 0, curve.rows_within(other.clear_in_us(now_ns), most)
        while rows < most:
            middle = (rows + most + 1) // 2
            if queue.rows_due_outside(now_ns, _ends_ns(curve, middle, now_ns)) >= middle:
                rows = middle
            else:
                most = middle - 1
        if not rows:
            return None
        requests = queue.steal(level, rows, now_ns, _ends_ns(curve, rows, now_ns), device.may_steal)
        if not requests:
            return None
        self._dequeue(other, queue, requests)
        self._withdraw_empty_levels(other, queue)
        rows = 0
        for request in requests:
            request.device = device.name
            request.reason += f"; then {device.name} was free, and took it over"
            rows += request.rows
        micros = curve.mean(rows)
        device.wake(level)
        device.charge(level, micros)
        return self._batch(device, device.free_lanes.pop(), mine, requests, rows, now_ns, micros)

    def _batch(
        self,
        device: Device,
        lane: int,
        queue: RequestQueue,
        requests: list[Request],
        rows: int,
        now_ns: int,
        run_us: float,
    ) -> Batch:
        """Account for a batch that takes a lane for so long; 0: nobody knows."""
        placement = queue.placement
        batch = Batch(device, lane, queue.key[0], requests, rows, queue.costs, placement.max_rows, now_ns, run_us)
        if lane >= 0:
            device.busy_until_ns[lane] = now_ns + int(run_us * 1e3)
        device.running_rows += rows
        placement.lanes.append(lane)
        weight = len(requests) or 1
        placement.load.running += weight
        self.running += weight
        return batch

    def _shrink_for_deadline(
        self, queue: RequestQueue, curve: CostCurve, level: int, head: Request, limit: int, run_us: float, now_ns: int
    ) -> tuple[int, float]:
        """Rows of the next batch at most, and how long it takes, where a batch of all that wait makes the head late.

        Between that and the largest batch that is in time for the head, the size counts that loses the fewest rows:
        those that it is too late for, those that the batch after it will be too late for, and, where many wait, those
        that could be done in the time by which two batches take longer than one.
        """
        rows = max(head.rows, min(limit, queue.rows))
        smallest = curve.rows_within((head.deadline_ns - now_ns) / 1e3, rows)
        best = limit, run_us
        if smallest < max(head.rows, 1):
            return best
        full_us, fewest = curve.mean(limit), float(queue.rows)
        size = rows
        while True:
            micros = curve.mean(size)
            late = 0 if size == smallest else min(queue.rows_due(level, now_ns + int(micros * 1e3)), queue.rows)
            lost = float(late)
            gone = late + min(size, queue.rows - late)
            if gone < queue.rows:
                next_ns = now_ns + int((micros + curve.mean(min(limit, queue.rows - gone))) * 1e3)
                lost += max(min(queue.rows_due(level, next_ns), queue.rows) - gone, 0)
            if size < rows and 2 * queue.rows > limit:
                lost += max(micros + curve.mean(rows - size) - run_us, 0.0) * limit / full_us
            if lost < fewest:
                best, fewest = (size, micros), lost
            if size == smallest:
                return best
            size = max(size // 2, smallest)

    def _end_turn(self, device: Device, queue: RequestQueue, level: int) -> None:
        """Put a queue that has had its turn behind the others, or out if it is empty."""
        device.turns[level].served(queue)
        self._withdraw_empty_levels(device, queue)
        if queue.count:
            self._enter(device, queue, level)

    def _withdraw_empty_levels(self, device: Device, queue: RequestQueue) -> None:
        """Requests have left the queue: it takes no turns on levels where nothing of it is left."""
        if not queue.count:
            self._withdraw(device, queue)
            return
        for level in range(LEVELS):
            if queue.head(level) is None:
                device.turns[level].withdraw(queue)

    def _withdraw(self, device: Device, queue: RequestQueue) -> None:
        """The queue is empty: it takes no turns."""
        for turns in device.turns:
            if turns.members:
                turns.withdraw(queue)

    def _dequeue(self, device: Device, queue: RequestQueue, requests: list[Request]) -> None:
        """Requests have left the queue."""
        placement, rows, nbytes, count = queue.placement, 0, 0, len(requests)
        load, counts, backlog_us, own_us = placement.load, device.counts, device.backlog_us, placement.backlog_us
        for request in requests:
            level, cost_us = request.priority, request.cost_us
            counts[level] -= 1
            backlog_us[level] -= cost_us
            own_us[level] -= cost_us
            rows += request.rows
            nbytes += request.nbytes
        device.dequeued(count, rows)
        placement.queued -= count
        load.queued -= count
        load.queued_bytes -= nbytes
        self.queued -= count
        self.queued_bytes -= nbytes

    def start_background(self, model: str, group: tuple[int, ...], rows: int, now_ns: int) -> Batch | None:
        """A batch whose results nobody waits for, to run on the BACKGROUND lane; None if it would be in the way.

        There has to be a device that has the model, nothing in its queues and a free lane: for what comes next, not for
        the batch. That has no requests and is charged to no priority; it counts as one running request of its model,
        and as one of the lanes that run it.
        """
        for device in self.devices.values():
            if device.error or model not in device.models or device.queued or not device.free_lanes:
                continue
            queue = self._routing.queue(device, model, group)
            if device.background_free and not queue.placement.has_all_lanes:
                device.background_free = False
                self.background += 1
                return self._batch(device, BACKGROUND, queue, [], rows, now_ns, 0)
        return None

    def finished(self, batch: Batch, micros: float, now_ns: int = NEVER) -> None:
        """The batch is over, well or not, after so many microseconds, 0 if that is nothing to learn from.

        Args:
            now_ns: when its requests had their answers: what was promised them is held against that. NEVER: it is not.
        """
        device, placement, weight = batch.device, batch.device.placements[batch.model], len(batch.requests) or 1
        device.running_rows -= batch.rows
        self.running -= weight
        if batch.hung:
            placement.load.hung -= weight
        else:
            placement.lanes.remove(batch.lane)
        placement.load.running -= weight
        if batch.lane == INLINE:
            if micros > 0:
                batch.costs.inline.observe(batch.rows, micros)
        elif batch.lane == BACKGROUND:
            self.background -= 1
            device.background_free = True  # how long it took where others go first says nothing about a lane
        else:
            device.busy_until_ns.pop(batch.lane, None)
            device.free_lanes.append(batch.lane)
            if micros > 0:
                batch.costs.observe_lane(batch.rows, micros)
        if placement.max_rows and micros > 0 and batch.requests:
            placement.count_worked(batch.rows, batch.max_rows, batch.requests[0].max_batch_size)
        if now_ns != NEVER and batch.requests:
            self._correct_forecast(placement.forecast, batch, now_ns)
        if device.held:
            self._release(device, placement)

    def _correct_forecast(self, forecast: Forecast, batch: Batch, now_ns: int) -> None:
        """Hold what was predicted for the requests of a batch against what became of them."""
        device, first, last = batch.device, batch.requests[0], batch.requests[-1]
        if batch.run_us:
            elapsed_ns = device.lanes * (now_ns - device.backlog_ns) if device.backlog_ns else now_ns - batch.started_ns
            forecast.observe(batch.run_us, elapsed_ns / 1e3)
            forecast.answered(first.predicted_us, (now_ns - first.added_ns) / 1e3)
        device.backlog_ns = now_ns if device.queued else 0
        deadlines_ns = [request.deadline_ns for request in batch.requests]
        late = sum([deadline_ns < now_ns for deadline_ns in deadlines_ns]) if min(deadlines_ns) < now_ns else 0
        # To keep a promise is easy where nothing waits.
        waited = last.wait_us or last.added_ns - last.came_ns > _BEHIND_NS
        in_time = len(deadlines_ns) - late if waited and last.deadline_ns != NEVER else 0
        if late or in_time:
            forecast.fared(late, in_time)

    # --- time, and what goes wrong -----------------------------------------------------------------------------

    def mark_hung(self, batch: Batch) -> None:
        """A batch hangs. Its lane is taken until it ends after all, but counts no more among those of its model."""
        if not batch.hung:
            batch.hung = True
            placement = batch.device.placements[batch.model]
            placement.lanes.remove(batch.lane)
            placement.load.hung += len(batch.requests) or 1
            self._release(batch.device, placement)

    def _watch(self, request: Request) -> None:
        if len(self._deadlines) > 64 and len(self._deadlines) > 4 * (self.queued + self.running):
            self._deadlines = [entry for entry in self._deadlines if not entry[2].done]
            heapify(self._deadlines)
        heappush(self._deadlines, (request.deadline_ns, request.serial, request))

    def expire(self, now_ns: int) -> list[Request]:
        """The requests whose deadline has come and that are not done; those that waited are taken out."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now_ns:
            _, serial, request = heappop(self._deadlines)
            if not request.done and serial == request.serial:  # one that was added again has a second entry
                if self.cancel(request):
                    self.devices[request.device].placements[request.model].forecast.fared(1, 0)
                expired.append(request)
        return expired

    def next_event_ns(self) -> int:
        """The time at which `expire` or `next_batches` has something to do though nothing else happens; NEVER."""
        while self._delayed and not self._delayed[0][3].count:
            heappop(self._delayed)  # a full batch took what waited for company, or it was withdrawn
        first = self._deadlines[0][0] if self._deadlines else NEVER
        return min(first, self._delayed[0][0]) if self._delayed else first

    def cancel(self, request: Request) -> bool:
        """Take a request out of its queue. False if it does not wait there any more."""
        if not request.waiting:
            return False
        device = self.devices[request.device]
        queue = device.queues[(request.model, request.group, request.alone)]
        queue.remove(request)
        if not queue.count:
            self._withdraw(device, queue)
        self._dequeue(device, queue, [request])
        return True

    def fail_device(self, name: str, error: str) -> list[Request]:
        """Stop routing to a device. Returns the requests that waited there: add them again or answer them."""
        device = self.devices[name]
        device.error = error
        stranded = self._drop_waiting(device)
        self._routing.look()
        return stranded

    def drop_all(self) -> list[Request]:
        """Empty every queue; returns what waited there."""
        return [request for device in self.devices.values() for request in self._drop_waiting(device)]

    def _drop_waiting(self, device: Device) -> list[Request]:
        dropped = []
        for queue in device.queues.values():
            requests = queue.drain()
            self._withdraw(device, queue)
            self._dequeue(device, queue, requests)
            dropped += requests
        return dropped


def _ends_ns(curve: CostCurve, rows: int, now_ns: int) -> int:
    """The time at which a batch that starts now is over, rarely later."""
    return now_ns + int((curve.mean(rows) + curve.spread(rows)) * 1e3)
