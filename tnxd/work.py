"""Things that the scheduler decides about: requests, the devices that they go to, the batches that they become."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from tnxctl.wire import DEFAULT_PRIORITY
from tnxd.costs import BatchCosts
from tnxd.forecast import Forecast
from tnxd.turns import Turns
from tnxd.waiting import LEVELS, Waiting

NEVER = 2**63 - 1
"""No deadline, in nanoseconds."""

# A level gets this share of the device's time while all have work: the last one keeps moving, too.
_SHARES = (8.0, 4.0, 2.0, 1.0)

# What a batch is charged with that nothing is known about, in microseconds: a level whose batches always fail must not
# have the device for nothing.
_UNKNOWN_US = 1000.0

# Batches that have to work at a ceiling before twice as many rows are tried. A try that fails costs about three of
# them: the forward that ran out of memory, and both halves.
_PROBE_AFTER = 256


class Request(msgspec.Struct, eq=False, gc=False):
    """A request as policy needs to know it; the server derives from it to add what it needs itself.

    Attributes:
        model: key of the model. max_batch_size: its row limit, 0 if it cannot be batched. max_delay_ns: how long a
            smaller batch may wait for company.
        group: requests share a batch only if model and group are equal.
        rows, nbytes: size of the inputs.
        client, peer: whose it is, and the connection it came by; clients share a device fairly, and so do the
            connections of one.
        wanted: "" to go by prefer_gpu and min_gpu_memory_mb, "auto" for the device that is done first, or a device
            that it must run on.
        excluded: devices that had no memory left for it: it goes to others, unless it names one.
        alone: whether it shares no batch, though others of its model and group wait (`tnxd.quarantine`).
        priority: 0 to LEVELS - 1, 0 first.
        deadline_ns: when it is worthless; NEVER. came_ns: when it came, from which its deadline was counted.
        device, reason, predicted_us: filled by `Scheduler.add`: where it will run, why there, and the microseconds
            until it will be done. So are wait_us, of these the wait; cost_us, its share of a full batch; due_ns, its
            place in the order; added_ns, when that was; serial, which grows with every request.
        waiting: whether it is in a queue. done: whether it has been answered; set by the caller.
    """

    model: str
    max_batch_size: int
    rows: int = 1
    nbytes: int = 0
    group: tuple[int, ...] = ()
    client: str = ""
    peer: bytes = b""
    wanted: str = ""
    prefer_gpu: bool = True
    min_gpu_memory_mb: float = 0.0
    priority: int = DEFAULT_PRIORITY
    deadline_ns: int = NEVER
    max_delay_ns: int = 0
    came_ns: int = 0
    excluded: frozenset[str] = frozenset()
    alone: bool = False
    device: str = ""
    reason: str = ""
    predicted_us: float = 0.0
    wait_us: float = 0.0
    cost_us: float = 0.0
    due_ns: int = 0
    added_ns: int = 0
    serial: int = 0
    waiting: bool = False
    done: bool = False


INLINE = -1
"""The lane that is the caller's own thread."""

SPARE = -2
"""The lane for what nobody waits for: a thread of the device that the operating system lets run last."""


@dataclass(slots=True)
class Batch:
    """Requests to run together on one lane.

    Attributes:
        lane: INLINE, SPARE, or an index below the device's lane count.
        model: key of the model.
        requests: none in a spare batch, whose results nobody waits for; it counts as one request that runs.
        costs: what is to learn how long it took.
        max_rows: most rows in one forward, since more ran out of memory; 0: as many as the model allows.
        started_ns: when it was formed. run_us: how long it is expected to run; 0: nobody knows.
        given_up: whether it hangs.
    """

    device: Device
    lane: int
    model: str
    requests: list[Request]
    rows: int
    costs: BatchCosts = field(default_factory=BatchCosts)
    max_rows: int = 0
    started_ns: int = 0
    run_us: float = 0.0
    given_up: bool = False


