"""Scheduler: where a request goes, and which batch runs next. Pure policy: no tensor, thread, clock or socket.

A request is routed to a device when it arrives (`routing`) and waits there with others of its model and shape group
(`request_queue`). A lane of that device takes what is waiting the moment it is free, up to the model's batch limit
(`batch_formation`): nothing waits for company, unless the model asks for a delay. A device with nothing to do steals
from others (`stealing`).

Each decision is a module of its own, and what is known of models is in `loaded_models`. Whatever moves a request or a
batch is here, in one class, because all of it moves the same counts, and these have to agree after every step.

One caller owns a Scheduler and tells it the time, in nanoseconds of a monotonic clock; it returns what to do and does
nothing itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from tnxctl.protocol.errors import Unavailable
from tnxd.lanes import BACKGROUND, INLINE
from tnxd.scheduling.accounts import Accounts
from tnxd.scheduling.batch_formation import fill_lanes
from tnxd.scheduling.correction import correct_forecast
from tnxd.scheduling.costs import CostModel
from tnxd.scheduling.deadlines import Deadlines
from tnxd.scheduling.delays import Delays
from tnxd.scheduling.device import Batch, Device
from tnxd.scheduling.lane_choice import give_lane_back, learn, next_curve
from tnxd.scheduling.loaded_models import LoadedModels
from tnxd.scheduling.paths import Outlook
from tnxd.scheduling.queue_admission import AdmissionControl
from tnxd.scheduling.request import DEVICE, NEVER, Request
from tnxd.scheduling.request_queue import RequestQueue
from tnxd.scheduling.routing import Routing
from tnxd.scheduling.stealing import steal

# A request without a deadline, or with a later one, takes its place in the order as if it had to be done in a second:
# among others of its kind that is the order of arrival, and none with a later deadline overtakes it.
_PATIENCE_NS = 1_000_000_000


class Scheduler(Accounts):
    """Scheduler of all devices: routes requests to them and forms batches for their free lanes.

    Args:
        devices: in order of preference among equals.
        costs: predicts how long a batch takes, and learns from those that ran.
        max_requests, max_bytes: most that may wait, over all devices.
        max_per_model, max_bytes_per_model: most that may wait for one model; None: as in all.

    Attributes:
        devices: by name.
        models: those that requests may be for.
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
        super().__init__()
        self._routing = Routing(devices, costs)
        self.devices = self._routing.devices
        self.models = LoadedModels(self._routing, costs)
        self._admission = AdmissionControl(max_requests, max_bytes, max_per_model, max_bytes_per_model)
        self._serial = 0
        self._deadlines = Deadlines()
        self._delays = Delays()
        self._opens_ns = NEVER  # when a batch may begin that is not to begin yet

    @property
    def room(self) -> int:
        """Requests that the queue still has room for."""
        room = self._admission.max_requests - self.queued
        return room if room > 0 else 0

    # --- devices -----------------------------------------------------------------------------------------------

    def add_device(self, device: Device) -> None:
        """Route requests to a device, too. It comes last in the order of preference among equals."""
        self.devices[device.name] = device
        self._routing.refresh()

    def set_free_memory(self, device: str, free_mb: float) -> None:
        """Note the free memory of a device, in MiB, as its executor reports it."""
        self.devices[device].memory_free_mb = free_mb

    # --- what would become of a request ------------------------------------------------------------------------

    def route(self, request: Request, now_ns: int) -> tuple[Device, str]:
        """Device where a request would run now, and the reason in words. Raises as `add` does."""
        return self._routing.route(request, now_ns)

    def outlook(self, request: Request, now_ns: int) -> Outlook:
        """Prediction for a request if it were added now, which it is not. Raises as `add` does for want of a device."""
        request.due_ns = min(now_ns + _PATIENCE_NS, request.deadline_ns)
        device, queue, _, (wait_us, run_us, _, _) = self._routing.choose(request, now_ns)
        return Outlook(
            wait_us,
            run_us,
            next_curve(device, queue, request.rows).spread(request.rows),
            queue.placement.forecast.reserve,
        )

    def prospects(self, limits: Mapping[str, int], now_ns: int) -> dict[str, tuple[int, float]]:
        """Rows that wait for models, and the microseconds until one more row would be done, by a client with nothing.

        Args:
            limits: row limits of the models, by key.

        Returns:
            By key, of the models that were asked lately.
        """
        rows: Counter[str] = Counter()
        fullest: dict[str, RequestQueue] = {}
        for device in self.devices.values():
            for (model, _, _), queue in device.queues.items():
                rows[model] += queue.rows
                if model in limits and (model not in fullest or queue.rows > fullest[model].rows):
                    fullest[model] = queue
        found = {}
        for model, queue in fullest.items():
            request = Request(model, limits[model], group=queue.key[1], due_ns=now_ns + _PATIENCE_NS)
            try:
                wait_us, run_us, _, _ = self._routing.choose(request, now_ns)[3]
            except Unavailable:  # it has just been taken from its devices
                wait_us = run_us = 0.0
            found[model] = rows[model], wait_us + run_us
        return found

    # --- in ----------------------------------------------------------------------------------------------------

    def add(self, request: Request, now_ns: int) -> None:
        """Route a request to a device and queue it there.

        Raises:
            InvalidArgument: the request names a device that does not exist.
            Unavailable: no device that the request may use has the model.
            ResourceExhausted: the queue is full. The message tells the predicted wait.
            TooLate: the request would not be done by its deadline. The message tells the predicted wait.
        """
        due_ns = now_ns + _PATIENCE_NS
        request.due_ns = due_ns if due_ns < request.deadline_ns else request.deadline_ns
        device, queue, reason, (wait_us, run_us, share_us, _) = self._routing.choose(request, now_ns)
        if not request.admitted:
            self._admission.admit(self, request, device, queue, wait_us, run_us, now_ns)
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
            self._deadlines.add(request, self.queued + self.running)
        may_go = queue.add(request)
        if request.max_delay_ns:
            may_go = not self._delays.holds(device, queue, request, now_ns)
        if may_go:
            device.offer(queue, request.priority)
        self.enqueue(device, queue, request)

    def start(self, request: Request, now_ns: int) -> Batch | None:
        """Start a request that need not wait: a batch of that one alone, INLINE. None: `add` it. Raises as `add` does.

        The outcome is that of `add` and `next_batches`, without the way through queues and turns. The caller runs the
        batch before it comes with another request.
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
        self._admission.admit(self, request, device, queue, 0.0, run_us, now_ns)
        request.device, request.reason, request.predicted_us = device.name, reason, run_us
        device.wake(request.priority)
        device.charge(request.priority, run_us)
        return self.start_batch(device, INLINE, queue, [request], rows, now_ns, 0)

    # --- out ---------------------------------------------------------------------------------------------------

    def next_batches(self, now_ns: int) -> tuple[list[Batch], list[Request]]:
        """Form batches for the lanes that are free now.

        Returns:
            Batches to run, at most one of them INLINE, and requests to answer that their deadlines cannot be met.
        """
        if self._delays.first_ns <= now_ns:
            self._delays.release(now_ns)
        batches: list[Batch] = []
        late: list[Request] = []
        opens_ns = NEVER
        for device in self.devices.values():
            if device.queued and not device.reserved:
                fill_lanes(self, device, now_ns, batches, late)
                if now_ns < device.opens_ns < opens_ns:
                    opens_ns = device.opens_ns
        self._opens_ns = opens_ns
        for device in self.devices.values():
            if self.queued and device.free_lanes and not device.error and not device.reserved:
                steal(self, self._routing, device, self.devices.values(), now_ns, batches)
        return batches, late

    def start_background(self, model: str, group: tuple[int, ...], rows: int, now_ns: int) -> Batch | None:
        """Start a background batch, whose results nobody waits for; None if it would be in the way of others.

        It runs on the BACKGROUND lane of a device that has the model, nothing in its queues and a free lane: that one
        is for requests that come next. The batch has no requests and is charged to no priority. It counts as one
        running request of its model, and as one of the lanes that run the model.
        """
        for device in self.devices.values():
            if device.error or model not in device.models or device.queued or not device.free_lanes:
                continue
            queue = self._routing.queue(device, model, group)
            if device.background_free and not device.reserved and not queue.placement.has_all_lanes:
                device.background_free = False
                self.background += 1
                return self.start_batch(device, BACKGROUND, queue, [], rows, now_ns, 0)
        return None

    def finished(self, batch: Batch, micros: float, now_ns: int = NEVER, ended_ns: int = 0) -> None:
        """Free the lane of a batch that is over, well or not, and learn from it.

        Args:
            micros: how long it took; 0 if that is nothing to learn from.
            now_ns: when its requests had their answers, which corrects the forecast. NEVER: it does not.
            ended_ns: when the device was done with it; 0: by then.
        """
        device, placement, weight = batch.device, batch.device.placements[batch.model], len(batch.requests) or 1
        device.running_rows -= batch.rows
        self.running -= weight
        learned_us = micros
        if device.chip is not None:
            part, batch.chip_us = device.chip.end(batch.lane, ended_ns or (now_ns if now_ns != NEVER else 0))
            learned_us *= part  # what it would have taken alone
            if micros > 0:
                placement.crowded -= placement.crowded > 0
                if batch.preparation_us:
                    placement.preparation.observe(batch.rows, batch.preparation_us)
            if device.reserved:
                device.reserved = not device.chip.is_idle
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
            device.wide.pop(batch.lane, None)
            give_lane_back(device, batch.lane)
            if learned_us > 0:
                learn(batch, placement.width, learned_us)
                if batch.surface is not None and batch.threads == 1:
                    batch.surface.observe(batch.rows // batch.length, batch.length, learned_us)
        if placement.max_rows and micros > 0 and batch.requests:
            placement.count_worked(batch.rows, batch.max_rows, batch.requests[0].max_batch_size)
        if now_ns != NEVER and batch.requests:
            correct_forecast(placement.forecast, batch, now_ns)
        if device.held:
            device.release(placement)

    def run_alone(self, batch: Batch, requests: Iterable[Request]) -> None:
        """Queue requests again whose batch ran out of memory beside others: in their turn, nothing else runs there.

        They count as taken in, and stay on their device. To be called when the batch is over.
        """
        device = batch.device
        device.placements[batch.model].note_crowded(batch.rows)
        for request in requests:
            request.alone |= DEVICE
            request.waiting = True
            request.serial = self._serial = self._serial + 1  # no two queues may have the same head
            queue = self._routing.queue(device, request.model, request.group, request.alone)
            if queue.add(request):
                device.offer(queue, request.priority)
            self.enqueue(device, queue, request)

    # --- time, and what goes wrong -----------------------------------------------------------------------------

    def mark_hung(self, batch: Batch) -> None:
        """Mark a batch as hung: its lane is taken until it ends after all, but counts no more as one of its model."""
        if not batch.hung:
            batch.hung = True
            placement = batch.device.placements[batch.model]
            placement.lanes.remove(batch.lane)
            placement.load.hung += len(batch.requests) or 1
            if batch.device.chip is not None:
                batch.device.chip.end(batch.lane, 0)  # it computes no more, as far as anybody knows
                if batch.device.chip.is_idle:
                    batch.device.reserved = False
            batch.device.release(placement)

    def expire(self, now_ns: int) -> list[Request]:
        """Take out the requests whose deadline has come. Returns those that are not done, running ones included."""
        if self._deadlines.first_ns > now_ns:
            return []
        expired = self._deadlines.expire(now_ns)
        for request in expired:
            if self.cancel(request):
                self.devices[request.device].placements[request.model].forecast.fared(1, 0)
        return expired

    def next_event_ns(self) -> int:
        """Time at which `expire` or `next_batches` has work though nothing else happens; NEVER if there is none."""
        delays = self._delays
        if delays.first_ns != NEVER:
            delays.drop_empty()
        opens_ns = self._opens_ns if self.queued else NEVER
        return min(self._deadlines.first_ns, delays.first_ns, opens_ns)

    def cancel(self, request: Request) -> bool:
        """Take a request out of its queue. False if it waits there no more."""
        if not request.waiting:
            return False
        device = self.devices[request.device]
        queue = device.queues[(request.model, request.group, request.alone)]
        queue.remove(request)
        if not queue.count:
            device.withdraw(queue)
        self.dequeue(device, queue, [request])
        if not device.queued:
            device.backlog_ns = 0  # what comes next does not tell how long a backlog takes
        return True

    def fail_device(self, name: str, error: str) -> list[Request]:
        """Stop routing to a device. Returns the requests that waited there: add them again or answer them."""
        device = self.devices[name]
        device.error = error
        stranded = self._drop_waiting(device)
        for request in stranded:
            request.alone &= ~DEVICE
        self._routing.refresh()
        return stranded

    def drop_all(self) -> list[Request]:
        """Empty all queues. Returns the requests that waited."""
        return [request for device in self.devices.values() for request in self._drop_waiting(device)]

    def _drop_waiting(self, device: Device) -> list[Request]:
        dropped = []
        for queue in device.queues.values():
            requests = queue.drain()
            device.withdraw(queue)
            self.dequeue(device, queue, requests)
            dropped += requests
        return dropped
