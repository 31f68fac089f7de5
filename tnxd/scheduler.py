"""Which device a request goes to, and which batch runs next. Pure policy: no tensor, no thread, no clock, no socket.

A request is routed to a device when it arrives and waits there with others of its model and shape group. A lane of
that device takes what is waiting the moment it is free, up to the model's batch limit: nothing waits for company.

One caller owns a Scheduler; it returns what to do and does nothing itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from tnxctl.errors import ResourceExhausted, Unavailable
from tnxd.costs import CostModel


class Request:
    """What policy needs to know of a request; the server derives from it to add what it needs itself.

    Attributes:
        model: key of the model. max_batch_size: its row limit, 0 if it cannot be batched.
        group: requests share a batch only if model and group are equal.
        rows, nbytes: size of the inputs.
        prefer_gpu, min_gpu_memory_mb: as on the wire, the memory in MiB.
        device, reason: filled by `Scheduler.add`: where it will run, and why there.
    """

    __slots__ = (
        "device",
        "group",
        "max_batch_size",
        "min_gpu_memory_mb",
        "model",
        "nbytes",
        "prefer_gpu",
        "reason",
        "rows",
    )

    def __init__(
        self,
        model: str,
        *,
        max_batch_size: int,
        group: tuple[int, ...] = (),
        rows: int = 1,
        nbytes: int = 0,
        prefer_gpu: bool = True,
        min_gpu_memory_mb: float = 0.0,
    ) -> None:
        self.model = model
        self.max_batch_size = max_batch_size
        self.group = group
        self.rows = rows
        self.nbytes = nbytes
        self.prefer_gpu = prefer_gpu
        self.min_gpu_memory_mb = min_gpu_memory_mb
        self.device = ""
        self.reason = ""


INLINE = -1
"""The lane that is the caller's own thread."""


@dataclass(slots=True)
class Batch:
    """Requests to run together on one lane; `lane` is INLINE or an index below the device's lane count."""

    device: Device
    lane: int
    model: str
    requests: list[Request]
    rows: int


@dataclass(slots=True, eq=False)
class _Queue:
    """Requests of one model and group that wait for one device, oldest first."""

    requests: deque[Request] = field(default_factory=deque)
    rows: int = 0


@dataclass(slots=True, eq=False)
class Device:
    """A device as policy sees it.

    Attributes:
        kind: "cpu" or "cuda".
        lanes: batches that it runs at a time.
        models: keys of the models that are loaded on it.
        memory_free_mb: in MiB, as last reported; used for GPUs.
        inline_limit_us: a batch predicted to take no longer runs on the caller's own thread, since handing it to
            another would cost more than it saves. 0: never.
    """

    name: str
    kind: str
    lanes: int
    models: frozenset[str]
    memory_free_mb: float = 0.0
    inline_limit_us: float = 0.0
    error: str = ""
    free_lanes: list[int] = field(init=False)
    waiting: dict[tuple[str, tuple[int, ...]], _Queue] = field(init=False, default_factory=dict)
    queued_rows: int = field(init=False, default=0)
    running_rows: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.free_lanes = list(range(self.lanes))

    @property
    def outstanding_rows(self) -> int:
        """Rows that wait or run here: the measure of load that routing compares."""
        return self.queued_rows + self.running_rows