@dataclass(slots=True, eq=False)
class Load:
    """The work that one model has, on all devices together.

    Attributes:
        queued, queued_bytes: requests that wait, and their inputs. running: in batches that run. hung: of these, in
            batches that were given up.
        max_lanes: lanes of a device that may run it at a time; 0: all.
    """

    queued: int = 0
    queued_bytes: int = 0
    running: int = 0
    hung: int = 0
    max_lanes: int = 0


@dataclass(slots=True, eq=False)
class Placement:
    """One model on one device.

    Attributes:
        load: of the model everywhere. forecast: what its predictions here are corrected by.
        lanes: those that run it now, INLINE and SPARE too, but for those that hang.
        queued: requests that wait for it here. backlog_us: their predicted cost, per priority.
        max_rows: most rows in one forward, since more ran out of memory; 0: as many as the model allows.
        worked: batches that worked at that ceiling.
        most_rows: where that ceiling ends to rise; 0: at what the model allows. On a CPU, memory that has run out is
            the end of the process: nothing may be tried.
    """

    load: Load
    forecast: Forecast = field(init=False, default_factory=Forecast)
    lanes: list[int] = field(init=False, default_factory=list)
    queued: int = field(init=False, default=0)
    backlog_us: list[float] = field(init=False, default_factory=lambda: [0.0] * LEVELS)
    max_rows: int = field(init=False, default=0)
    worked: int = field(init=False, default=0)
    most_rows: int = field(init=False, default=0)

    @property
    def has_all_lanes(self) -> bool:
        """Whether it runs on as many lanes as it may."""
        return 0 < self.load.max_lanes <= len(self.lanes)

    def row_limit(self, limit: int) -> int:
        """Most rows of a batch, of a model that takes so many."""
        return self.max_rows if 0 < self.max_rows < limit else limit

    def bound(self, rows: int) -> None:
        """A forward of more rows than these must never be tried."""
        self.most_rows = self.max_rows = rows

    def lower(self, rows: int) -> None:
        """A forward ran out of memory, and one of so many rows worked."""
        rows = max(rows, 1)
        self.max_rows = min(self.max_rows, rows) if self.max_rows else rows
        self.worked = 0

    def count(self, batch: Batch) -> None:
        """A batch worked: in the end, the ceiling doubles, since others may have left memory meanwhile.

        Down at once to what works, up by doubling: so TCP finds its window (slow start; Jacobson, 1988).
        """
        if batch.max_rows != self.max_rows or not batch.requests:
            return
        if 2 * batch.rows <= self.max_rows:  # requests of several rows need not fill it
            return
        self.worked += 1
        if self.worked == _PROBE_AFTER:
            self.worked = 0
            self.max_rows = min(2 * self.max_rows, self.most_rows or 2 * self.max_rows)
            if self.max_rows >= batch.requests[0].max_batch_size:
                self.max_rows = 0


