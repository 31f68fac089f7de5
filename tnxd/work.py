"""What the scheduler decides about: requests, the devices that they go to, the batches that they become."""

from __future__ import annotations

from dataclasses import dataclass, field

from tnxctl.wire import DEFAULT_PRIORITY
from tnxd.costs import CostCurve
from tnxd.turns import Turns
from tnxd.waiting import LEVELS, Waiting

NEVER = 2**63 - 1
"""No deadline, in nanoseconds."""

# A level gets this share of the batches while all have work: the last one keeps moving, too.
_SHARES = (8.0, 4.0, 2.0, 1.0)


class Request:
    """What policy needs to know of a request; the server derives from it to add what it needs itself.

    Attributes:
        model: key of the model. max_batch_size: its row limit, 0 if it cannot be batched. max_delay_ns: how long a
            smaller batch may wait for company.
        group: requests share a batch only if model and group are equal.
        rows, nbytes: size of the inputs.
        client: whose it is; clients share a device fairly.
        wanted: "" to go by prefer_gpu and min_gpu_memory_mb, "auto" for the device that is done first, or a device
            that it must run on.
        priority: 0 to LEVELS - 1, 0 first.
        deadline_ns: when it is worthless; NEVER.
        device, reason, predicted_us: filled by `Scheduler.add`: where it will run, why there, and the microseconds
            until it will be done.
        waiting: whether it is in a queue. done: whether it has been answered; set by the caller.
    """

    __slots__ = (
        "client",
        "cost_us",
        "deadline_ns",
        "device",
        "done",
        "due_ns",
        "group",
        "max_batch_size",
        "max_delay_ns",
        "min_gpu_memory_mb",
        "model",
        "nbytes",
        "predicted_us",
        "prefer_gpu",
        "priority",
        "reason",
        "rows",
        "serial",
        "waiting",
        "wanted",
    )

    def __init__(
        self,
        model: str,
        *,
        max_batch_size: int,
        max_delay_ns: int = 0,
        group: tuple[int, ...] = (),
        rows: int = 1,
        nbytes: int = 0,
        client: bytes = b"",
        wanted: str = "",
        prefer_gpu: bool = True,
        min_gpu_memory_mb: float = 0.0,
        priority: int = DEFAULT_PRIORITY,
        deadline_ns: int = NEVER,
    ) -> None:
        self.model = model
        self.max_batch_size = max_batch_size
        self.max_delay_ns = max_delay_ns
        self.group = group
        self.rows = rows
        self.nbytes = nbytes
        self.client = client
        self.wanted = wanted
        self.prefer_gpu = prefer_gpu
        self.min_gpu_memory_mb = min_gpu_memory_mb
        self.priority = priority
        self.deadline_ns = deadline_ns
        self.device = ""
        self.reason = ""
        self.predicted_us = 0.0
        self.cost_us = 0.0
        self.due_ns = 0
        self.serial = 0
        self.waiting = False
        self.done = False


INLINE = -1
"""The lane that is the caller's own thread."""


@dataclass(slots=True)
class Batch:
    """Requests to run together on one lane.

    Attributes:
        lane: INLINE or an index below the device's lane count.
        curve: what is to learn how long it took.
    """

    device: Device
    lane: int
    model: str
    requests: list[Request]
    rows: int
    curve: CostCurve = field(default_factory=CostCurve)


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
        lane_threads: threads that work on one batch of a lane.
        waiting: queues by model and group, empty ones too. queued, queued_rows: requests in them, and their rows.
        turns: which queue is next, per priority. counts: requests per priority.
        passes: how much each priority has used, by its share.
        busy_until_ns: per running lane, when its batch should be over.
        backlog_us: predicted cost of what waits, per priority.
    """

    name: str
    kind: str
    lanes: int
    models: frozenset[str]
    memory_free_mb: float = 0.0
    inline_limit_us: float = 0.0
    lane_threads: int = 1
    error: str = ""
    free_lanes: list[int] = field(init=False)
    busy_until_ns: dict[int, int] = field(init=False, default_factory=dict)
    waiting: dict[tuple[str, tuple[int, ...]], Waiting] = field(init=False, default_factory=dict)
    backlog_us: list[float] = field(init=False, default_factory=lambda: [0.0] * LEVELS)
    queued: int = field(init=False, default=0)
    queued_rows: int = field(init=False, default=0)
    running_rows: int = field(init=False, default=0)
    turns: list[Turns[Waiting]] = field(init=False, default_factory=lambda: [Turns() for _ in range(LEVELS)])
    counts: list[int] = field(init=False, default_factory=lambda: [0] * LEVELS)
    passes: list[float] = field(init=False, default_factory=lambda: [0.0] * LEVELS)

    def __post_init__(self) -> None:
        self.free_lanes = list(range(self.lanes))

    @property
    def outstanding_rows(self) -> int:
        """Rows that wait or run here: the measure of load that routing compares."""
        return self.queued_rows + self.running_rows

    def next_level(self) -> int | None:
        """The priority whose turn it is: levels share by weight (stride scheduling, Waldspurger and Weihl, 1995)."""
        best = None
        for level in range(LEVELS):
            if self.turns[level].members and (best is None or self.passes[level] < self.passes[best]):
                best = level
        return best

    def charge(self, level: int, micros: float) -> None:
        """A level has used so much of the device."""
        self.passes[level] += micros / _SHARES[level]

    def enqueue(self, level: int, rows: int, micros: float) -> None:
        """Count a request that comes to a level."""
        if not self.counts[level] and self.queued:
            # The level was idle: it starts even with those at work, whatever it has not used.
            active = [self.passes[other] for other in range(LEVELS) if self.counts[other]]
            self.passes[level] = max(self.passes[level], min(active))
        self.counts[level] += 1
        self.queued += 1
        self.queued_rows += rows
        self.backlog_us[level] += micros

    def dequeue(self, level: int, rows: int, micros: float) -> None:
        """Count a request that leaves its level."""
        self.counts[level] -= 1
        self.queued -= 1
        self.queued_rows -= rows
        self.backlog_us[level] -= micros
        if not self.queued:
            self.backlog_us[level] = 0.0  # rounding errors do not add up