class Scheduler:
    """Routes requests to devices and forms batches for free lanes.

    Args:
        devices: in order of preference among equals.
        costs: predicts how long a batch takes.
        max_requests, max_bytes: most that may wait, over all devices.
    """

    def __init__(self, devices: Iterable[Device], costs: CostModel, *, max_requests: int, max_bytes: int) -> None:
        self.devices = {device.name: device for device in devices}
        self.queued = 0
        self.queued_bytes = 0
        self.running = 0
        self._costs = costs
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._describe_devices()

    @property
    def room(self) -> int:
        """How many more requests may wait."""
        return self._max_requests - self.queued

    def add(self, request: Request) -> None:
        """Take a request in and route it.

        Raises:
            ResourceExhausted: the queue is full, by requests or by bytes.
            Unavailable: no device that the request may use has the model.
        """
        if self.room <= 0:
            raise ResourceExhausted(f"{self.queued} requests are queued, which is the limit: try later")
        if self.queued_bytes + request.nbytes > self._max_bytes:
            raise ResourceExhausted(
                f"{self.queued_bytes} bytes are queued, {request.nbytes} more exceed the limit of {self._max_bytes}"
            )
        device, reason = self.route(request.model, request.prefer_gpu, request.min_gpu_memory_mb)
        request.device, request.reason = device.name, reason
        key = (request.model, request.group)
        queue = device.waiting.get(key)
        if queue is None:
            queue = device.waiting[key] = _Queue()
        queue.requests.append(request)
        queue.rows += request.rows
        device.queued_rows += request.rows
        self.queued += 1
        self.queued_bytes += request.nbytes

    def route(self, model: str, prefer_gpu: bool, min_gpu_memory_mb: float) -> tuple[Device, str]:
        """The device where a request would run now, and the reason in words. Raises Unavailable."""
        if not prefer_gpu:
            return self._cpu_for(model), "the request did not prefer a GPU"
        if not self._gpus:
            return self._cpu_for(model), self._no_gpu
        fitting = [gpu for gpu in self._gpus if model in gpu.models and gpu.memory_free_mb >= min_gpu_memory_mb]
        if fitting:
            gpu = min(fitting, key=lambda gpu: gpu.outstanding_rows)
            return gpu, f"{gpu.name} has {gpu.memory_free_mb:.0f} MiB free"
        free = ", ".join(
            f"{gpu.name} has {gpu.memory_free_mb:.0f}"
            if model in gpu.models
            else f"{gpu.name} has not loaded {model!r}"
            for gpu in self._gpus
        )
        return self._cpu_for(model), f"no GPU has {min_gpu_memory_mb:g} MiB free: {free}"

    def next_batches(self) -> list[Batch]:
        """Batches for the lanes that are free now, at most one of them INLINE. The caller runs them all."""
        batches: list[Batch] = []
        for device in self.devices.values():
            if device.waiting:
                self._fill_lanes(device, batches)
        return batches

    def finished(self, batch: Batch) -> None:
        """The batch is over, well or not: its lane is free again."""
        batch.device.running_rows -= batch.rows
        self.running -= len(batch.requests)
        if batch.lane != INLINE:
            batch.device.free_lanes.append(batch.lane)

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

    def _fill_lanes(self, device: Device, batches: list[Batch]) -> None:
        inline_free = device.inline_limit_us > 0
        for key, queue in list(device.waiting.items()):
            taken = False
            while queue.requests:
                if inline_free and self._is_cheap(device, queue):
                    lane, inline_free = INLINE, False
                elif device.free_lanes:
                    lane = device.free_lanes.pop()
                else:
                    break
                batches.append(self._take(device, lane, queue))
                taken = True
            if taken:
                del device.waiting[key]
                if queue.requests:
                    device.waiting[key] = queue  # behind the others: models and groups take turns
            if not inline_free and not device.free_lanes:
                return

    def _is_cheap(self, device: Device, queue: _Queue) -> bool:
        first = queue.requests[0]
        rows = max(first.rows, min(first.max_batch_size, queue.rows))
        predicted = self._costs.predict(device.name, first.model, rows)
        return predicted is not None and predicted <= device.inline_limit_us

    def _take(self, device: Device, lane: int, queue: _Queue) -> Batch:
        waiting = queue.requests
        first = waiting.popleft()
        requests, rows, nbytes, limit = [first], first.rows, first.nbytes, first.max_batch_size
        while waiting and rows + waiting[0].rows <= limit:
            request = waiting.popleft()
            requests.append(request)
            rows += request.rows
            nbytes += request.nbytes
        queue.rows -= rows
        self.queued -= len(requests)
        self.queued_bytes -= nbytes
        self.running += len(requests)
        device.queued_rows -= rows
        device.running_rows += rows
        return Batch(device, lane, first.model, requests, rows)

    def _drop_waiting(self, device: Device) -> list[Request]:
        dropped = [request for queue in device.waiting.values() for request in queue.requests]
        device.waiting.clear()
        device.queued_rows = 0
        self.queued -= len(dropped)
        self.queued_bytes -= sum(request.nbytes for request in dropped)
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