@dataclass(slots=True, eq=False)
class Device:
    """A device as policy sees it.

    Attributes:
        kind: "cpu" or "cuda".
        lanes: batches that it runs at a time.
        models: keys of the models that are loaded on it; they come and go.
        memory_free_mb: in MiB, as last reported; used for GPUs.
        inline_limit_us: a batch predicted to take no longer runs on the caller's own thread, since handing it to
            another would cost more than it saves. 0: never.
        lane_threads: threads that work on one batch of a lane.
        error: why it failed; empty while it works.
        free_lanes: indices of lanes that have nothing to do.
        spare_free: whether the SPARE lane has nothing to do.
        placements: of models that came here, by key.
        waiting: queues by model, group and whether their requests ride alone, empty ones too. sweep_at: how many there
            may be before the empty ones are dropped. queued, queued_rows: requests in them, and their rows.
            running_rows: those in batches that run.
        turns: which queue is next, per priority. counts: requests per priority.
        held: models that run on as many lanes as they may, and their queues that have no turn on that priority until
            one of these is free.
        passes: how much each priority has used, by its share. virtual: how much the one had that was served last.
        busy_until_ns: per running lane, when its batch should be over.
        backlog_us: predicted cost of what waits, per priority.
        backlog_ns: when the last batch was over, if requests waited then; else 0.
    """

    name: str
    kind: str
    lanes: int
    models: set[str]
    memory_free_mb: float = 0.0
    inline_limit_us: float = 0.0
    lane_threads: int = 1
    error: str = ""
    free_lanes: list[int] = field(init=False)
    spare_free: bool = field(init=False, default=True)
    busy_until_ns: dict[int, int] = field(init=False, default_factory=dict)
    placements: dict[str, Placement] = field(init=False, default_factory=dict)
    waiting: dict[tuple[str, tuple[int, ...], bool], Waiting] = field(init=False, default_factory=dict)
    sweep_at: int = field(init=False, default=0)
    held: dict[Placement, set[tuple[Waiting, int]]] = field(init=False, default_factory=dict)
    backlog_us: list[float] = field(init=False, default_factory=lambda: [0.0] * LEVELS)
    backlog_ns: int = field(init=False, default=0)
    queued: int = field(init=False, default=0)
    queued_rows: int = field(init=False, default=0)
    running_rows: int = field(init=False, default=0)
    turns: list[Turns[Waiting]] = field(init=False, default_factory=lambda: [Turns() for _ in range(LEVELS)])
    counts: list[int] = field(init=False, default_factory=lambda: [0] * LEVELS)
    passes: list[float] = field(init=False, default_factory=lambda: [0.0] * LEVELS)
    virtual: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.free_lanes = list(range(self.lanes))

    @property
    def outstanding_rows(self) -> int:
        """Rows that wait or run here: the measure of load that routing compares."""
        return self.queued_rows + self.running_rows

    def takes(self, request: Request) -> bool:
        """Whether a request that may go anywhere may go here."""
        if self.error or request.model not in self.models or self.name in request.excluded:
            return False
        return self.kind != "cuda" or self.memory_free_mb >= request.min_gpu_memory_mb

    def takes_over(self, request: Request) -> bool:
        """Whether a request that waits elsewhere may come here."""
        return request.wanted == "auto" and self.takes(request)

    def clear_in_us(self, now_ns: int) -> float:
        """Microseconds until all that runs and waits here should be done."""
        running_ns = sum([until_ns - now_ns for until_ns in self.busy_until_ns.values() if until_ns > now_ns])
        return (sum(self.backlog_us) + running_ns / 1e3) / self.lanes

    def next_level(self) -> int | None:
        """The priority whose turn it is: levels share by weight (stride scheduling, Waldspurger and Weihl, 1995)."""
        best = None
        for level in range(LEVELS):
            if self.turns[level].members and (best is None or self.passes[level] < self.passes[best]):
                best = level
        return best

    def charge(self, level: int, micros: float) -> None:
        """A level has used so much of the device; 0 if that is not known."""
        used = self.passes[level]
        if used > self.virtual:
            self.virtual = used
        self.passes[level] = used + (micros or _UNKNOWN_US) / _SHARES[level]

    def wake(self, level: int) -> None:
        """A level that had nothing to run has: it starts even with those at work, whatever it has not used.

        Even is with the one that was served last (start-time fair queueing; Goyal, Vin and Cheng, 1996).
        """
        if self.passes[level] < self.virtual:
            self.passes[level] = self.virtual

    def enqueue(self, level: int, rows: int, micros: float) -> None:
        """Count a request that comes to a level."""
        if not self.counts[level]:
            self.wake(level)
        self.counts[level] += 1
        self.queued += 1
        self.queued_rows += rows
        self.backlog_us[level] += micros

    def dequeued(self, count: int, rows: int) -> None:
        """Count off requests that have left; their levels have been told."""
        self.queued -= count
        self.queued_rows -= rows
        if not self.queued:
            self.backlog_us = [0.0] * LEVELS  # rounding errors do not add up
