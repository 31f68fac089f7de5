"""Which device a request goes to, and which batch runs next. Pure policy: no tensor, no thread, no clock, no socket.

A request is routed to a device when it arrives and waits there with others of its model and shape group
(`tnxd.waiting`). A lane of that device takes what is waiting the moment it is free, up to the model's batch limit:
nothing waits for company, unless the model asks for a delay.

One caller owns a Scheduler and tells it the time, in nanoseconds of a monotonic clock; it returns what to do and does
nothing itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from math import inf

from tnxctl.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, Unavailable
from tnxd.costs import CostCurve, CostModel
from tnxd.waiting import LEVELS, Waiting
from tnxd.work import INLINE, NEVER, Batch, Device, Request

# A request without a deadline takes its place in the order as if it had to be done in a second: among others of its
# kind that is the order of arrival, and none with a later deadline overtakes it.
_PATIENCE_NS = 1_000_000_000

# Queues that are kept though nothing waits in them: sequence models bring a new shape group with every length.
_MAX_IDLE_QUEUES = 256

# How far to look for a batch that is cheap enough to run inline while all lanes are busy.
_MAX_PASSED_OVER = 8

Prediction = tuple[float, float, float]
"""Of a request, in microseconds: until its batch starts; that batch; what it adds to the work of the device."""


class Scheduler:
    """Routes requests to devices and forms batches for free lanes.

    Args:
        devices: in order of preference among equals.
        costs: predicts how long a batch takes, and learns from those that ran.
        max_requests, max_bytes: most that may wait, over all devices.
        max_per_model: most requests that may wait for one model.
    """

    def __init__(
        self,
        devices: Iterable[Device],
        costs: CostModel,
        *,
        max_requests: int,
        max_bytes: int,
        max_per_model: int | None = None,
    ) -> None:
        self.devices = {device.name: device for device in devices}
        self.queued = 0
        self.queued_bytes = 0
        self.running = 0
        self._costs = costs
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._max_per_model = max_per_model or max_requests
        self._per_model: dict[str, int] = {}
        self._serial = 0
        self._deadlines: list[tuple[int, int, Request]] = []
        self._delayed: list[tuple[int, int, Device, Waiting]] = []
        self._describe_devices()

    @property
    def room(self) -> int:
        """How many more requests may wait."""
        return self._max_requests - self.queued

    # --- in ----------------------------------------------------------------------------------------------------

    def add(self, request: Request, now_ns: int) -> None:
        """Take a request in and route it.

        Raises:
            InvalidArgument: it names a device that there is not.
            Unavailable: no device that it may use has the model.
            ResourceExhausted: the queue is full. The sentence tells the predicted wait.
            DeadlineExceeded: it would not be done in time. The sentence tells the predicted wait.
        """
        if request.wanted == "auto":
            device, reason, prediction = self._soonest(request, now_ns)
            queue = self._queue(device, request)
        else:
            device, reason = self.route(request, now_ns)
            queue = self._queue(device, request)
            prediction = self._predict(device, request, queue, now_ns)
        wait_us, run_us, share_us = prediction
        self._admit(request, queue, wait_us, run_us, now_ns)
        request.device, request.reason = device.name, reason
        request.predicted_us = wait_us + run_us
        request.cost_us = share_us
        request.serial = self._serial = self._serial + 1
        request.waiting = True
        request.due_ns = now_ns + _PATIENCE_NS
        if request.deadline_ns != NEVER:
            request.due_ns = min(request.deadline_ns, request.due_ns)
            self._watch(request)
        if queue.add(request) or request.max_delay_ns:
            self._offer(device, queue, request, now_ns)
        device.enqueue(request.priority, request.rows, share_us)
        self.queued += 1
        self.queued_bytes += request.nbytes
        self._per_model[request.model] = self._per_model.get(request.model, 0) + 1

    def _queue(self, device: Device, request: Request) -> Waiting:
        """Where it would wait. Empty queues are kept for the next request, up to a number."""
        key = (request.model, request.group)
        queue = device.waiting.get(key)
        if queue is None:
            if len(device.waiting) >= _MAX_IDLE_QUEUES:
                device.waiting = {known: other for known, other in device.waiting.items() if other.count}
            curves = [self._costs.curve(device.name, *key, inline=inline) for inline in (False, True)]
            queue = device.waiting[key] = Waiting(key, *curves)
        return queue

    def route(self, request: Request, now_ns: int) -> tuple[Device, str]:
        """The device where a request would run now, and the reason in words. Raises as `add` does."""
        wanted, model = request.wanted, request.model
        if wanted:
            return self._soonest(request, now_ns)[:2] if wanted == "auto" else self._named(wanted, model)
        if not request.prefer_gpu:
            return self._cpu_for(model), "the request did not prefer a GPU"
        if not self._gpus:
            return self._cpu_for(model), self._no_gpu
        minimum = request.min_gpu_memory_mb
        fitting = [gpu for gpu in self._gpus if model in gpu.models and gpu.memory_free_mb >= minimum]
        if fitting:
            gpu = min(fitting, key=lambda gpu: gpu.outstanding_rows)
            return gpu, f"{gpu.name} has {gpu.memory_free_mb:.0f} MiB free"
        free = ", ".join(
            f"{gpu.name} has {gpu.memory_free_mb:.0f}"
            if model in gpu.models
            else f"{gpu.name} has not loaded {model!r}"
            for gpu in self._gpus
        )
        return self._cpu_for(model), f"no GPU has {minimum:g} MiB free: {free}"

    def _soonest(self, request: Request, now_ns: int) -> tuple[Device, str, Prediction]:
        candidates = []
        for device in self.devices.values():
            if device.error or request.model not in device.models:
                continue
            if device.kind == "cuda" and device.memory_free_mb < request.min_gpu_memory_mb:
                continue
            prediction = self._predict(device, request, self._queue(device, request), now_ns)
            candidates.append((prediction[0] + prediction[1], device, prediction))
        if not candidates:
            raise Unavailable(f"no device serves {request.model!r} now")
        candidates.sort(key=lambda candidate: candidate[0])
        times = ", ".join([f"{device.name} {micros / 1e3:.3g} ms" for micros, device, _ in candidates])
        _, best, prediction = candidates[0]
        return best, f"done first there: {times}", prediction

    def _named(self, name: str, model: str) -> tuple[Device, str]:
        device = self.devices.get(name)
        if device is None:
            raise InvalidArgument(f"device {name[:60]!r}: there are {', '.join(self.devices)}, and auto")
        if device.error:
            raise Unavailable(f"device {name} failed: {device.error}")
        if model not in device.models:
            raise Unavailable(f"device {name} has not loaded {model!r}")
        return device, f"the request asked for {name}"

    def _predict(self, device: Device, request: Request, queue: Waiting, now_ns: int) -> Prediction:
        """Microseconds until its batch starts, that this batch takes, and that it adds to the work of the device.

        The first counts lanes that run and what waits before it; the last is its share of a full batch.
        """
        rows, limit = request.rows, request.max_batch_size
        curve = queue.curve
        if device.inline_limit_us and queue.inline_curve.known:
            curve = queue.inline_curve  # a batch that is too dear for the caller's thread shows as such there, too
        full_us = curve.mean(limit or 1)
        share_us = full_us * rows / limit if limit else full_us
        wait_us = 0.0
        if device.queued:
            level = request.priority
            for backlog_us in device.backlog_us[: level + 1]:
                wait_us += backlog_us
            if queue.count:
                due_ns = min(request.deadline_ns, now_ns + _PATIENCE_NS)
                queued, ahead = queue.rows_ahead(level, request.client, due_ns)
                batches, rest = divmod(ahead, limit) if limit else (ahead, 0)
                wait_us = max(wait_us - queued * full_us / (limit or 1), 0.0) + batches * full_us
                if rest + rows <= limit:
                    rows += rest
        if device.busy_until_ns:
            for until_ns in device.busy_until_ns.values():
                if until_ns > now_ns:
                    wait_us += (until_ns - now_ns) / 1e3
        return wait_us / device.lanes, curve.mean(rows), share_us

    def _admit(self, request: Request, queue: Waiting, wait_us: float, run_us: float, now_ns: int) -> None:
        limit = ""
        if self.queued >= self._max_requests:
            limit = f"{self.queued} requests are queued, which is the limit"
        elif self.queued_bytes + request.nbytes > self._max_bytes:
            limit = (
                f"{self.queued_bytes} bytes are queued and {request.nbytes} more exceed the limit, {self._max_bytes}"
            )
        elif self._per_model.get(request.model, 0) >= self._max_per_model:
            limit = f"{self._max_per_model} requests for {request.model!r} are queued, which is the limit"
        if limit:
            raise ResourceExhausted(f"{limit}; the predicted wait is {wait_us / 1e3:.3g} ms")
        if request.deadline_ns != NEVER:
            margin_us = queue.curve.spread(request.rows)
            left_us = (request.deadline_ns - now_ns) / 1e3
            if wait_us + run_us + margin_us > left_us:
                raise DeadlineExceeded(
                    f"it cannot be done within its deadline, {left_us / 1e3:.3g} ms from now: the predicted wait is "
                    f"{wait_us / 1e3:.3g} ms and then {run_us / 1e3:.3g} ms, with a margin of {margin_us / 1e3:.3g} ms"
                )

    def _offer(self, device: Device, queue: Waiting, request: Request, now_ns: int) -> None:
        """Let the queue take part in the turns of its device, now or when it has waited for company."""
        delay_ns = request.max_delay_ns
        if delay_ns and queue.rows < request.max_batch_size:
            if queue.count == 1:
                queue.ready_ns = now_ns + delay_ns
                heappush(self._delayed, (queue.ready_ns, request.serial, device, queue))
            if now_ns < queue.ready_ns:
                return
        self._enter(device, queue, request.priority)

    def _enter(self, device: Device, queue: Waiting, level: int) -> None:
        head = queue.head(level)
        if head is not None:
            device.turns[level].offer(queue, head.due_ns, head.serial)

    # --- out ---------------------------------------------------------------------------------------------------

    def next_batches(self, now_ns: int) -> tuple[list[Batch], list[Request]]:
        """Batches for the lanes that are free now, at most one of them INLINE, and requests that are too late.

        The caller runs the first and answers the second.
        """
        while self._delayed and self._delayed[0][0] <= now_ns:
            _, _, device, queue = heappop(self._delayed)
            for level in range(LEVELS):
                self._enter(device, queue, level)
        batches: list[Batch] = []
        late: list[Request] = []
        for device in self.devices.values():
            if device.queued:
                self._fill_lanes(device, now_ns, batches, late)
        return batches, late

    def _fill_lanes(self, device: Device, now_ns: int, batches: list[Batch], late: list[Request]) -> None:
        inline_free = device.inline_limit_us > 0
        passed_over: list[tuple[Waiting, int]] = []
        while (inline_free or device.free_lanes) and (level := device.next_level()) is not None:
            queue = device.turns[level].first()
            head = queue.head(level) if queue is not None else None
            if queue is None:
                break
            if head is None:
                device.turns[level].withdraw(queue)  # all its requests of this level are cancelled or late
                continue
            curve, limit = queue.inline_curve, head.max_batch_size
            rows = max(head.rows, min(limit, queue.rows))
            if inline_free and _inline_us(device, queue, rows) <= device.inline_limit_us:
                lane, inline_free = INLINE, False
            elif device.free_lanes:
                lane, curve = device.free_lanes.pop(), queue.curve
            elif len(passed_over) == _MAX_PASSED_OVER:
                break
            else:  # no lane for this one; perhaps there is a cheap one behind it
                device.turns[level].withdraw(queue)
                passed_over.append((queue, level))
                continue
            run_us = curve.mean(rows)
            if now_ns + run_us * 1e3 > head.deadline_ns:
                limit, run_us = self._hurry(queue, curve, level, head, run_us, now_ns)
            first_late = len(late)
            in_time = queue.take(level, limit, now_ns + int(run_us * 1e3), late)
            self._took(device, in_time)
            self._took(device, late[first_late:])
            self._rotate(device, queue, level)
            rows = sum([request.rows for request in in_time])
            if not in_time:
                inline_free = inline_free or lane == INLINE
                if lane != INLINE:
                    device.free_lanes.append(lane)
                continue
            micros = curve.mean(rows)
            device.charge(level, micros)
            if lane != INLINE:
                device.busy_until_ns[lane] = now_ns + int(micros * 1e3)
            device.running_rows += rows
            self.running += len(in_time)
            batches.append(Batch(device, lane, head.model, in_time, rows, curve))
        for queue, level in passed_over:
            self._enter(device, queue, level)

    def _hurry(
        self, queue: Waiting, curve: CostCurve, level: int, head: Request, run_us: float, now_ns: int
    ) -> tuple[int, float]:
        """Rows of the next batch at most, and how long it takes, where a batch of all that wait makes the head late.

        Between that and the largest batch that is in time for the head, the size counts that loses the fewest rows:
        those that it is too late for, those that the batch after it will be too late for, and, where many wait, those
        that could be done in the time by which two batches take longer than one.
        """
        limit = head.max_batch_size
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

    def _rotate(self, device: Device, queue: Waiting, level: int) -> None:
        """After its turn: the queue goes behind the others, or out if it is empty."""
        device.turns[level].served(queue)
        if not queue.count:
            self._retire(device, queue)
            return
        for other in range(LEVELS):
            if queue.head(other) is None:
                device.turns[other].withdraw(queue)
            elif other == level:
                self._enter(device, queue, level)

    def _retire(self, device: Device, queue: Waiting) -> None:
        """The queue is empty: it takes no turns."""
        for turns in device.turns:
            if turns.members:
                turns.withdraw(queue)

    def _took(self, device: Device, requests: list[Request]) -> None:
        """Requests have left the queue."""
        for request in requests:
            device.dequeue(request.priority, request.rows, request.cost_us)
            self.queued_bytes -= request.nbytes
            left = self._per_model[request.model] - 1
            if left:
                self._per_model[request.model] = left
            else:
                del self._per_model[request.model]
        self.queued -= len(requests)

    def finished(self, batch: Batch, micros: float) -> None:
        """The batch is over, well or not, after so many microseconds: its lane is free again."""
        device = batch.device
        device.running_rows -= batch.rows
        self.running -= len(batch.requests)
        if micros > 0:
            batch.curve.observe(batch.rows, micros)
        if batch.lane != INLINE:
            device.busy_until_ns.pop(batch.lane, None)
            device.free_lanes.append(batch.lane)

    # --- time, and what goes wrong -----------------------------------------------------------------------------

    def _watch(self, request: Request) -> None:
        if len(self._deadlines) > 64 and len(self._deadlines) > 4 * (self.queued + self.running):
            self._deadlines = [entry for entry in self._deadlines if not entry[2].done]
            heapify(self._deadlines)
        heappush(self._deadlines, (request.deadline_ns, request.serial, request))

    def expire(self, now_ns: int) -> list[Request]:
        """The requests whose deadline has come and that are not done; those that waited are taken out."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now_ns:
            request = heappop(self._deadlines)[2]
            if not request.done:
                self.cancel(request)
                expired.append(request)
        return expired

    def next_event_ns(self) -> int:
        """When `expire` or `next_batches` has something to do though nothing else happens; NEVER."""
        first = self._deadlines[0][0] if self._deadlines else NEVER
        return min(first, self._delayed[0][0]) if self._delayed else first

    def cancel(self, request: Request) -> bool:
        """Take a request out of its queue. False if it does not wait there any more."""
        if not request.waiting:
            return False
        device = self.devices[request.device]
        queue = device.waiting[(request.model, request.group)]
        queue.remove(request)
        if not queue.count:
            self._retire(device, queue)
        self._took(device, [request])
        return True

    def fail_device(self, name: str, error: str) -> list[Request]:
        """Stop routing to a device. Returns the requests that waited there: add them again or answer them."""
        device = self.devices[name]
        device.error = error
        stranded = self._drop_waiting(device)
        self._describe_devices()
        return stranded

    def drop_all(self) -> list[Request]:
        """Empty every queue; returns what waited there."""
        return [request for device in self.devices.values() for request in self._drop_waiting(device)]

    def _drop_waiting(self, device: Device) -> list[Request]:
        dropped = []
        for queue in list(device.waiting.values()):
            dropped += queue.drain()
            self._retire(device, queue)
        self._took(device, dropped)
        return dropped

    def _cpu_for(self, model: str) -> Device:
        for cpu in self._cpus:
            if model in cpu.models:
                return cpu
        raise Unavailable(f"no CPU lane serves {model!r}: " + (self._no_cpu or "it is not loaded on the CPU"))

    def _describe_devices(self) -> None:
        ready = [device for device in self.devices.values() if not device.error]
        self._gpus = [device for device in ready if device.kind == "cuda"]
        self._cpus = [device for device in ready if device.kind == "cpu"]
        failed = [f"{device.name} failed" for device in self.devices.values() if device.error]
        self._no_gpu = "no GPU is ready" + (f": {', '.join(failed)}" if failed else "")
        self._no_cpu = "" if self._cpus else "this daemon runs without the CPU"


def _inline_us(device: Device, queue: Waiting, rows: int) -> float:
    """What a batch is expected to take on the caller's own thread, in microseconds.

    What the lanes measured counts as well, times their threads, and the lower one holds: a slow spell of the machine
    must not keep the batches of a model on lanes for good, where nothing is learned about the caller's thread.
    """
    expected = inf
    if queue.inline_curve.known:
        expected = queue.inline_curve.mean(rows)
    if queue.curve.known:
        expected = min(expected, queue.curve.mean(rows) * device.lane_threads)
    return expected
